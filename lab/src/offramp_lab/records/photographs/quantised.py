"""What weights in 8 and 4 bits are worth, and prepacked ones, with exits and without, in PyTorch;
in quantised.json."""

from __future__ import annotations

from typing import Any

from offramp.adapter.adapter import Adapter
from offramp.core.decoding.policy import MODES
from offramp.features.description import weight_bytes
from offramp_lab.experiments.experiment import same
from offramp_lab.experiments.factors import Name
from offramp_lab.records.photographs import opened as way
from offramp_lab.records.photographs.opened import HOW, TORCH
from offramp_lab.records.photographs.runtimes import OWN
from offramp_lab.records.photographs.told import WAY, Spec, Told, speeds, worth
from offramp_lab.records.record import Record

STOCK, OURS = "generate", "offramp, torch"
FORMATS = (*HOW, *(f"{layers}, {way.PREPACKED}" for layers in ("float32", "bfloat16", "int4")))
"""Formats of the decoder layers; prepacked: as far as they are not rounded, they are laid out for
the processor."""
FULL = (OURS, "float32", "full")


def called() -> dict[Name, Name]:
    """The ways, by runtime, format and mode; prepacked weights not by Hugging Face's `generate`."""
    found: dict[Name, Name] = {}
    for layers in FORMATS:
        name = layers.replace(way.PREPACKED, "prepacked")
        if layers in HOW:
            stock = way.in_format(layers, way.STOCK)
            found[STOCK, name, "full"] = stock, way.FULL_DEPTH, TORCH
        for mode in MODES:
            found[OURS, name, mode] = way.in_format(layers), OWN[mode], TORCH
    return found


def bases(name: Name) -> dict[str, Name]:
    return {"over_generate": (STOCK, "float32", "full"), "over_full": (OURS, name[1], "full")}


def figures(told: Told) -> dict[str, Any]:
    """Identical answers, and CIDEr with the interval of its difference from the float32 full
    model's; decoding by format; and bytes of weights."""
    found = {name: told.captions[own] for name, own in called().items()}
    ours = [name for name in found if name[0] == OURS]
    full, count = found[FULL], len(told.examples)
    return {
        "timings": {
            "photographs": count,
            "entries": speeds(found, bases),
            "memory": {
                layers.replace(way.PREPACKED, "prepacked"): memory(
                    told.opened.loaded(way.in_format(layers), TORCH)[0]
                )
                for layers in FORMATS
            },
        },
        "answers": {
            "photographs": count,
            "entries": [
                {
                    **dict(zip(WAY, name, strict=True)),
                    "as_own_full": same(found[name].answers, found[OURS, name[1], "full"].answers),
                    "as_float32_full": same(found[name].answers, full.answers),
                    **worth(found[name], full),
                }
                for name in ours
            ],
        },
    }


def memory(adapter: Adapter) -> dict[str, int]:
    """Bytes of weights: of the model, of its decoder layers, and of the exits beside it."""
    backbone = adapter.backbone
    parts = {"model": backbone.model, "layers": backbone.layers, "exits": adapter.exits.modules}
    return {name: weight_bytes(part) for name, part in parts.items()}


SPEC = Spec(
    Record("quantised", "photographs"), lambda _: [*called().values()], figures, photographs=100
)
