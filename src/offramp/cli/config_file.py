"""`--config run.yaml`: options of a command from a file; the command line's own win.

The file holds names with values, or with lists or objects of values. Each value is read as if it
were typed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence

import yaml

from offramp.core.errors import DataError, InputError, StorageError, did_you_mean

LARGEST = 2**16
"""Bytes of the largest file that is read."""
_REMEDY = "Write lines such as steps: 400"
_NULL = "tag:yaml.org,2002:null"


def of_config(
    args: Sequence[str], options: Mapping[str, argparse.Action]
) -> Iterator[tuple[argparse.Action, str, list[str]]]:
    """Yield the options in a command's `--config` file, each with its flag and its words.

    args: of the command. options: of the command, by flag.

    Raises:
        InputError: the file holds something else than options of the command.
        StorageError: it cannot be read.
    """
    path = _path(args)
    if path is None or "--config" not in options:
        return
    for name, value in _read(path).items():
        flag = f"--{name}"
        if flag not in options or flag in ("--config", "--help"):
            known = [f[2:] for f in options if f.startswith("--") and f != "--config"]
            raise InputError(
                f"{path} sets {name[:60]!r}, which is no option of this command.",
                did_you_mean(name, known),
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


def _read(path: str) -> dict[str, yaml.Node]:
    from offramp.core.storage.json_text import read_bytes

    try:
        text = read_bytes(path, LARGEST).decode("utf-8-sig")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except DataError as error:
        raise InputError(error.problem, "A file of options has a few lines.") from error
    except StorageError as error:
        raise StorageError(error.problem, "Correct --config.") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path} is no YAML: {error}", f"{_REMEDY}.") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is no text in UTF-8, or nested.", f"{_REMEDY}.") from error
    return {} if node is None or node.tag == _NULL else _entries(node, path)


def _entries(node: yaml.Node, path: str) -> dict[str, yaml.Node]:
    """The nodes of an object by name, with dashes as flags have them."""
    if not isinstance(node, yaml.MappingNode):
        raise InputError(f"{path} holds no options by name.", f"{_REMEDY}.")
    names = [_text(key, path).replace("_", "-") for key, _ in node.value]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"{path} sets {min(twice)[:60]!r} twice.", "Keep one of the lines.")
    return dict(zip(names, (value for _, value in node.value), strict=True))


def _text(node: yaml.Node, path: str) -> str:
    """Return a value as the command line spells it."""
    if not isinstance(node, yaml.ScalarNode) or node.tag.startswith("!"):
        raise InputError(f"{path} is nested deeper than any option is, or tagged.", f"{_REMEDY}.")
    return str(node.value)


def _as_words(
    flag: str, node: yaml.Node, action: argparse.Action, path: str
) -> tuple[str, list[str]]:
    """An option as it would be typed: its flag, and the words after it."""
    if isinstance(node, yaml.MappingNode):
        entries = _entries(node, path).items()
        return flag, [",".join(f"{n.replace('-', '_')}={_text(v, path)}" for n, v in entries)]
    if isinstance(node, yaml.SequenceNode):
        words = [_text(item, path) for item in node.value]
        return flag, words if action.nargs is not None else [",".join(words)]
    text = _text(node, path)
    two_ways = isinstance(action, argparse.BooleanOptionalAction)
    if two_ways or action.nargs == 0:
        if text.lower() not in ("true", "false"):
            raise InputError(
                f"{path} sets {flag[2:]} to {text[:60]!r}, which is neither true nor false.",
                f"Write {flag[2:]}: true",
            )
        if text.lower() == "true":
            return flag, []
        return (flag.replace("--", "--no-", 1) if two_ways else ""), []
    if node.tag == _NULL and text != "none":
        if not _takes_none(action):
            raise InputError(
                f"{path} sets {flag[2:]} to nothing.", "Write a value, or remove the line."
            )
        text = "none"
    return flag, [text]


def _takes_none(action: argparse.Action) -> bool:
    try:
        return callable(action.type) and action.type("none") is None
    except (ValueError, argparse.ArgumentTypeError):
        return False
