"""Take what was learnt out of a training's state, and put it into the data package."""

from __future__ import annotations

import dataclasses
import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.photo_vlm.command import command, parser_of
from examples.photo_vlm.learn import load_state, low_rank
from examples.photo_vlm.rows import CAPTIONS, QUESTIONS
from offramp.models.photo.build import CARD, WEIGHTS
from offramp.models.photo.packages import LANGUAGE, VISION
from offramp.models.photo.tower import PhotoTowerConfig
from offramp.provenance import provenance
from offramp.storage import atomic_folder, digest_file, read_json, write_json

PACKAGE = Path("photo-model/offramp_photo")
_TOWER = (
    "hidden_size", "neck_size", "layers", "heads", "grid", "queries", "words", "vocabulary",
    "detector_size", "image_size",
)  # fmt: skip
_CURVE = ("step", "cpu_seconds", "CIDEr", "Bleu_4", "accuracy")


def weights_of(learnt: dict[str, Any], detector: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bridge, detector and low-rank updates, in bfloat16 and by their names in the file."""
    groups = {"bridge": learnt["bridge"], "detector": detector, "lora": low_rank(learnt["lora"])}
    return {
        f"{group}.{name}": tensor.bfloat16().contiguous()
        for group, tensors in groups.items()
        for name, tensor in tensors.items()
    }


def learning_of(state: dict[str, Any], log: Path) -> dict[str, Any]:
    """How long and by which settings a state was learnt, and how it did meanwhile."""
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    return {
        "trained": {"steps": state["step"], "cpu_seconds": round(state["seconds"])},
        "settings": state["settings"],
        "curve": [{name: row[name] for name in _CURVE} for row in rows if "CIDEr" in row],
    }


def card_of(
    state: dict[str, Any], step: int, words: list[str], data: Path, log: Path
) -> dict[str, Any]:
    """Where the weights of a step come from; digests are SHA-256."""
    tower = PhotoTowerConfig(
        hidden_size=state["bridge"]["words.table"].shape[1], vocabulary=len(words)
    )
    return {
        "tower": {name: getattr(tower, name) for name in _TOWER},
        "steps": step,
        **learning_of(state, log),
        "base": [dataclasses.asdict(weights) for weights in (LANGUAGE, VISION)],
        "data": {name: digest_file(data / name) for name in (CAPTIONS, QUESTIONS)},
        "terms": "Flickr8k and DAQUAR: research and education only.",
        "gguf": metadata.version("gguf"),
        "provenance": provenance(state["settings"]["seed"], sys.argv, None),
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
        "--reinforced", action="store_true", help="what `reinforce` learnt after `train`"
    )
    arguments = parser.parse_args()
    work: Path = arguments.work
    state = load_state(work / "state.pt")
    reinforced = load_state(work / "reinforced.pt") if arguments.reinforced else None
    detectors = torch.load(work / "detectors.pt", weights_only=True)
    whole = "whole."
    detector = {n.removeprefix(whole): t for n, t in detectors.items() if n.startswith(whole)}
    final = reinforced or state
    learnt = final if arguments.last else final["best"]
    words = read_json(work / "words.json")
    card = card_of(state, learnt["step"], words, arguments.data, work / "state.jsonl")
    if reinforced:
        card["reinforced"] = learning_of(reinforced, work / "reinforced.jsonl")
    from safetensors.torch import save_file

    with atomic_folder(arguments.out) as staging:
        save_file(weights_of(learnt, detector), staging / WEIGHTS)
        write_json(staging / CARD, {**card, "sha256": digest_file(staging / WEIGHTS)})
    print(arguments.out)


if __name__ == "__main__":
    main()
