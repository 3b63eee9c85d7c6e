"""`offramp calibrate`: thresholds that keep a risk below a target, at a confidence."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from offramp.cli.commands.runtime import check_runtime, load_runtime, runtime_options
from offramp.cli.loading import adapter_folder, load_adapter, read_data, unseen_items
from offramp.cli.options import (
    add_command,
    batch_option,
    data_options,
    field_option,
    length_option,
    model_options,
    policy_options,
)
from offramp.cli.output import print_json, print_text
from offramp.cli.parser import Parser

log = logging.getLogger(__name__)


def add(commands: Any) -> None:
    add_command(
        commands,
        "calibrate",
        "Choose thresholds that keep the risk below a target, and store them in the adapter.",
        "offramp calibrate --adapter exits --data held_out.jsonl --target 0.01 --confidence 0.95\n"
        "  offramp calibrate --adapter exits --data vqa.jsonl --risk exact_match_drop "
        "--target 0.02",
        _calibrate,
        _options,
    )


def _options(parser: Parser) -> None:
    from offramp.calibration.calibrate import Promise
    from offramp.calibration.risk_control import METHODS
    from offramp.calibration.risk_functions import RISKS

    model_options(parser, required=False, adapter=True)
    data = data_options(parser, "images that training has not seen, like those to come")
    data.add_argument(
        "--leave-out-seen", action="store_true",
        help="leave out images that the exits were trained on, and say how many",
    )  # fmt: skip
    group = parser.add_argument_group("guarantee")
    field_option(
        group, Promise, "risk", "of early answers; only a drop needs labels",
        choices=RISKS,
    )  # fmt: skip
    field_option(group, Promise, "target", "bound of the risk")
    field_option(group, Promise, "confidence", "probability that the bound holds")
    field_option(group, Promise, "method", "test of the thresholds", choices=METHODS)
    exits = policy_options(parser, threshold=False)
    exits.add_argument(
        "--exit-in-prefill", action=argparse.BooleanOptionalAction,
        help="let first tokens exit early too (default: as in the adapter)",
    )  # fmt: skip
    group = parser.add_argument_group("answers and output")
    length_option(group)
    batch_option(group, 64)
    group.add_argument("--out", type=Path, help="folder for the adapter (default: its own)")
    group.add_argument("--json", action="store_true", help="the calibration as one JSON object")
    runtime_options(parser)


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
    check_runtime(arguments)
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
    costs, runtime = None, load_runtime(arguments, adapter)
    if runtime is None and can_replay(policy):  # with an answer at a time, as where speed counts
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
        runtime=runtime,
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
        progress=lambda path: tqdm(path, "calibrate", disable=None, leave=False),
        **asked,
    )
    # Before it is written, for it took long to find.
    if arguments.json:
        print_json(found.to_json())
    else:
        print_text(_table(found))
    calibrated(adapter, found, examples).save(out)
    log.info("Written to %s.", out)


def _table(found: Any) -> str:
    """The path and the guarantee, as a person reads them on a terminal."""
    lines = [f"{'thresholds':<32}{'risk':>10}{'at most':>10}{'us/token':>10}"]
    for point in found.path:
        shown = ", ".join(f"{d}: {t:g}" for d, t in point.thresholds.items())
        took = "" if point.seconds is None else f"{point.seconds * 1e6:.0f}"
        lines.append(f"{shown:<32}{point.risk:>10.4f}{point.bound:>10.4f}{took:>10}")
    lines.append("")
    if found.reason:
        lines.append(f"Nothing is guaranteed, and the exits are off. {found.reason}")
    else:
        shown = ", ".join(f"{t:g} at depth {d}" for d, t in found.policy.thresholds.items())
        faster = f"; decoding is predicted to be {found.speedup:.2f}x" if found.speedup else ""
        lines.append(
            f"Guaranteed: {found.risk} at most {found.target:g}, with {found.confidence:.0%} "
            f"confidence (measured {found.measured:.4f} on {found.n} answers){faster}. "
            f"Thresholds: {shown}."
        )
    return "\n".join(lines)
