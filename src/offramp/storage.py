"""What is written to disk, and how: whole or not at all, valid JSON, with its origin beside it."""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
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
    temporary = target.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
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
    staging = target.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        staging.mkdir(parents=True)
        yield staging
        files = sorted(file for file in staging.rglob("*") if file.is_file())
        for file in files:
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


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: the content is not JSON.
        StorageError: the file is missing or cannot be read.
    """
    content = _read_bytes(path)
    try:
        return json.loads(content.decode("utf-8-sig"))
    except ValueError as error:
        raise DataError(
            f"{path} is not valid JSON: {error}.",
            "Restore the file from a copy, or write it again with the command that made it.",
        ) from error


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


def _read_bytes(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str | Path, error: OSError) -> StorageError:
    return StorageError(
        f"Cannot read {path}: {_reason(error)}.", "Check the path and that the file may be read."
    )


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _reason(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__
