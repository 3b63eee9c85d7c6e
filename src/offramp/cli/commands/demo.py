"""`offramp demo`: exits for a tiny model, trained, calibrated and timed."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from offramp.cli.options import add_command, name_first
from offramp.cli.output import say_next, show_result, tell
from offramp.cli.outputs import check_out_demo, overwrite_option
from offramp.cli.parser import Parser, one_of
from offramp.core.errors import InputError

log = logging.getLogger(__name__)


def add(commands: Any) -> None:
    add_command(
        commands,
        "demo",
        "Train exits on a tiny VLM, calibrate them, and time them against the full model.",
        "offramp demo tiny-t5",
        _demo,
        _options,
    )


def _options(parser: Parser) -> None:
    from offramp.adapter.shipped import TINY, short_name

    names = [f"tiny-{kind}" for kind in TINY]
    name_first(
        parser,
        parser,
        "backbone",
        ("--backbone",),
        f"{one_of(names)} (default: {names[0]})",
        required=False,
        choices=names,
        type=lambda name: f"tiny-{short_name(name)}",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="output folder (default: runs/demo)"
    )
    overwrite_option(parser)


def _demo(arguments: argparse.Namespace) -> None:
    from offramp.adapter.shipped import short_name
    from offramp.cli.demo import demo, table
    from offramp.common.folders import check_writable

    check_writable(arguments.out, folder=True)
    kind = short_name(arguments.backbone or "tiny-opt")
    check_out_demo(arguments.out, kind, arguments)
    if not arguments.json:
        _greet()
    report = demo(kind, arguments.out)
    show_result(report, table(report), as_json=arguments.json)
    log.info("figures: %s", arguments.out / "report.json")
    log.info("open %s", arguments.out / "report.html")
    say_next(f"offramp serve {arguments.out / kind}")


def _greet() -> None:
    """Show a photograph's caption by full depth and by exits, and say what comes next."""
    from offramp.cli.commands.generate import painter
    from offramp.cli.demo import photograph

    try:
        lines = photograph(painter())
    except InputError as error:
        log.info("The photo model is left out: %s", error.problem)
    else:
        tell("\n".join(["One photograph, captioned; beside each word its depth:", *lines, ""]))
    tell(
        "Now an exit is trained for a tiny model that describes drawn scenes: one layer, from no "
        "labels, in a minute or two;\nthen a threshold is calibrated, and quality and speed are "
        "measured on new images."
    )
