"""What the recipe's commands share: their parser, and errors that are two lines."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable


def command(run: Callable[[], None]) -> Callable[[], None]:
    """A command that ends with a user's mistake in two lines, and status 1."""
    from offramp.errors import OfframpError

    @functools.wraps(run)
    def wrapped() -> None:
        try:
            run()
        except OfframpError as error:
            print(error, file=sys.stderr)
            sys.exit(1)

    return wrapped


def parser_of(name: str, example: str, does: str) -> argparse.ArgumentParser:
    """A parser whose help begins with an example."""
    module = f"python -m examples.photo_vlm.{name}"
    return argparse.ArgumentParser(
        usage=f"{module} {example}",
        description=does,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
