"""Speeds, interleaved: every photograph is answered in all ways before the next one."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from offramp.evaluation.timing import GenerateFn
from offramp.runtimes.llama_cpp.native.tap import States
from offramp.runtimes.llama_cpp.segment import EngineOptions, Segment
from offramp_lab.experiments.experiment import Experiment, each, same
from offramp_lab.records.runtimes.methods import (
    ENGINE,
    FORMATS,
    IN_LLAMA,
    STOCK,
    WAY,
    WITH_ITS_KERNELS,
    Bench,
    Name,
    speeds,
    taken,
    with_ratios,
)

ROWS = (1, 2, 3, 4, 6, 8)
"""Tokens in a call, whose cost is measured."""
WARM = 8
"""Photographs that all answer before any counts: code is made where a row count is first met."""


def timings(bench: Bench, rounds: int, more: Mapping[Name, GenerateFn]) -> dict[str, Any]:
    """Tokens a second of decoding; medians of rounds. more: methods of other runtimes."""
    methods = {**bench.methods(), **more}
    inputs = [bench.encoder.prompts([example]) for example in bench.photographs]
    first = {name: taken(method, inputs[0])[0][0] for name, method in methods.items()}
    load_before = os.getloadavg()[0]
    taking = {name: partial(taken, method) for name, method in methods.items()}
    runs = Experiment(taking, inputs, rounds, warm=WARM, title="timings").run()
    said = {name: [ids for *_, ids in each(found)] for name, found in runs.items()}
    # Some load a runtime.
    weights = {pair: bench.weights_bytes(*pair) for pair in {name[:2] for name in methods}}
    entries = []
    for name, found in runs.items():
        runtime, layers, _ = name
        alone = said.get(("llama.cpp", layers, "full"))
        entries.append(
            {
                **dict(zip(WAY, name, strict=True)),
                **speeds(found),
                "first_call_seconds": first[name],
                "answers": len(said[name]),
                "answers_as_one_file": (alone is not None and same(said[name], alone))
                if runtime in (IN_LLAMA, WITH_ITS_KERNELS)
                else None,
                "weights_bytes": weights[runtime, layers],
            }
        )
    return {
        "photographs": len(inputs),
        "rounds": rounds,
        "load": [round(load_before, 1), round(os.getloadavg()[0], 1)],
        "entries": with_ratios(entries, runs, _bases),
        "row_milliseconds": {
            name: {layers: row_costs(bench, layers, engine) for layers in FORMATS}
            for name, engine in ((IN_LLAMA, ENGINE), (WITH_ITS_KERNELS, STOCK))
        },
        "call_sizes": {layers: _call_sizes(bench, layers) for layers in FORMATS},
    }


def _call_sizes(bench: Bench, layers: str) -> dict[str, int]:
    with bench.runtime(layers) as runtime:
        return {"least": runtime.call_sizes.least, "most": runtime.call_sizes.most}


def _bases(name: Name) -> dict[str, Name]:
    """What a method's speed is put beside: llama.cpp's own at its format, Hugging Face's, and the
    same runtime's at full depth."""
    runtime, layers, _ = name
    return {
        "over_generate": ("generate", "float32", "full"),
        "over_llama_cpp": ("llama.cpp", layers, "full"),
        "over_full": (runtime, layers, "full"),
    }


def row_costs(
    bench: Bench, layers: str, engine: EngineOptions, repeats: int = 15
) -> dict[str, dict[str, float]]:
    """CPU milliseconds of a call by its rows: of the layers below and above the exit, and of the
    decoder in one file; behind 40 tokens."""
    below, above = sorted(bench.files(layers).glob("segment-*.gguf"))
    files = {"below": below, "above": above, "one_file": bench.whole(layers)}
    draw = np.random.default_rng(0)
    found: dict[str, dict[str, float]] = {}
    for name, file in files.items():
        segment = Segment(file, engine, tap_layer=None)
        states = draw.normal(size=(40, segment.width)).astype(np.float32)
        segment.feed(states, 1)
        found[name] = {}
        for rows in ROWS:
            seconds = [_seconds(segment, states[:rows]) for _ in range(repeats)]
            found[name][str(rows)] = 1e3 * median(seconds)
        segment.close()
    return found


def _seconds(segment: Segment, states: States) -> float:
    """CPU seconds of a call over `states`, which are taken back."""
    begin = time.process_time()
    segment.feed(states, 1)
    segment.logits(1)
    seconds = time.process_time() - begin
    segment.crop(len(states))
    return seconds
