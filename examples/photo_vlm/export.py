"""Take what was learnt out of a training's state, and put it into the data package."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.photo_vlm.command import command, parser_of
from examples.photo_vlm.learn import load_state, low_rank
from examples.photo_vlm.rows import CAPTIONS, QUESTIONS
from offramp.common.provenance import provenance
from offramp.core.storage import atomic_folder, digest_file, read_json, write_json
from offramp_photo.build import CARD, WEIGHTS
from offramp_photo.packages import LANGUAGE, VISION
from offramp_photo.tower import PhotoTowerConfig

PACKAGE = Path("photo-model/offramp_photo")
_TOWER = (
    "hidden_size",
    "neck_size",
    "layers",
    "heads",
    "grid",
    "queries",
    "words",
    "vocabulary",
    "detector_size",
    "image_size",
)
STAGES = {"state": ["state"], "reinforced": ["state", "reinforced"], "talk": ["talk"]}
"""States of the trainings that one export tells of, by its name."""
_CURVE = ("step", "cpu_seconds", "CIDEr", "Bleu_4", "accuracy", "right")


def weights_of(learnt: dict[str, Any], detector: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bridge, detector and low-rank updates, in bfloat16 and by their names in the file."""
    groups = {"bridge": learnt["bridge"], "detector": detector, "lora": low_rank(learnt["lora"])}
    return {
        f"{group}.{name}": tensor.bfloat16().contiguous()
        for group, tensors in groups.items()
        for name, tensor in tensors.items()
    }


def stage_of(state: dict[str, Any], step: int, log: Path) -> dict[str, Any]:
    """One training: up to which of its steps the weights are learnt, how long it took, by which
    settings, and how it did meanwhile."""
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    return {
        "step": step,
        "trained": {"steps": state["step"], "cpu_seconds": round(state["seconds"])},
        "settings": state["settings"],
        "curve": [
            {name: row[name] for name in _CURVE if name in row} for row in rows if "CIDEr" in row
        ],
    }


def card_of(
    stages: Sequence[dict[str, Any]], width: int, words: list[str], data: Path
) -> dict[str, Any]:
    """Where weights come from; digests are SHA-256. width: of the language model."""
    tower = PhotoTowerConfig(hidden_size=width, vocabulary=len(words))
    return {
        "tower": {name: getattr(tower, name) for name in _TOWER},
        "stages": list(stages),
        "base": [dataclasses.asdict(weights) for weights in (LANGUAGE, VISION)],
        "data": {name: digest_file(data / name) for name in (CAPTIONS, QUESTIONS)},
        "terms": "Flickr8k and DAQUAR: research and education only.",
        "gguf": metadata.version("gguf"),
        "provenance": provenance(stages[-1]["settings"]["seed"], sys.argv, None),
        "words": words,
    }


@command
def main() -> None:
    parser = parser_of("export", "--work runs/photo_vlm", str(__doc__), "data", "work")
    parser.add_argument("--out", type=Path, default=PACKAGE, help="folder for weights and card")
    parser.add_argument(
        "--last", action="store_true", help="the last weights, not those of the highest CIDEr"
    )
    parser.add_argument(
        "--of",
        choices=STAGES,
        default="state",
        help="what `train` learnt (state), `reinforce` after it, or `talk` after what --before "
        "tells of, whose last weights are taken (default: %(default)s)",
    )
    parser.add_argument(
        "--before",
        type=Path,
        metavar="CARD",
        help="card of the weights that --start began at: its stages come first",
    )
    arguments = parser.parse_args()
    work: Path = arguments.work
    names = STAGES[arguments.of]
    stages = read_json(arguments.before)["stages"] if arguments.before else []
    for name in names:
        state = load_state(work / f"{name}.pt")
        last = name == names[-1] and (arguments.last or name == "talk")
        learnt = state if last else state["best"]
        stages.append(stage_of(state, learnt["step"], work / f"{name}.jsonl"))
    detectors = torch.load(work / "detectors.pt", weights_only=True)
    whole = "whole."
    detector = {n.removeprefix(whole): t for n, t in detectors.items() if n.startswith(whole)}
    width = learnt["bridge"]["words.table"].shape[1]
    card = card_of(stages, width, read_json(work / "words.json"), arguments.data)
    from safetensors.torch import save_file

    with atomic_folder(arguments.out) as staging:
        save_file(weights_of(learnt, detector), staging / WEIGHTS)
        write_json(staging / CARD, {**card, "sha256": digest_file(staging / WEIGHTS)})
    print(arguments.out)


if __name__ == "__main__":
    main()
