"""`--config run.yaml`: options of a command from a file; the command line's own win."""

from __future__ import annotations

import argparse
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from offramp.errors import InputError, StorageError, did_you_mean


def with_config(args: Sequence[str], options: Mapping[str, argparse.Action]) -> list[str]:
    """The arguments of a command with those of its `--config` file before them.

    options: of the command, by flag.

    Raises:
        InputError: the file holds something else than options of the command.
        StorageError: it cannot be read.
    """
    path = _path(args)
    if path is None or "--config" not in options:
        return list(args)
    added: list[str] = []
    for name, value in _read(path).items():
        flag = f"--{str(name).replace('_', '-')}"
        if flag not in options or flag in ("--config", "--help"):
            known = [f[2:] for f in options if f.startswith("--") and f != "--config"]
            raise InputError(
                f"{path} sets {str(name)!r}, which is no option of this command.",
                did_you_mean(flag[2:], known),
            )
        added += _as_arguments(flag, value, options[flag], path)
    return [*added, *args]


def _path(args: Sequence[str]) -> str | None:
    """What follows the last --config, if anything does."""
    path = None
    for place, word in enumerate(args):
        if word == "--config" and place + 1 < len(args):
            path = args[place + 1]
        elif word.startswith("--config="):
            path = word.partition("=")[2]
    return path


def _read(path: str) -> Mapping[Any, Any]:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would keep its reader waiting
            raise InputError(f"{path} is no file.", "Give a YAML file, such as --config run.yaml.")
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(f"Cannot read {path}: {error.strerror}.", "Correct --config.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is no YAML: {reason}.", f"{_REMEDY}.") from error
    if content is not None and not isinstance(content, Mapping):
        kind = type(content).__name__
        raise InputError(f"{path} holds a {kind}, not options by name.", f"{_REMEDY}.")
    return content or {}


_REMEDY = "Write lines such as steps: 400"


def _as_arguments(flag: str, value: Any, action: argparse.Action, path: str) -> list[str]:
    """One option as it would be typed."""
    two_ways = isinstance(action, argparse.BooleanOptionalAction)
    if two_ways or action.nargs == 0:
        if not isinstance(value, bool):
            raise InputError(
                f"{path} sets {flag[2:]} to {value!r}, which is neither true nor false.",
                f"Write {flag[2:]}: true",
            )
        no = [flag.replace("--", "--no-", 1)] if two_ways else []
        return [flag] if value else no
    if isinstance(value, list) and action.nargs is not None:
        return [flag, *map(str, value)]
    if isinstance(value, list):
        return [f"{flag}={','.join(map(str, value))}"]
    if isinstance(value, Mapping):
        return [f"{flag}={','.join(f'{name}={number}' for name, number in value.items())}"]
    return [f"{flag}={'none' if value is None else value}"]
