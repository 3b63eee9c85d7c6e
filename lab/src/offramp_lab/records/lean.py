"""What the framework around a token costs, and what is left of it; rewrites lean.json in
lab/records.

One thread, float32. Hugging Face's `generate`, exits on the stack itself, without the stack's own
code, and compiled, in turn, on the photo model and on a tiny OPT; once as they are, and once with
matrix products left out, so that what remains is overhead. On the stack and without its code
through eight slots of the batch engine as well. `python -m offramp_lab.records.lean` takes eight
minutes.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from examples.photo_vlm.rows import read_photographs
from torch import Tensor, nn

from offramp.engine.decoding.scheduler import Schedule
from offramp.engine.executors.modules import in_place
from offramp.engine.generate import generate
from offramp.engine.policy import FULL, ExitPolicy
from offramp.models.backbone import Backbone
from offramp.models.exits import Exits, ExitSet
from offramp.serving.core import EngineCore
from offramp.serving.engine_config import EngineConfig
from offramp.serving.request import Request
from offramp_lab.experiments.experiment import Experiment, Rounds, Ticks, each, in_cpu_milliseconds
from offramp_lab.inputs import tiny_families
from offramp_lab.records.record import Record, asked
from offramp_lab.records.runtimes.methods import policies
from offramp_lab.records.subjects import load_photo

RECORD = Record("lean")
WAY = ("model", "path", "mode")
TOKENS = 32
SLOTS = 8


def per_token(clock: Ticks) -> tuple[float, float, float]:
    """CPU and wall milliseconds of a token, the first two left out; and those, of the CPU, of the
    second token, with which the stack is rehearsed."""
    of, second = len(clock.cpu) - 3, clock.cpu[2] - clock.cpu[1]
    per = [(noted[-1] - noted[2]) / of for noted in (clock.cpu, clock.wall)]
    return 1e3 * per[0], 1e3 * per[1], 1e3 * second


Run = Callable[[Mapping[str, Any], Ticks], Any]
"""Answers a prompt and tells the clock of each token."""


@dataclass(frozen=True)
class Case:
    """A model with exits, policies by mode, and prompts of one row."""

    name: str
    backbone: Backbone
    exits: ExitSet
    policies: Mapping[str, ExitPolicy]
    prompts: Sequence[Mapping[str, Any]]

    def methods(self) -> dict[tuple[str, str], Run]:
        """By path ("generate", Hugging Face's own; "stack", "lean" or "compiled") and mode."""
        model = self.backbone.model
        options: dict[str, Any] = {"max_new_tokens": TOKENS, "do_sample": False}

        def stock(inputs: Mapping[str, Any], clock: Ticks) -> Any:
            return model.generate(**inputs, **options, streamer=clock)

        def ours(path: str, policy: ExitPolicy) -> Run:
            lean, compiled = path != "stack", path == "compiled"
            backbone = self.backbone.with_decoding(lean=lean, compiled=compiled)
            how: dict[str, Any] = {"exits": self.exits, "policy": policy, **options}
            return lambda inputs, clock: generate(backbone, inputs, streamer=clock, **how)

        made: dict[tuple[str, str], Run] = {("generate", "full"): stock}
        for mode, policy in self.policies.items():
            for path in ("stack", "lean", "compiled"):
                made[path, mode] = ours(path, policy)
        return made


@contextmanager
def no_products() -> Iterator[None]:
    """Linear layers answer zeros, made once for each shape."""
    functional: Any = torch.nn.functional
    linear, zeros = functional.linear, {}

    def answer(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if type(states) is not Tensor:  # code is being made, which must still need the states
            return (states[..., :1] * 0).expand(*states.shape[:-1], len(weight))
        key = (id(weight), states.shape)
        if key not in zeros:
            zeros[key] = states.new_zeros(*states.shape[:-1], len(weight))
        return zeros[key]

    functional.linear = answer
    in_place._CODES.clear()
    try:
        yield
    finally:
        functional.linear = linear
        in_place._CODES.clear()


def measure(case: Case, rounds: int, modes: Sequence[str]) -> list[dict[str, Any]]:
    """Milliseconds of a token by path and mode: medians of rounds, and the least; tokens a CPU
    second; CPU seconds of the first round, in which code is made."""

    def timed(prompt: Mapping[str, Any], run: Run) -> tuple[float, ...]:
        clock, start = Ticks(), sum(os.times()[:4])
        with torch.inference_mode():
            run(prompt, clock)
        return (*per_token(clock), sum(os.times()[:4]) - start)

    def figures(found: Rounds) -> dict[str, float]:
        first, *counted = found  # the first warms up
        times = each(counted)
        return {
            "cpu_milliseconds": median(t[0] for t in times),
            "cpu_milliseconds_least": min(t[0] for t in times),
            "wall_milliseconds": median(t[1] for t in times),
            "second_token_cpu_milliseconds": median(t[2] for t in times),
            "tokens_per_second": 1e3 / median(t[0] for t in times),
            "first_round_cpu_seconds": sum(t[3] for t in first),
        }

    methods = {
        (case.name, *name): partial(timed, run=run)
        for name, run in case.methods().items()
        if name[1] in modes
    }
    return Experiment(methods, case.prompts, rounds + 1).entries(WAY, figures)


def measure_slots(case: Case, rounds: int, modes: Sequence[str]) -> list[dict[str, Any]]:
    """The same of tokens that the batch engine writes in as many slots as there are answers,
    prompts left out."""
    config = EngineConfig(slots=SLOTS, limit=192, schedule=Schedule.of(SLOTS))
    options = {"max_new_tokens": TOKENS, "do_sample": False}

    def milliseconds(_: None, path: str, mode: str) -> float:
        backbone = case.backbone.with_decoding(lean=path == "lean", compiled=False)
        policy = case.policies[mode]
        core = EngineCore(backbone, case.exits, policy, config, clock=time.thread_time)
        for row in range(SLOTS):
            core.add(Request(case.prompts[row % len(case.prompts)], options=options))
        core.run()
        return 1e3 * (sum(core.seconds.values()) - core.seconds["read"]) / core.tokens

    methods = {
        (f"{case.name}, {SLOTS} slots", path, mode): partial(milliseconds, path=path, mode=mode)
        for mode in modes
        for path in ("stack", "lean")
    }
    return Experiment(methods, rounds=rounds, warm=1).entries(WAY, in_cpu_milliseconds)


def photo_model(exits: Path | None, data: Path, prompts: int) -> Case:
    """The photo model with its shipped exits and thresholds."""
    adapter, encoder = load_photo(exits)
    examples = read_photographs(data)["captions_val"][:prompts]
    inputs = [encoder.prompts([example]) for example in examples]
    modes = policies(adapter.policy)
    return Case("photo", _endless(adapter.backbone), adapter.exits, modes, inputs)


def tiny_opt() -> Case:
    """A BLIP-2 with an OPT of six layers and width 32, and an exit at two."""
    backbone = Backbone(tiny_families.build("blip2-opt"))
    exits = ExitSet(Exits(backbone, (2,)))
    modes = {"full": FULL, "every_token": ExitPolicy({2: 1e-6})}
    return Case("tiny OPT", backbone, exits, modes, [tiny_families.KINDS["blip2-opt"].inputs(1)])


def _endless(backbone: Backbone) -> Backbone:
    """Without an end token: answers of one length."""
    for module in backbone.model.modules():
        config: Any = getattr(module, "generation_config", None)
        if isinstance(module, nn.Module) and config is not None:
            config.eos_token_id = None
    return backbone


def main() -> None:
    arguments = asked(__doc__, photo=True, rounds=3, prompts=1)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()  # so that code is made
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # by processes whose time is counted
    load_before = os.getloadavg()[0]
    photo = photo_model(arguments.adapter, arguments.data, arguments.prompts)
    tiny = tiny_opt()
    record = {
        "tokens": TOKENS,
        "rounds": arguments.rounds,
        "prompts": arguments.prompts,
        "speeds": [
            *measure(photo, arguments.rounds, [*photo.policies]),
            *measure(tiny, 20 * arguments.rounds, [*tiny.policies]),
            *measure_slots(photo, arguments.rounds, ("full", "early_exit")),
            *measure_slots(tiny, 20 * arguments.rounds, [*tiny.policies]),
        ],
    }
    with no_products():  # scores are those of zeros: only where they decide nothing
        record["overhead"] = measure(photo, 3 * arguments.rounds, ("full", "every_token"))
    record["load"] = [round(load_before, 1), round(os.getloadavg()[0], 1)]
    RECORD.write(record)


if __name__ == "__main__":
    main()
