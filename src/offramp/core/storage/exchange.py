"""A folder put in another's place at once, so that no reader and no crash finds half of each."""

import contextlib
import ctypes
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from offramp.core.storage.places import sync_folder

_HERE = -100  # paths are relative to the working folder
_EXCHANGE = 2


def exchange_folder(new: Path, target: Path, *, without: Collection[str] = ()) -> bool:
    """Swap the folder `new` and `target`; files that only `target` had are first linked into `new`.

    without: names in `target` that are not taken along.

    Returns:
        False where the system cannot, as on some network and removable disks; `target` is then
            untouched, and `new` has its own files and links to others.
    """
    swap = _swap()
    if swap is None or _works_in(target):
        return False
    try:
        if not all(_is_ours(target, new)):
            return False
        for name in _take_along(target, new, without):
            os.link(target / name, new / name, follow_symlinks=False)
        shutil.copystat(target, new)
        for folder, _, _ in os.walk(new):
            sync_folder(Path(folder))
        swap(new, target)
    except OSError:  # no links, another file system, another owner's files
        return False
    sync_folder(target.parent)
    with contextlib.suppress(OSError):  # what another process wrote meanwhile
        for name in list(_take_along(new, target, without)):
            os.rename(new / name, target / name)
    return True


def _take_along(source: Path, target: Path, without: Collection[str]) -> Iterator[str]:
    """Names of files and links in `source` that `target` lacks."""
    for entry in [*os.scandir(source)]:
        plain = entry.is_symlink() or not entry.is_dir()
        if plain and entry.name not in without and not os.path.lexists(target / entry.name):
            yield entry.name


def _is_ours(target: Path, new: Path) -> Iterator[bool]:
    """Of each folder and file below the first level of `target`, whether `new` has it too, under
    one owner: what is anybody else's may not even be readable, and is left where it is.

    Raises:
        OSError: a folder cannot be looked into.
    """
    owner = os.stat(new).st_uid
    for folder, folders, files in os.walk(target, onerror=_refuse):
        inside = new / Path(folder).relative_to(target)
        yield os.stat(folder).st_uid == owner
        for name in folders:
            yield os.path.islink(Path(folder) / name) or (inside / name).is_dir()
        if Path(folder) != target:
            yield all(os.path.lexists(inside / name) for name in (*folders, *files))


def _refuse(error: OSError) -> None:
    raise error


def _works_in(target: Path) -> bool:
    """Whether the working folder lies in `target`: it would stay behind in the old one."""
    try:
        return Path(os.path.realpath(os.getcwd())).is_relative_to(target)
    except OSError:  # it was removed
        return False


def _swap() -> Callable[[Path, Path], None] | None:
    """What exchanges two paths at once, where the system has it."""
    try:
        system = ctypes.CDLL(None, use_errno=True)
    except TypeError:  # Windows
        return None
    if hasattr(system, "renameat2"):  # Linux
        return lambda a, b: _call(
            system.renameat2, _HERE, os.fsencode(a), _HERE, os.fsencode(b), _EXCHANGE
        )
    if hasattr(system, "renamex_np"):  # macOS
        return lambda a, b: _call(system.renamex_np, os.fsencode(a), os.fsencode(b), _EXCHANGE)
    return None


def _call(function: Any, *arguments: Any) -> None:
    if function(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
