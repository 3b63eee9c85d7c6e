"""`--config run.yaml`: options of a command from a file; the command line's own win.

The file holds names with values: texts, numbers, true and false, and lists or objects of those.
Each is what the option itself takes, as if it were typed; nothing becomes a text that was none.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from offramp.errors import DataError, InputError, StorageError, did_you_mean

LARGEST = 2**20
"""Bytes of the largest file that is read."""
_REMEDY = "Write lines such as steps: 400"


class Scalar(str):
    """A value as it is written. plain: without quotes, so that it may be a number or a truth."""

    plain: bool

    def __new__(cls, text: str, *, plain: bool) -> Scalar:
        made = super().__new__(cls, text)
        made.plain = plain
        return made

    @property
    def is_null(self) -> bool:
        return self.plain and self in ("", "~", "null", "Null", "NULL")

    @property
    def truth(self) -> bool | None:
        """True or false, as YAML 1.2 has them; None: it is neither."""
        return {"true": True, "false": False}.get(self.lower()) if self.plain else None

    @property
    def is_number(self) -> bool:
        return self.plain and _NUMBER.fullmatch(self) is not None


_NUMBER = re.compile(r"[-+]?(\.?[0-9][0-9_]*\.?[0-9_]*([eE][-+]?[0-9]+)?|0[xob][0-9a-fA-F_]+)")


def of_config(
    args: Sequence[str], options: Mapping[str, argparse.Action]
) -> Iterator[tuple[argparse.Action, str, list[str]]]:
    """The options that a command's `--config` file sets: each with its flag and its words.

    args: of the command. options: of the command, by flag.

    Raises:
        InputError: the file holds something else than options of the command.
        StorageError: it cannot be read.
    """
    path = _path(args)
    if path is None or "--config" not in options:
        return
    for name, value in _read(path).items():
        flag = f"--{name.replace('_', '-')}"
        if flag not in options or flag in ("--config", "--help"):
            known = [f[2:] for f in options if f.startswith("--") and f != "--config"]
            raise InputError(
                f"{path} sets {name!r}, which is no option of this command.",
                did_you_mean(flag[2:], known),
            )
        yield (options[flag], *_as_words(flag, value, options[flag], path))


def _path(args: Sequence[str]) -> str | None:
    """What follows the last --config, if anything does."""
    path = None
    for place, word in enumerate(args):
        if word == "--":
            break
        if word == "--config" and place + 1 < len(args):
            path = args[place + 1]
        elif word.startswith("--config="):
            path = word.partition("=")[2]
    return path


# -- the file --------------------------------------------------------------------------------------


def _read(path: str) -> dict[str, Any]:
    from offramp.storage.json_text import read_bytes

    try:
        text = read_bytes(path, LARGEST).decode("utf-8-sig")
        return _mapping(_Events(text), path)
    except DataError as error:
        raise InputError(error.problem, "A file of options has a few lines.") from error
    except StorageError as error:
        raise StorageError(error.problem, "Correct --config.") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path} is no YAML: {error}", f"{_REMEDY}.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text in UTF-8.", f"{_REMEDY}.") from error


class _Events:
    """What a YAML file consists of, one after the other: nothing is built that it does not hold."""

    def __init__(self, text: str) -> None:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        self._events = yaml.parse(text, Loader=loader)

    def next(self) -> Any:
        event = next(self._events, None)
        anchor = getattr(event, "anchor", None)
        if anchor is not None:
            raise yaml.YAMLError(f"it has an anchor or an alias ({anchor[:40]}), which is not read")
        tag = getattr(event, "tag", None)
        if tag not in (None, "!"):
            raise yaml.YAMLError(f"it has a tag ({str(tag)[:60]}), which is not read")
        return event


def _mapping(events: _Events, path: str) -> dict[str, Any]:
    event = events.next()
    while isinstance(event, yaml.StreamStartEvent | yaml.DocumentStartEvent):
        event = events.next()
    if event is None or isinstance(event, yaml.StreamEndEvent):
        return {}
    if isinstance(event, yaml.ScalarEvent) and _scalar(event).is_null:
        return {}
    if not isinstance(event, yaml.MappingStartEvent):
        kind = "list" if isinstance(event, yaml.SequenceStartEvent) else "text"
        raise InputError(f"{path} holds a {kind}, not options by name.", f"{_REMEDY}.")
    found = dict(_entries(events, path, _value))
    while (event := events.next()) is not None:
        if isinstance(event, yaml.DocumentStartEvent):
            raise InputError(f"{path} holds several documents.", f"{_REMEDY}.")
    return found


def _entries(events: _Events, path: str, value: Any) -> Iterator[tuple[str, Any]]:
    seen = set()
    while not isinstance(event := events.next(), yaml.MappingEndEvent):
        if not isinstance(event, yaml.ScalarEvent):
            raise InputError(f"{path} has a name that is no text.", f"{_REMEDY}.")
        name = str(event.value).replace("-", "_")
        if name in seen:
            raise InputError(f"{path} sets {event.value!r} twice.", "Keep one of the lines.")
        seen.add(name)
        yield str(event.value), value(events, events.next(), path)


def _value(events: _Events, event: Any, path: str) -> Any:
    if isinstance(event, yaml.ScalarEvent):
        return _scalar(event)
    if isinstance(event, yaml.MappingStartEvent):
        return dict(_entries(events, path, _flat))
    items = []
    while not isinstance(event := events.next(), yaml.SequenceEndEvent):
        items.append(_flat(events, event, path))
    return items


def _flat(_: _Events, event: Any, path: str) -> Scalar:
    if not isinstance(event, yaml.ScalarEvent):
        raise InputError(f"{path} is nested deeper than any option is.", f"{_REMEDY}.")
    return _scalar(event)


def _scalar(event: Any) -> Scalar:
    return Scalar(event.value, plain=bool(event.implicit[0]))  # as it is written without quotes


# -- options ---------------------------------------------------------------------------------------


def _as_words(flag: str, value: Any, action: argparse.Action, path: str) -> tuple[str, list[str]]:
    """An option as it would be typed: its flag, and the words behind it."""
    name = flag[2:]
    two_ways = isinstance(action, argparse.BooleanOptionalAction)
    if two_ways or action.nargs == 0:
        truth = value.truth if isinstance(value, Scalar) else None
        if truth is None:
            raise InputError(
                f"{path} sets {name} to {_shown(value)}, which is neither true nor false.",
                f"Write {name}: true",
            )
        if two_ways and not truth:
            return flag.replace("--", "--no-", 1), []
        return (flag, []) if truth else ("", [])
    if isinstance(value, dict):
        told = {
            n: str(v).lower() if v.truth is not None else _word(v, name, action, path)
            for n, v in value.items()
        }
        return flag, [",".join(f"{n}={word}" for n, word in told.items())]
    if isinstance(value, list):
        words = [_word(item, name, action, path) for item in value]
        return flag, words if action.nargs is not None else [",".join(words)]
    return flag, [_word(value, name, action, path)]


def _word(value: Scalar, name: str, action: argparse.Action, path: str) -> str:
    """A value as it would be typed. Raise `InputError` for what would become a text unasked."""
    takes_text = action.type in (None, Path) and action.choices is None
    if value.is_null:
        if _takes_none(action):
            return "none"
        _refuse(value, name, path, "Write a value, or remove the line.")
    if value.truth is not None or (value.is_number and takes_text):
        _refuse(value, name, path, f'Put it in quotes if it is a text: {name}: "{value[:40]}"')
    return str(value)


def _takes_none(action: argparse.Action) -> bool:
    try:
        return callable(action.type) and action.type("none") is None
    except (ValueError, argparse.ArgumentTypeError):
        return False


def _refuse(value: Scalar, name: str, path: str, remedy: str) -> NoReturn:
    raise InputError(f"{path} sets {name} to {_shown(value)}, which is no text.", remedy)


def _shown(value: Any) -> str:
    if isinstance(value, Scalar):
        return "nothing (null)" if value.is_null else repr(str(value))[:60]
    return f"a{'n object' if isinstance(value, dict) else ' list'} of {len(value)}"
