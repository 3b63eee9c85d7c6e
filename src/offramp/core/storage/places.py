"""Where files are about to be written: checked, locked, and cleared of what dead processes left."""

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
import stat
from pathlib import Path

ROOM = "Check that the folder exists, may be written and has free space, then run it again."


def replaceable(path: str | Path, *, folder: bool = False, follow: bool = True) -> Path:
    """Return the path to write to: the link's target, if a file may stand there. folder: whether a
    folder is to be written. follow: False: the link itself is replaced.

    Raises:
        OSError: a folder stands in a file's place or the other way round; or a device, a pipe or a
            socket, which other programs need.
        ValueError: no file can have the name.
    """
    target = Path(os.path.realpath(path))
    if not follow:
        target = Path(os.path.realpath(Path(path).parent)) / Path(path).name
    with contextlib.suppress(FileNotFoundError):
        mode = os.stat(target, follow_symlinks=follow).st_mode
        if stat.S_ISLNK(mode):
            return target
        if stat.S_ISDIR(mode) is not folder:
            raise FileExistsError(errno.EEXIST, f"it is {'not ' if folder else ''}a folder")
        if not folder and not stat.S_ISREG(mode):
            raise FileExistsError(errno.EEXIST, "it is no plain file")
    return target


def _machine() -> str:
    """The machine since its start, and the container in it whose process numbers are meant: two
    containers may have one name."""
    known = [socket.gethostname()]
    with contextlib.suppress(OSError):
        known.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    with contextlib.suppress(OSError):
        known.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(known)


_HOST = hashlib.sha256(_machine().encode()).hexdigest()[:8]
_TEMPORARY = re.compile(rf"\.offramp-{_HOST}-(\d+)-[0-9a-f]{{16}}\.tmp")
_tidied: set[Path] = set()


def temporary_name() -> str:
    """A file name with the machine and the process that writes the file."""
    return f".offramp-{_HOST}-{os.getpid()}-{secrets.token_hex(8)}.tmp"


def remove_dead(folder: Path) -> None:
    """Remove half-written files of ended processes of this machine; once a process."""
    if folder in _tidied:
        return
    _tidied.add(folder)
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            named = _TEMPORARY.fullmatch(entry.name)
            if named and not _is_alive(int(named[1])):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    os.unlink(entry.path)


def _is_alive(process: int) -> bool:
    if os.name == "nt":  # where a signal of 0 is Ctrl+C
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's
        return True
    return True


def keep_mode(old: Path, new: Path) -> None:
    """Give a new file the mode of the plain file that it will replace, if there is one."""
    with contextlib.suppress(OSError):
        mode = os.lstat(old).st_mode
        if stat.S_ISREG(mode):
            os.chmod(new, stat.S_IMODE(mode))


def usual_mode(folder: Path) -> int:
    """Return the mode of a new file under the umask; to read the umask would change it."""
    probe = folder / temporary_name()
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    return mode


def sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Write the names in a folder to disk, where the system can; else a rename may be lost."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
