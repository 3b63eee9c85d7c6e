"""Whether llama.cpp lives through an export, tried out in a process of its own.

A file that a graph does not fit, or a damaged projector, ends the whole process by an assertion,
and no error can be caught. So files that were not loaded on this machine before are loaded and fed
in a child first (`trial_process`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import offramp
from offramp.common.folders import cache_folder
from offramp.core.errors import OfframpError, UnsupportedBackboneError
from offramp.core.storage import digest_file, write_atomic
from offramp_llama_cpp.gguf_files import SegmentFiles
from offramp_llama_cpp.packages import import_llama_cpp
from offramp_llama_cpp.segment import EngineOptions

log = logging.getLogger(__name__)

_SECONDS = 600


def check_survives(files: SegmentFiles, options: EngineOptions) -> None:
    """Load and feed the files in a child process, unless they were here before.

    Raises:
        InputError: llama-cpp-python is not installed.
        UnsupportedBackboneError: that ends the process.
    """
    loaded = files.taps
    if files.drafter is not None:
        loaded.append((files.drafter, 0))
    asked = {"segments": [[str(file), tap] for file, tap in loaded]}
    remedy = "Export again with the installed version of llama-cpp-python, or use --engine torch."
    _check(asked, files.digests, options, files.files[0].parent, remedy)


def check_projector_survives(
    file: Path, options: EngineOptions, *, width: int, features: int, words: Path | None = None
) -> None:
    """Load a projector in a child process and show it a picture, unless it was here before.

    width, features: as of `Projector`. words: the file whose words stand around images; None: none.

    Raises:
        UnsupportedBackboneError: that ends the process.
        StorageError: the file cannot be read.
    """
    asked = {
        "projector": str(file),
        "words": None if words is None else str(words),
        "width": width,
        "features": features,
    }
    digests = (digest_file(file), str(width), str(features))
    remedy = "Use the mmproj file that was made with the model's, downloaded again."
    _check(asked, digests, options, file, remedy)


def _check(
    asked: Mapping[str, Any],
    digests: Sequence[str],
    options: EngineOptions,
    what: Path,
    remedy: str,
) -> None:
    """Try something out in a child process, unless files of these digests were here before."""
    known = _known(digests, options)
    if not sys.executable or (known is not None and known.is_file()):
        return
    line = json.dumps([asked, asdict(options)])
    # What this process imports from, the child does: source trees, and PYTHONPATH.
    homes = [str(Path(f).parents[1]) for f in (__file__, offramp.__file__)]
    path = os.pathsep.join([*homes, *filter(None, [os.environ.get("PYTHONPATH")])])
    # No backtrace: llama.cpp would start a debugger for it.
    environment = {**os.environ, "PYTHONPATH": path, "GGML_NO_BACKTRACE": "1"}
    try:
        done = subprocess.run(
            # -P: of the working folder nothing is imported.
            [sys.executable, "-P", "-m", f"{__name__}_process", line],
            check=False,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            env=environment,
        )
    except (OSError, subprocess.SubprocessError) as error:
        log.info("The files could not be tried out in a process of their own: %s", error)
        return
    if done.returncode > 0:
        last = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        log.info("The files could not be tried out in a process of their own: %s", last)
    if done.returncode < 0:
        said = re.findall(r"GGML_ASSERT\(.*|.*GGML_ABORT.*|fatal error.*", done.stderr)
        raise UnsupportedBackboneError(
            f"llama.cpp ends its process (signal {-done.returncode}) when it runs {what}"
            f"{': ' + said[0].strip()[:200] if said else ''}.",
            remedy,
        )
    if done.returncode == 0 and known is not None:
        try:
            write_atomic(known, b"", follow=False)
        except OfframpError as error:
            log.info("%s The files will be tried out again.", error)


def _known(digests: Sequence[str], options: EngineOptions) -> Path | None:
    """The mark that these files were tried out by this version of llama.cpp."""
    version = import_llama_cpp().__version__
    what = json.dumps([version, list(digests), asdict(replace(options, context=1, threads=1))])
    try:
        folder = cache_folder("trials")
    except RuntimeError:  # there is no home
        return None
    return folder / hashlib.sha256(what.encode()).hexdigest()[:32]
