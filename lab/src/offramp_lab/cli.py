"""The command line `offramp-lab`: that of `offramp`, with commands that measure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from offramp.cli.command_line import Program

EXAMPLES = """\
examples:
  offramp-lab compare tiny-opt --data photos.jsonl --out runs/compare

python -m offramp_lab.records.NAME makes a record.
"""
COMMANDS = {"compare": "offramp_lab.commands.compare"}
"""Modules by command, as in `offramp.cli.command_line`."""


def program() -> Program:
    """What `offramp.cli.command_line.run` runs."""
    from offramp.cli.command_line import Program

    what = "Measure and compare early exits: what offramp's evidence is made with."
    return Program("offramp-lab", "offramp_lab", what, EXAMPLES, COMMANDS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; what it returns is what `offramp.cli.main` returns."""
    try:
        # Here, so that Ctrl-C while modules are still being read is no traceback either.
        from offramp.cli.command_line import run

        return run(argv, program())
    except KeyboardInterrupt:
        return 130
