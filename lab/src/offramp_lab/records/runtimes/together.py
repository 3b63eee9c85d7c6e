"""Several answers at once inside llama.cpp against one after the other, in runtimes-together.json.

`python -m offramp_lab.records.runtimes.together` captions photographs of the
reporting half in groups, by the batch engine over our kernels: each group submitted at once and one
by one, in an order of its own, in every mode; CPU seconds of the process for whole answers, prompts
with them, the vision tower's output being kept from before. One thread decodes.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from offramp.engine.policy import MODES
from offramp.runtimes.llama_cpp import EngineOptions, LlamaCppRuntime, export_gguf
from offramp.serving.batch_engine import BatchEngine
from offramp.serving.request import Handle
from offramp_lab.experiments.experiment import Experiment, same, times
from offramp_lab.records.record import Record, asked
from offramp_lab.records.subjects import photo

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
    subject = photo(arguments, arguments.photographs, arguments.dtype)
    prompts, size = subject.prompts(), arguments.sequences
    groups = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    options = EngineOptions(context=256, sequences=size)
    entries: list[dict[str, Any]] = []
    for formats in arguments.formats:
        with tempfile.TemporaryDirectory() as folder:
            export_gguf(subject.adapter, folder, formats)
            with (
                LlamaCppRuntime(subject.adapter, folder, engine=options) as runtime,
                BatchEngine(runtime) as engine,
            ):
                entries += in_modes(formats, groups, partial(_ways, engine))
    RECORD.write({"sequences": size, "photographs": len(prompts), "entries": entries})


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


def in_modes(
    formats: str, groups: Sequence[Sequence[Any]], ways: Callable[[str], Mapping[str, Answers]]
) -> Iterator[dict[str, Any]]:
    """An entry of each mode. ways: by the mode."""
    for mode in MODES:
        entry = {"format": formats, "mode": mode, **timed(groups, ways(mode), mode)}
        print(entry)
        yield entry


def timed(
    groups: Sequence[Sequence[Any]], ways: Mapping[str, Answers], name: str
) -> dict[str, Any]:
    """Tokens a CPU second of both `WAYS` to answer groups of prompts, in an order of its own each;
    and how many times as many at once, with its paired interval, and on the clock."""

    def taken(group: Sequence[Any], way: Answers) -> tuple[Rows, float, float]:
        begin, start = time.process_time(), time.perf_counter()
        rows = way(group)
        return rows, time.process_time() - begin, time.perf_counter() - start

    methods = {way: partial(taken, way=ways[way]) for way in WAYS}
    # All groups warm up: what the tower makes is kept.
    runs = Experiment(methods, groups, warm=len(groups), title=name).run()
    found = {way: by_group for way, [by_group] in runs.items()}
    tokens = [sum(map(len, rows)) for rows, *_ in found["at_once"]]
    rates = {w: np.array([tokens, [cpu for _, cpu, _ in found[w]]], float) for w in WAYS}
    wall = {way: sum(spent for *_, spent in found[way]) for way in WAYS}
    said = ([row for rows, *_ in found[way] for row in rows] for way in WAYS)
    return {
        **{way: float(of[0].sum() / of[1].sum()) for way, of in rates.items()},
        **times(rates["at_once"], rates["one_by_one"]),
        "wall_times": wall["one_by_one"] / wall["at_once"],
        "same": same(*said),
    }


if __name__ == "__main__":
    main()
