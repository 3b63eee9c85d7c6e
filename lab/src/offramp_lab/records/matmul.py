"""The photo model's layers in llama.cpp by rows in a call; rewrites matmul.json.

`python -m offramp_lab.records.matmul` takes some minutes of one core. Of each number format a
call of so many rows is timed, by our kernels and by llama.cpp's own, in turn; the least of its CPU
times counts.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from offramp_llama_cpp import ExportFormats
from offramp_llama_cpp.gguf_export import export_whole
from offramp_llama_cpp.native import products
from offramp_llama_cpp.segment import Segment

from offramp_lab.experiments.experiment import Experiment, each, spent
from offramp_lab.places import RUNS
from offramp_lab.records.photographs.opened import COMES, ENGINE
from offramp_lab.records.record import Record, asked
from offramp_lab.records.subjects import load_photo

RECORD = Record("matmul")
FORMATS = ("q8_0",)
ROWS = (1, 8, 46)
BEFORE = 36
"""Tokens that stand before the rows of a call."""


def milliseconds(segment: Segment, states: Any) -> float:
    """CPU milliseconds of a call of these rows, after `BEFORE` others."""
    segment.crop(segment.length_of() - BEFORE)
    return 1e3 * spent(lambda rows: segment.feed(rows, 1))(states)[1]


def main() -> None:
    arguments = asked(__doc__, photo=True, rounds=15)
    backbone = load_photo(arguments.adapter)[0].backbone
    states = np.random.default_rng(0).normal(size=(max(ROWS), backbone.width)).astype(np.float32)
    work = RUNS / RECORD.name
    work.mkdir(parents=True, exist_ok=True)
    made: dict[str, dict[str, Any]] = {kind: {} for kind in FORMATS}
    for kind in FORMATS:
        file = work / f"{kind}.gguf"
        if not file.is_file():
            export_whole(backbone, file, ExportFormats(kind))
        sides = {"ms": ENGINE, "llama.cpp": COMES}
        segments = {name: Segment(file, engine, tap_layer=None) for name, engine in sides.items()}
        for segment in segments.values():
            segment.feed(states[:BEFORE], 1)
        for rows in ROWS:
            ways = {name: partial(milliseconds, segment) for name, segment in segments.items()}
            runs = Experiment(ways, [states[:rows]], arguments.rounds).run()
            took = {name: min(each(found)) for name, found in runs.items()}
            made[kind][str(rows)] = took
            print(kind, rows, made[kind][str(rows)], flush=True)
        for segment in segments.values():
            segment.close()
    RECORD.write({"instructions": products.instructions(), "calls": made})


if __name__ == "__main__":
    main()
