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
    kind: str,
    dtype: torch.dtype | str = torch.float32,
    device: str | None = None,
    **how: Any,
) -> tuple[Backbone, Any]:
    """A shipped model, "opt" or "t5", and its processor.

    how: quantize and compile, as of `Backbone.from_pretrained`.
    """
    kind, folder = short_name(kind), tiny_folder(kind)
    backbone = Backbone.from_pretrained(folder, dtype=dtype, device=device, **how)
    backbone.name = f"offramp/tiny-{kind}"
    return backbone, load_processor(folder)


def load_named(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    quantize: str | None = None,
    compile: bool = False,
) -> tuple[Backbone, Any]:
    """A shipped model by its long name, or one of a hub name or a folder; and its processor.

    dtype: torch's name of one, or "auto": as saved, shipped ones in float32.

    Raises:
        InputError: a revision of a shipped model; or as of `Backbone.from_pretrained`.
    """
    if not name.strip():
        raise InputError(
            "The backbone's name is empty.", "Give a hub name or a folder, or tiny-opt or tiny-t5."
        )
    exact: Any = "auto" if dtype == "auto" else getattr(torch, dtype)
    kind = tiny_kind(name)
    how: dict[str, Any] = {"quantize": quantize, "compile": compile}
    if kind is None:
        backbone = Backbone.from_pretrained(
            name, revision=revision, dtype=exact, device=device, **how
        )
        return backbone, load_processor(name, revision=revision)
    if revision is not None:
        raise InputError(
            f"{name} ships with offramp and has no revision {revision!r}.",
            "Leave the revision out.",
        )
    if dtype == "auto" and quantize is None:
        exact = torch.float32
    return load_tiny(kind, exact, device, **how)


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
