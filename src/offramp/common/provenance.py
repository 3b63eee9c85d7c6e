"""Where a result comes from: what ran, on what, with which versions, when."""

import contextlib
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any


def provenance(
    seed: int | None, command: str | Sequence[str], data_digest: str | None
) -> dict[str, Any]:
    """Return where a result comes from: command, data, versions, machine and time (UTC).

    Args:
        seed: the run's seed; None: nothing was drawn.
        command: the command line, as one string or as its arguments.
        data_digest: `digest_rows` or `examples_digest` of the data read; None: no data was read.
    """
    # Looked up, not imported: a command that never needed torch should not wait for it here.
    torch = sys.modules.get("torch")
    has_gpu = torch is not None and torch.cuda.is_available()
    return {
        "command": command if isinstance(command, str) else _shown(command),
        "seed": seed,
        "data_digest": data_digest,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "offramp": version_of("offramp"),
            "commit": _commit(),
            "torch": version_of("torch"),
            "transformers": version_of("transformers"),
            "python": platform.python_version(),
        },
        "platform": platform.platform(),
        "processor": processor(),
        "accelerator": torch.cuda.get_device_name() if torch is not None and has_gpu else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads() if torch is not None else os.cpu_count(),
    }


def _shown(command: Sequence[str]) -> str:
    """A command line to type again: the program, and files that are named from the root, by their
    names, not by where they lie here: adapters that hold it are given to others."""
    if not command:
        return ""
    parts = [word.rpartition("=") for word in command[1:]]
    named = ["".join((*lead, os.path.basename(p) if os.path.isabs(p) else p)) for *lead, p in parts]
    is_ours = command[0].endswith(os.path.join("offramp", "cli", "__main__.py"))
    return shlex.join(["offramp" if is_ours else os.path.basename(command[0]), *named])


def version_of(package: str) -> str | None:
    """Return the version of an installed package; None: there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@cache
def _commit() -> str | None:
    """The git commit this code was run from, "+changed" where files differ from it; None where the
    package was installed from a wheel, whose version then says all."""
    here = Path(__file__).parent

    def git(*command: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *command],
            check=True,
            capture_output=True,
            text=True,
            timeout=5,
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
        return git("rev-parse", "HEAD") + ("+changed" if changed else "")
    except (OSError, subprocess.SubprocessError):  # no git here, or no checkout
        return None


def processor() -> str:
    """Return the processor's marketing name, if the system reports it, with its family and model,
    which tell generations apart (AMD's 25 is Zen 3 and 4, 26 Zen 5); else its architecture."""
    with contextlib.suppress(OSError):
        first, _, _ = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")
        said = dict(line.split(":", 1) for line in first.splitlines() if ":" in line)
        said = {key.strip(): value.strip() for key, value in said.items()}
        if name := said.get("model name"):
            family = said.get("cpu family")
            return f"{name} (family {family}, model {said.get('model')})" if family else name
    return platform.processor() or platform.machine()
