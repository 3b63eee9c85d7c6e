"""`offramp inspect`: an adapter, or what a backbone could carry."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from offramp.cli.options import add_command, load_model


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "inspect",
        "Describe an adapter, or what exits could be attached to a backbone.",
        "offramp inspect tiny-opt",
        _inspect,
    )
    parser.add_argument("name", help="adapter folder, or hub name or folder of a VLM")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--revision", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="auto", help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cpu", help=argparse.SUPPRESS)


def _inspect(arguments: argparse.Namespace) -> None:
    from offramp.save_and_load import CONFIG
    from offramp.storage import read_json

    config = Path(arguments.name) / CONFIG
    if config.is_file():
        found = read_json(config)
        found["backbone"].pop("fingerprint", None)
    else:
        from offramp.models.backbone import describe
        from offramp.models.exits import propose_depths

        backbone, _ = load_model(arguments, arguments.name)
        found = describe(backbone)
        found["proposed_depths"] = {
            n: list(propose_depths(backbone.depth, n)) for n in (1, 2, 3) if n < backbone.depth
        }
    if arguments.json:
        print(json.dumps(found, ensure_ascii=False))
        return
    for key, value in found.items():
        print(
            f"{key}: {json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value}"
        )
