"""Errors a user can act on: one line says what is wrong, the next says what to do."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any


class OfframpError(Exception):
    """Base of every error that offramp raises on purpose.

    `str(error)` is exactly two lines: the problem, then the remedy. Each subclass also inherits the
    builtin that fits, so that `except ValueError` works for callers who do not know offramp.
    """

    def __init__(self, problem: str, remedy: str) -> None:
        self.problem: str = _one_line(problem)
        self.remedy: str = _one_line(remedy)
        super().__init__(f"{self.problem}\n{self.remedy}")

    def __str__(self) -> str:
        # Written out because builtins such as OSError print their arguments in their own way.
        return f"{self.problem}\n{self.remedy}"

    def __reduce__(self) -> tuple[type["OfframpError"], tuple[str, str]]:
        # `args` holds the joined text, which is not what the constructor takes: without this an
        # error could not come back from a worker process.
        return type(self), (self.problem, self.remedy)


class InputError(OfframpError, ValueError):
    """An argument or option has a value that cannot be used."""


class DataError(OfframpError, ValueError):
    """A data set, a row of it or an image cannot be used."""


class AdapterError(OfframpError, ValueError):
    """A saved set of exits is damaged or does not fit the backbone."""


class UnsupportedBackboneError(OfframpError, TypeError):
    """The model is of a kind that offramp does not know how to run."""


class InexactError(OfframpError, ArithmeticError):
    """Decoding that was to be exact is not."""


class TrainingError(OfframpError, RuntimeError):
    """Training cannot go on."""


class BusyError(OfframpError, RuntimeError):
    """A batch engine takes no request now: its queue is full, or it was closed."""


class StorageError(OfframpError, OSError):
    """A file cannot be read or written; a file that would be replaced is unchanged.

    result: the content of a failed write, printed so that a long computation is not lost.
    """

    result: Any = None


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """Return a remedy that names the closest allowed words, if any is close, and all of them.

    `did_you_mean("tt5", ["opt", "t5"])` is `"Did you mean 't5'? Allowed: opt, t5."`; `""` when
    nothing is allowed.
    """
    names = list(allowed)
    if not names:
        return ""
    # Compared in lower case, answered as written: 'OPT' should find 'opt'.
    written = {name.lower(): name for name in reversed(names)}
    close = difflib.get_close_matches(word.lower(), written, n=1)
    question = f"Did you mean {written[close[0]]!r}? " if close else ""
    return f"{question}Allowed: {', '.join(names)}."


def check_known(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Raise `InputError` for a name that is not known; the error lists those that are."""
    for name in names:
        if name not in known:
            raise InputError(f"{what} {name!r} is not known.", did_you_mean(name, known))


def printable(text: str) -> str:
    """Return text that is safe on a terminal: what is no letter, sign or space is escaped.

    Lines and tabs stay. Foreign names and JSON may hold sequences that move the cursor, change the
    title or reverse the text.
    """
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else _escaped(letter) for letter in text
    )


def _escaped(letter: str) -> str:
    return ascii(letter)[1:-1]


_LONGEST = 2000
"""Letters of the longest line: a damaged file may hold a name of a million."""


def _one_line(text: str) -> str:
    text = str(text)
    text = text if len(text) <= 2 * _LONGEST else text[: 2 * _LONGEST]
    line = " ".join(line.strip() for line in text.splitlines() if line.strip())
    # Half of a surrogate pair, as file names may hold, is no letter either.
    line = printable(line.replace("\t", " "))
    return line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "..."
