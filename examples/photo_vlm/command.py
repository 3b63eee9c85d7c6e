"""What the recipe's commands share: their parser, and errors that are two lines."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path

FOLDERS = {
    "data": (Path("../shared/data"), "where the data sets are"),
    "work": (Path("runs/photo_vlm"), "where this recipe keeps what it makes"),
}
"""By the option's name: default, and what it is."""


def command(run: Callable[[], None]) -> Callable[[], None]:
    """A command that ends with a user's mistake in two lines, and status 1."""
    from offramp.core.errors import OfframpError

    @functools.wraps(run)
    def wrapped() -> None:
        try:
            run()
        except OfframpError as error:
            print(error, file=sys.stderr)
            sys.exit(1)

    return wrapped


def parser_of(name: str, example: str, does: str, *folders: str) -> argparse.ArgumentParser:
    """A parser whose help begins with an example, with options for some of `FOLDERS`."""
    module = f"python -m examples.photo_vlm.{name}"
    parser = argparse.ArgumentParser(
        usage=f"{module} {example}",
        description=does,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for folder in folders:
        default, what = FOLDERS[folder]
        help_ = f"{what} (default: %(default)s)"
        parser.add_argument(f"--{folder}", type=Path, default=default, metavar="DIR", help=help_)
    return parser
