"""`offramp train`: its flags are the fields of `TrainConfig`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from offramp.cli.options import (
    add_command,
    backbone_options,
    data_options,
    load_model,
    read_data,
    training_config,
    training_options,
)


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "train",
        "Train exits on a frozen VLM from images with captions, questions, or nothing but prompts.",
        "offramp train --backbone tiny-opt --data photos.jsonl --out exits --steps 400",
        _train,
    )
    backbone_options(parser, required=True)
    data_options(parser, "images with captions, question and answer, dialogue, or alone")
    parser.add_argument("--out", type=Path, required=True, help="folder for the adapter")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument(
        "--gates", action="store_true",
        help="learn a gate before each exit, where it pays, that guesses if a look is worth it",
    )  # fmt: skip
    training_options(parser)


def _train(arguments: argparse.Namespace) -> None:
    from accelerate import PartialState
    from tqdm import tqdm

    from offramp.calibration.gates import learn_shortlist_and_gates
    from offramp.calibration.profiler import measure_costs
    from offramp.models.input_processor import InputProcessor
    from offramp.training.trainer import train

    config = training_config(arguments)
    items = read_data(arguments, require_answers=config.regime == "supervised")
    examples = [item.example for item in items]
    backbone, processor = load_model(arguments)
    adapter = train(backbone, processor, examples, config, arguments.out, resume=arguments.resume)
    processes = PartialState()
    processes.destroy_process_group()  # its threads can abort a process that just exits
    if processes.is_main_process:
        if arguments.gates:
            encoder = InputProcessor(backbone, processor)
            costs = measure_costs(
                backbone, encoder.prompts(examples[:1]), adapter.exits,
                score=adapter.policy.score, shortlist=adapter.policy.shortlist,
            )  # fmt: skip
            adapter = learn_shortlist_and_gates(
                adapter, encoder, examples,
                gates=True, costs=costs, max_new_tokens=config.max_new_tokens,
                progress=lambda some: tqdm(some, "gates", disable=None, leave=False),
            )  # fmt: skip
            adapter.save(arguments.out)
        learnt = {"checks": adapter.exits.measured} if adapter.exits.measured else {}
        print(json.dumps({"adapter": str(arguments.out), **adapter.metrics, **learnt}))
