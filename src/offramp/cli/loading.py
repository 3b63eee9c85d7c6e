"""What commands read: data, backbone with its processor, adapter; and where they may write."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from offramp.cli.outputs import check_out_adapter
from offramp.core.errors import DataError, InputError
from offramp.engines import AUTO, TORCH

log = logging.getLogger(__name__)


def read_data(arguments: argparse.Namespace, *, require_answers: bool = True) -> list[Any]:
    """Return what `data_options` name, as `offramp.data.formats.read_items` reads it."""
    from offramp.data.formats import read_items
    from offramp.data.rows import NoAnswerError

    try:
        return read_items(
            arguments.data, arguments.images, split=arguments.split, prompt=arguments.prompt,
            limit=arguments.limit, require_answers=require_answers, group_by=arguments.group_by,
        )  # fmt: skip
    except NoAnswerError as error:
        without = [
            f"--{name} {value}"
            for name, value in (("regime", "unsupervised"), ("risk", "disagreement"))
            if hasattr(arguments, name)
        ]
        hint = f" {' and '.join(without)} needs none." if without else ""
        raise DataError(error.problem, f"{error.remedy}{hint}") from error


def load_model(
    arguments: argparse.Namespace, name: str | None = None, revision: str | None = None
) -> tuple[Any, Any]:
    """The backbone and its processor. revision: where --revision does not give another."""
    from offramp.adapter.shipped import tiny_kind
    from offramp.engines.loading import open_backbone, own_vision
    from offramp.features.shrink_on_load import with_shrink_on_load

    name = arguments.backbone if name is None else name
    if name is None:
        raise InputError("No backbone was named.", "Give --backbone NAME.")
    quantize = getattr(arguments, "quantize", None)
    backbone, processor = open_backbone(
        name,
        revision=arguments.revision or revision,
        dtype=arguments.dtype,
        device=choose_device(
            arguments.device, is_tiny=tiny_kind(name) is not None, quantize=quantize
        ),
        quantize=quantize,
        vision=own_vision(getattr(arguments, "vision", TORCH), _engine(arguments)),
    )
    if getattr(arguments, "shrink_on_load", False):
        processor = with_shrink_on_load(processor)
    return laid_out(arguments, backbone), processor


def check_exits(backbone: Any, processor: Any, example: Any) -> dict[str, Any]:
    """Part 3 of the self-check on one example, taken over by the backbone; what came out, in words.

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


def choose_device(asked: str, *, is_tiny: bool = False, quantize: str | None = None) -> str:
    """Return where the backbone runs; says which and why, where the machine has a GPU.

    Raises:
        InputError: there is no such device.
    """
    import torch

    from offramp.core.models.hub import check_device

    gpu = torch.cuda.is_available()
    if asked != "auto":
        check_device(asked)
        device, why = asked, "as asked"
    elif quantize is not None:
        device, why = "cpu", "quantised weights are read by a processor's kernels"
    elif gpu and not is_tiny:
        device, why = "cuda", "this machine has a GPU; --device cpu runs on the processor"
    else:
        device, why = "cpu", "a tiny model is faster there; --device cuda runs on the GPU"
    if gpu:
        log.info("device: %s (%s)", device, why)
    return device


def load_adapter(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The adapter on its own backbone, or on the one that --backbone names, in the engine that
    --engine names where that is PyTorch's; and the processor."""
    from offramp.engines.loading import with_exits

    model, processor = open_named(arguments, arguments.adapter)
    return with_exits(model), processor


def open_named(arguments: argparse.Namespace, name: str, **more: Any) -> tuple[Any, Any]:
    """An adapter, or the backbone of a model that ships without exits, and the processor. more: as
    of `offramp.engines.loading.open_model`."""
    from offramp.adapter.adapter import Adapter
    from offramp.adapter.shipped import tiny_kind
    from offramp.engines.loading import open_model, own_vision, seeing

    _settle(arguments, name, **more)
    quantize, vision = getattr(arguments, "quantize", None), getattr(arguments, "vision", TORCH)
    engine = _engine(arguments)
    model, processor = open_model(
        name,
        backbone=arguments.backbone,
        revision=arguments.revision,
        dtype=arguments.dtype,
        device=choose_device(
            arguments.device,
            is_tiny=tiny_kind(arguments.backbone or name) is not None,
            quantize=quantize,
        ),
        quantize=quantize,
        vision=own_vision(vision, engine),
        shrink_on_load=getattr(arguments, "shrink_on_load", False),
        **more,
    )
    if isinstance(model, Adapter):
        gguf, threads = (getattr(arguments, n, None) for n in ("gguf", "threads"))
        model = seeing(model, vision, gguf, threads)
    return laid_out(arguments, model), processor


def _settle(arguments: argparse.Namespace, name: str, **more: Any) -> None:
    """Where --engine is auto, put what was found in its place, and in that of --vision."""
    if _engine(arguments) != AUTO:
        return
    import torch

    from offramp.engines.auto import Way
    from offramp.engines.loading import settle

    names = ("backbone", "revision", "dtype", "device", "quantize", "shrink_on_load")
    how = {name: getattr(arguments, name, None) for name in names}
    how = {name: value for name, value in how.items() if value not in (None, False, AUTO)}
    arguments.engine, arguments.vision, arguments.gguf = settle(
        name, Way(AUTO, arguments.vision, arguments.gguf),
        answers=getattr(arguments, "answers", None), together=hasattr(arguments, "slots"),
        **how, **more,
    )  # fmt: skip
    if hasattr(arguments, "context") and arguments.threads is None:  # llama.cpp's own number
        arguments.threads = torch.get_num_threads()


def laid_out(arguments: argparse.Namespace, model: Any) -> Any:
    """A backbone or an adapter in the engine that --engine names, where that is PyTorch's."""
    from offramp.engines import engine_named

    engine = engine_named(_engine(arguments))
    return model if engine.replaces else engine.open(model)


def _engine(arguments: argparse.Namespace) -> str:
    """PyTorch, where a command has no --engine."""
    return getattr(arguments, "engine", TORCH)


def adapter_folder(arguments: argparse.Namespace) -> Path:
    """Return where a changed adapter is written: --out or, if it is on this machine, its own
    folder.

    Raises:
        InputError: neither is given, --out holds another adapter, or there are no exits to save.
            StorageError: it cannot be written.
    """
    from offramp.adapter.shipped import shipped_exits
    from offramp.core.storage.folders import check_writable

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
    """The items whose images the adapter did not use in these steps; says how many are left out."""
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


def policy_of(arguments: argparse.Namespace, adapter: Any) -> Any:
    """The adapter's policy, at the threshold that --threshold names."""
    from dataclasses import replace

    if arguments.threshold is None:
        return adapter.policy
    thresholds = dict.fromkeys(adapter.exits.depths, arguments.threshold)
    return replace(adapter.policy.at(thresholds), drafts={})
