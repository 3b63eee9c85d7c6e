"""The photo model's layers in llama.cpp by rows in a call, beside the processor's peak, in
matmul.json.

`python -m offramp_lab.records.matmul` takes some minutes of one core. Of each number format a
call of so many rows is timed, by our kernels and by llama.cpp's own, in turn; the least of its CPU
times counts. Operations are those of the layers' weights, two a weight and row; attention, norms
and the head of one row take time and count for nothing. The peak is that of the kernels' own
operations in registers (peak.c): of words of 16 bits, which AVX2 also multiplies bytes of q8_0 as,
and of bytes.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from offramp_llama_cpp import ExportFormats
from offramp_llama_cpp.gguf_export import export_whole
from offramp_llama_cpp.native import products
from offramp_llama_cpp.segment import Segment

from offramp_lab.places import RUNS
from offramp_lab.records.record import Record, asked
from offramp_lab.records.runtimes.methods import ENGINE, STOCK
from offramp_lab.records.subjects import load_photo

RECORD = Record("matmul")
FORMATS = ("q8_0", "q4_0", "q4_1", "iq4_nl", "f16")
ROWS = (1, 2, 4, 8, 16, 32, 46, 64)
BEFORE = 36
"""Tokens that stand before the rows of a call."""


def peaks() -> dict[str, float]:
    """Operations a second, in 10^9, of products of 16 bits and of bytes."""
    native = Path(products.__file__).parent
    instructions = products.instructions()
    flags = {"AVX-512": products.AVX512, "AVX2": products.AVX2}[instructions]
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "peak.so"
        source = Path(__file__).with_name("peak.c")
        subprocess.run(
            ["cc", "-std=gnu11", "-O3", "-shared", "-fPIC", *flags, f"-I{native}", "-o", made,
             source],
            check=True,
        )  # fmt: skip
        run = ctypes.CDLL(str(made)).peak
    run.restype = ctypes.c_size_t
    run.argtypes = [ctypes.c_bool, ctypes.c_size_t, ctypes.c_void_p]
    kept, rounds = ctypes.c_int32(), 2_000_000

    def most(of_bytes: bool) -> float:
        found: list[float] = []
        for _ in range(9):
            begin = time.process_time()
            each = run(of_bytes, rounds, ctypes.byref(kept))
            found.append(2 * each * rounds / (time.process_time() - begin) / 1e9)
        return max(found)

    return {"words": most(False), "bytes": most(True)}


def milliseconds(segments: list[Segment], states: Any, rows: int, rounds: int) -> list[float]:
    """The least CPU milliseconds that a call of so many rows took of each, in turn."""
    best = [float("inf")] * len(segments)
    for _ in range(rounds):
        for place, segment in enumerate(segments):
            segment.crop(segment.length_of() - BEFORE)
            begin = time.process_time()
            segment.feed(states[:rows], 1)
            best[place] = min(best[place], 1e3 * (time.process_time() - begin))
    return best


def main() -> None:
    arguments = asked(__doc__, photo=True, rounds=15)
    adapter, _ = load_photo(arguments.adapter)
    backbone = adapter.backbone
    weights = sum(
        p.numel() for layer in backbone.layers for p in layer.parameters() if p.dim() == 2
    )
    states = np.random.default_rng(0).normal(size=(max(ROWS), backbone.width)).astype(np.float32)
    work = RUNS / RECORD.name
    work.mkdir(parents=True, exist_ok=True)
    made: dict[str, dict[str, Any]] = {kind: {} for kind in FORMATS}
    for kind in FORMATS:
        file = work / f"{kind}.gguf"
        if not file.is_file():
            export_whole(backbone, file, ExportFormats(kind))
        segments = [Segment(file, engine, tap_layer=None) for engine in (ENGINE, STOCK)]
        for segment in segments:
            segment.feed(states[:BEFORE], 1)
        for rows in ROWS:
            ours, theirs = milliseconds(segments, states, rows, arguments.rounds)
            rate = 2e-6 * weights * rows / ours
            made[kind][str(rows)] = {"ms": ours, "llama.cpp": theirs, "operations": rate}
            print(f"{kind:7} {rows:3} rows {ours:8.2f} ms, llama.cpp's {theirs:8.2f}, {rate:6.1f}")
        for segment in segments:
            segment.close()
    RECORD.write(
        {
            "instructions": products.instructions(),
            "weights": weights,
            "peak": peaks(),
            "calls": made,
        }
    )


if __name__ == "__main__":
    main()
