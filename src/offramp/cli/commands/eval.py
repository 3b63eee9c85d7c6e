"""`offramp eval`: quality, depth and latency on a data set."""

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
    policy_of,
    read_data,
    unseen_items,
)
from offramp.errors import InputError


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "eval",
        "Measure quality, depth and latency on a data set, with the full model and early exits.",
        "offramp eval --adapter exits --task captions --data photos.jsonl --out runs/captions\n"
        "  offramp eval --adapter exits --task vqa --images val2014 --out runs/vqa \\\n"
        "      --data v2_OpenEnded_mscoco_val2014_questions.json\n"
        "  offramp eval --adapter exits --task vqa --data ... --out runs/vqa --resume\n"
        "  offramp eval --backbone tiny-opt --mode full --task gqa --data questions.jsonl "
        "--out runs/gqa",
        _eval,
    )
    parser.add_argument("--adapter", help="folder or hub name of trained exits")
    backbone_options(parser, required=False)
    parser.add_argument(
        "--task", required=True, metavar="TASK", help="captions, vqa, okvqa, gqa or dialogue"
    )
    data_options(parser, "what is evaluated")
    parser.add_argument(
        "--mode",
        metavar="MODE",
        help="full, early_exit or both (default: both; without --adapter full)",
    )
    parser.add_argument(
        "--threshold", type=float, help="one threshold for all exits, instead of the adapter's"
    )
    parser.add_argument("--score", help="confidence score, instead of the adapter's")
    parser.add_argument("--kv", help="recompute or propagate, instead of the adapter's")
    parser.add_argument(
        "--metrics", nargs="+", metavar="METRIC", help="only these (default: all of the task's)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=1, help="more than 1 measures quality only (default: 1)"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        help="default: 40 for captions, 20 for dialogue, 10 for questions",
    )
    parser.add_argument(
        "--ranking",
        default="sum",
        metavar="HOW",
        help="candidates' log-likelihood: sum, or mean per token (default: sum)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the intervals (default: 0)")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for rows.jsonl (an answer a line) and result.json",
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument(
        "--allow-seen",
        action="store_true",
        help="take pictures that the exits were trained or calibrated on",
    )
    parser.add_argument(
        "--leave-out-seen", action="store_true", help="leave out such pictures, and say how many"
    )
    parser.add_argument(
        "--rescore",
        action="store_true",
        help="score the answers in --out again; no model is loaded",
    )


def _eval(arguments: argparse.Namespace) -> None:
    from tqdm import tqdm

    from offramp.evaluation.evaluate import evaluate, rescore
    from offramp.evaluation.tasks import Settings
    from offramp.models.input_processor import InputProcessor

    names = ("batch_size", "max_new_tokens", "ranking", "seed")
    settings = {name: getattr(arguments, name) for name in names}
    alone = arguments.adapter is None and not arguments.rescore
    settings["mode"] = arguments.mode or ("full" if alone else "both")
    settings["metrics"] = None if arguments.metrics is None else tuple(arguments.metrics)
    Settings(arguments.task, **settings)  # a mistake should not wait for data and model
    if alone and arguments.backbone is None:
        raise InputError("Nothing to evaluate was named.", "Give --adapter, or --backbone.")
    items = read_data(arguments)
    if arguments.rescore:
        result = rescore(arguments.out, items, arguments.task, **settings)
    else:
        model, processor = load_model(arguments) if alone else load_adapter(arguments)
        backbone = model if alone else model.backbone
        if arguments.leave_out_seen and not alone:
            items = unseen_items(items, model, ("train", "calibration"))
        result = evaluate(
            model,
            InputProcessor(backbone, processor),
            items,
            arguments.task,
            None if alone else policy_of(arguments, model),
            out=arguments.out,
            resume=arguments.resume,
            allow_seen=arguments.allow_seen,
            progress=lambda batches: tqdm(batches, "evaluate", disable=None),
            **settings,
        )
    print(json.dumps(result, ensure_ascii=False))
