"""The two VLMs that ship with the package, and their world's examples with exact ground truth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from offramp.errors import InputError, did_you_mean
from offramp.models.backbone import Backbone
from offramp.models.hub.loading import load_processor

TINY = ("opt", "t5")


def short_name(name: str) -> str:
    """A tiny model's name without what stands before it: "opt" of "tiny-opt"."""
    return name.removeprefix("offramp/").removeprefix("tiny-")


def tiny_kind(name: str) -> str | None:
    """Which tiny model is meant, as "tiny-opt" is; None: none."""
    kind = short_name(name)
    return kind if kind in TINY and kind != name else None


def tiny_folder(kind: str) -> Path:
    """Folder of a shipped model, for plain `from_pretrained`. Raise `InputError` if unknown.

    kind: "opt" or "t5", or "tiny-opt" or "tiny-t5" as on the command line.
    """
    kind = short_name(kind)
    if kind not in TINY:
        raise InputError(f"No tiny model {kind!r} ships with offramp.", did_you_mean(kind, TINY))
    return Path(__file__).parent / "shipped_models" / kind


def load_tiny(
    kind: str, dtype: torch.dtype = torch.float32, device: str | None = None
) -> tuple[Backbone, Any]:
    """A shipped model, "opt" or "t5", and its processor."""
    kind, folder = short_name(kind), tiny_folder(kind)
    backbone = Backbone.from_pretrained(folder, dtype=dtype, device=device)
    backbone.name = f"offramp/tiny-{kind}"
    return backbone, load_processor(folder)


def tiny_exits(kind: str) -> Path:
    """Folder of the exits that ship for a tiny model, for `Adapter.from_pretrained`: those of
    `offramp demo`, calibrated. Raise `InputError` if none ship."""
    kind = short_name(kind)
    folder = tiny_folder(kind).with_name(f"{kind}_exits")
    if not folder.is_dir():
        raise InputError(
            f"No exits for the tiny model {kind!r} ship with offramp.",
            f"Train them in a few minutes: offramp demo --backbone {kind}.",
        )
    return folder
