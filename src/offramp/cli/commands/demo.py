"""`offramp demo`: exits for a tiny model, trained, calibrated and timed."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from offramp.cli.options import add_command, name_first
from offramp.cli.output import say_next, show_result
from offramp.cli.outputs import check_out_demo, overwrite_option
from offramp.cli.parser import Parser, one_of

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
        parser, parser, "backbone", ("--backbone",), f"{one_of(names)} (default: {names[0]})",
        required=False, choices=names, type=lambda name: f"tiny-{short_name(name)}",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="output folder (default: runs/demo)"
    )
    overwrite_option(parser)


def _demo(arguments: argparse.Namespace) -> None:
    from offramp.adapter.shipped import short_name
    from offramp.cli.demo import demo, table
    from offramp.core.storage.folders import check_writable

    check_writable(arguments.out, folder=True)
    kind = short_name(arguments.backbone or "tiny-opt")
    check_out_demo(arguments.out, kind, arguments)
    report = demo(kind, arguments.out)
    show_result(report, table(report), as_json=arguments.json)
    log.info("figures: %s", arguments.out / "report.json")
    log.info("open %s", arguments.out / "report.html")
    say_next(f"offramp serve {arguments.out / kind}")
