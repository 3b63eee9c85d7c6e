"""`offramp demo`: exits for a tiny model, trained, calibrated and timed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from offramp.cli.options import add_command, name_option, seed_option
from offramp.cli.output import print_text, tell
from offramp.cli.parser import Parser


def add(commands: Any) -> None:
    add_command(
        commands,
        "demo",
        "Train exits on a tiny VLM, calibrate them, and time them against the full model.",
        "offramp demo --backbone t5",
        _demo,
        _options,
    )


def _options(parser: Parser) -> None:
    from offramp.models.shipped import TINY

    name_option(parser, "--backbone", TINY, "which tiny model", default="opt")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="folder (default: runs/demo)"
    )
    parser.add_argument(
        "--target", type=float, default=0.0075, metavar="X",
        help="share of answers that may differ from the full model's (default: 0.0075)",
    )  # fmt: skip
    seed_option(parser, "training")


def _demo(arguments: argparse.Namespace) -> None:
    from offramp.calibration.calibrate import Guarantee
    from offramp.research.demo import demo, table
    from offramp.storage import check_writable

    Guarantee(target=arguments.target)  # a mistake should not wait for training
    check_writable(arguments.out, folder=True)
    report = demo(arguments.backbone, arguments.out, target=arguments.target, seed=arguments.seed)
    print_text(table(report))
    tell(f"figures: {arguments.out / 'report.json'}")
    tell(f"open {arguments.out / 'report.html'}")
