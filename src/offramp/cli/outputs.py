"""What a command may write over: what it wrote itself, an earlier time, and nothing else unless it
is told."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from offramp.core.errors import InputError, OfframpError

_TOLD = "Give another --out, or --overwrite to replace it."


def is_page(begin: bytes) -> bool:
    """Return True if a file with this beginning is a page of `offramp report` or `offramp
    inspect`."""
    return b'name="generator" content="offramp report"' in begin


def overwrite_option(group: Any) -> None:
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="replace what is in --out, whatever wrote it (default: only what this command wrote)",
    )


def check_out_file(
    path: Path, arguments: argparse.Namespace, ours: Callable[[bytes], bool], what: str
) -> None:
    """Raise `InputError` where a file exists that may not be replaced.

    ours: whether a file with these first bytes was written by this command. what: its name.
    """
    from offramp.common.folders import check_writable

    check_writable(path)
    if not os.path.lexists(path):
        return
    try:
        with open(path, "rb") as file:
            found = file.read(4096)
    except OSError:
        found = b"?"
    for read in _named(vars(arguments)):
        inside = os.path.isdir(read) and found and not ours(found) and _inside(path, read)
        if inside or _same(path, read):
            raise InputError(
                f"--out {path} is a file that this command reads.", "Give another --out."
            )
    if found and not ours(found) and not arguments.overwrite:
        raise InputError(f"{path} is no {what}: it would be lost.", _TOLD)


def check_out_adapter(out: Path, source: Path, arguments: argparse.Namespace) -> None:
    """Raise `InputError` where `out` holds an adapter of other exits than `source`."""
    from offramp.core.save_and_load import CONFIG, EXITS, read_config

    if arguments.overwrite or _same(out, source) or not os.path.lexists(out / CONFIG):
        return
    try:
        files = [read_config(folder).files or {} for folder in (out, source)]
        same = files[0].get(EXITS, "?") == files[1].get(EXITS)
    except OfframpError:
        same = False
    if not same:
        raise InputError(f"{out} already holds another adapter.", _TOLD)


def check_out_demo(out: Path, kind: str, arguments: argparse.Namespace) -> None:
    """Raise `InputError` where the demo would replace files that it did not write."""
    from offramp.core.save_and_load import CONFIG, read_config

    for name in ("report.json", f"report-{kind}.json"):
        check_out_file(
            out / name,
            arguments,
            lambda begin: b'"full_equals_generate"' in begin,
            "report of a demo",
        )
    if arguments.overwrite or not os.path.lexists(out / kind / CONFIG):
        return
    try:
        command = str(read_config(out / kind).provenance.get("command"))
    except OfframpError as error:
        raise InputError(f"{error.problem}", _TOLD) from error
    if not command.startswith("offramp demo"):
        raise InputError(f"{out / kind} already holds an adapter.", _TOLD)


def _same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):
        return os.path.realpath(one) == os.path.realpath(other)


def _inside(path: Path, folder: Path) -> bool:
    """Return True where a file lies directly in a folder, once links are followed."""
    return Path(os.path.realpath(path)).parent == Path(os.path.realpath(folder))


def _named(values: dict[str, Any]) -> Iterable[Path]:
    """Everything on the command line that may be a file or a folder which is read; a folder of
    images is not one of files that are replaced."""
    for name, value in values.items():
        for one in value if isinstance(value, list | tuple) else [value]:
            named = name not in ("out", "run", "images") and isinstance(one, str | Path)
            if named and str(one):
                yield Path(one)
