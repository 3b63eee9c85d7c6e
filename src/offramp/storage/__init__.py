"""What is written to disk, and how: whole or not at all, valid JSON, with its origin beside it."""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from offramp.errors import DataError, InputError, StorageError

_ROOM = "Check that the folder exists, may be written and has free space, then run it again."


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Write a file so that readers see the old content or the new, never a part.

    Text is written as UTF-8. Missing parent folders are made. A link is followed, not replaced.

    Raises:
        StorageError: nothing was written; what was there before is untouched.
    """
    target = Path(os.path.realpath(path))
    payload = data.encode() if isinstance(data, str) else data
    # In the same folder, because a rename is atomic only within one file system.
    temporary = target.parent / _temporary_name()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_dead(target.parent)
        with open(temporary, "xb") as file:
            file.write(payload)
            file.flush()
            # Some file systems commit the rename before the content: an empty file after a crash.
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise StorageError(f"Cannot write {path}: {_reason(error)}.", _ROOM) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty staging folder; its files move to `path` when the block ends without error.

    A new folder appears at once. In a folder that exists, files of the same name are replaced one
    rename each after all of them are safely on disk, and every other file stays as it is.

    Raises:
        StorageError: a file could not be written or moved. Errors of the block itself pass
            unchanged, except OSError, which becomes a StorageError; `path` is then untouched.
    """
    target = Path(os.path.realpath(path))
    staging = target.parent / _temporary_name()
    try:
        staging.mkdir(parents=True)
        _remove_dead(target.parent)
        yield staging
        files = sorted(file for file in staging.rglob("*") if file.is_file())
        mode = _usual_mode(staging)
        for file in files:
            file.chmod(mode)  # some libraries create files that nobody else may read
            _sync(file)
        if target.exists():
            for file in files:
                place = target / file.relative_to(staging)
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, place)
        else:
            os.replace(staging, target)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"Cannot write {path}: {_reason(error)}.", _ROOM) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as indented UTF-8 JSON, whole or not at all.

    Raises:
        InputError: the value is not JSON; NaN and infinity are not, whatever Python's default.
        StorageError: see `write_atomic`.
    """
    write_atomic(path, _dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_result(path: str | Path, value: Any) -> None:
    """`write_json` for what took long to compute: where it cannot be written, the StorageError has
    it as `result`, and the command line prints it."""
    try:
        write_json(path, value)
    except StorageError as error:
        error.result = value
        raise


def read_json(path: str | Path, *, largest: int | None = None) -> Any:
    """Read a JSON file.

    largest: bytes of the largest file that is read; None: any.

    Raises:
        DataError: the content is not JSON, nested too deeply, or too large.
        StorageError: the file is missing or cannot be read.
    """
    content = _read_bytes(path, largest)
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        deep = isinstance(error, RecursionError)
        raise DataError(
            f"{path} is not valid JSON: {'it is nested too deeply' if deep else error}.",
            "Restore the file from a copy, or write it again with the command that made it.",
        ) from error


def check_writable(path: str | Path, *, folder: bool = False) -> None:
    """Raise `StorageError` where `path` could not be written, without leaving a trace.

    folder: it is to be a folder of files.
    """
    target = Path(os.path.realpath(path))
    try:
        if target.exists() and target.is_dir() is not folder:
            raise FileExistsError(errno.EEXIST, f"it is {'not ' if folder else ''}a folder")
        place = target if folder else target.parent
        while not os.path.lexists(place):  # raises nothing; `stat` below does
            with contextlib.suppress(FileNotFoundError):
                os.stat(place)  # names that are too long, and paths through a file, fail here
            place = place.parent
        with contextlib.suppress(FileNotFoundError):
            os.stat(target)
        probe = place / _temporary_name()
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise StorageError(f"Cannot write {path}: {_reason(error)}.", _ROOM) from error


@contextlib.contextmanager
def locked_folder(folder: str | Path, name: str = ".lock") -> Iterator[None]:
    """Hold a folder for one process; the system lets go of it when that one ends, however.

    Raises:
        StorageError: another process holds it, or the folder cannot be written.
    """
    path = Path(folder) / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+b")  # noqa: SIM115
    except OSError as error:
        raise StorageError(f"Cannot write {path}: {_reason(error)}.", _ROOM) from error
    with file:
        if not _lock(file.fileno()):
            raise StorageError(
                f"Another run is writing to {folder}.",
                "Wait until it has ended, or give another folder.",
            )
        yield  # the file stays: one that is removed could be locked twice


class JsonlLog:
    """An append-only log, one JSON object a line, on disk after each `append`.

    A line that a crash tore off at the end is dropped when the log is opened again, so that what is
    appended next stands on a line of its own.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _mend_tail(self.path)
            # Unbuffered: a failed write must not be tried again, half a line late, on close.
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise StorageError(f"Cannot open {path}: {_reason(error)}.", _ROOM) from error

    def append(self, row: dict[str, Any]) -> None:
        """Add one row.

        Raises:
            InputError: the row is not JSON (NaN and infinity are not); nothing was written.
            StorageError: the row could not be written; the rows before it are whole.
        """
        line = (_dumps(row) + "\n").encode()
        start = os.fstat(self._file.fileno()).st_size
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(start)
            raise StorageError(f"Cannot add to {self.path}: {_reason(error)}.", _ROOM) from error

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @staticmethod
    def read(path: str | Path) -> list[dict[str, Any]]:
        """All whole rows, oldest first; a torn last line (no newline, no JSON) is left out.

        Raises:
            DataError: any other line is not a JSON object.
            StorageError: the file is missing or cannot be read.
        """
        lines = _read_bytes(path).split(b"\n")
        tail = lines.pop()
        rows = [
            _parse_row(line, path, number) for number, line in enumerate(lines, 1) if line.strip()
        ]
        if _is_object(tail):
            rows.append(json.loads(tail))
        return rows


def digest_file(path: str | Path) -> str:
    """SHA-256 of a file's content, in hex.

    Raises:
        StorageError: the file is missing or cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from error


def digest_rows(rows: Iterable[Any]) -> str:
    """SHA-256 of JSON-able rows, in hex.

    The order of rows counts, the order of a dict's keys does not, a tuple equals a list, and the
    result is the same on every machine and Python version.

    Raises:
        InputError: a row is not JSON.
    """
    digest = hashlib.sha256()
    for row in rows:
        # A line break cannot occur inside compact JSON, so rows cannot run into each other.
        digest.update(_dumps(row, sort_keys=True, separators=(",", ":")).encode() + b"\n")
    return digest.hexdigest()


def _dumps(value: Any, **options: Any) -> str:
    try:
        text = json.dumps(value, allow_nan=False, **options)
        text.encode()  # half a surrogate pair passes json.dumps and fails only when written
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"This value cannot be stored as JSON: {error}.",
            "Use only dict, list, str, bool, None and finite numbers; write null for a NaN.",
        ) from error
    return text


def _parse_row(line: bytes, path: str | Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise _bad_line(path, number, f"is not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise _bad_line(path, number, "is not a JSON object")
    return row


def _bad_line(path: str | Path, number: int, what: str) -> DataError:
    return DataError(f"{path}, line {number} {what}.", "Mend or delete that line.")


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _mend_tail(path: Path) -> None:
    """End the log with a newline: complete a whole last line, drop a torn one."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        content = file.read()
        kept = content.rfind(b"\n") + 1
        tail = content[kept:]
        if not tail:
            return
        if _is_object(tail):
            file.write(b"\n")
        else:
            file.truncate(kept)


def _read_bytes(path: str | Path, largest: int | None = None) -> bytes:
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):  # a pipe would keep its reader waiting for ever
            kind = errno.EISDIR if stat.S_ISDIR(found.st_mode) else errno.EINVAL
            raise OSError(kind, os.strerror(kind) if kind == errno.EISDIR else "not a plain file")
        if largest is not None and found.st_size > largest:
            raise DataError(
                f"{path} has {found.st_size} bytes; at most {largest} are read.",
                "Restore the file from a copy, or write it again with the command that made it.",
            )
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise _unreadable(path, error) from error


def _unreadable(path: str | Path, error: Exception) -> StorageError:
    return StorageError(
        f"Cannot read {path}: {_reason(error)}.", "Check the path and that the file may be read."
    )


_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
_TEMPORARY = re.compile(rf"\.offramp-{_HOST}-(\d+)-[0-9a-f]{{16}}\.tmp")
_tidied: set[Path] = set()


def _temporary_name() -> str:
    """A name that tells the machine and the process whose file it is."""
    return f".offramp-{_HOST}-{os.getpid()}-{secrets.token_hex(8)}.tmp"


def _remove_dead(folder: Path) -> None:
    """Remove what processes of this machine that have ended left half written; once a process."""
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
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's
        return True
    return True


def _usual_mode(folder: Path) -> int:
    """The mode of a new file, as the umask has it; asking for the umask itself would change it."""
    probe = folder / _temporary_name()
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    return mode


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


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
