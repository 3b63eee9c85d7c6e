"""The photo model's layers in llama.cpp by rows in a call; rewrites matmul.json.

`python -m offramp_lab.records.matmul` takes some minutes of one core. A call of so many rows is
timed, by our kernels and by llama.cpp's own, in turn; the least of its CPU times counts.
"""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from typing import Any

import numpy as np
from offramp_llama_cpp import ExportFormats
from offramp_llama_cpp.gguf_export import export_whole
from offramp_llama_cpp.native import products
from offramp_llama_cpp.segment import Segment

from offramp_lab.experiments.experiment import Experiment, spent
from offramp_lab.records.photographs.opened import COMES, ENGINE
from offramp_lab.records.record import Record
from offramp_lab.records.subjects import load_photo

RECORD = Record("matmul")
FORMAT = "q8_0"
ROWS = (1, 8, 46)
BEFORE = 36
"""Tokens that stand before the rows of a call."""


def milliseconds(segment: Segment, states: Any) -> float:
    """CPU milliseconds of a call of these rows, after `BEFORE` others."""
    segment.crop(segment.length_of() - BEFORE)
    return 1e3 * spent(lambda rows: segment.feed(rows, 1))(states)[1]


def figures(arguments: Namespace) -> dict[str, Any]:
    backbone = load_photo(arguments.adapter)[0].backbone
    states = np.random.default_rng(0).normal(size=(max(ROWS), backbone.width)).astype(np.float32)
    RECORD.work.mkdir(parents=True, exist_ok=True)
    file, ways = RECORD.work / f"{FORMAT}.gguf", {}
    if not file.is_file():
        export_whole(backbone, file, ExportFormats(FORMAT))
    for name, engine in {"ms": ENGINE, "llama.cpp": COMES}.items():
        segment = Segment(file, engine, tap_layer=None)
        segment.feed(states[:BEFORE], 1)
        ways[name] = partial(milliseconds, segment)
    runs = Experiment(ways, [states[:rows] for rows in ROWS], arguments.rounds).run()
    calls = {
        str(rows): {
            name: min(found[place] for found in by_round) for name, by_round in runs.items()
        }
        for place, rows in enumerate(ROWS)
    }
    return {"instructions": products.instructions(), "calls": {FORMAT: calls}}


if __name__ == "__main__":
    RECORD.run(__doc__, figures, photo=True, rounds=15)
