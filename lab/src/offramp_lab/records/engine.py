"""Measure the batch engine: many requests at once, predicted and measured; rewrites
lab/records/engine.json.

Scripted exits on random weights in real sizes; one thread, a quiet machine. `python -m
offramp_lab.records.engine NAME...` measures only these shapes, and leaves the record's others:
opt-2.7b (12 GB of memory in float32, 6 in bfloat16), flan-t5-xl (7, 4), smollm2-135m. About 40, 25
and 10 minutes on an idle core.

--dtype: float32 or bfloat16; the latter where the processor has instructions for it (AMX, AVX-512
BF16), else it is many times slower. --slots: rows at once. --cpu-time: seconds of the thread, not
of the clock, for a machine that others use too; load averages are in the record. --prepack: the
engine's weights; a static batch's both ways.
"""

import argparse
import os
from collections.abc import Mapping
from typing import Any

import torch

from offramp.models.prepack import prepack
from offramp.serving.engine_config import EngineConfig
from offramp_lab.experiments.benchmark.bench import shortlisted, untrained
from offramp_lab.experiments.benchmark.engine_bench import EngineCase, bench_engine, table
from offramp_lab.inputs.shapes import shape
from offramp_lab.records.record import Record, asked, named

RECORD = Record("engine")
DEPTHS = {"opt-2.7b": 8, "flan-t5-xl": 6, "smollm2-135m": 7, "mini-opt": 2}
SHORTLISTS = {"smollm2-135m": 4096}
"""Where the whole vocabulary costs several layers."""
CASES = (
    EngineCase("early_exit", 0.75, 0.7),
    EngineCase("early_exit", 0.75, guess=False),
    EngineCase("early_exit", 0.9, 0.7),
    EngineCase("early_exit", 0.9, guess=False),
    EngineCase("lossless", right=0.9),
)
KINDS = ("guess", "park")
WORDS = 32
"""Of a prompt, if no other number is asked for, which the record then says."""
WITHIN = 0.1
"""How far off a prediction may be, as a share of what was measured."""


def main() -> None:
    arguments = asked(
        __doc__, dtype="float32", clock=True, rounds=3, words=WORDS, slots=(8,), prepack=False,
        more=_more,
    )  # fmt: skip
    for name in arguments.shapes:
        for slots in arguments.slots:
            figures = measure(name, slots, arguments)
            context = f"{figures['costs']['context']} tokens of context"
            more = [context] if arguments.words != WORDS else []
            more += ["prepacked"] if arguments.prepack else []
            add_to_record(name, arguments.dtype, slots, figures, *more)


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shapes", nargs="*", default=["opt-2.7b", "flan-t5-xl", "smollm2-135m"])
    parser.add_argument("--lengths", type=int, nargs=2, default=(30, 60))
    parser.add_argument(
        "--cases", nargs="*", default=KINDS, choices=KINDS, help="of rows that; none: full alone"
    )


def measure(name: str, slots: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Costs and entries of one shape and size."""
    known = shape(name)
    backbone = known.build(getattr(torch, arguments.dtype))
    stock = known.build(getattr(torch, arguments.dtype)) if arguments.prepack else None
    exits = untrained(backbone, (DEPTHS[name],))
    exits = shortlisted(backbone, exits, SHORTLISTS.get(name))
    if arguments.prepack:
        prepack(backbone, exits)
    inputs = known.inputs(backbone, words=arguments.words)
    limit = inputs["input_ids"].shape[1] + arguments.lengths[1] + 1
    cases = [case for case in CASES if KINDS[not case.guess] in arguments.cases]
    costs, entries = bench_engine(
        backbone, exits, inputs, cases, EngineConfig(slots=slots, limit=limit),
        rounds=arguments.rounds, lengths=tuple(arguments.lengths), stock=stock,
        clock=arguments.clock, title=f"{name}, {slots} slots",
    )  # fmt: skip
    print(table(costs, entries))
    for entry in entries:
        entry["clock"] = named(arguments.clock)
        entry["within"] = abs(entry["predicted"] / entry["measured"] - 1.0) <= WITHIN
    return {"costs": costs.to_json(), "entries": entries, "load": os.getloadavg()}


def add_to_record(
    name: str, dtype: str, slots: int, figures: Mapping[str, Any], *more: str
) -> None:
    """Put figures of one shape and size into the record, beside what it holds.

    more: what else sets these figures apart.
    """
    key = ", ".join((name, dtype, f"{slots} slots", *more))
    RECORD.add({key: {**RECORD.read().get(key, {}), **figures}})


if __name__ == "__main__":
    main()
