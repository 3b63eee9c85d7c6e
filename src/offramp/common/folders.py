"""Folders of runs, which one process holds, and of what is kept for a user."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from offramp.core.errors import StorageError
from offramp.core.storage.places import ROOM, reason, replaceable, temporary_name


def user_folder(variable: str, usual: str) -> Path:
    """Return the folder that an environment variable names or, without an absolute path in it,
    `usual` in the home folder. Nothing is loaded from the working folder, whose files may be
    anybody's.

    Raises:
        RuntimeError: there is no home folder.
    """
    named = Path(os.environ.get(variable, ""))
    found = named if named.is_absolute() else Path.home() / usual
    if not found.is_absolute():
        raise RuntimeError("HOME is no absolute path")
    return found


def cache_folder(name: str) -> Path:
    """Return the folder of a cache: `offramp/NAME` in XDG_CACHE_HOME, or in ~/.cache. Raise
    `RuntimeError` where there is no home folder."""
    return user_folder("XDG_CACHE_HOME", ".cache") / "offramp" / name


def check_writable(path: str | Path, *, folder: bool = False) -> None:
    """Raise `StorageError` where `path` cannot be written, without leaving a trace.

    folder: whether a folder of files will be written.
    """
    try:
        target = replaceable(path, folder=folder)
        place = target if folder else target.parent
        while not os.path.lexists(place):
            with contextlib.suppress(FileNotFoundError):
                os.stat(place)  # a path through a file fails here
            place = place.parent
        longest = os.pathconf(place, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
        if any(len(os.fsencode(part)) > longest for part in target.relative_to(place).parts):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        probe = place / temporary_name()
        probe.touch(exist_ok=False)
        probe.unlink()
    except (OSError, ValueError) as error:
        raise StorageError(f"Cannot write {path}: {reason(error)}.", ROOM) from error


@contextlib.contextmanager
def locked_folder(folder: str | Path, name: str = ".lock") -> Iterator[None]:
    """Lock a folder for one process; the system releases the lock when the process ends, even by a
    crash.

    Raises:
        StorageError: another process holds it, or the folder cannot be written.
    """
    path = Path(folder) / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+b")  # noqa: SIM115
    except OSError as error:
        raise StorageError(f"Cannot write {path}: {reason(error)}.", ROOM) from error
    with file:
        if not _lock(file.fileno()):
            raise StorageError(
                f"Another run is writing to {folder}.",
                "Wait until it has ended, or give another folder.",
            )
        yield  # the file stays: one that is removed could be locked twice


def _lock(descriptor: int) -> bool:
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Some network file systems have no locks: two runs there are the user's to keep apart.
        return error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN)
    return True
