"""An argument parser whose mistakes are two lines and whose options are made on the first use."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from offramp.cli.config_file import of_config
from offramp.cli.output import print_text
from offramp.core.errors import InputError, did_you_mean
from offramp.core.plugins import remedy


class UsageError(InputError):
    """A command line that cannot be read."""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `UsageError` where argparse prints its usage and exits.

    late: adds the options at the first use, because they may need modules that take seconds to
    load. example: command lines at the beginning of the help. usual: options in `--help`; None:
    all. `--help-all` always shows all.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        # An abbreviated option means another one as soon as there is a further option.
        super().__init__(*args, **{"allow_abbrev": False, **options})
        self.register("type", Path, path_word)
        self.late: Callable[[Parser], None] | None = None
        self.example = ""
        self.usual: Collection[str] | None = None
        self.name: Named | None = None
        """The model's name, where the command needs one."""
        self.question: str | None = None
        """Where one word that no option takes is kept."""
        self.named: list[Any] = []
        """What the command line named: a model, or by mistake several."""
        self.given: dict[str, list[str]] = {}
        """Options that were given, by where they are kept, as they were typed."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        self._load()
        typed = sys.argv[1:] if args is None else list(args)
        namespace = argparse.Namespace() if namespace is None else namespace
        self.given = {}
        self._take_config(typed, namespace)
        self.named = []
        parsed, unknown = super().parse_known_args(typed, namespace)
        if self.question and len(unknown) == 1 and not unknown[0].startswith("-"):
            if getattr(parsed, self.question) is not None:
                self.error(f"two prompts were given, one of them {_short(unknown[0])!r}")
            setattr(parsed, self.question, unknown.pop())
        if unknown:
            self._refuse(unknown[0])
        if len({*self.named}) > 1:
            self.error(f"two models were named, {self.named[0]!r} and {self.named[1]!r}")
        if self.name is not None and getattr(parsed, self.name.dest, None) is None:
            raise UsageError(
                "No model was named.", f"Name it first: {self.prog} NAME. {self._remedy()}"
            )
        if self.given:
            parsed.given = self.given
        return parsed, unknown

    def _take_config(self, typed: Sequence[str], namespace: argparse.Namespace) -> None:
        """What the `--config` file sets, as if it were the options' defaults."""
        for action, flag, words in of_config(typed, self._option_string_actions):
            action.required = False
            if not flag:  # it is set to what it is anyway
                continue
            try:
                values = self._get_values(action, words)
                action(self, namespace, values, flag)
            except argparse.ArgumentError as error:
                self.error(str(error))

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        # argparse would take an option whose value is "--" for one without, and store [].
        if action.option_strings and arg_strings == ["--"] and action.nargs != 0:
            self.error(f"argument {'/'.join(action.option_strings)}: '--' is no value")
        if any("\0" in word for word in arg_strings if isinstance(word, str)):
            self.error(f"argument {action.dest}: a value holds a zero byte")
        if action.option_strings:
            self.given[action.dest] = [action.option_strings[0], *arg_strings]
        return super()._get_values(action, arg_strings)

    def loaded(self) -> Iterator[argparse.Action]:
        """Return all options, those of commands included, after adding late ones."""
        self._load()
        for action in self._actions:
            yield action
            if isinstance(action, argparse._SubParsersAction):
                for command in action.choices.values():
                    yield from command.loaded()

    def _load(self) -> None:
        if self.late is not None:
            late, self.late = self.late, None
            late(self)

    def show_usual(self, usual: Collection[str]) -> None:
        """Show only these options in `--help`, and the others in `--help-all`."""
        count = sum(_is_shown(action) for action in self._actions) + 1
        text = f"show all {count} options and exit"
        self.add_argument("--help-all", action=HelpAll, nargs=0, help=text)
        self.usual = {"--help", "--help-all", *usual}

    def format_help(self) -> str:
        text = self._options_help()
        return f"example:\n  {self.example}\n\n{text}" if self.example else text

    def _options_help(self) -> str:
        if self.usual is None:
            return super().format_help()
        unusual = [
            (action, action.help)
            for action in self._actions
            if action.option_strings and not set(action.option_strings) & set(self.usual)
        ]
        for action, _ in unusual:
            action.help = argparse.SUPPRESS
        try:
            return super().format_help()
        finally:
            for action, text in unusual:
                action.help = text

    def _print_message(self, message: str, file: Any = None) -> None:
        """Help and version: argparse's own says nothing where they cannot be written."""
        print_text(message.rstrip("\n"))

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message[:1].upper()}{message[1:].rstrip('.')}.", self._remedy())

    def _refuse(self, word: str) -> NoReturn:
        """Raise for a word that no option takes."""
        flag = word.partition("=")[0]
        known = [
            name[2:]
            for name, action in self._option_string_actions.items()
            if name.startswith("--") and _is_shown(action)
        ]
        hint = did_you_mean(flag.lstrip("-"), known).partition("?")
        close = f"{hint[0].replace(QUOTE, QUOTE + '--', 1)}? " if hint[1] and flag[0] == "-" else ""
        what = "The option" if flag.startswith("-") else "The argument"
        raise UsageError(f"{what} {flag!r} is not known.", f"{close}{self._remedy()}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            name = "/".join(action.option_strings) or action.metavar or action.dest
            known = [str(choice) for choice in action.choices]
            raise UsageError(
                f"{name} {_short(str(value))!r} is not known.", remedy(str(value), known)
            )

    def _remedy(self) -> str:
        return f"See {self.prog} --help."


QUOTE = "'"


def _is_shown(action: argparse.Action) -> bool:
    """Whether help shows an option: an old spelling is read, and not shown."""
    return bool(action.option_strings) and action.help != argparse.SUPPRESS


class Named(argparse.Action):
    """The action for the model's name: the first word, or an option of earlier versions."""

    def __call__(self, parser: Any, namespace: Any, values: Any, *_: Any) -> None:
        if values is None:  # no word; an option may have named it
            return
        parser.named.append(values)
        setattr(namespace, self.dest, parser.named[0])


class HelpAll(argparse.Action):
    """The action that prints the help of all options of a command and exits."""

    def __call__(self, parser: Any, *_: Any) -> None:
        parser.usual = None
        parser.print_help()
        parser.exit()


def path_word(text: str) -> Path:
    """Return a file or folder; a type of options."""
    if not text:  # which would be the working folder
        raise argparse.ArgumentTypeError("the name is empty")
    try:
        os.lstat(text)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise argparse.ArgumentTypeError(f"{_short(text)!r} is too long a name") from None
    return Path(text)


MOST = 2**31 - 1
"""Of a whole number, unless its option says otherwise: what every library takes."""
SEEDS = 2**32 - 1
THREADS = 1024


def whole(least: int, most: int = MOST) -> Callable[[str], int]:
    """Return a type of options: whole numbers from `least` to `most`."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{_short(text)!r} is not a whole number") from None
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(
                f"{_short(text)} is not a whole number from {least} to {most}"
            )
        return number

    return parse


def seed(text: str) -> int:
    """Return a seed that all generators take; a type of options."""
    return whole(0, SEEDS)(text)


def threads(text: str) -> int:
    """Return a number of threads that can start; a type of options."""
    return whole(1, THREADS)(text)


def number(least: float, most: float) -> Callable[[str], float]:
    """Return a type of options: numbers from `least` to `most`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{_short(text)!r} is not a number") from None
        if not least <= value <= most:  # not a number neither
            raise argparse.ArgumentTypeError(f"{value:g} is not from {least:g} to {most:g}")
        return value

    return parse


def share(text: str) -> float:
    """Return a number from 0 to 1; a type of options."""
    return number(0, 1)(text)


def truth(text: str) -> bool:
    """Return true or false; a type of options."""
    return named(("true", "false"))(text) == "true"


def named(names: Iterable[str]) -> Callable[[str], str]:
    """Return a type of options: one of these names."""

    def parse(text: str) -> str:
        if text not in (known := list(names)):
            raise argparse.ArgumentTypeError(f"{_short(text)!r} is not {one_of(known)}")
        return text

    return parse


def some(text: str) -> float:
    """Return a number above 0 and up to 1; a type of options."""
    value = share(text)
    if not value:
        raise argparse.ArgumentTypeError("0 is not above 0")
    return value


def whole_numbers(least: int) -> Callable[[str], tuple[int, ...]]:
    """Return a type of options: whole numbers from `least`, separated by commas."""
    number = whole(least)
    return lambda text: tuple(number(part) for part in text.split(","))


class Flattened(argparse.Action):
    """The action that stores the values of several words as one tuple: "3,6" and "3 6" are
    equal."""

    def __call__(self, parser: Any, namespace: Any, values: Any, *_: Any) -> None:
        setattr(namespace, self.dest, tuple(number for word in values for number in word))


def or_none(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a type of options: values of `parse`, or none."""
    return lambda text: None if text.lower() == "none" else parse(text)


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def one_of(names: Iterable[str]) -> str:
    """Return names as text for help."""
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last
