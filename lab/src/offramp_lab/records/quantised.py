"""What weights in 8 and 4 bits are worth, and prepacked ones, with exits and without, on the photo
model in PyTorch; rewrites quantised.json in lab/records.

One thread. `python -m offramp_lab.records.quantised` needs the model that `python -m
examples.photo_vlm.build` makes and the photographs it names. Parts, each kept in runs/quantised for
the others: kernels (a minute), timings (five minutes, on a quiet machine), answers (a quarter of an
hour) and calibrated (half an hour); what was answered already is not asked again. `--parts timings`
measures only these.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from examples.photo_vlm.caption import ADAPTER, load
from examples.photo_vlm.rows import half_of, read_photographs
from tqdm import tqdm

from offramp.adapter import Adapter
from offramp.data.example import Example
from offramp.engine.policy import FULL, ExitPolicy
from offramp.evaluation.caption_metrics import caption_scores
from offramp.evaluation.statistics import interval
from offramp.models.input_processor import InputProcessor
from offramp.models.quantized.linears import SCHEMES
from offramp.models.quantized.prepacked import PrepackedLinear
from offramp.models.quantized.weights import weight_bytes
from offramp.models.vision_cache import VisionCache
from offramp.provenance import provenance
from offramp.storage import JsonlLog, read_json, write_json
from offramp_lab.places import PHOTOGRAPHS, RECORDS, RUNS
from offramp_lab.records.runtimes.calibrated import by_format
from offramp_lab.records.runtimes.kept import Kept, KeptRuntime
from offramp_lab.records.runtimes.methods import Answer, Clock, Method, generating, stock
from offramp_lab.records.runtimes.timings import timed

OUT, RECORD = RUNS / "quantised", RECORDS / "quantised.json"
HOW: dict[str, tuple[Any, str | None]] = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "int8": (torch.bfloat16, "int8"),
    "int4": (torch.bfloat16, "int4"),
}
"""Formats of the decoder layers: precision of the states, and what weights are rounded to."""
PREPACKED = ", prepacked"
"""Behind a format whose weights, as far as they are not rounded, are laid out for the processor."""
FORMATS = (*HOW, *(f"{layers}{PREPACKED}" for layers in ("float32", "bfloat16", "int4")))
PARTS = ("kernels", "timings", "answers", "calibrated")
AT_ONCE = 16
"""Photographs that are answered in a batch, where a row gets what it gets alone."""
STOCK, OURS = "generate", "offramp, torch"
ASKED = {
    "float32": ("full", "early_exit"),
    "int8": ("full", "early_exit", "lossless"),
    "int4": ("full", "early_exit", "threshold_0.1", "lossless"),
    "float32, prepacked": ("full", "early_exit", "lossless"),
    "bfloat16, prepacked": ("full", "early_exit", "lossless"),
}
"""Modes whose answers are compared."""
Name = tuple[str, str, str]
"""Runtime, format, mode."""


def policies(adapter: Adapter) -> dict[str, ExitPolicy]:
    """By mode: exits off, the shipped threshold, a lower one, every token at the exit, lossless."""
    shipped = adapter.policy

    def at(threshold: float) -> ExitPolicy:
        return replace(shipped, thresholds=dict.fromkeys(shipped.thresholds, threshold), drafts={})

    return {
        "full": FULL,
        "early_exit": shipped,
        "threshold_0.1": at(0.1),
        "every_token": at(1e-6),
        "lossless": replace(shipped, lossless=True),
    }


@dataclass(frozen=True)
class Bench:
    """The photo model in every format, with the shipped exits, and photographs of the measuring
    half, none of which chose a threshold."""

    adapters: Mapping[str, Adapter]
    encoder: InputProcessor
    photographs: Sequence[Example]

    @classmethod
    def of(cls, model: Path, photographs: Sequence[Example], formats: Iterable[str]) -> Bench:
        adapters = {}
        for name in formats:
            dtype, word = HOW[name.removesuffix(PREPACKED)]
            backbone, encoder = load(model, dtype, word)
            adapters[name] = Adapter.load(ADAPTER, backbone)
            if name.endswith(PREPACKED):
                adapters[name].prepack()
        return cls(adapters, encoder, photographs)

    def method(self, layers: str, mode: str, **options: Any) -> Method:
        """Ours, in a mode."""
        adapter = self.adapters[layers]
        return generating(adapter.generate, policy=policies(adapter)[mode], **options)

    def methods(self) -> dict[Name, Method]:
        """All of them; prepacked weights not by Hugging Face's own `generate`."""
        made: dict[Name, Method] = {}
        for layers, adapter in self.adapters.items():
            if not layers.endswith(PREPACKED):
                made[STOCK, layers, "full"] = stock(adapter)
            for mode in policies(adapter):
                made[OURS, layers, mode] = self.method(layers, mode)
        return made

    def inputs(self, example: Example) -> dict[str, Mapping[str, Any]]:
        """The prompt, by format: pixels come in the precision of the model."""
        return {
            layers: InputProcessor(adapter.backbone, self.encoder.processor).prompts([example])
            for layers, adapter in self.adapters.items()
        }


# -- answers ---------------------------------------------------------------------------------------


def answers(bench: Bench) -> dict[str, Any]:
    """Which answers are the same, and their CIDEr. What is answered already is kept."""
    methods: dict[Name, Method] = {}
    for layers, modes in ASKED.items():
        options = {"vision_cache": VisionCache(1 << 28)}
        for mode in modes:
            methods[OURS, layers, mode] = bench.method(layers, mode, **options)
    file = OUT / "answers.jsonl"
    rows_by_key = {row["key"]: row for row in JsonlLog.read(file)} if file.is_file() else {}
    with JsonlLog(file) as log:
        for example in tqdm(bench.photographs, "answers", disable=None):
            if example.key not in rows_by_key:
                inputs = bench.inputs(example)
                said = {
                    "/".join(name): list(method(inputs[name[1]], Clock()))
                    for name, method in methods.items()
                }
                rows_by_key[example.key] = {"key": example.key, **said}
                log.append(rows_by_key[example.key])
    rows = [rows_by_key[example.key] for example in bench.photographs]
    return {"photographs": len(rows), "entries": compare([*methods], bench, rows)}


def compare(names: Sequence[Name], bench: Bench, rows: Sequence[Any]) -> list[dict[str, Any]]:
    """Identical answers, and CIDEr with the interval of its difference from the float32 full
    model's. rows: for each photograph, ids by joined names."""
    said = {name: [tuple(row["/".join(name)]) for row in rows] for name in names}
    right = {str(i): example.answers for i, example in enumerate(bench.photographs)}

    def measure(answers: Sequence[Answer]) -> Any:
        texts = bench.encoder.tokenizer.batch_decode(answers, skip_special_tokens=True)
        spoken = {str(i): text.strip() for i, text in enumerate(texts)}
        scored = caption_scores(spoken, right, metrics=("CIDEr",), tokenizer="simple")
        return scored.measures["CIDEr"]

    def same(name: Name, other: Name) -> int:
        return sum(a == b for a, b in zip(said[name], said[other], strict=True))

    whole = (OURS, "float32", "full")
    reference, entries = measure(said[whole]), []
    for name in names:
        runtime, layers, mode = name
        value = measure(said[name])
        entries.append(
            {
                "runtime": runtime, "format": layers, "mode": mode,
                "as_own_full": same(name, (OURS, layers, "full")),
                "as_float32_full": same(name, whole),
                "CIDEr": value.value,
                "difference_interval": interval(value, minus=reference),
            }
        )  # fmt: skip
    return entries


# -- calibration ----------------------------------------------------------------------------------


def calibrated(bench: Bench, chosen_on: Sequence[Example]) -> dict[str, Any]:
    """Thresholds for int4: chosen on photographs of the other half, measured on the bench's."""
    kept = Kept(OUT / "calibrated.jsonl")
    runtimes = {
        layers: KeptRuntime(
            adapter, f"torch {layers}", adapter.backbone.depth, kept,
            rows=AT_ONCE, dtype=adapter.backbone.dtype,
        )
        for layers, adapter in bench.adapters.items()
    }  # fmt: skip
    float32 = runtimes.pop("float32")
    halves = (chosen_on, bench.photographs)
    return by_format(bench.adapters["int4"], bench.encoder, halves, float32, runtimes)


# -- timings ---------------------------------------------------------------------------------------


def timings(bench: Bench, rounds: int) -> dict[str, Any]:
    """Tokens a second of decoding, interleaved; medians of rounds."""
    methods = bench.methods()
    inputs = [bench.inputs(example) for example in bench.photographs]
    for name, method in methods.items():
        method(inputs[0][name[1]], Clock())
    spent = {name: [[0.0, 0.0, 0.0] for _ in range(rounds)] for name in methods}
    tokens = dict.fromkeys(methods, 0)
    draw, names = np.random.default_rng(0), list(methods)
    load_before = os.getloadavg()[0]
    for number in tqdm(range(rounds), "timings", disable=None):
        for prompts in inputs:
            for name in [names[i] for i in draw.permutation(len(names))]:
                seconds, answer = timed(methods[name], prompts[name[1]])
                for place, value in enumerate(seconds[:3]):
                    spent[name][number][place] += value
                tokens[name] += len(answer) - 1
    return {
        "photographs": len(inputs),
        "rounds": rounds,
        "load": [round(load_before, 1), round(os.getloadavg()[0], 1)],
        "entries": _entries(spent, tokens, len(inputs)),
        "memory": {layers: memory(adapter) for layers, adapter in bench.adapters.items()},
    }


def _entries(
    spent: Mapping[Name, Sequence[Sequence[float]]], tokens: Mapping[Name, int], photographs: int
) -> list[dict[str, Any]]:
    """By method. wall_seconds, cpu_seconds: of one round's tokens, decoding alone."""
    entries: list[dict[str, Any]] = []
    for (runtime, layers, mode), totals in spent.items():
        whole, wall, cpu = (median(total[place] for total in totals) for place in range(3))
        decoded = tokens[runtime, layers, mode] / len(totals)
        entries.append(
            {
                "runtime": runtime, "format": layers, "mode": mode,
                "tokens_per_second": decoded / wall, "cpu_tokens_per_second": decoded / cpu,
                "wall_seconds": wall, "cpu_seconds": cpu, "tokens": decoded,
                "end_to_end_seconds": whole / photographs,
            }
        )  # fmt: skip
    stock_speed = entries[0]["cpu_tokens_per_second"]
    return [{**e, "over_generate": e["cpu_tokens_per_second"] / stock_speed} for e in entries]


def memory(adapter: Adapter) -> dict[str, int]:
    """Bytes of weights: of the model, of its decoder layers, and of the exits beside it."""
    backbone = adapter.backbone
    parts = {"model": backbone.model, "layers": backbone.layers, "exits": adapter.exits.modules}
    return {name: weight_bytes(part) for name, part in parts.items()}


# -- kernels ---------------------------------------------------------------------------------------


SHAPES = {"layer": (1536, 576, 20), "head": (49152, 576, 1)}
"""Rows and columns of a linear, and how many stand side by side, so that none is in a cache."""
TOKENS = (1, 2, 4, 8, 16, 64)


@torch.inference_mode()
def kernels(repeats: int = 5) -> list[dict[str, Any]]:
    """CPU microseconds of a linear of the photo model for several tokens in a call, by format; the
    least of the repeats."""
    found: list[dict[str, Any]] = []
    for what, (rows, columns, copies) in SHAPES.items():
        plain = [torch.nn.Linear(columns, rows, bias=False) for _ in range(copies)]
        half = [copy.deepcopy(linear).bfloat16() for linear in plain]
        rounded = {word: [kind(linear) for linear in half] for word, kind in SCHEMES.items()}
        sides: dict[str, Sequence[Any]] = {"float32": plain, "bfloat16": half, **rounded}
        sides |= {
            f"{n}{PREPACKED}": [*map(PrepackedLinear, sides[n])] for n in ("float32", "bfloat16")
        }
        for tokens in TOKENS:
            states = torch.randn(tokens, columns)
            taken: dict[str, float] = {}
            for _ in range(repeats):
                for layers, linears in sides.items():
                    dtype, _ = HOW[layers.removesuffix(PREPACKED)]
                    given, start = states.to(dtype), time.process_time()
                    for linear in linears:
                        linear(given)
                    spent = 1e6 * (time.process_time() - start) / copies
                    taken[layers] = min(spent, taken.get(layers, spent))
            found.append({"what": what, "tokens": tokens, "microseconds": taken})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=RUNS / "photo_vlm" / "model")
    parser.add_argument("--data", type=Path, default=PHOTOGRAPHS)
    parser.add_argument("--parts", nargs="+", default=PARTS)
    parser.add_argument("--photographs", type=int, default=100, help="to compare answers on")
    parser.add_argument("--calibrated", type=int, default=200, help="to choose on, and to measure")
    parser.add_argument("--timed", type=int, default=3, help="photographs to time on")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    held = read_photographs(arguments.data)["captions_val"]
    choosing, measured = ([e for e in held if half_of(e) == half] for half in (0, 1))
    few, many = measured[: arguments.timed], measured[: arguments.photographs]
    others = (choosing[: arguments.calibrated], measured[: arguments.calibrated])
    parts: dict[str, Callable[[], Any]] = {
        "kernels": kernels,
        "timings": lambda: timings(Bench.of(arguments.model, few, FORMATS), arguments.rounds),
        "answers": lambda: answers(Bench.of(arguments.model, many, ASKED)),
        "calibrated": lambda: calibrated(
            Bench.of(arguments.model, others[1], ("int4", "float32")), others[0]
        ),
    }
    for name in arguments.parts:
        write_json(OUT / f"{name}.json", parts[name]())
    files = {name: OUT / f"{name}.json" for name in parts}
    record = {name: read_json(file) for name, file in files.items() if file.is_file()}
    about = provenance(0, ["offramp_lab.records.quantised"], None)
    write_json(RECORD, {**record, "provenance": about})


if __name__ == "__main__":
    main()
