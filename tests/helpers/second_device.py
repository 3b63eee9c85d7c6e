"""A device with memory of its own, which PyTorch is taught by `second_device.cpp`.

A tensor on the wrong side fails as on a GPU, and what a GPU's time goes to is counted. The memory
is the host's, so nothing is said about speed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import sys
import sysconfig
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils import cpp_extension
from torch.utils.backend_registration import rename_privateuse1_backend

from offramp.common.folders import cache_folder

NAME = "mock"
SOURCE = Path(__file__).with_suffix(".cpp")


def missing() -> str | None:
    """The tool that this machine lacks to compile the device, or None."""
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        return "there is no C++ compiler"
    if not cpp_extension.is_ninja_available():
        return "there is no ninja, by which PyTorch compiles extensions"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "there are no headers of Python"
    return None


@cache
def _library() -> Any:
    """The compiled device: compiled once on a machine for a version of PyTorch and of Python."""
    source = SOURCE.read_bytes() + f"{torch.__version__} {sys.version}".encode()
    folder = cache_folder("second_device") / hashlib.sha256(source).hexdigest()[:16]
    library = folder / "second_device.so"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "one-process", "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # another may compile it now
        done = folder / "done"  # linked to its end, whoever was killed meanwhile
        if not done.exists():
            (folder / "lock").unlink(missing_ok=True)  # PyTorch's own, of a run that was killed
            cpp_extension.load(
                "second_device",
                [str(SOURCE)],
                extra_cflags=["-O0", "-g0"],
                build_directory=str(folder),
                is_python_module=False,
            )
            done.touch()
    spec = spec_from_file_location("second_device", library)
    assert spec is not None and spec.loader is not None
    made = module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@cache
def device() -> torch.device:
    """Register the device with PyTorch, and return it."""
    _library()
    rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module())  # type: ignore[no-untyped-call]
    return torch.device(NAME, 0)


def _module() -> ModuleType:
    """What `torch.cuda` is for CUDA. Without a generator, its random numbers are the CPU's."""
    made: Any = ModuleType(f"torch.{NAME}")
    made.is_available = lambda: True
    made.is_initialized = lambda: True
    made.device_count = lambda: 1
    made.current_device = lambda: 0
    made.synchronize = lambda device=None: None
    made.manual_seed = made.manual_seed_all = lambda seed: None
    made.get_rng_state = lambda device=None: torch.empty(0)
    made.set_rng_state = lambda state, device=None: None
    made._is_in_bad_fork = lambda: False
    made.get_amp_supported_dtype = lambda: [torch.float32, torch.bfloat16]
    return made  # type: ignore[no-any-return]


@dataclass
class Counts:
    """What the device did. launches: operators. waits: times that the host stood until a result was
    there. uploads: copies from the host, for which CUDA waits too, if less. places: of waits and
    uploads, by operator and lines of code; where these were asked for."""

    launches: int = 0
    waits: int = 0
    uploads: int = 0
    places: Counter[str] = field(default_factory=Counter)


@contextmanager
def counted(*, places: bool = False) -> Iterator[Counts]:
    """Count what the device does in this context, whichever thread asks for it."""
    library, made = _library(), Counts()

    def hear(name: str) -> None:
        frames = [f for f in traceback.extract_stack() if "/offramp/" in f.filename]
        calls = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[:-4:-1])
        made.places[f"{name} {calls}"] += 1

    before = library.counts()
    library.hear(hear if places else None)
    try:
        yield made
    finally:
        library.hear(None)
        now = zip(library.counts(), before, strict=True)
        made.launches, made.waits, made.uploads = (after - first for after, first in now)
