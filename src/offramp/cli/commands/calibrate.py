"""`offramp calibrate`: thresholds that keep a risk below a target, at a confidence."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from offramp.cli.options import (
    adapter_folder,
    add_command,
    backbone_options,
    data_options,
    load_adapter,
    read_data,
    unseen_items,
)


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "calibrate",
        "Choose thresholds that keep the risk below a target, and store them in the adapter.",
        "offramp calibrate --adapter exits --data held_out.jsonl --target 0.01 --confidence 0.95\n"
        "  offramp calibrate --adapter exits --data vqa.jsonl --risk exact_match_drop "
        "--target 0.02",
        _calibrate,
    )
    parser.add_argument("--adapter", required=True, help="folder or hub name of trained exits")
    backbone_options(parser, required=False)
    data_options(parser, "pictures that training has not seen, like those to come")
    parser.add_argument(
        "--risk",
        default="disagreement",
        metavar="RISK",
        help="disagreement with the full model, or its ROUGE-L form consistency, without labels; "
        "exact_match_drop, vqa_accuracy_drop or rouge_l_drop with them (default: disagreement)",
    )
    parser.add_argument("--target", type=float, default=0.01, help="of the risk (default: 0.01)")
    parser.add_argument(
        "--confidence", type=float, default=0.95, help="of keeping it (default: 0.95)"
    )
    parser.add_argument(
        "--method",
        default="auto",
        metavar="METHOD",
        help="auto, upper_bound or learn_then_test (default: auto)",
    )
    parser.add_argument("--score", help="confidence score, instead of the adapter's")
    parser.add_argument("--kv", help="recompute or propagate, instead of the adapter's")
    parser.add_argument(
        "--exit-in-prefill",
        action=argparse.BooleanOptionalAction,
        help="let first tokens leave early too (default: as in the adapter)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=40, help="default: 40")
    parser.add_argument("--batch-size", type=int, default=64, help="default: 64")
    parser.add_argument(
        "--leave-out-seen", action="store_true",
        help="leave out pictures that the exits were trained on, and say how many",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder for the adapter (default: its own)")
    parser.add_argument("--json", action="store_true", help="the calibration as one JSON object")


def _calibrate(arguments: argparse.Namespace) -> None:
    from dataclasses import replace

    from tqdm import tqdm

    from offramp.calibration.calibrate import Promise, calibrate, calibrated
    from offramp.calibration.profiler import measure_costs
    from offramp.calibration.replay import can_replay
    from offramp.calibration.risk_functions import RISKS
    from offramp.models.input_processor import InputProcessor

    asked = {n: getattr(arguments, n) for n in ("target", "confidence", "risk", "method")}
    Promise(**asked)  # a mistake should not wait for data and model
    out = adapter_folder(arguments)
    labelled = RISKS[arguments.risk].quality is not None
    items = read_data(arguments, require_answers=labelled)
    adapter, processor = load_adapter(arguments)
    if arguments.leave_out_seen:
        items = unseen_items(items, adapter, ("train",))
    examples = [item.example for item in items]
    names = ("score", "kv", "exit_in_prefill")
    changes = {n: v for n in names if (v := getattr(arguments, n)) is not None}
    policy = replace(adapter.policy, thresholds={}, lossless=False, **changes)
    encoder = InputProcessor(adapter.backbone, processor)
    costs = None
    if can_replay(policy):  # with an answer at a time, as where speed counts
        costs = measure_costs(
            adapter.backbone, encoder.prompts(examples[:1]), adapter.exits,
            score=policy.score, shortlist=policy.shortlist,
        )  # fmt: skip
    found = calibrate(
        adapter,
        encoder,
        examples,
        policy,
        costs=costs,
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
        progress=lambda path: tqdm(path, "calibrate", disable=None, leave=False),
        **asked,
    )
    calibrated(adapter, found, examples).save(out)
    print(json.dumps(found.to_json(), ensure_ascii=False) if arguments.json else _table(found, out))


def _table(found: Any, out: Path) -> str:
    """The path and the promise, as a person reads them on a terminal."""
    lines = [f"{'thresholds':<32}{'risk':>10}{'at most':>10}{'us/token':>10}"]
    for point in found.path:
        shown = ", ".join(f"{d}: {t:g}" for d, t in point.thresholds.items())
        took = "" if point.seconds is None else f"{point.seconds * 1e6:.0f}"
        lines.append(f"{shown:<32}{point.risk:>10.4f}{point.bound:>10.4f}{took:>10}")
    lines.append("")
    if found.reason:
        lines.append(f"Nothing is promised, and the exits are off. {found.reason}")
    else:
        shown = ", ".join(f"{t:g} at depth {d}" for d, t in found.policy.thresholds.items())
        faster = f"; decoding is predicted to be {found.speedup:.2f}x" if found.speedup else ""
        lines.append(
            f"Promised: {found.risk} at most {found.target:g}, with {found.confidence:.0%} "
            f"confidence (measured {found.measured:.4f} on {found.n} answers){faster}. "
            f"Thresholds: {shown}."
        )
    return "\n".join([*lines, f"Written to {out}."])
