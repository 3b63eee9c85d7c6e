"""What is written to disk, and how: whole or not at all, valid JSON, with its origin beside it."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from offramp.core.errors import DataError, StorageError
from offramp.core.storage import schema
from offramp.core.storage.json_text import check_plain, dumps, read_bytes, unreadable
from offramp.core.storage.places import (
    ROOM,
    keep_mode,
    reason,
    remove_dead,
    replaceable,
    sync,
    sync_folder,
    temporary_name,
    usual_mode,
)

__all__ = [
    "atomic_folder",
    "check_plain",
    "digest_file",
    "digest_rows",
    "read_json",
    "write_atomic",
    "write_json",
]


def write_atomic(path: str | Path, data: bytes | str, *, follow: bool = True) -> None:
    """Write a file so that readers see the old content or the new, never a part.

    Text is written as UTF-8. Missing parent folders are made. An existing file keeps its mode.
    follow: whether a link is followed; False, as for files of a cache: the link itself is replaced.

    Raises:
        StorageError: nothing was written; what was there before is untouched.
    """
    payload = data.encode() if isinstance(data, str) else data
    temporary: Path | None = None
    try:
        target = replaceable(path, follow=follow)
        # In the same folder, because a rename is atomic only within one file system.
        temporary = target.parent / temporary_name()
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_dead(target.parent)
        with open(temporary, "xb") as file:
            file.write(payload)
            file.flush()
            keep_mode(target, temporary)
            # Some file systems commit the rename before the content: an empty file after a crash.
            os.fsync(file.fileno())
        os.replace(temporary, target)
        sync_folder(target.parent)
    except (OSError, ValueError) as error:
        raise StorageError(f"Cannot write {path}: {reason(error)}.", ROOM) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | Path, *, owns: Collection[str] = ()) -> Iterator[Path]:
    """Yield an empty staging folder; its files move to `path` when the block ends without error.

    A new folder appears at once. In an existing folder all files of the same names are replaced at
    once, and every other file stays. Where the system cannot exchange folders, or the working
    folder lies inside, the files are renamed one by one, once all of them are safely on disk.

    owns: names of files that are removed from `path` where the staging folder has none.

    Raises:
        StorageError: a file could not be written or moved. Errors of the block itself pass
            unchanged, except OSError, which becomes a StorageError; `path` is then untouched.
    """
    target = Path(os.path.realpath(path))
    staging = target.parent / temporary_name()
    try:
        replaceable(target, folder=True)
        staging.mkdir(parents=True)
        remove_dead(target.parent)
        yield staging
        files = sorted(file for file in staging.rglob("*") if file.is_file())
        mode = usual_mode(staging)
        for file in files:
            file.chmod(mode)  # some libraries create files that only their owner may read
            keep_mode(target / file.relative_to(staging), file)
            sync(file)
        if not target.exists():
            os.replace(staging, target)
            sync_folder(target.parent)
        else:
            from offramp.core.storage.exchange import exchange_folder  # who only reads needs none

            if not exchange_folder(staging, target, without=owns):
                _replace_each(files, staging, target, owns)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"Cannot write {path}: {reason(error)}.", ROOM) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _replace_each(files: list[Path], staging: Path, target: Path, owns: Collection[str]) -> None:
    names = [file.relative_to(staging) for file in files]
    for name in names:
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging / name, place)
    for left in set(owns) - {str(name) for name in names}:
        (target / left).unlink(missing_ok=True)
    for folder in {(target / name).parent for name in names}:
        sync_folder(folder)


def write_json(path: str | Path, value: Any, *, follow: bool = True) -> None:
    """Write a value as indented UTF-8 JSON, whole or not at all. follow: as of `write_atomic`.

    Raises:
        InputError: the value is not JSON; NaN and infinity are refused.
        StorageError: see `write_atomic`.
    """
    write_atomic(path, dumps(value, indent=2, ensure_ascii=False) + "\n", follow=follow)


def read_json(path: str | Path, *, largest: int | None = None, unique: bool = False) -> Any:
    """Read a JSON file.

    largest: size limit in bytes; None: no limit. unique: whether numbers that are not finite, and
    objects with a name twice, are refused.

    Raises:
        DataError: the content is not JSON, nested too deeply, or too large.
        StorageError: the file is missing or cannot be read.
    """
    content = read_bytes(path, largest)
    try:
        return schema.parse(content) if unique else json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        deep = isinstance(error, RecursionError)
        raise DataError(
            f"{path} is not valid JSON: {'it is nested too deeply' if deep else error}.",
            "Restore the file from a copy, or write it again with the command that made it.",
        ) from error


def digest_file(path: str | Path) -> str:
    """SHA-256 of a file's content, in hex.

    Raises:
        StorageError: the file is missing or cannot be read.
    """
    check_plain(path)
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(path, error) from error


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
        digest.update(dumps(row, sort_keys=True, separators=(",", ":")).encode() + b"\n")
    return digest.hexdigest()
