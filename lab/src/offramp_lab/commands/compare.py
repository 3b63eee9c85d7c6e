"""`offramp-lab compare`: training objectives and exit policies side by side, at equal quality."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from offramp.cli.loading import load_model, read_data
from offramp.cli.options import (
    add_command,
    data_options,
    field_options,
    filled,
    model_options,
    name_option,
)
from offramp.cli.output import show_result
from offramp.cli.parser import Parser, one_of

TRAINING = (
    "regime", "steps", "batch_size", "learning_rate", "labelled_fraction",
    "min_confidence", "max_new_tokens", "shortlist", "seed",
)  # fmt: skip
"""What the objectives share of a training's options; the seed also splits."""


def add(commands: Any) -> None:
    add_command(
        commands,
        "compare",
        "Train exits by several objectives, decode by several policies, and show how fast each is "
        "at equal quality.",
        "offramp-lab compare tiny-opt --data photos.jsonl --out runs/compare\n"
        "  offramp-lab compare tiny-opt --data questions.jsonl \\\n"
        "      --quality exact_match --objectives free distillation "
        "--policies max_probability --out runs/compare",
        _compare,
        _options,
        usual="data limit objectives policies depths steps quality seeds out",
    )


def _options(parser: Parser) -> None:
    from offramp.calibration.risk_functions import QUALITIES
    from offramp.training.config import TrainConfig
    from offramp_lab.experiments.comparison.methods import Plan

    model_options(parser)
    data_options(parser, "split by image").add_argument(
        "--test-fraction", type=float, default=0.3, metavar="X",
        help="share of the images to test on; the others train (default: 0.3)",
    )  # fmt: skip
    _method_options(parser)
    field_options(parser.add_argument_group("training"), TrainConfig, TRAINING)
    group = parser.add_argument_group("measuring and output")
    name_option(
        group,
        "--quality",
        ("agreement", *QUALITIES),
        "agreement with the full model, which needs no references, or a metric against the data's",
        default="agreement",
    )
    field_options(group, Plan, ("seeds", "timed", "rounds"))
    group.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for compare.json, compare.svg and what an interrupted run continues from",
    )


def _method_options(parser: Parser) -> None:
    from offramp_lab.experiments.comparison.methods import OBJECTIVES, POLICIES, Plan

    group = parser.add_argument_group("methods")
    group.add_argument(
        "--objectives", nargs="+", metavar="NAME", choices=OBJECTIVES,
        help=f"{one_of(OBJECTIVES)}; free is always there (default: all). cross_entropy_few uses "
        "--labelled-fraction of the answers, cross_entropy_own goes beside --regime pseudo",
    )  # fmt: skip
    group.add_argument(
        "--policies", nargs="+", metavar="NAME", choices=POLICIES,
        help=f"{one_of(POLICIES)}, on FREE's exits (default: all)",
    )  # fmt: skip
    group.add_argument(
        "--pairs", nargs="+", type=_pair, metavar="OBJECTIVE:POLICY",
        help="methods as they were published, such as logit_lens:saturation (MuE on a frozen "
        "model) or cross_entropy:patience (PABEE), at the depths of --several",
    )  # fmt: skip
    field_options(group, Plan, ("depths", "several", "exit_in_prefill"))


def _pair(text: str) -> tuple[str, str]:
    objective, _, policy = text.partition(":")
    return objective, policy


def _compare(arguments: argparse.Namespace) -> None:
    from offramp.calibration.risk_functions import QUALITIES
    from offramp.data.example import split_examples
    from offramp.storage import check_writable
    from offramp.training.config import FREE, TrainConfig
    from offramp_lab.experiments.comparison.compare import compare
    from offramp_lab.experiments.comparison.methods import Plan

    names = ("objectives", "policies", "pairs")
    named = {n: tuple(v) for n in names if (v := getattr(arguments, n)) is not None}
    chosen = {"max_new_tokens": arguments.max_new_tokens, **filled(arguments, Plan), **named}
    training = TrainConfig(
        **{n: getattr(arguments, n) for n in TRAINING}, **FREE, exit_kind="layer", patience=None
    )
    plan = Plan(training=training, **chosen)  # a mistake should not wait for the data
    check_writable(arguments.out, folder=True)
    items = read_data(arguments, require_answers=arguments.quality != "agreement")
    examples = [item.example for item in items]
    share = arguments.test_fraction
    parts = split_examples(examples, {"train": 1 - share, "test": share}, arguments.seed)
    comparison = compare(
        *load_model(arguments), parts["train"], parts["test"], arguments.out, plan,
        quality=QUALITIES.get(arguments.quality),
    )  # fmt: skip
    result = {"quality_full": comparison["quality_full"], **comparison["equal_quality"]}
    show_result(result, as_json=arguments.json)
