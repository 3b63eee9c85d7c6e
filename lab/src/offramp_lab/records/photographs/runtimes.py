"""Exits inside llama.cpp and in PyTorch, against runtimes without exits; in runtimes.json."""

from __future__ import annotations

from typing import Any

from offramp.core.decoding.policy import MODES
from offramp_lab.experiments.experiment import same
from offramp_lab.experiments.factors import LOSSLESS, Measured, Name
from offramp_lab.records.photographs import opened as way
from offramp_lab.records.photographs.opened import PLAIN, TORCH, TOWER, Opened
from offramp_lab.records.photographs.told import WAY, Spec, Told, speeds, worth
from offramp_lab.records.record import Record

FORMATS = ("f16", "q8_0", "q4_1", "iq4_nl")
IN_LLAMA, IN_TORCH = "offramp, llama.cpp", "offramp, torch"
OWN = {"full": way.FULL_DEPTH, "early_exit": way.EARLY, "lossless": LOSSLESS}
COMPILED = f"{PLAIN}, {way.COMPILED}"


def called(opened: Opened) -> dict[Name, Name]:
    """The ways, by runtime, format and mode."""
    found = {("generate", "float32", "full"): (way.STOCK, way.FULL_DEPTH, TORCH)}
    for mode in MODES:
        found[IN_TORCH, "float32", mode] = (PLAIN, OWN[mode], TOWER)
    for layers in FORMATS:
        found["llama.cpp", layers, "full"] = f"{way.ALONE}{layers}", way.FULL_DEPTH, TOWER
        kernels = f"{layers}{way.ITS_KERNELS}", way.EARLY, TOWER
        found[f"{IN_LLAMA}{way.ITS_KERNELS}", layers, "early_exit"] = kernels
        for mode in MODES:
            found[IN_LLAMA, layers, mode] = (layers, OWN[mode], TOWER)
    if opened.compiled:
        found[way.STOCK_COMPILED, "float32", "full"] = way.STOCK_COMPILED, way.FULL_DEPTH, TORCH
        for mode in MODES:
            found[f"{IN_TORCH}, {way.COMPILED}", "float32", mode] = COMPILED, OWN[mode], TOWER
    return found


def bases(name: Name) -> dict[str, Name]:
    """What a speed is put beside: Hugging Face's, llama.cpp's own at its format, and the same
    runtime's at full depth."""
    runtime, layers, _ = name
    return {
        "over_generate": ("generate", "float32", "full"),
        "over_llama_cpp": ("llama.cpp", layers, "full"),
        "over_full": (IN_LLAMA if runtime.startswith(IN_LLAMA) else runtime, layers, "full"),
    }


def figures(told: Told) -> dict[str, Any]:
    found = {name: told.captions[own] for name, own in called(told.opened).items()}
    count = len(told.examples)
    return {
        "answers": {"photographs": count, **_answers(found)},
        "timings": {"photographs": count, "entries": speeds(found, bases)},
    }


def _answers(found: dict[Name, Measured]) -> dict[str, Any]:
    """Counts of identical answers, and CIDEr."""
    full, early = (found[IN_TORCH, "float32", mode] for mode in ("full", "early_exit"))
    again = (IN_TORCH, "float32", "lossless")  # full depth's answers
    scored = [name for name in found if name[0] in (IN_TORCH, IN_LLAMA) and name != again]
    return {
        "identical": {
            layers: {
                name: same(found[IN_LLAMA, layers, mode].answers, other.answers)
                for name, mode, other in (
                    ("lossless_as_full", "lossless", found[IN_LLAMA, layers, "full"]),
                    ("early_as_float32_early", "early_exit", early),
                    ("full_as_float32_full", "full", full),
                )
            }
            for layers in FORMATS
        },
        "cider": [
            {**dict(zip(WAY, name, strict=True)), **worth(found[name], full)} for name in scored
        ],
    }


SPEC = Spec(
    Record("runtimes", "photographs"),
    lambda opened: [*called(opened).values()],
    figures,
    photographs=100,
)
