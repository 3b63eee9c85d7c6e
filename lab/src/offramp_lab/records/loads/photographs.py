"""Captions of photographs through the batch engine, against single requests one after the other.

    python -m offramp_lab.records.loads.photographs --photo FOLDER --dtype bfloat16

The photo model with its shipped exits and thresholds, held-out photographs, greedy. Captions a
second are counted twice: end to end, photographs opened and seen by the model included, and of
decoding alone, from the first token of each to its last (in the engine: its decoding calls).
Counted too is how many captions are the very tokens that a single request gets; in bfloat16 two
tokens may tie, and the company in the batch then decides. Rewrites "photographs" in
lab/records/loads.json, of its number format alone; five minutes each, a quiet machine.

--cpu-time: seconds of the thread, not of the clock, for a machine that others use too.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from examples.photo_vlm.held_out import cider
from tqdm import tqdm
from transformers import StoppingCriteriaList

from offramp.answers import Answer
from offramp.engine.policy import FULL, MODES
from offramp.evaluation.timing import FirstToken, exit_generate_fn, stock_generate_fn
from offramp.serving.core import EngineConfig, EngineCore
from offramp.serving.request import Request
from offramp_lab.records.loads.subjects import Subject, add_photo, keep, photo

Clock = Callable[[], float]
Ids = tuple[int, ...]


@dataclass
class Run:
    """One pass over all photographs: seconds end to end and of decoding, and what was said."""

    seconds: float = 0.0
    decode: float = 0.0
    said: list[Ids] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_photo(parser, required=True)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument(
        "--modes", nargs="+", default=("generate", *MODES), choices=("generate", *MODES),
        help="full among them",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    clock = time.thread_time if arguments.cpu_time else time.perf_counter
    subject = photo(arguments.photo, arguments.data, arguments.images, arguments.dtype)
    warm = alone(replace(subject, examples=subject.examples[:2]), clock)
    ways = {**alone(subject, clock), **together(subject, arguments.slots, clock)}
    runs: dict[str, list[Run]] = {}
    for number in tqdm(range(arguments.rounds), "rounds"):
        for name, run in ways.items():
            if name.rpartition(", ")[2] not in arguments.modes:
                continue
            if number == 0 and name in warm:
                warm[name]()
            runs.setdefault(name, []).append(run())
            print(name, runs[name][-1].seconds, runs[name][-1].decode, flush=True)
    figures = {
        "photographs": len(subject.examples), "slots": arguments.slots, "rounds": arguments.rounds,
        "clock": "thread" if arguments.cpu_time else "wall", "ways": compared(subject, runs),
    }  # fmt: skip
    print(*figures["ways"], sep="\n")
    command = "offramp_lab.records.loads.photographs"
    keep("photographs", {arguments.dtype: figures}, command, subject.examples)


def alone(subject: Subject, clock: Clock) -> Mapping[str, Callable[[], Run]]:
    """One request after the other."""
    adapter, options = subject.adapter, subject.options
    ways = {
        "generate": stock_generate_fn(adapter.backbone, **options),
        **{
            mode: exit_generate_fn(
                adapter.backbone,
                None if mode == "full" else adapter.exits,
                FULL if mode == "full" else adapter.policy.in_mode(mode),
                **options,
            )
            for mode in MODES
        },
    }

    def run(way: Any) -> Run:
        begin, done = clock(), Run()
        for example in subject.examples:
            inputs, first = subject.encoder.prompts([example]), FirstToken(clock)
            done.said.append(tuple(way(inputs, StoppingCriteriaList([first])).tolist()))
            assert first.seconds is not None
            done.decode += clock() - first.seconds
        done.seconds = clock() - begin
        return done

    return {f"alone, {name}": partial(run, way) for name, way in ways.items()}


def together(subject: Subject, slots: int, clock: Clock) -> Mapping[str, Callable[[], Run]]:
    """All submitted at once to an engine; photographs are opened in the same thread, so that one
    core does all the work on either side."""
    adapter, encoder = subject.adapter, subject.encoder

    def run(mode: str) -> Run:
        config = EngineConfig(slots=slots, limit=128)
        core = EngineCore(adapter.backbone, adapter.exits, adapter.policy, config, clock=clock)
        begin, handles, coming = clock(), [], iter(subject.examples)
        for example in coming:
            inputs = encoder.prompts([example])
            handles.append(core.add(Request(inputs, mode, options=subject.options)))
            while core.waiting >= slots:
                core.round()
        core.run()
        seconds = clock() - begin
        said = [tuple(handle.result().output.new_tokens[0].tolist()) for handle in handles]
        return Run(seconds, sum(t for kind, t in core.seconds.items() if kind != "read"), said)

    return {f"{slots} slots, {mode}": partial(run, mode) for mode in MODES}


def compared(subject: Subject, runs: Mapping[str, list[Run]]) -> list[dict[str, Any]]:
    """Captions a second of every way, in multiples of the full model's alone too, and how good."""
    count = len(subject.examples)
    full = runs["alone, full"]
    rows = []
    for name, repeats in runs.items():
        took = {n: median(getattr(run, n) for run in repeats) for n in ("seconds", "decode")}
        own = {n: median(getattr(run, n) for run in full) for n in took}
        said, mode = repeats[0].said, name.rpartition(", ")[2]
        same = runs[f"alone, {mode}" if mode in MODES else "alone, full"][0].said
        answers = [Answer(ids, subject.encoder.texts(torch.tensor([ids]))[0]) for ids in said]
        rows.append(
            {
                "way": name, "captions_per_second": count / took["seconds"],
                "captions_per_second_decode": count / took["decode"],
                "over_full_alone": own["seconds"] / took["seconds"],
                "over_full_alone_decode": own["decode"] / took["decode"],
                "as_alone": sum(a == b for a, b in zip(said, same, strict=True)),
                "as_full": sum(a == b for a, b in zip(said, full[0].said, strict=True)),
                "tokens": sum(map(len, said)), "cider": cider(answers, subject.examples),
            }
        )  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
