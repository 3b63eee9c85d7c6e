"""`offramp train`: its options are the fields of `TrainConfig`."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from offramp.cli.loading import check_exits, load_model, read_data
from offramp.cli.options import (
    ASKED,
    DATA,
    LOADED,
    add_command,
    asked_again,
    data_options,
    field_options,
    model_options,
    name_option,
)
from offramp.cli.output import say_next, show_result
from offramp.cli.parser import Parser
from offramp.engines import all_engines

log = logging.getLogger(__name__)


GROUPS = {
    "exits": ("depths", "exit_kind", "shortlist"),
    "labels and answers": ("regime", "losses", "max_new_tokens"),
    "schedule": ("steps", "batch_size", "learning_rate", "seed"),
}
"""Fields of `TrainConfig` as the help groups them; --losses holds the weights."""
NOT_SAID = (
    "temperature",
    "discriminator_learning_rate",
    "labelled_fraction",
    "min_confidence",
    "validation_fraction",
    "evaluate_every",
    "patience",
    "cache",
)
"""Fields that are no options, for no measurement speaks for them; in Python they are there."""
REGIMES = ("unsupervised", "supervised")
"""Those of `TrainConfig` that are said; the others are baselines of the lab."""


def add(commands: Any) -> None:
    add_command(
        commands,
        "train",
        "Train exits on a frozen VLM from images with captions, questions, or nothing but prompts.",
        "offramp train tiny-opt --data photos.jsonl --out exits --steps 400",
        _train,
        _options,
        usual="data prompt limit depths shortlist steps out resume",
    )


def _options(parser: Parser) -> None:
    from offramp.core.models.exit_kinds import kinds_of_exit
    from offramp.training.config import TrainConfig

    kinds = [kind for kind in kinds_of_exit() if kind != "lens"]  # which has nothing to train
    model_options(parser)
    data_options(parser, "images with captions, question and answer, dialogue, or alone")
    for title, names in GROUPS.items():
        group = parser.add_argument_group(title)
        field_options(group, TrainConfig, names, exit_kind=kinds, regime=REGIMES)
    group = parser.add_argument_group("output")
    group.add_argument("--out", type=Path, required=True, help="folder for the adapter")
    group.add_argument(
        "--resume", action="store_true", help="continue from the checkpoint in --out"
    )
    group.add_argument(
        "--overwrite", action="store_true", help="replace the adapter or checkpoint in --out"
    )
    group.add_argument(
        "--drafting",
        nargs="?",
        const=True,
        metavar="ADAPTER",
        help="teach the exits of an adapter that is there to draft on, and change nothing else of "
        "them without --of-format. Without a folder: as --exit-kind drafting (default: exits are "
        "trained)",
    )
    if formats := [*_formats()]:
        name_option(
            group,
            "--of-format",
            formats,
            "the exits are for files of this number format: they learn from the backbone with "
            "weights as `offramp export` writes them",
            shown="from the backbone as it is",
        )


def _formats() -> dict[str, Any]:
    """Number formats of files that engines read, and what makes a backbone as it is in one."""
    return {f: one.as_in_file for one in all_engines().values() for f in one.formats}


def _config(arguments: argparse.Namespace) -> Any:
    """The training configuration that was asked for.

    Raises:
        InputError: an option of the adversary without it, or values that do not fit.
    """
    from offramp.training.config import OBJECTIVES, TrainConfig

    asked = {n: getattr(arguments, n) for names in GROUPS.values() for n in names}
    if arguments.drafting is True:
        asked["exit_kind"] = "drafting"
    losses = asked["losses"]
    weights = {name: losses[name] for name in OBJECTIVES if name in losses}
    asked["losses"] = {name: losses[name] for name in losses if name not in weights}
    return TrainConfig(**asked | weights)


def _train(arguments: argparse.Namespace) -> None:
    from accelerate import PartialState

    from offramp.adapter.adapter import Adapter
    from offramp.adapter.shipped import shipped_exits
    from offramp.calibration.asked import Guarantee
    from offramp.training.checkpoint import check_out
    from offramp.training.trainer import train, train_drafting

    config = _config(arguments)
    check_out(arguments.out, resume=arguments.resume, overwrite=arguments.overwrite)
    wanted = Guarantee(target=0.01)
    log.info(
        "To calibrate these exits to 1%% later needs %d images that training does not see, where "
        "no answer loses anything, and about %d where half of that is lost in truth.",
        wanted.images_needed(),
        wanted.images_for(0.005),
    )
    items = read_data(arguments, require_answers=config.regime == "supervised")
    examples = [item.example for item in items]
    backbone, processor = load_model(arguments)
    if backbone.tested:  # those `train` checks itself
        check_exits(backbone, processor, examples[0])
    teacher = None
    if (kind := getattr(arguments, "of_format", None)) is not None:
        teacher = _formats()[kind](backbone, kind)
    if isinstance(arguments.drafting, str):
        adapter = train_drafting(
            Adapter.from_pretrained(
                backbone, shipped_exits(arguments.drafting) or arguments.drafting
            ),
            processor,
            examples,
            config,
            arguments.out,
            overwrite=arguments.overwrite,
            teacher=teacher,
        )
    else:
        adapter = train(
            backbone,
            processor,
            examples,
            config,
            arguments.out,
            resume=arguments.resume,
            overwrite=arguments.overwrite,
            teacher=teacher,
        )
    processes = PartialState()
    processes.destroy_process_group()  # its threads can abort a process that just exits
    if processes.is_main_process:
        learnt = {"checks": adapter.exits.measured} if adapter.exits.measured else {}
        result = {"adapter": str(arguments.out), **adapter.metrics, **learnt}
        show_result(result, as_json=arguments.json)
        how = [name for name in LOADED if name != "backbone"]
        of = f"{arguments.out} --data held_out{asked_again(arguments, *how, *ASKED, *DATA[2:])}"
        say_next(
            f"offramp calibrate {of} --target 0.01   (thresholds)",
            f"offramp calibrate {of} --lossless   (the full model's tokens, faster)",
        )
