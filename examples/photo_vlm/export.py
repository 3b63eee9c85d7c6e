"""Take the bridge out of a training's state, and put it with its card where `build` looks."""

from __future__ import annotations

import dataclasses
import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from examples.photo_vlm.build import BRIDGE, load_language, new_bridge, save_bridge
from examples.photo_vlm.command import command, parser_of
from examples.photo_vlm.fetch import LANGUAGE, VISION
from examples.photo_vlm.learn import load_state
from examples.photo_vlm.rows import CAPTIONS, QUESTIONS
from examples.photo_vlm.vision import LiteTowerConfig
from offramp.provenance import provenance
from offramp.storage import digest_file

_TOWER = ("hidden_size", "layers", "heads", "grid", "queries", "image_size")
_CURVE = ("step", "seconds", "CIDEr", "Bleu_4", "accuracy")


def card_of(state: dict[str, Any], tower: LiteTowerConfig, data: Path, log: Path) -> dict[str, Any]:
    """Where a bridge comes from, and how it did while it learnt; digests are SHA-256."""
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    return {
        "tower": {name: getattr(tower, name) for name in _TOWER},
        "steps": state["step"],
        "seconds": round(state["seconds"]),
        "settings": state["settings"],
        "weights": [dataclasses.asdict(weights) for weights in (LANGUAGE, VISION)],
        "data": {name: digest_file(data / name) for name in (CAPTIONS, QUESTIONS)},
        "gguf": metadata.version("gguf"),
        "provenance": provenance(state["settings"]["seed"], sys.argv, None),
        "curve": [{name: row[name] for name in _CURVE} for row in rows if "CIDEr" in row],
    }


@command
def main() -> None:
    parser = parser_of("export", "--work runs/photo_vlm", str(__doc__), "data", "work")
    parser.add_argument("--out", type=Path, default=BRIDGE, help="folder for the bridge")
    arguments = parser.parse_args()
    state = load_state(arguments.work / "state.pt")
    tower = LiteTowerConfig()
    bridge = new_bridge(load_language(arguments.work)[0].config, tower)
    bridge.load_state_dict(state["bridge"]["bridge"])
    log = arguments.work / "log.jsonl"
    save_bridge(bridge, arguments.out, card_of(state, tower, arguments.data, log))
    print(arguments.out)


if __name__ == "__main__":
    main()
