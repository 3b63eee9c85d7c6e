"""Exits inside llama.cpp and in PyTorch, against runtimes without exits; in runtimes.json."""

from __future__ import annotations

from typing import Any

from offramp_lab.experiments.experiment import same
from offramp_lab.experiments.factors import LOSSLESS, Name, named
from offramp_lab.records.photographs import opened as way
from offramp_lab.records.photographs.opened import PLAIN, TORCH, TOWER, Opened
from offramp_lab.records.photographs.told import Spec, Told, speeds, worth
from offramp_lab.records.record import Record

FORMATS = ("f16", "q8_0", "q4_1", "iq4_nl")
MODES = (way.FULL_DEPTH, way.EARLY, LOSSLESS)
COMPILED = f"{PLAIN}, {way.COMPILED}"
GENERATE: Name = (way.STOCK, way.FULL_DEPTH, TORCH)


def names(opened: Opened) -> list[Name]:
    compiled = opened.compiled
    return [
        GENERATE,
        *((engine, mode, TOWER) for engine in (PLAIN, *FORMATS) for mode in MODES),
        *((f"{way.ALONE}{layers}", way.FULL_DEPTH, TOWER) for layers in FORMATS),
        *((f"{layers}{way.ITS_KERNELS}", way.EARLY, TOWER) for layers in FORMATS),
        *((COMPILED, mode, TOWER) for mode in MODES if compiled),
        *((way.STOCK_COMPILED, way.FULL_DEPTH, TORCH) for _ in range(compiled)),
    ]


def bases(name: Name) -> dict[str, Name]:
    """What a speed is put beside: Hugging Face's, llama.cpp's own at its format, and the same
    engine's at full depth."""
    engine = name[0].removesuffix(way.ITS_KERNELS)
    alone = f"{way.ALONE}{engine.removeprefix(way.ALONE)}"
    return {
        "over_generate": GENERATE,
        "over_llama_cpp": (alone, way.FULL_DEPTH, TOWER),
        "over_full": (engine, way.FULL_DEPTH, name[2]),
    }


def figures(told: Told) -> dict[str, Any]:
    """Counts of identical answers, and CIDEr; and decoding."""
    count, found = len(told.examples), told.captions
    full, early = (found[PLAIN, mode, TOWER] for mode in (way.FULL_DEPTH, way.EARLY))
    identical = {}
    for layers in FORMATS:
        own = {mode: found[layers, mode, TOWER].answers for mode in MODES}
        identical[layers] = {
            "lossless_as_full": same(own[LOSSLESS], own[way.FULL_DEPTH]),
            "early_as_float32_early": same(own[way.EARLY], early.answers),
            "full_as_float32_full": same(own[way.FULL_DEPTH], full.answers),
        }
    cider = [
        {**named(name), **worth(own, full)}
        for name, own in found.items()
        if name[0] in (PLAIN, *FORMATS) and name[:2] != (PLAIN, LOSSLESS)  # full depth's answers
    ]
    return {
        "answers": {"photographs": count, "identical": identical, "cider": cider},
        "timings": {"photographs": count, "entries": speeds(found, bases)},
    }


SPEC = Spec(Record("runtimes", "photographs"), names, figures, photographs=100)
