"""A 7B decoder in llama.cpp, with exits and without; rewrites runtimes-shapes.json.

Speed only: weights are random, its layers all the same one (in memory of their own once they are
written), and which tokens exit is drawn. `python -m offramp_lab.records.runtimes.shapes` takes 25
minutes, 18 GB of memory and 9 of disk; one thread. All files of a format have to fit into memory.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from offramp.adapter import Adapter
from offramp.engine.policy import ExitPolicy
from offramp.models.backbone import Backbone
from offramp.models.exits import Exits, ExitSet
from offramp.runtimes.llama_cpp import EngineOptions, ExportFormats, export_gguf
from offramp.runtimes.llama_cpp.chain import SegmentChain
from offramp.runtimes.llama_cpp.gguf_export import export_whole
from offramp.runtimes.llama_cpp.native.tap import States
from offramp.runtimes.llama_cpp.segment import Segment
from offramp.runtimes.llama_cpp.self_check import AT_ONCE, call_sizes
from offramp_lab.experiments.experiment import Experiment
from offramp_lab.inputs.drawn_weights import fill
from offramp_lab.inputs.shapes import shape
from offramp_lab.records.record import Record, asked
from offramp_lab.records.runtimes.methods import ENGINE, IN_LLAMA, STOCK, WITH_ITS_KERNELS

RECORD = Record("runtimes-shapes", "runtimes.shapes")
PROMPT = 32
"""Tokens before those that are timed."""
Method = Callable[[None], float]
"""CPU seconds of all tokens behind the prompt."""
RATES = {"exits off": 0.0, "75% exit": 0.75, "90% exit": 0.9, "every token exits": 1.0}


def main() -> None:
    arguments = asked(
        __doc__, out=RECORD.path, tokens=40, rounds=3, shape="llava-7b", formats=("q4_1", "q4_0")
    )
    adapter = repeated(arguments.shape)
    entries = [
        entry
        for layers in arguments.formats
        for entry in measure(adapter, layers, arguments.tokens, arguments.rounds)
    ]
    found = {"shape": arguments.shape, "depth": adapter.exits.depths[0], "tokens": arguments.tokens}
    RECORD.write({**found, "entries": entries}, arguments.out)


def repeated(name: str) -> Adapter:
    """The shape with one decoder layer in all places, and an exit that looks at the whole head."""
    model: Any = shape(name).empty()
    stack = model.model.language_model
    stack.layers = nn.ModuleList([stack.layers[0]] * len(stack.layers))
    fill(model, torch.float32, 0)
    backbone = Backbone(model, name=name)
    depth = backbone.depth // 4
    exits = Exits(backbone, (depth,)).requires_grad_(False)
    return Adapter(backbone, ExitSet(exits), ExitPolicy({depth: 0.5}))


def measure(adapter: Adapter, layers: str, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Tokens a CPU second: of llama.cpp alone, and of exits at each rate by both kernels."""
    with tempfile.TemporaryDirectory() as name:
        files, whole = Path(name) / "chain", Path(name) / "whole.gguf"
        export_gguf(adapter, files, layers)
        export_whole(adapter.backbone, whole, ExportFormats(layers))
        alone = Segment(whole, STOCK, tap_layer=None)
        draw = np.random.default_rng(0)
        states = draw.normal(size=(PROMPT + tokens, alone.width)).astype(np.float32)
        methods: dict[tuple[str, str], Method] = {("llama.cpp", "full"): _full(alone, states)}
        segments = [alone]
        for runtime, engine in ((IN_LLAMA, ENGINE), (WITH_ITS_KERNELS, STOCK)):
            chain = _chain(files, engine, adapter.exits.depths[0], states[:AT_ONCE])
            segments += chain.segments
            for mode, rate in RATES.items():
                methods[runtime, mode] = _decoding(chain, states, rate)
        try:
            return _timed(methods, layers, tokens, rounds)
        finally:
            for segment in segments:
                segment.close()


def _chain(files: Path, engine: EngineOptions, depth: int, probe: States) -> SegmentChain:
    below, above = sorted(files.glob("*.gguf"))
    segments = [Segment(below, engine, tap_layer=depth - 1), Segment(above, engine, tap_layer=None)]
    return SegmentChain(segments, call_sizes(segments, probe))


def _full(segment: Segment, states: States) -> Method:
    def run(_: None) -> float:
        segment.crop(segment.length_of())
        segment.feed(states[:PROMPT], 1)
        begin = time.process_time()
        for row in states[PROMPT:, None]:
            segment.feed(row, 1)
            segment.logits(1).argmax()
        return time.process_time() - begin

    return run


def _decoding(chain: SegmentChain, states: States, rate: float) -> Method:
    def run(_: None) -> float:
        exits = iter(np.random.default_rng(1).random(len(states)) < rate)

        def decide(_exit: int, _state: States, logits: States) -> bool:
            return bool(next(exits)) and int(logits.argmax()) >= 0

        chain.reset()
        chain.run(states[:PROMPT])
        chain.finish(1)
        begin = time.process_time()
        for row in states[PROMPT:, None]:
            if chain.run(row, decide):
                chain.finish(1)[0].argmax()
        return time.process_time() - begin

    return run


def _timed(
    methods: dict[tuple[str, str], Method], layers: str, tokens: int, rounds: int
) -> list[dict[str, Any]]:
    """Medians of interleaved rounds, behind one that is not counted."""
    load = os.getloadavg()[0]
    runs = Experiment(methods, rounds=rounds, warm=1, title=layers).run()
    speeds = {name: tokens / median(s for [s] in found) for name, found in runs.items()}
    alone = speeds["llama.cpp", "full"]
    return [
        {
            "runtime": runtime,
            "format": layers,
            "mode": mode,
            "tokens_per_second": speed,
            "over_llama_cpp": speed / alone,
            "over_full": speed / speeds.get((runtime, "exits off"), alone),
            "load": load,
        }
        for (runtime, mode), speed in speeds.items()
    ]


if __name__ == "__main__":
    main()
