"""Values as JSON text, and files as bytes."""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

from offramp.core.errors import DataError, InputError, StorageError
from offramp.core.storage.places import reason


def dumps(value: Any, **options: Any) -> str:
    try:
        text = json.dumps(value, allow_nan=False, **options)
        text.encode()  # half a surrogate pair passes json.dumps and fails only when written
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"This value cannot be stored as JSON: {error}.",
            "Use only dict, list, str, bool, None and finite numbers; write null for a NaN.",
        ) from error
    return text


def check_plain(path: str | Path) -> os.stat_result:
    """Raise `StorageError` unless the path is a plain file or a link to one: a pipe would block its
    reader for ever, and a device has no end."""
    try:
        return _plain(path)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error


def _plain(path: str | Path) -> os.stat_result:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        kind = errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EINVAL
        raise OSError(kind, os.strerror(kind) if kind == errno.EISDIR else "not a plain file")
    return status


def read_bytes(path: str | Path, largest: int | None = None) -> bytes:
    try:
        status = _plain(path)
        if largest is not None and status.st_size > largest:
            raise DataError(
                f"{path} has {status.st_size} bytes; at most {largest} are read.",
                "Restore the file from a copy, or write it again with the command that made it.",
            )
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise unreadable(path, error) from error


def unreadable(path: str | Path, error: Exception) -> StorageError:
    return StorageError(
        f"Cannot read {path}: {reason(error)}.", "Check the path and that the file may be read."
    )
