"""What weights in 8 and 4 bits are worth, and prepacked ones, with exits and without, on the photo
model in PyTorch; rewrites quantised.json in lab/records.

One thread. `python -m offramp_lab.records.quantised` needs the photographs. Parts, each kept in
runs/quantised for the others: timings (four minutes, on a quiet machine) and answers (seven
minutes); what was answered already is not asked again. `--parts timings` measures only these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from offramp.adapter.adapter import Adapter
from offramp.engines import ENGINES
from offramp.evaluation.timing import GenerateFn, generate_fn, stock_generate_fn
from offramp.features.description import weight_bytes
from offramp.features.input_processor import InputProcessor
from offramp.inputs.example import Example
from offramp_lab.experiments.experiment import same
from offramp_lab.places import RUNS
from offramp_lab.records.record import Kept, Record, Some, asked
from offramp_lab.records.runtimes.answers import cider, ids_by, worth
from offramp_lab.records.runtimes.methods import (
    OPTIONS,
    WAY,
    Name,
    Taken,
    in_turns,
    policies,
    taken,
)
from offramp_lab.records.subjects import halves, load_photo

RECORD = Record("quantised")
HOW: dict[str, tuple[str, str | None]] = {
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "int8": ("bfloat16", "int8"),
    "int4": ("bfloat16", "int4"),
}
"""Formats of the decoder layers: precision of the states, and what weights are rounded to."""
PREPACKED = ", prepacked"
"""Behind a format whose weights, as far as they are not rounded, are laid out for the processor."""
FORMATS = (*HOW, *(f"{layers}{PREPACKED}" for layers in ("float32", "bfloat16", "int4")))
PARTS = ("timings", "answers")
STOCK, OURS = "generate", "offramp, torch"
ASKED = {
    "float32": ("full", "early_exit"),
    "int8": ("full", "early_exit", "lossless"),
    "int4": ("full", "early_exit", "lossless"),
    "float32, prepacked": ("full", "early_exit", "lossless"),
    "bfloat16, prepacked": ("full", "early_exit", "lossless"),
}
"""Modes whose answers are compared."""


@dataclass(frozen=True)
class Bench:
    """The photo model in every format, with the shipped exits, and photographs of the measuring
    half, none of which chose a threshold."""

    adapters: Mapping[str, Adapter]
    encoder: InputProcessor
    photographs: Sequence[Example]

    @classmethod
    def of(
        cls, exits: Path | None, photographs: Sequence[Example], formats: Iterable[str]
    ) -> Bench:
        """encoder: of pixels in float32."""
        adapters, encoders = {}, {}
        for name in formats:
            dtype, word = HOW[name.removesuffix(PREPACKED)]
            adapters[name], encoders[name] = load_photo(exits, dtype, word)
            if name.endswith(PREPACKED):
                ENGINES["packed"].open(adapters[name])
        return cls(adapters, encoders["float32"], photographs)

    def methods(self) -> dict[Name, GenerateFn]:
        """By runtime, format and mode; prepacked weights not by Hugging Face's own `generate`."""
        made: dict[Name, GenerateFn] = {}
        for layers, adapter in self.adapters.items():
            if not layers.endswith(PREPACKED):
                made[STOCK, layers, "full"] = stock_generate_fn(adapter.backbone, **OPTIONS)
            for mode, policy in policies(adapter.policy).items():
                made[OURS, layers, mode] = generate_fn(adapter.generate, policy=policy, **OPTIONS)
        return made

    def inputs(self, example: Example) -> dict[str, Mapping[str, Any]]:
        """The prompt, by format: pixels come in the precision of the model."""
        return {
            layers: InputProcessor(adapter.backbone, self.encoder.processor).prompts([example])
            for layers, adapter in self.adapters.items()
        }


# -- answers ---------------------------------------------------------------------------------------


def answers(bench: Bench) -> dict[str, Any]:
    """Identical answers, and CIDEr with the interval of its difference from the float32 full
    model's. What is answered already is kept."""
    photographs, encoder = bench.photographs, bench.encoder
    ways = {
        name: partial(_ids, name, method)
        for name, method in bench.methods().items()
        if name[0] == OURS and name[2] in ASKED[name[1]]
    }
    kept = Kept(RUNS / RECORD.name / "answers.jsonl")
    said = kept.answers(ways, photographs, bench.inputs, "answers")
    whole = (OURS, "float32", "full")
    reference = cider(said[whole], photographs, encoder)

    def entry(name: Name) -> dict[str, Any]:
        return {
            **dict(zip(WAY, name, strict=True)),
            "as_own_full": same(said[name], said[OURS, name[1], "full"]),
            "as_float32_full": same(said[name], said[whole]),
            **worth(cider(said[name], photographs, encoder), reference),
        }

    return {"photographs": len(photographs), "entries": [entry(name) for name in said]}


def _ids(name: Name, method: GenerateFn, inputs: Mapping[str, Any]) -> list[int]:
    return ids_by(method, inputs[name[1]])


# -- timings ---------------------------------------------------------------------------------------


def timings(bench: Bench, rounds: int) -> dict[str, Any]:
    """Tokens a second of decoding, interleaved; medians of rounds; of `generate` in float32 and of
    full depth in the same format, with intervals over photographs.

    wall_seconds, cpu_seconds: of one round's tokens, decoding alone.
    """

    def taking(inputs: Mapping[str, Any], name: Name, method: GenerateFn) -> Taken:
        return taken(method, inputs[name[1]])

    methods = {n: partial(taking, name=n, method=m) for n, m in bench.methods().items()}
    inputs = [bench.inputs(example) for example in bench.photographs]
    return {
        **in_turns(methods, inputs, rounds, 1, _bases),
        "memory": {layers: memory(adapter) for layers, adapter in bench.adapters.items()},
    }


def _bases(name: Name) -> dict[str, Name]:
    return {"over_generate": (STOCK, "float32", "full"), "over_full": (OURS, name[1], "full")}


def memory(adapter: Adapter) -> dict[str, int]:
    """Bytes of weights: of the model, of its decoder layers, and of the exits beside it."""
    backbone = adapter.backbone
    parts = {"model": backbone.model, "layers": backbone.layers, "exits": adapter.exits.modules}
    return {name: weight_bytes(part) for name, part in parts.items()}


def main() -> None:
    arguments = asked(__doc__, photo=True, photographs=100, timed=30, rounds=1, parts=Some(PARTS))
    _, measuring = halves(arguments.data)

    def bench(count: int, formats: Iterable[str]) -> Bench:
        return Bench.of(arguments.adapter, measuring[:count], formats)

    made: dict[str, Callable[[], Any]] = {
        "timings": lambda: timings(bench(arguments.timed, FORMATS), arguments.rounds),
        "answers": lambda: answers(bench(arguments.photographs, ASKED)),
    }
    RECORD.parts(made, arguments.parts)


if __name__ == "__main__":
    main()
