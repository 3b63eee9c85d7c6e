"""What commands read: data, backbone with its processor, adapter; and where they may write."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from offramp.cli.outputs import check_out_adapter
from offramp.core.errors import DataError, InputError
from offramp.engines import AUTO, TORCH

log = logging.getLogger(__name__)


def read_data(arguments: argparse.Namespace, *, require_answers: bool = True) -> list[Any]:
    """Return the examples that `data_options` name, by `offramp.data.formats.read_items`."""
    from offramp.data.formats import read_items
    from offramp.data.rows import NoAnswerError

    try:
        return read_items(
            arguments.data,
            arguments.images,
            split=arguments.split,
            prompt=arguments.prompt,
            limit=arguments.limit,
            require_answers=require_answers,
            group_by=arguments.group_by,
        )
    except NoAnswerError as error:
        without = [
            f"--{name} {value}"
            for name, value in (("regime", "unsupervised"), ("risk", "disagreement"))
            if hasattr(arguments, name)
        ]
        hint = f" {' and '.join(without)} needs none." if without else ""
        raise DataError(error.problem, f"{error.remedy}{hint}") from error


BACKBONE = ("revision", "dtype", "device", "quantize", "vision", "shrink_on_load")
"""Options of how a backbone is opened."""
ADAPTER = (*BACKBONE, "backbone", "engine", "gguf", "context", "threads", "chat_template")
"""Options of how an adapter is opened, as `offramp.load` takes them."""


def loaded(arguments: argparse.Namespace, **more: Any) -> Any:
    """Return the adapter that the command names, opened by its options, as a `Loaded`.

    more: arguments of `offramp.load`, instead of options.
    """
    asked = {"engine": TORCH, "vision": TORCH, **_given(arguments, ADAPTER), **more}
    name = asked.pop("name") if "name" in asked else arguments.adapter
    _told(name)
    from offramp.engines.loading import load

    return load(name, **asked)


def _told(name: str) -> None:
    """On a terminal, say what is waited for."""
    if sys.stderr.isatty():
        log.info("opening %s", name)


def check_name(name: str, *, exits: bool) -> None:
    """Look for a model before PyTorch is loaded, which takes seconds. exits: whether the name is to
    be of exits.

    Raises:
        AdapterError: there are no exits of that name. InputError: nor a model.
    """
    from offramp.adapter.shipped import check_spelling, exits_folder, photo_kind, tiny_kind
    from offramp.common.names import close_name, is_hub_name

    if photo_kind(name) or tiny_kind(name) or os.path.isdir(name) or is_hub_name(name):
        return
    if exits:
        exits_folder(name)
    check_spelling(name)
    if os.sep in name:  # else it may be one of the hub's names without an owner
        raise InputError(
            f"No vision-language model could be loaded from {name!r}: there is no such folder.",
            f"{close_name(name)}Give a folder written by save_pretrained, or a hub name such as "
            "Salesforce/blip2-opt-2.7b.",
        )


def load_model(
    arguments: argparse.Namespace, name: str | None = None, revision: str | None = None
) -> tuple[Any, Any]:
    """Return the backbone and its processor. revision: used without --revision."""
    name = arguments.backbone if name is None else name
    if name is None:
        raise InputError("No backbone was named.", "Give --backbone NAME.")
    check_name(name, exits=False)
    _told(name)
    from offramp.engines import engine_named
    from offramp.engines.loading import open_backbone

    asked = {"revision": revision, **_given(arguments, BACKBONE)}
    if asked.get("vision") == AUTO:
        asked["vision"] = TORCH
    backbone, processor = open_backbone(name, **asked)
    return engine_named(getattr(arguments, "engine", TORCH)).open(backbone), processor


def _given(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """The options of these names that the command has and that say something."""
    found = {name: getattr(arguments, name, None) for name in names}
    return {name: value for name, value in found.items() if value not in (None, False)}


@contextmanager
def answering(arguments: argparse.Namespace) -> Iterator[tuple[Any, Any]]:
    """The adapter that the command names, as a `Loaded`, and what answers in its place: a runtime,
    a server of the engine's own that ends with this context, or None."""
    from offramp.engines import engine_named

    asks = None if arguments.engine == AUTO else engine_named(arguments.engine).asks
    if asks is None:
        opened = loaded(arguments, keep_decoder=True)
        yield opened, opened.runtime
        return
    opened = loaded(arguments, engine=TORCH)
    with asks(opened, arguments) as server:
        yield opened, server


def check_engine(arguments: argparse.Namespace, *, asks: bool = False) -> None:
    """Raise `InputError` for a mistake in the engine's options, before the model loads. asks: as of
    `offramp.engines.check_asked`."""
    from offramp.engines import check_asked

    vision = getattr(arguments, "vision", TORCH)
    check_asked(arguments.engine, arguments.gguf, arguments.quantize, vision, asks=asks)
    if arguments.gguf is not None and not arguments.gguf.is_dir():
        raise InputError(
            f"There is no folder {str(arguments.gguf)!r} of files for llama.cpp.",
            "Write it: offramp export FOLDER --gguf q8_0 --out FOLDER.",
        )


def check_exits(backbone: Any, processor: Any, example: Any) -> dict[str, Any]:
    """Run part 3 of the self-check on one example; return the findings in words, which the backbone
    takes over.

    Raises:
        UnsupportedBackboneError: decoding with exits would not be the model's own.
    """
    from offramp.features.input_processor import InputProcessor
    from offramp.features.self_check import adopt_findings, check_decoding

    check = check_decoding(backbone, InputProcessor(backbone, processor).prompts([example]))
    adopt_findings(backbone, check)
    return {
        "exits": "the model's own logits, to rounding",
        "first_token": "may exit" if check.holds(check.first_token) else "runs whole",
        "lossless": "exact" if check.holds(check.lossless) else "refused",
    }


def adapter_folder(arguments: argparse.Namespace) -> Path:
    """Return the folder for a changed adapter: --out or, if it is on this machine, its own folder.

    Raises:
        InputError: neither is given, --out holds another adapter, or there are no exits to save.
            StorageError: it cannot be written.
    """
    from offramp.adapter.shipped import shipped_exits
    from offramp.common.folders import check_writable

    shipped_exits(arguments.adapter)  # raises for a model that ships without
    if arguments.out is None and not os.path.isdir(arguments.adapter):
        raise InputError(
            f"{arguments.adapter} is not a folder on this machine.", "Say where to write: --out."
        )
    out = Path(arguments.out or arguments.adapter)
    check_writable(out, folder=True)
    check_out_adapter(out, Path(arguments.adapter), arguments)
    return out


def unseen_items(items: Sequence[Any], adapter: Any, steps: Sequence[str]) -> list[Any]:
    """Return the items whose images the adapter did not use in these steps; report the number left
    out."""
    from offramp.data.decontamination import unseen

    keep = unseen(adapter.seen, [item.example for item in items], steps)
    left = [item for item, is_unseen in zip(items, keep, strict=True) if is_unseen]
    log.info("%d of %d examples are left out: used before", len(items) - len(left), len(items))
    if not left:
        raise DataError(
            f"All {len(items)} examples are of images that were used before.",
            "Give other data, or more of it (--limit).",
        )
    return left


def policy_of(
    arguments: argparse.Namespace, adapter: Any, prompt: str, engine: str | None = None
) -> Any:
    """Return the adapter's policy for a prompt, or at the threshold of --threshold. engine: as of
    `Adapter.standing`."""
    from dataclasses import replace

    if arguments.threshold is None:
        return adapter.policy_of(prompt, engine=engine)
    thresholds = dict.fromkeys(adapter.exits.depths, arguments.threshold)
    return replace(adapter.policy.at(thresholds), drafts={})
