"""`offramp analyse`: quality at every depth, overthinking, and how deep tokens need to go."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from offramp.cli.options import (
    add_command,
    backbone_options,
    data_options,
    load_adapter,
    load_model,
    read_data,
)
from offramp.errors import InputError


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "analyse",
        "Measure quality at every depth, with exits and without, and where tokens go wrong.",
        "offramp analyse --adapter exits --data held_out.jsonl --out runs/analysis\n"
        "  offramp analyse --backbone Salesforce/blip2-opt-2.7b --data held_out.jsonl "
        "--out runs/lens",
        _analyse,
    )
    parser.add_argument("--adapter", help="folder or hub name of trained exits")
    backbone_options(parser, required=False)
    data_options(parser, "held-out data; without answers it tells agreement only")
    parser.add_argument(
        "--metric",
        metavar="METRIC",
        help="quality of answers: exact_match, vqa_accuracy or rouge_l (default: rouge_l for long "
        "answers, else exact_match)",
    )
    parser.add_argument(
        "--decode-depths",
        type=lambda text: tuple(int(part) for part in text.split(",")),
        metavar="DEPTHS",
        help="decode with every token leaving at these, e.g. 2,4,8 (default: at most twelve)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=40, help="default: 40")
    parser.add_argument("--batch-size", type=int, default=32, help="default: 32")
    parser.add_argument("--seed", type=int, default=0, help="of the intervals (default: 0)")
    parser.add_argument(
        "--allow-seen",
        action="store_true",
        help="take pictures that the exits were trained or calibrated on",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for analysis.json and its plots (SVG)"
    )


def _analyse(arguments: argparse.Namespace) -> None:
    from tqdm import tqdm

    from offramp.models.input_processor import InputProcessor
    from offramp.research.analysis.analyse import AnalysisConfig, analyse

    names = ("metric", "decode_depths", "max_new_tokens", "batch_size", "seed")
    config = AnalysisConfig(**{name: getattr(arguments, name) for name in names})
    if arguments.adapter is None and arguments.backbone is None:
        raise InputError("Nothing to analyse was named.", "Give --adapter, or --backbone.")
    items = read_data(arguments, require_answers=False)
    if arguments.adapter is None:
        backbone, processor = load_model(arguments)
        model: Any = backbone
    else:
        model, processor = load_adapter(arguments)
        backbone = model.backbone
    result = analyse(
        model,
        InputProcessor(backbone, processor),
        [item.example for item in items],
        config,
        out=arguments.out,
        allow_seen=arguments.allow_seen,
        progress=lambda things: tqdm(things, "analyse", disable=None, leave=False),
    )
    print(json.dumps(result, ensure_ascii=False))
