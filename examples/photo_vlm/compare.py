"""Hold FREE against other objectives and policies on photographs, by speed at equal CIDEr.

FREE learns from the captions that the model is sure of, without labels; cross-entropy reads all
captions that people wrote, or those of a tenth of the photographs. Takes about two hours of one
core; cut off, it goes on where it stopped. Then: python -m offramp_lab.pages.readme
"""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path

import torch

from examples.photo_vlm.command import command, parser_of
from examples.photo_vlm.evaluate import LONGEST, load
from examples.photo_vlm.rows import read_photographs
from offramp.calibration.risk_functions import QUALITIES
from offramp.core.storage import write_json
from offramp.training.config import FREE, TrainConfig
from offramp_lab.experiments.comparison.compare import compare
from offramp_lab.experiments.comparison.methods import Plan

RECORD = Path("lab/records/compare-photo.json")
PLAN = Plan(
    objectives=(
        "logit_lens",
        "cross_entropy",
        "cross_entropy_few",
        "cross_entropy_own",
        "distillation",
        "free",
    ),
    policies=("patience", "agreement", "saturation"),
    pairs=(("logit_lens", "saturation"),),
    depths=(4,),
    several=(4, 8, 16),
    quantiles=(0.0, 0.15, 0.35, 0.55, 0.75),
    training=TrainConfig(
        exit_kind="layer",
        regime="pseudo",
        min_confidence=0.35,
        shortlist=2048,
        steps=1500,
        learning_rate=5e-4,
        evaluate_every=300,
        patience=None,
        max_new_tokens=LONGEST["captions"],
        **FREE,
    ),
    timed=50,
    rounds=1,
    max_new_tokens=LONGEST["captions"],
)
SIZES = (800, 300)
"""Photographs to train and to test on."""
QUICK = replace(
    PLAN,
    training=replace(PLAN.training, steps=4, evaluate_every=4),
    quantiles=(0.0, 0.5),
    timed=1,
    rounds=1,
)
QUICK_SIZES = (32, 8)


@command
def main() -> None:
    parser = parser_of("compare", "--quick", str(__doc__), "data", "work")
    parser.add_argument("--quick", action="store_true", help="only to try it out")
    parser.add_argument("--out", type=Path, default=RECORD)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    torch.set_num_threads(1)
    backbone, encoder = load()
    splits = read_photographs(arguments.data)
    plan, (taught, tested) = (QUICK, QUICK_SIZES) if arguments.quick else (PLAN, SIZES)
    place = arguments.work / ("compared-quick" if arguments.quick else "compared")
    train, test = splits["captions"][:taught], splits["captions_val"][:tested]
    comparison = compare(
        backbone, encoder.processor, train, test, place, plan, quality=QUALITIES["cider"]
    )
    write_json(arguments.out, comparison)
    print(comparison["equal_quality"], file=sys.stderr)


if __name__ == "__main__":
    main()
