"""Compiles the C files beside this one, once on a machine, where the wheel did not bring them.

What is kept is code that runs in this process. So it lies in a folder of the user's own, and is
loaded only where nobody else could have put it there and it is what was compiled, byte by byte: a
library that was cut short would end the process at its first use.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from offramp.common.folders import cache_folder
from offramp.core.errors import StorageError
from offramp.core.storage import write_atomic
from offramp_llama_cpp.native.recipe import AVX2, BUILT, COMMAND, built, digest_of

log = logging.getLogger(__name__)


@functools.cache
def compiled(
    name: str, flags: tuple[str, ...] = (), headers: Path | None = None
) -> ctypes.CDLL | None:
    """The library made of `name`.c; None, with a line in the log, where it cannot be made here.

    headers: folder of header files. The wheel's library is taken where these are the headers that
    it was compiled with. Else one is compiled and kept in the user's cache folder. CC names the
    compiler, with arguments if it has any.
    """
    source = Path(__file__).with_name(f"{name}.c")
    if (found := _brought(source, flags, headers)) is not None:
        return found
    compiler = _compiler()
    if not compiler:
        log.info("No C compiler was found: %s.c is not used.", name)
        return None
    include = () if headers is None else (f"-I{headers}",)
    tuned = ("-mtune=native",) if set(AVX2) <= set(flags) else ()
    command = (*compiler, *COMMAND, *tuned, *flags, *include)
    try:
        kept = cache_folder("native") / f"{name}-{_digest(compiler, command, source, headers)}.so"
        found = _kept(kept)
        return _compile(command, source, kept) if found is None else found
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # or there is no home
        log.info("%s.c could not be compiled (%s): it is not used.", name, error)
        return None


def reason_not_compiled(name: str) -> str:
    """Return why a file is not compiled yet, in words; empty where a library of it is there."""
    try:
        folders = Path(__file__).with_name(BUILT), cache_folder("native")
        if any(any(folder.glob(f"{name}-*.so")) for folder in folders):
            return ""
    except RuntimeError:  # there is no home
        pass
    return "compiled at first use" if _compiler() else "no C compiler was found"


def _brought(source: Path, flags: tuple[str, ...], headers: Path | None) -> ctypes.CDLL | None:
    """The library that a wheel brought, where it is of these headers and can be loaded here."""
    if not source.with_name(BUILT).is_dir():
        return None
    try:
        file = built(source, flags, headers)
        return ctypes.CDLL(str(file)) if file.is_file() else None
    except OSError as error:  # as of an older system than the wheel's
        log.info("A library of the wheel is not loaded (%s): it is compiled.", error)
        return None


def _compiler() -> tuple[str, ...]:
    """CC as a shell reads it ("ccache gcc"); nothing where there is none."""
    try:
        program, *more = shlex.split(os.environ.get("CC") or "cc") or ["cc"]
    except ValueError:  # a quote that does not end
        return ()
    found = shutil.which(program)
    return () if found is None else (found, *more)


def _digest(
    compiler: tuple[str, ...], command: tuple[str, ...], source: Path, headers: Path | None
) -> str:
    """The digest of all that the library is made of."""
    asked = [*compiler, "--version"]
    version = subprocess.run(asked, check=True, capture_output=True, timeout=60).stdout
    return digest_of(source, headers, (command, version))


def _compile(command: tuple[str, ...], source: Path, kept: Path) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        made = Path(folder) / kept.name
        subprocess.run(
            [*command, "-o", str(made), str(source)], check=True, capture_output=True, timeout=300
        )
        content = made.read_bytes()
        try:
            _own_folder(kept.parent)
            write_atomic(kept, content, follow=False)
            digest = hashlib.sha256(content).hexdigest()
            write_atomic(_beside(kept), digest, follow=False)
            for file in (kept, _beside(kept)):
                file.chmod(0o600)  # whatever the umask allows others
            library = _kept(kept)
        except OSError as error:
            said = error.problem if isinstance(error, StorageError) else str(error)
            log.info("%s is not kept (%s): it will be compiled again.", kept.name, said)
            library = None
        return ctypes.CDLL(str(made)) if library is None else library


# -- what is kept ----------------------------------------------------------------------------------


def _beside(kept: Path) -> Path:
    """The file with a library's SHA-256."""
    return kept.with_name(f"{kept.name}.sha256")


def _own_folder(folder: Path) -> None:
    """Make the folder, for its owner alone. Raise `OSError` where it is another's, or a link."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_own(folder, os.lstat(folder), stat.S_ISDIR, tight=False)
    folder.chmod(0o700)


def _kept(path: Path) -> ctypes.CDLL | None:
    """The library that is kept, where it is whole and nobody else could have written it."""
    try:
        if not os.path.lexists(path):
            return None
        _check_own(path.parent, os.lstat(path.parent), stat.S_ISDIR)
        content, digest = (_read_own(file) for file in (path, _beside(path)))
        if hashlib.sha256(content).hexdigest() != digest.decode("ascii", "replace").strip():
            raise OSError(f"{path.name} is not what was compiled")
        return ctypes.CDLL(str(path))
    except OSError as error:
        log.info("A kept library is not loaded (%s): it is compiled again.", error)
        return None


def _read_own(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | _NO_WAIT)
    with open(descriptor, "rb") as file:
        _check_own(path, os.fstat(descriptor), stat.S_ISREG)
        return file.read()


_NO_WAIT = getattr(os, "O_NONBLOCK", 0)  # for a pipe, until it is known not to be one


def _check_own(
    path: Path, status: os.stat_result, kind: Callable[[int], bool], *, tight: bool = True
) -> None:
    """Raise `OSError` unless it is of this kind, this user's, and, if `tight`, no other's to write.

    Windows has no owners in this sense; its cache folder is the user's own.
    """
    if not kind(status.st_mode):
        raise OSError(f"{path.name} is no plain {'file' if kind is stat.S_ISREG else 'folder'}")
    if not hasattr(os, "geteuid"):
        return
    if status.st_uid != os.geteuid():
        raise OSError(f"{path.name} is another user's")
    if tight and stat.S_IMODE(status.st_mode) & 0o022:
        raise OSError(f"{path.name} can be written by others")
