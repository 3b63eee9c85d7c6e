"""Speeds, interleaved: every photograph is answered in all ways before the next one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import Any

from offramp.evaluation.timing import GenerateFn, beside_full
from offramp_lab.experiments.experiment import Experiment
from offramp_lab.records.runtimes.methods import (
    WAY,
    Bench,
    Name,
    drafted,
    speeds,
    taken,
    with_ratios,
)

WARM = 8
"""Photographs that all answer before any counts: code is made where a row count is first met."""


def timings(bench: Bench, rounds: int, more: Mapping[Name, GenerateFn]) -> dict[str, Any]:
    """Tokens a second of decoding; medians of rounds. more: methods of other runtimes."""
    methods = {**bench.methods(), **more}
    inputs = [bench.encoder.prompts([example]) for example in bench.photographs]
    load_before = os.getloadavg()[0]
    taking = {name: partial(taken, method) for name, method in methods.items()}
    runs = Experiment(taking, inputs, rounds, warm=WARM, title="timings").run()
    runs = beside_full(runs, drafted(runs))
    entries = [{**dict(zip(WAY, name, strict=True)), **speeds(runs[name])} for name in runs]
    return {
        "photographs": len(inputs),
        "rounds": rounds,
        "load": [round(load_before, 1), round(os.getloadavg()[0], 1)],
        "entries": with_ratios(entries, runs, _bases),
    }


def _bases(name: Name) -> dict[str, Name]:
    """What a method's speed is put beside: llama.cpp's own at its format, Hugging Face's, and the
    same runtime's at full depth."""
    runtime, layers, _ = name
    return {
        "over_generate": ("generate", "float32", "full"),
        "over_llama_cpp": ("llama.cpp", layers, "full"),
        "over_full": (runtime, layers, "full"),
    }
