"""A log that grows a line at a time."""

import contextlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from offramp.core.errors import DataError, StorageError
from offramp.core.storage.json_text import dumps, read_bytes
from offramp.core.storage.places import ROOM, reason, sync_folder


class JsonlLog:
    """An append-only log, one JSON object a line.

    synced: True: rows are on disk after each `append` (some milliseconds), even if the machine
    stops. False: only after `sync`, or if the process alone stops.

    A line that a crash cut off at the end is dropped when the log is opened again, so that the next
    row stands on a line of its own.
    """

    def __init__(self, path: str | Path, *, synced: bool = True) -> None:
        self.path: Path = Path(path)
        self._synced = synced
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _mend_tail(self.path)
            # Unbuffered: a failed write must not be tried again, half a line late, on close.
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
            sync_folder(self.path.parent)
        except OSError as error:
            raise StorageError(f"Cannot open {path}: {reason(error)}.", ROOM) from error

    def append(self, row: dict[str, Any]) -> None:
        """Add one row.

        Raises:
            InputError: the row is not JSON (NaN and infinity are not); nothing was written.
            StorageError: the row could not be written; the rows before it are whole.
        """
        line = (dumps(row) + "\n").encode()
        start = os.fstat(self._file.fileno()).st_size
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
            if self._synced:
                _sync_content(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(start)
            raise StorageError(f"Cannot add to {self.path}: {reason(error)}.", ROOM) from error

    def sync(self) -> None:
        """Write all rows to disk. Raise `StorageError` if the disk is full."""
        try:
            _sync_content(self._file.fileno())
        except OSError as error:
            raise StorageError(f"Cannot add to {self.path}: {reason(error)}.", ROOM) from error

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
        """Return all whole rows, oldest first; a torn last line (no newline, no JSON) is left out.

        Raises:
            DataError: any other line is not a JSON object.
            StorageError: the file is missing or cannot be read.
        """
        lines = read_bytes(path).split(b"\n")
        tail = lines.pop()
        rows = [
            _parse_row(line, path, number) for number, line in enumerate(lines, 1) if line.strip()
        ]
        if _is_object(tail):
            rows.append(json.loads(tail))
        return rows


_sync_content = getattr(os, "fdatasync", os.fsync)  # the size too, but no times


def _parse_row(line: bytes, path: str | Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise _bad_line(path, number, f"is not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise _bad_line(path, number, "is not a JSON object")
    return row


def _bad_line(path: str | Path, number: int, what: str) -> DataError:
    return DataError(f"{path}, line {number} {what}.", "Repair or delete that line.")


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
        whole = content.rfind(b"\n") + 1
        tail = content[whole:]
        if not tail:
            return
        if _is_object(tail):
            file.write(b"\n")
        else:
            file.truncate(whole)
