"""Photographs captioned, and questions about them answered, in all ways in turn; rewrites the
records that are of this.

`python -m offramp_lab.records.photographs` needs photographs and the packages onnxruntime and
llama-cpp-python; --records names some of the records. Every photograph is answered by all ways that
any of these asks of it, in an order of its own, before the next one: a way that several ask is
asked once. One thread; seconds are of the CPU. What was answered is kept in runs/photographs, by
the exits and the model, so that a run that was cut off goes on, and a record is told again without
asking anything. --compiled: code that inductor compiles too, which takes minutes. Each record says
in its module what it is of.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from offramp_lab.experiments.experiment import bar
from offramp_lab.experiments.factors import Measured, Name
from offramp_lab.places import RUNS
from offramp_lab.records.photographs import (
    end_to_end,
    five_layers,
    megapixels,
    quantised,
    runtimes,
    trust,
)
from offramp_lab.records.photographs.opened import COMPILED, Opened
from offramp_lab.records.photographs.told import Spec, Told, scored
from offramp_lab.records.record import Some, Turns, asked
from offramp_lab.records.subjects import halves

SPECS = {
    module.SPEC.record.name: module.SPEC
    for module in (end_to_end, megapixels, five_layers, runtimes, quantised, trust)
}
SPLITS = {"captions": "captions_val", "questions": "questions_val"}
WARM = 8
"""Examples that compiled code is tried on: it is made where a row count is first met. Others are
tried on two: the second prompt of llama.cpp still runs the tower twice."""


def measured(specs: list[Spec], opened: Opened, examples: dict[str, Any]) -> list[Told]:
    """What is told of each record's photographs. examples: those that chose nothing, by kind."""
    found: dict[str, list[dict[Name, Measured]]] = {}
    for kind, some in examples.items():
        turns = Turns(opened.work / f"{kind}.jsonl")
        for place, example in enumerate(bar(kind)(some[: max(s.count(kind) for s in specs)])):
            wanted = [n for s in specs if s.count(kind) > place for n in s.of(kind, opened)]
            ways = opened.ways([*dict.fromkeys(wanted)], kind)
            compiled = any(COMPILED in engine for engine, *_ in ways)
            turns.take(ways, example, some[: WARM if compiled else 2])
        found[kind] = [
            scored(turns.told(spec.of(kind, opened) if own else (), own), kind, opened.encoder, own)
            for spec in specs
            for own in [some[: spec.count(kind)]]
        ]
    return [
        Told(opened, examples["captions"][: spec.photographs], captions, questions)
        for spec, captions, questions in zip(specs, *found.values(), strict=True)
    ]


def main() -> None:
    arguments = asked(
        __doc__,
        photo=True,
        photographs=300,
        student=RUNS / "student",
        compiled=False,
        records=Some(SPECS),
    )
    most = arguments.photographs
    specs = [
        replace(s, photographs=min(most, s.photographs), questions=min(most, s.questions))
        for s in (SPECS[name] for name in arguments.records)
    ]
    how = arguments.student, arguments.compiled
    opened = Opened(arguments.adapter, RUNS / "photographs", *how)
    examples = {kind: halves(arguments.data, split)[1] for kind, split in SPLITS.items()}
    with opened.stages.of_entries():
        for spec, told in zip(specs, measured(specs, opened, examples), strict=True):
            spec.record.write(spec.figures(told))


if __name__ == "__main__":
    main()
