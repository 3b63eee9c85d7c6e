"""Compiles the C files beside this one, once on a machine."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from offramp.errors import StorageError
from offramp.storage import write_atomic

log = logging.getLogger(__name__)


@functools.cache
def compiled(
    name: str, flags: tuple[str, ...] = (), headers: Path | None = None
) -> ctypes.CDLL | None:
    """The library made of `name`.c; None, with a line in the log, where it cannot be made here.

    headers: folder of header files. The library is kept in the user's cache folder.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        log.info("No C compiler was found: %s.c is not used.", name)
        return None
    include = () if headers is None else (f"-I{headers}",)
    command = (compiler, "-std=gnu11", "-O3", "-shared", "-fPIC", *flags, *include)
    source = Path(__file__).with_name(f"{name}.c")
    try:
        kept = cache_folder() / f"{name}-{_digest(command, source, headers)}.so"
        return ctypes.CDLL(str(kept)) if kept.is_file() else _compile(command, source, kept)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # or there is no home
        log.info("%s.c could not be compiled (%s): it is not used.", name, error)
        return None


def cache_folder() -> Path:
    """Where libraries are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "offramp" / "native"


def _digest(command: tuple[str, ...], source: Path, headers: Path | None) -> str:
    """Of all that the library is made of."""
    asked = [command[0], "--version"]
    version = subprocess.run(asked, check=True, capture_output=True, timeout=60).stdout
    digest = hashlib.sha256(repr(command).encode() + version)
    others = () if headers is None else headers.glob("ggml*.h")
    for file in (source, *sorted(source.parent.glob("*.h")), *sorted(others)):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _compile(command: tuple[str, ...], source: Path, kept: Path) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        made = Path(folder) / kept.name
        subprocess.run(
            [*command, "-o", str(made), str(source)], check=True, capture_output=True, timeout=300
        )
        try:
            write_atomic(kept, made.read_bytes())
        except StorageError as error:
            log.info("%s It will be compiled again.", error)
            return ctypes.CDLL(str(made))
    return ctypes.CDLL(str(kept))
