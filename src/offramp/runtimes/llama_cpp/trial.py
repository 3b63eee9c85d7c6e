"""Whether llama.cpp lives through an export, tried out in a process of its own.

A file that a graph does not fit ends the whole process by an assertion, and no error can be caught.
So files that were not loaded on this machine before are loaded and fed in a child first.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path

import numpy as np

from offramp.errors import OfframpError, UnsupportedBackboneError
from offramp.runtimes.llama_cpp.gguf_files import SegmentFiles
from offramp.runtimes.llama_cpp.segment import EngineOptions, Segment
from offramp.storage import cache_folder, write_atomic

log = logging.getLogger(__name__)

_CONTEXT, _ROWS = 64, 6
_SECONDS = 600


def check_survives(files: SegmentFiles, options: EngineOptions) -> None:
    """Load and feed the files in a child process, unless they were here before.

    Raises:
        UnsupportedBackboneError: that ends the process.
    """
    known, loaded = _known(files.digests, options), files.taps
    if files.drafter is not None:
        loaded.append((files.drafter, 0))
    if not sys.executable or (known is not None and known.is_file()):
        return
    asked = json.dumps([[[str(file), tap] for file, tap in loaded], asdict(options)])
    source = str(Path(__file__).parents[3])
    path = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        done = subprocess.run(
            # -P: of the working folder nothing is imported.
            [sys.executable, "-P", "-m", __name__, asked], check=False, capture_output=True,
            text=True, errors="replace", timeout=_SECONDS, env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        log.info("The files could not be tried out in a process of their own: %s", error)
        return
    if done.returncode > 0:
        last = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        log.info("The files could not be tried out in a process of their own: %s", last)
    if done.returncode < 0:
        said = re.findall(r"GGML_ASSERT\(.*|.*GGML_ABORT.*|fatal error.*", done.stderr)
        raise UnsupportedBackboneError(
            f"llama.cpp ends its process (signal {-done.returncode}) when it runs "
            f"{files.files[0].parent}{': ' + said[0].strip()[:200] if said else ''}.",
            "Export again with the installed version of llama-cpp-python, or use --engine torch.",
        )
    if done.returncode == 0 and known is not None:
        try:
            write_atomic(known, b"")
        except OfframpError as error:
            log.info("%s The files will be tried out again.", error)


def _known(digests: Sequence[str], options: EngineOptions) -> Path | None:
    """The mark that these files were tried out by this version of llama.cpp."""
    version = metadata.version("llama-cpp-python")
    what = json.dumps([version, list(digests), asdict(replace(options, context=1, threads=1))])
    try:
        folder = cache_folder("trials")
    except RuntimeError:  # there is no home
        return None
    return folder / hashlib.sha256(what.encode()).hexdigest()[:32]


def _try(loaded: Sequence[tuple[str, int | None]], options: EngineOptions) -> None:
    options = replace(options, context=_CONTEXT, threads=1)
    for file, tap in loaded:
        segment = Segment(Path(file), options, tap_layer=tap)
        rows = np.ones((_ROWS, segment.width), dtype=np.float32)
        if segment.looks_ahead:
            segment.feed(rows, 0, ahead=True)
        segment.feed(rows, _ROWS)
        segment.logits(_ROWS)
        segment.crop(_ROWS // 2)
        for row in rows[: _ROWS // 2]:
            segment.feed(row[None], 1)
        segment.close()


if __name__ == "__main__":
    _loaded, _options = json.loads(sys.argv[1])
    _try(_loaded, EngineOptions(**_options))
