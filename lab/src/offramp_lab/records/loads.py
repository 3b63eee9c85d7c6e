"""Captions of photographs through the batch engine, against single requests one after the other.

    python -m offramp_lab.records.loads --dtype bfloat16

The photo model with its shipped exits and thresholds, held-out photographs, greedy. Captions a
second are counted twice: end to end, photographs opened and seen by the model included, and of
decoding alone, from the first token of each to its last (in the engine: its decoding calls).
Counted too is how many captions are the very tokens that a single request gets; in bfloat16 two
tokens may tie, and the company in the batch then decides. Rewrites
lab/records/loads.json, of its number format alone; five minutes each, a quiet machine.

--cpu-time: seconds of the thread, not of the clock, for a machine that others use too. --modes:
full among them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from examples.photo_vlm.held_out import cider

from offramp.answers import Answer
from offramp.engine.policy import MODES
from offramp.evaluation.timing import exit_generate_fn, stock_generate_fn, timed
from offramp.serving.core import EngineCore
from offramp.serving.engine_config import EngineConfig
from offramp.serving.request import Request
from offramp_lab.experiments.experiment import Experiment, same
from offramp_lab.records.record import Record, Some, asked, named
from offramp_lab.records.subjects import Subject, photo

RECORD = Record("loads")
Clock = Callable[[], float]
Ids = tuple[int, ...]


@dataclass
class Run:
    """One pass over all photographs: seconds end to end and of decoding, and what was said."""

    seconds: float = 0.0
    decode: float = 0.0
    said: list[Ids] = field(default_factory=list)


def main() -> None:
    arguments = asked(
        __doc__, photo=True, dtype="bfloat16", clock=True, images=64, slots=8, rounds=1,
        modes=Some(("generate", *MODES)),
    )  # fmt: skip
    clock, slots = arguments.clock, arguments.slots
    subject = photo(arguments, arguments.images, arguments.dtype)
    few = replace(subject, examples=subject.examples[:2])
    ways = {
        name: run
        for name, run in {**alone(clock), **together(slots, clock)}.items()
        if name.rpartition(", ")[2] in arguments.modes
    }
    Experiment(ways, [few]).run()  # so that all code is there
    runs = Experiment(ways, [subject], arguments.rounds, title="rounds").run()
    figures = {
        "photographs": len(subject.examples), "slots": slots, "rounds": arguments.rounds,
        "clock": named(clock),
        "ways": compared(subject, {name: [run for [run] in found] for name, found in runs.items()}),
    }  # fmt: skip
    print(*figures["ways"], sep="\n")
    RECORD.add({arguments.dtype: figures})


Way = Callable[[Subject], Run]


def alone(clock: Clock) -> dict[str, Way]:
    """One request after the other, by Hugging Face's `generate` and in every mode."""

    def run(subject: Subject, mode: str) -> Run:
        adapter, options = subject.adapter, subject.options
        if mode == "generate":
            way = stock_generate_fn(adapter.backbone, **options)
        elif mode == "full":
            way = exit_generate_fn(adapter.backbone, **options)
        else:
            policy = adapter.policy.in_mode(mode)
            way = exit_generate_fn(adapter.backbone, adapter.exits, policy, **options)
        begin, done = clock(), Run()
        for example in subject.examples:
            _, decode, ids = timed(way, subject.encoder.prompts([example]), clock)
            done.said.append(ids)
            done.decode += decode
        done.seconds = clock() - begin
        return done

    return {f"alone, {mode}": partial(run, mode=mode) for mode in ("generate", *MODES)}


def together(slots: int, clock: Clock) -> dict[str, Way]:
    """All submitted at once to an engine; photographs are opened in the same thread, so that one
    core does all the work on either side."""

    def run(subject: Subject, mode: str) -> Run:
        adapter, config = subject.adapter, EngineConfig(slots=slots, limit=128)
        core = EngineCore(adapter.backbone, adapter.exits, adapter.policy, config, clock=clock)
        begin, handles = clock(), []
        for example in subject.examples:
            inputs = subject.encoder.prompts([example])
            handles.append(core.add(Request(inputs, mode, options=subject.options)))
            while core.waiting >= slots:
                core.round()
        core.run()
        seconds = clock() - begin
        said = [tuple(handle.result().output.new_tokens[0].tolist()) for handle in handles]
        return Run(seconds, sum(t for kind, t in core.seconds.items() if kind != "read"), said)

    return {f"{slots} slots, {mode}": partial(run, mode=mode) for mode in MODES}


def compared(subject: Subject, runs: Mapping[str, list[Run]]) -> list[dict[str, Any]]:
    """Captions a second of every way, in multiples of the full model's alone too, and how good."""
    count = len(subject.examples)
    full = runs["alone, full"]
    rows = []
    for name, repeats in runs.items():
        took = {n: median(getattr(run, n) for run in repeats) for n in ("seconds", "decode")}
        own = {n: median(getattr(run, n) for run in full) for n in took}
        said, mode = repeats[0].said, name.rpartition(", ")[2]
        single = runs[f"alone, {mode}" if mode in MODES else "alone, full"][0].said
        answers = [Answer(ids, subject.encoder.texts(torch.tensor([ids]))[0]) for ids in said]
        rows.append(
            {
                "way": name, "captions_per_second": count / took["seconds"],
                "captions_per_second_decode": count / took["decode"],
                "over_full_alone": own["seconds"] / took["seconds"],
                "over_full_alone_decode": own["decode"] / took["decode"],
                "as_alone": same(said, single),
                "as_full": same(said, full[0].said),
                "tokens": sum(map(len, said)), "cider": cider(answers, subject.examples),
            }
        )  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
