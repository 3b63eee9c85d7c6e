"""The command line: data on stdout, everything else on stderr, two lines for a user's mistake."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns 0 for success, 1 for a user's mistake, 2 for a command line that cannot be read, 128 + n
    after signal n (130: Ctrl-C).
    """
    try:
        # Here, so that Ctrl-C while modules are still being read is no traceback either.
        from offramp.cli.command_line import run

        return run(argv)
    except KeyboardInterrupt:
        return 130
