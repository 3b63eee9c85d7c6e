"""`offramp demo`: exits for a tiny model, trained, calibrated and raced."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from offramp.cli.options import add_command


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "demo",
        "Train exits on a tiny VLM, calibrate them, and race them against the full model.",
        "offramp demo --backbone t5",
        _demo,
    )
    parser.add_argument("--backbone", default="opt", choices=("opt", "t5"), help="default: opt")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="default: runs/demo")
    parser.add_argument(
        "--target",
        type=float,
        default=0.0075,
        help="share of answers that may differ from the full model's (default: 0.0075)",
    )
    parser.add_argument("--seed", type=int, default=0)


def _demo(arguments: argparse.Namespace) -> None:
    from offramp.research.demo import demo, table

    report = demo(arguments.backbone, arguments.out, target=arguments.target, seed=arguments.seed)
    print(table(report))
    print(f"report: {arguments.out / 'report.json'}", file=sys.stderr)
