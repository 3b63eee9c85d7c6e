"""The photo model's layers in llama.cpp by number format and rows in a call, beside what the
processor does at most; rewrites the part of matmul.json of its instructions.

`python -m offramp_lab.records.matmul` takes some minutes of one core. A call of so many rows is
timed, by our kernels and by llama.cpp's own, in turn; the least of its CPU times counts. The peak
is that of products of bytes in registers, in 10^9 operations a second. A call's share of it counts
two operations for each of the layers' weights and row; attention, norms and the head of one row
take time and count for nothing. Memory, in 10^9 bytes a second, is read by a vector's product with
itself, in pages of the usual size; weights lie in larger ones, which are read faster.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from offramp_llama_cpp import ExportFormats
from offramp_llama_cpp.gguf_export import export_whole
from offramp_llama_cpp.native import products
from offramp_llama_cpp.segment import Segment

from offramp_lab.experiments.experiment import Experiment, spent
from offramp_lab.records.photographs.opened import COMES, ENGINE
from offramp_lab.records.record import Record
from offramp_lab.records.subjects import load_photo

RECORD = Record("matmul")
FORMATS = ("q8_0", "iq4_nl")
ROWS = (1, 2, 8, 16, 46, 64)
BEFORE = 36
"""Tokens that stand before the rows of a call."""


def milliseconds(segment: Segment, states: Any) -> float:
    """CPU milliseconds of a call of these rows, after `BEFORE` others."""
    segment.crop(segment.length_of() - BEFORE)
    return 1e3 * spent(lambda rows: segment.feed(rows, 1))(states)[1]


def calls(backbone: Any, name: str, peak: float, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of calls in a number format by rows, and our kernels' share of the peak."""
    weights = sum(p.numel() for p in backbone.layers.parameters() if p.dim() == 2)
    states = np.random.default_rng(0).normal(size=(max(ROWS), backbone.width)).astype(np.float32)
    file, ways = RECORD.work / f"{name}.gguf", {}
    if not file.is_file():
        export_whole(backbone, file, ExportFormats(name))
    for way, engine in {"ms": ENGINE, "llama.cpp": COMES}.items():
        segment = Segment(file, engine, tap_layer=None)
        segment.feed(states[:BEFORE], 1)
        ways[way] = partial(milliseconds, segment)
    runs = Experiment(ways, [states[:rows] for rows in ROWS], rounds).run()
    found = {}
    for place, rows in enumerate(ROWS):
        took = {way: min(each[place] for each in by_round) for way, by_round in runs.items()}
        found[str(rows)] = {**took, "share": 2e-6 * weights * rows / took["ms"] / peak}
    return found


def most(done: int, call: Callable[[Any], Any], rounds: int) -> float:
    """What is done in a call, in 10^9 a CPU second of the fastest round."""
    return 1e-9 * done / min(spent(call)(None)[1] for _ in range(rounds))


def figures(arguments: Namespace) -> dict[str, Any]:
    backbone, rounds = load_photo(arguments.adapter)[0].backbone, arguments.rounds
    RECORD.work.mkdir(parents=True, exist_ok=True)
    times, vector = 1 << 21, torch.ones(1 << 26)
    peak = most(2 * products.peak(times), lambda _: products.peak(times), rounds)
    found = {
        "peak": peak,
        "memory": most(vector.nbytes, lambda _: vector.dot(vector), rounds),
        **{name: calls(backbone, name, peak, rounds) for name in FORMATS},
        "provenance": RECORD.origin(),
    }
    return {**RECORD.read(), products.instructions(): found}


if __name__ == "__main__":
    RECORD.run(__doc__, figures, photo=True, rounds=15)
