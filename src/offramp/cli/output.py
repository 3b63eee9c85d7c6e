"""What a command prints: results on stdout, all else on stderr; and what if neither works."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from offramp.core.errors import StorageError, printable

log = logging.getLogger(__name__)

CLOSED = 128 + 13
"""Exit code where the reader of a pipe has gone: that of a program that SIGPIPE stopped."""


def prepare_output() -> None:
    """Make every text printable: characters outside the encoding are written as escapes."""
    if sys.stderr is None:  # closed; progress bars would fail
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            with contextlib.suppress(OSError, ValueError):
                stream.reconfigure(errors="backslashreplace")


def print_text(text: str, end: str = "\n") -> None:
    """Print a line of the result, or, with another `end`, a part of one.

    Raises:
        StorageError: stdout is closed or full. BrokenPipeError: its reader has gone.
    """
    if sys.stdout is None:
        raise StorageError("stdout is closed.", "Redirect it to a file, or to /dev/null.")
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        _forget()
        raise _full(error) from error


def print_json(value: Any) -> None:
    """Print a result as one line of JSON, in ASCII where stdout is not Unicode."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    text = json.dumps(value, ensure_ascii=not encoding.lower().startswith("utf"))
    # What is no letter, such as half of a surrogate pair or what a terminal obeys, is written as
    # JSON's own escape.
    print_text(text if text.isprintable() else "".join(map(_in_json, text)))


def _in_json(letter: str) -> str:
    if letter.isprintable():
        return letter
    return json.dumps(letter)[1:-1]


def show_result(value: Any, text: str | None = None, *, as_json: bool) -> None:
    """Print a command's result: as JSON, or for people. text: for people; None: by `plain`."""
    if as_json:
        print_json(value)
    else:
        print_text(plain(value) if text is None else text)


def plain(value: Any, indent: str = "") -> str:
    """Return nested values as indented lines."""
    if not isinstance(value, Mapping):
        return f"{indent}{_word(value)}"
    lines = []
    for name, part in value.items():
        nested = isinstance(part, Mapping) and part
        title = f"{indent}{printable(str(name))}:"
        lines.append(title if nested else f"{title} {_word(part)}")
        if nested:
            lines.append(plain(part, f"{indent}  "))
    return "\n".join(lines)


def _word(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_word, value)) or "none"
    return "none" if value is None or value == {} else printable(str(value))


def inline(value: Any) -> str:
    """Return a value on one line; of a mapping, each name with its value."""
    if isinstance(value, Mapping) and value:
        return ", ".join(f"{printable(str(n))}: {inline(part)}" for n, part in value.items())
    return _word(value)


def few(lines: Sequence[str], most: int) -> list[str]:
    """Return the first of these lines, with a last line that tells how many more `--json` shows."""
    if len(lines) <= most:
        return [*lines]
    return [*lines[: most - 1], f"... and {len(lines) - most + 1} more, with --json"]


def tell(text: str) -> None:
    """Print a line for the user on stderr; lost where stderr is closed or full."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def end_output(code: int) -> int:
    """Flush stdout; return its exit code where that fails, else `code`."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        return close_output()
    except OSError as error:
        _forget()
        tell(f"error: {_full(error)}")
        return 1
    return code


def say_next(*commands: str) -> None:
    """Print the usual next command for people, on stderr; nothing where output is to be quiet."""
    log.info("next: %s", "\n  or: ".join(commands))


def close_output() -> int:
    """Return the exit code after the reader of stdout has gone. Nothing more is written to
    stdout."""
    _forget()
    return CLOSED


def _full(error: OSError) -> StorageError:
    return StorageError(
        f"Cannot write to stdout: {error.strerror}.", "Redirect it to where there is room."
    )


def _forget() -> None:
    """Keep the interpreter from failing on stdout once more when it ends."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
