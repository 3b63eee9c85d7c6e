"""Train one of the two tiny BLIP-2 models that ship with offramp, from nothing, on one CPU core.

    python -m offramp_lab.recipes.tiny_vlm.train --backbone opt --work-dir build/tiny_vlm

Runs what is not done yet: eyes (shared by both backbones), features, language, export, record. Stop
it at any time and run it again; it goes on from checkpoints, which are
never more than a few minutes old.
"""

import argparse
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy
import PIL
import torch
import transformers
from transformers import AutoProcessor, Blip2ForConditionalGeneration

from offramp.models.shipped import tiny_folder
from offramp.storage import read_json, write_json
from offramp_lab.recipes.tiny_vlm.build import build_model, build_tokenizer, export
from offramp_lab.recipes.tiny_vlm.checkpointing import load
from offramp_lab.recipes.tiny_vlm.evaluate import full
from offramp_lab.recipes.tiny_vlm.train_language import pool
from offramp_lab.recipes.tiny_vlm.train_language import train as train_language
from offramp_lab.recipes.tiny_vlm.train_vision import train as train_eyes

TINY = tiny_folder("opt").parent


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", choices=("opt", "t5"), required=True)
    parser.add_argument(
        "--work-dir", type=Path, required=True, help="checkpoints, features and logs"
    )
    parser.add_argument(
        "--export-dir", type=Path, default=TINY, help="the model goes to a folder in here"
    )
    parser.add_argument("--record", type=Path, default=Path(__file__).with_name("record.json"))
    parser.add_argument("--see-steps", type=int, default=3000, help="steps of stage 1, batch 64")
    parser.add_argument("--speak-steps", type=int, default=5000, help="steps of stage 2")
    parser.add_argument(
        "--restart", type=int, default=0, help="step of stage 2 at which the schedule starts again"
    )
    parser.add_argument("--pool", type=int, default=40_000, help="training scenes of stage 2")
    parser.add_argument(
        "--scenes", type=int, default=500, help="test scenes of the final evaluation"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only",
        choices=("train", "export", "record"),
        help="do one part, from the last checkpoint",
    )
    return parser.parse_args()


def trained(args: argparse.Namespace) -> Blip2ForConditionalGeneration:
    eyes = train_eyes(args.work_dir, args.see_steps, seed=args.seed)
    states = pool(eyes, args.work_dir, args.pool)
    return train_language(
        args.backbone,
        eyes,
        states,
        args.work_dir,
        args.speak_steps,
        seed=args.seed,
        restart=args.restart,
    )


def latest(args: argparse.Namespace) -> Blip2ForConditionalGeneration:
    """The model of the last checkpoint, whether training is done or not."""
    state = load(args.work_dir / f"speak-{args.backbone}.pt")
    if state is None:
        raise SystemExit(f"no checkpoint of {args.backbone} in {args.work_dir}: train first")
    model = build_model(args.backbone, len(build_tokenizer(args.backbone)))
    model.load_state_dict(state["model"])
    return model


def training(args: argparse.Namespace) -> dict[str, Any]:
    """Steps and seconds of both stages, as the checkpoints tell them."""
    files = ("see.pt", f"speak-{args.backbone}.pt")
    eyes, language = (load(args.work_dir / file) for file in files)
    if eyes is None or language is None:
        raise SystemExit(f"no checkpoints in {args.work_dir}: train first")
    return {
        "see_steps": eyes["step"],
        "see_seconds": round(eyes["seconds"]),
        "speak_steps": language["step"],
        "speak_seconds": round(language["seconds"]),
        "pool_scenes": args.pool,
        "seed": args.seed,
    }


def record(args: argparse.Namespace) -> dict[str, Any]:
    """What the exported model does on the test split, loaded as users load it."""
    folder = args.export_dir / args.backbone
    model = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    started = time.monotonic()
    scores = full(model, AutoProcessor.from_pretrained(folder), "test", args.scenes)
    return {
        **scores,
        "evaluation_seconds": round(time.monotonic() - started),
        "parameters": sum(p.numel() for p in model.parameters()),
        "language_parameters": sum(p.numel() for p in model.language_model.parameters()),
        "folder_bytes": sum(file.stat().st_size for file in folder.iterdir()),
        "training": training(args),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": numpy.__version__,
            "pillow": PIL.__version__,
        },
    }


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in sorted(value.items())}
    return round(value, 4) if isinstance(value, float) else value


def write_record(args: argparse.Namespace, entry: dict[str, Any]) -> None:
    """Replace this backbone's entry of the record."""
    everything = read_json(args.record) if args.record.exists() else {}
    write_json(args.record, rounded({**everything, args.backbone: entry}))


def main() -> None:
    torch.set_num_threads(1)  # the models are so small that a second thread gains little
    args = arguments()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    if args.only in (None, "train"):
        trained(args)
    if args.only in (None, "export"):
        args.export_dir.mkdir(parents=True, exist_ok=True)
        export(latest(args), args.backbone, args.export_dir / args.backbone)
    if args.only in (None, "record"):
        write_record(args, record(args))
        print(f"wrote {args.record}", file=sys.stderr)


if __name__ == "__main__":
    main()
