"""Several answers at once inside llama.cpp against one after the other, in runtimes-together.json.

`python -m offramp_lab.records.runtimes.together` captions photographs of the
reporting half in groups, by the batch engine over our kernels: each group submitted at once and one
by one, in an order of its own, in every mode; CPU seconds of the process for whole answers, prompts
with them, the vision tower's output being kept from before. One thread decodes.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from examples.photo_vlm.rows import half_of, read_photographs

from offramp.engine.policy import MODES
from offramp.progress import progress
from offramp.runtimes.llama_cpp import EngineOptions, LlamaCppRuntime, export_gguf
from offramp.serving.batch_engine import BatchEngine
from offramp.serving.request import Handle
from offramp_lab.experiments.experiment import times
from offramp_lab.records.photo import load_photo
from offramp_lab.records.record import Record, asked

RECORD = Record("runtimes-together")
NEW = 30
WAYS = ("at_once", "one_by_one")
Rows = list[list[tuple[int, int]]]
"""Tokens and depths of each answer."""
Answers = Callable[[Sequence[Any]], Rows]
"""Of a group of prompts."""


def main() -> None:
    arguments = asked(
        __doc__, photo=True, dtype="float32", photographs=52, sequences=4, formats=("q8_0", "q4_1")
    )
    dtype = getattr(torch, arguments.dtype)
    adapter, encoder = load_photo(arguments.photo, arguments.adapter, dtype)
    held = [e for e in read_photographs(arguments.data)["captions_val"] if half_of(e) == 1]
    held = held[: arguments.photographs]
    size = arguments.sequences
    prompts = [encoder.prompts([example]) for example in held]
    groups = [prompts[start : start + size] for start in range(0, len(held), size)]
    options = EngineOptions(context=256, sequences=size)
    entries: list[dict[str, Any]] = []
    for formats in arguments.formats:
        with tempfile.TemporaryDirectory() as folder:
            export_gguf(adapter, folder, formats)
            with (
                LlamaCppRuntime(adapter, folder, engine=options) as runtime,
                BatchEngine(runtime) as engine,
            ):
                for mode in MODES:
                    told = timed(groups, _ways(engine, mode), mode)
                    entries.append({"format": formats, "mode": mode, **told})
                    print(entries[-1])
    RECORD.write({"sequences": size, "photographs": len(held), "entries": entries})


def _ways(engine: BatchEngine, mode: str) -> dict[str, Answers]:
    options: dict[str, Any] = {"mode": mode, "max_new_tokens": NEW, "do_sample": False}

    def answers(handles: Iterable[Handle]) -> Rows:
        made = [handle.result().output for handle in handles]
        return [[*zip(m.new_tokens[0].tolist(), m.depths[0].tolist(), strict=True)] for m in made]

    def at_once(group: Sequence[Any]) -> Rows:
        return answers([engine.submit(inputs, **options) for inputs in group])

    def one_by_one(group: Sequence[Any]) -> Rows:
        return [answers([engine.submit(inputs, **options)])[0] for inputs in group]

    return {"at_once": at_once, "one_by_one": one_by_one}


def timed(
    groups: Sequence[Sequence[Any]], ways: Mapping[str, Answers], name: str
) -> dict[str, Any]:
    """Tokens a CPU second of both `WAYS` to answer groups of prompts, in an order of its own each;
    and how many times as many at once, with its paired interval, and on the clock."""
    seconds, wall = np.zeros((len(WAYS), len(groups))), np.zeros((len(WAYS), len(groups)))
    tokens, same = np.zeros(len(groups)), 0
    for place, group in enumerate(progress(groups, name)):
        told = [ways[way](group) for way in WAYS]  # what the tower makes is kept
        same += sum(a == b for a, b in zip(*told, strict=True))
        tokens[place] = sum(map(len, told[0]))
        for way in random.Random(place).sample(WAYS, len(WAYS)):
            begin, start = time.process_time(), time.perf_counter()
            ways[way](group)
            seconds[WAYS.index(way), place] = time.process_time() - begin
            wall[WAYS.index(way), place] = time.perf_counter() - start
    at_once_, one_by_one_ = (np.stack([tokens, spent]) for spent in seconds)
    rates = {way: float(tokens.sum() / seconds[i].sum()) for i, way in enumerate(WAYS)}
    return {
        **rates,
        **times(at_once_, one_by_one_),
        "wall_times": float(wall[1].sum() / wall[0].sum()),
        "same": int(same),
    }


if __name__ == "__main__":
    main()
