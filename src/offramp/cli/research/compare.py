"""`offramp compare`: training objectives and exit policies side by side, at equal quality."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from offramp.cli.options import (
    add_command,
    backbone_options,
    load_model,
    training_config,
    training_options,
)

TRAINING = (
    "regime", "initial_layer", "steps", "batch_size", "learning_rate", "labelled_fraction",
    "min_confidence", "max_new_tokens", "shortlist", "seed",
)  # fmt: skip
"""What the objectives share of a training's options; the seed also splits."""


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "compare",
        "Train exits by several objectives, let tokens leave by several policies, and tell how "
        "fast each is at equal quality.",
        "offramp compare --backbone tiny-opt --data photos.jsonl --out runs/compare\n"
        "  offramp compare --backbone tiny-opt --data questions.jsonl --quality exact_match \\\n"
        "      --objectives free distillation --policies max_probability --out runs/compare",
        _compare,
    )
    backbone_options(parser, required=True)
    parser.add_argument(
        "--data", required=True, metavar="SOURCE",
        help="JSONL file, or a datasets name or folder; split by picture",
    )  # fmt: skip
    parser.add_argument("--split", help="only rows of this split")
    parser.add_argument("--prompt", help="prompt for captions, or a template with {question}")
    parser.add_argument("--limit", type=int, help="read at most so many examples")
    parser.add_argument(
        "--test-fraction", type=float, default=0.3,
        help="share of the pictures to test on; the others train (default: 0.3)",
    )  # fmt: skip
    parser.add_argument(
        "--quality", default="agreement", metavar="NAME",
        help="agreement with the full model, which needs no references; or exact_match, "
        "vqa_accuracy, rouge_l or cider against the data's (default: agreement)",
    )  # fmt: skip
    parser.add_argument(
        "--objectives", nargs="+", metavar="NAME",
        help="of logit_lens, cross_entropy, cross_entropy_few (on --labelled-fraction of the "
        "answers), cross_entropy_own (beside --regime pseudo), distillation, l2, cosine, "
        "adversarial, free_supervised, free_next_layer (beside --initial-layer closest) and free, "
        "which is always there (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--policies", nargs="+", metavar="NAME",
        help="of max_probability, margin, entropy, patience, agreement, saturation, discriminator, "
        "fixed_depth and truncation, on FREE's exits (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--pairs", nargs="+", type=_pair, metavar="OBJECTIVE:POLICY",
        help="methods as they were published, such as logit_lens:saturation (MuE on a frozen "
        "model) or cross_entropy:patience (PABEE), at the depths of --several",
    )  # fmt: skip
    parser.add_argument(
        "--depths", type=int, nargs="+", metavar="DEPTH",
        help="of the exits of every objective (default: a quarter of the layers)",
    )  # fmt: skip
    parser.add_argument(
        "--several", type=int, nargs="+", metavar="DEPTH",
        help="of FREE's exits for policies that need more than one (default: a quarter, a half and "
        "three quarters of the layers)",
    )  # fmt: skip
    training_options(parser, TRAINING)
    parser.add_argument(
        "--timed", type=int, default=12, help="test examples in the race (default: 12)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the race (default: 5)")
    parser.add_argument(
        "--seeds", type=int, default=1,
        help="train and race everything so often; figures are means (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, required=True,
        help="folder for compare.json, compare.svg and what a run that was cut off goes on with",
    )  # fmt: skip


def _pair(text: str) -> tuple[str, str]:
    objective, _, policy = text.partition(":")
    return objective, policy


def _compare(arguments: argparse.Namespace) -> None:
    from offramp.data.datasets import read_examples
    from offramp.data.example import split_examples
    from offramp.errors import check_known
    from offramp.research.comparison.compare import compare
    from offramp.research.comparison.methods import QUALITIES, Plan

    check_known("Quality", [arguments.quality], ("agreement", *QUALITIES))
    given = ("objectives", "policies", "pairs", "depths", "several")
    chosen: dict[str, Any] = {
        n: tuple(v) for n in given if (v := getattr(arguments, n)) is not None
    }
    same = {n: getattr(arguments, n) for n in ("seeds", "timed", "rounds", "max_new_tokens")}
    training = training_config(arguments, TRAINING, patience=None)
    plan = Plan(training=training, **chosen, **same)  # a mistake should not wait for the data
    examples = read_examples(
        arguments.data,
        split=arguments.split,
        prompt_template=arguments.prompt,
        limit=arguments.limit,
        require_answers=arguments.quality != "agreement",
    )
    share = arguments.test_fraction
    parts = split_examples(examples, {"train": 1 - share, "test": share}, arguments.seed)
    found = compare(
        *load_model(arguments),
        parts["train"],
        parts["test"],
        arguments.out,
        plan,
        quality=QUALITIES.get(arguments.quality),
    )
    print(json.dumps({"quality_full": found["quality_full"], **found["equal_quality"]}))
