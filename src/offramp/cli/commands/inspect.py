"""`offramp inspect`: an adapter, or what a backbone could carry."""

from __future__ import annotations

import argparse
import logging
import os
from typing import Any

from offramp.cli.loading import check_exits, load_model
from offramp.cli.options import add_command, precision_options
from offramp.cli.output import say_next, show_result
from offramp.cli.parser import Parser
from offramp.errors import InputError

log = logging.getLogger(__name__)


def add(commands: Any) -> None:
    add_command(
        commands,
        "inspect",
        "Describe an adapter, or what exits could be attached to a backbone.",
        "offramp inspect tiny-opt",
        _inspect,
        _options,
    )


def _options(parser: Parser) -> None:
    parser.add_argument("name", help="adapter folder, or hub name or folder of a model")
    precision_options(parser.add_argument_group("model"))


def _inspect(arguments: argparse.Namespace) -> None:
    from offramp.save_and_load import CONFIG

    is_adapter = os.path.isfile(os.path.join(arguments.name, CONFIG))
    options = ("revision", "dtype", "device", "quantize")
    named = [n for n in options if getattr(arguments, n) not in (None, "auto")]
    if is_adapter and named:
        raise InputError(
            f"{arguments.name} is an adapter, to which --{named[0]} says nothing.",
            f"Leave --{named[0]} out, or name a backbone.",
        )
    description = _adapter(arguments.name) if is_adapter else _backbone(arguments)
    show_result(description, as_json=arguments.json)
    if is_adapter:
        say_next(f"offramp generate --adapter {arguments.name} --image dog.jpg")
        return
    depth = next(iter(description["proposed_depths"].values()), [1])[0]
    say_next(
        f"offramp train --backbone {arguments.name} --data photos --depths {depth} --out exits"
    )


def _adapter(name: str) -> dict[str, Any]:
    """What adapter.json holds, without the digests."""
    from offramp.save_and_load import UNCHECKED, load_certificate, read_config

    config = read_config(name)
    if config.files is None:
        log.warning(UNCHECKED, name)
    entries = dict(config.raw)
    for digest in ("digest", "files"):
        entries.pop(digest, None)
    entries["backbone"] = {n: v for n, v in entries["backbone"].items() if n != "fingerprint"}
    certificate = load_certificate(config)
    entries["verified"] = [] if certificate is None else [run.words for run in certificate.runs]
    return entries


def _backbone(arguments: argparse.Namespace) -> dict[str, Any]:
    from PIL import Image

    from offramp.data.example import Example
    from offramp.models.exits import propose_depths
    from offramp.models.fingerprint import describe

    backbone, processor = load_model(arguments, arguments.name)
    description = describe(backbone)
    blank = (
        Example.of_text("Who are you?", key="blank")
        if backbone.text_only
        else Example(Image.new("RGB", (64, 64)), "Describe the image.", (), "blank")
    )
    description["decoding"] = check_exits(backbone, processor, blank)
    description["proposed_depths"] = {
        n: list(propose_depths(backbone.depth, n)) for n in (1, 2, 3) if n < backbone.depth
    }
    return description
