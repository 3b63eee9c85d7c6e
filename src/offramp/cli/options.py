"""What the commands share: their options for a model, data and training, and what is read."""

from __future__ import annotations

import argparse
import logging
import typing
from collections.abc import Collection, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from offramp.errors import InputError
from offramp.training.config import TrainConfig

TRAINING = tuple(field.name for field in fields(TrainConfig))


def add_command(
    commands: Any, name: str, help: str, example: str, run: Any
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=help,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def backbone_options(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument(
        "--backbone",
        required=required,
        metavar="NAME",
        help="hub name or folder of the VLM, or tiny-opt or tiny-t5, which ship with offramp",
    )
    parser.add_argument("--revision", help="hub revision of the backbone")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
        help="precision of the backbone (default: as saved)",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="e.g. cpu or cuda (default: cpu)")


def data_options(parser: argparse.ArgumentParser, what: str) -> None:
    """Options that say which examples; what: of the examples, what the command needs."""
    parser.add_argument(
        "--data", required=True, nargs="+", metavar="FILE",
        help=f"{what}: JSONL file, datasets name or folder, or a data set's official file (VQA: "
        "the questions; annotations beside them are found)",
    )  # fmt: skip
    parser.add_argument(
        "--format", default="auto", metavar="FORMAT",
        help="auto, jsonl, coco, karpathy, nocaps, vqav2, okvqa, gqa or visdial (default: auto)",
    )  # fmt: skip
    parser.add_argument(
        "--images", metavar="FOLDER", help="folder of the pictures (default: that of the data)"
    )
    parser.add_argument("--split", help="only this split (Karpathy's files; default there: test)")
    parser.add_argument("--prompt", help="prompt for captions, or a template with {question}")
    parser.add_argument("--limit", type=int, help="read at most so many examples")


def training_options(parser: argparse.ArgumentParser, names: Collection[str] = TRAINING) -> None:
    """A flag for each of these fields, with its help and its default."""
    hints = typing.get_type_hints(TrainConfig)
    for field in fields(TrainConfig):
        if field.name in names:
            default = field.default if field.default_factory is MISSING else None
            _training_option(parser, field.name, hints[field.name], default, dict(field.metadata))


def training_config(
    arguments: argparse.Namespace, names: Collection[str] = TRAINING, **more: Any
) -> TrainConfig:
    """What the flags of these fields say, and `more`."""
    given = {name: getattr(arguments, name) for name in names}
    return TrainConfig(**{**given, "losses": given.get("losses") or {}}, **more)


def _training_option(
    parser: argparse.ArgumentParser, name: str, hint: Any, default: Any, metadata: dict[str, Any]
) -> None:
    flag = f"--{name.replace('_', '-')}"
    shown = f"{metadata['help']} (default: {'none' if default is None else default})"
    if hint is bool:
        parser.add_argument(
            flag, action=argparse.BooleanOptionalAction, default=default, help=shown
        )
        return
    parse: Any = metadata.get("parse") or (hint if isinstance(hint, type) else _whole_or_none)
    if name == "depths":
        parse = _depths
    parser.add_argument(
        flag, type=parse, default=default, choices=metadata.get("choices"), help=shown
    )


def _depths(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _whole_or_none(text: str) -> int | None:
    return None if text.lower() == "none" else int(text)


def read_data(arguments: argparse.Namespace, *, require_answers: bool = True) -> list[Any]:
    """What `data_options` name, as `offramp.data.formats.read_items` reads it."""
    from offramp.data.formats import read_items

    return read_items(
        arguments.data, arguments.images, arguments.format,
        split=arguments.split, prompt=arguments.prompt, limit=arguments.limit,
        require_answers=require_answers,
    )  # fmt: skip


def load_model(arguments: argparse.Namespace, name: str | None = None) -> tuple[Any, Any]:
    """The backbone and its processor."""
    import torch
    from transformers import AutoProcessor

    from offramp.models.backbone import Backbone
    from offramp.models.shipped import TINY, load_tiny

    name = name or arguments.backbone
    kind = name.removeprefix("offramp/").removeprefix("tiny-")
    if kind in TINY and kind != name:
        return load_tiny(kind)
    dtype = "auto" if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    backbone = Backbone.from_pretrained(
        name, revision=arguments.revision, dtype=dtype, device=arguments.device
    )
    try:
        processor = AutoProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            name, revision=arguments.revision
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"No processor could be loaded from {name!r}: {str(error).strip().splitlines()[0]}",
            "Save the model's processor beside it: processor.save_pretrained(folder).",
        ) from error
    return backbone, processor


def load_adapter(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The adapter on its own backbone, or on the one that --backbone names; and the processor."""
    from offramp.adapter import Adapter
    from offramp.save_and_load import CONFIG
    from offramp.storage import read_json

    name = arguments.backbone
    if name is None:
        config = Path(arguments.adapter) / CONFIG
        if not config.is_file():
            raise InputError(
                f"{arguments.adapter} is not an adapter folder on this machine.",
                "Correct --adapter, or name the --backbone of an adapter on the hub.",
            )
        name = read_json(config)["backbone"]["name"]
    backbone, processor = load_model(arguments, name)
    return Adapter.from_pretrained(arguments.adapter, backbone), processor


def adapter_folder(arguments: argparse.Namespace) -> Path:
    """Where a changed adapter is written: --out or, if it is on this machine, its own folder."""
    if arguments.out is None and not Path(arguments.adapter).is_dir():
        raise InputError(
            f"{arguments.adapter} is not a folder on this machine.", "Say where to write: --out."
        )
    return Path(arguments.out or arguments.adapter)


def unseen_items(items: Sequence[Any], adapter: Any, steps: Sequence[str]) -> list[Any]:
    """The items whose pictures the adapter did not use in these steps; tells how many are left."""
    from offramp.data.decontamination import unseen
    from offramp.errors import DataError

    keep = unseen(adapter.seen, [item.example for item in items], steps)
    left = [item for item, kept in zip(items, keep, strict=True) if kept]
    logging.info("%d of %d examples are left out: seen before", len(items) - len(left), len(items))
    if not left:
        raise DataError(
            f"All {len(items)} examples are of pictures that were used before.",
            "Give other data, or more of it (--limit).",
        )
    return left


def policy_of(arguments: argparse.Namespace, adapter: Any) -> Any:
    """The adapter's policy, with what --threshold, --score and --kv change."""
    from dataclasses import replace

    policy = adapter.policy
    if arguments.threshold is not None:
        thresholds = dict.fromkeys(adapter.exits.depths, arguments.threshold)
        policy = replace(policy, thresholds=thresholds, drafts={})
    changes = {n: v for n in ("score", "kv") if (v := getattr(arguments, n)) is not None}
    return replace(policy, **changes)
