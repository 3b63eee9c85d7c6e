"""`offramp-lab analyse`: quality at every depth, overthinking, and how deep tokens need to go."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from offramp.cli.loading import load_adapter, load_model, read_data
from offramp.cli.options import add_command, field_options, filled, measured_options
from offramp.cli.output import say_next, show_result
from offramp.cli.parser import Parser
from offramp.errors import InputError

OWN = ("metric", "decode_depths", "exit_in_prefill", "max_new_tokens", "batch_size", "seed")
"""Fields of `AnalysisConfig` that are flags."""


def add(commands: Any) -> None:
    add_command(
        commands,
        "analyse",
        "Measure quality at every depth, with exits and without, and where tokens go wrong.",
        "offramp-lab analyse exits --data held_out.jsonl --out runs/analysis\n"
        "  offramp-lab analyse --backbone Salesforce/blip2-opt-2.7b --data held_out.jsonl "
        "--out runs/lens",
        _analyse,
        _options,
        usual="data limit metric decode-depths max-new-tokens batch-size out json",
    )


def _options(parser: Parser) -> None:
    from offramp_lab.experiments.analysis.config import AnalysisConfig

    what = "held-out data; without answers it gives agreement only"
    measured_options(parser, what, adapter=False, allow_seen=True)
    field_options(parser.add_argument_group("analysis"), AnalysisConfig, OWN)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for analysis.json and its plots (SVG)"
    )


def _analyse(arguments: argparse.Namespace) -> None:
    from offramp.models.input_processor import InputProcessor
    from offramp.progress import progress
    from offramp.storage import check_writable
    from offramp_lab.experiments.analysis.analyse import analyse
    from offramp_lab.experiments.analysis.config import AnalysisConfig
    from offramp_lab.experiments.analysis.summary import summary

    config = AnalysisConfig(**filled(arguments, AnalysisConfig))
    if arguments.adapter is None and arguments.backbone is None:
        raise InputError("Nothing to analyse was named.", "Name exits first, or give --backbone.")
    check_writable(arguments.out, folder=True)
    items = read_data(arguments, require_answers=False)
    load = load_model if arguments.adapter is None else load_adapter
    model, processor = load(arguments)
    backbone = model if arguments.adapter is None else model.backbone
    result = analyse(
        model,
        InputProcessor(backbone, processor),
        [item.example for item in items],
        config,
        out=arguments.out,
        allow_seen=arguments.allow_seen,
        progress=lambda iterable: progress(iterable, "analyse"),
    )
    show_result(result, summary(result), as_json=arguments.json)
    say_next(f"offramp report {arguments.out} --out report.html")
