"""What weights in 8 and 4 bits are worth, and prepacked ones, with exits and without, in PyTorch;
in quantised.json."""

from __future__ import annotations

from typing import Any

from offramp.adapter.adapter import Adapter
from offramp.features.description import weight_bytes
from offramp_lab.experiments.experiment import same
from offramp_lab.experiments.factors import Name, named
from offramp_lab.records.photographs import opened as way
from offramp_lab.records.photographs.opened import HOW, PLAIN, TORCH, Opened
from offramp_lab.records.photographs.runtimes import GENERATE, MODES
from offramp_lab.records.photographs.told import Spec, Told, speeds, worth
from offramp_lab.records.record import Record

FORMATS = (*HOW, *(f"{layers}, {way.PREPACKED}" for layers in ("float32", "bfloat16", "int4")))
"""Formats of the decoder layers; packed: as far as they are not rounded, they are laid out for the
processor."""


def names(_: Opened) -> list[Name]:
    """Hugging Face's `generate` without packed weights, ours with them too."""
    stock = [(way.in_format(layers, way.STOCK), way.FULL_DEPTH, TORCH) for layers in HOW]
    return [*stock, *((way.in_format(f), mode, TORCH) for f in FORMATS for mode in MODES)]


def bases(name: Name) -> dict[str, Name]:
    own = name[0].replace(way.STOCK, PLAIN)
    return {"over_generate": GENERATE, "over_full": (own, way.FULL_DEPTH, TORCH)}


def figures(told: Told) -> dict[str, Any]:
    """Identical answers, and CIDEr with the interval of its difference from the float32 full
    model's; decoding by format; and bytes of weights."""
    found, count = told.captions, len(told.examples)
    engines = {layers: way.in_format(layers) for layers in FORMATS}
    full = found[PLAIN, way.FULL_DEPTH, TORCH]
    answers = [
        {
            **named(name),
            "as_own_full": same(own.answers, found[name[0], way.FULL_DEPTH, TORCH].answers),
            "as_float32_full": same(own.answers, full.answers),
            **worth(own, full),
        }
        for name, own in found.items()
        if name[0] in engines.values()
    ]
    memory = {n: held(told.opened.loaded(engine, TORCH)[0]) for n, engine in engines.items()}
    return {
        "timings": {"photographs": count, "entries": speeds(found, bases), "memory": memory},
        "answers": {"photographs": count, "entries": answers},
    }


def held(adapter: Adapter) -> dict[str, int]:
    """Bytes of weights: of the model, of its decoder layers, and of the exits beside it."""
    backbone = adapter.backbone
    parts = {"model": backbone.model, "layers": backbone.layers, "exits": adapter.exits.modules}
    return {name: weight_bytes(part) for name, part in parts.items()}


SPEC = Spec(Record("quantised", "photographs"), names, figures, photographs=100)
