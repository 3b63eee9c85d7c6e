"""What exits are worth inside llama.cpp, on the photo model; rewrites llama-cpp.json in
benchmarks/records.

One thread. `python -m benchmarks.llama_cpp` needs the model that `python -m
examples.photo_vlm.build` makes and the photographs it names. Parts, each kept in runs/llama_cpp for
the others: answers (200 photographs, half an hour), timings and callback (ten minutes, on a quiet
machine). `--parts timings` measures only these.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from examples.photo_vlm.caption import ADAPTER, load
from examples.photo_vlm.evaluate import LONGEST
from examples.photo_vlm.held_out import half_of
from examples.photo_vlm.rows import read_photographs
from tqdm import tqdm
from transformers import StoppingCriteriaList

from offramp.adapter import Adapter
from offramp.data.example import Example
from offramp.engine.policy import FULL, ExitPolicy
from offramp.evaluation.caption_metrics import caption_scores
from offramp.evaluation.statistics import interval
from offramp.evaluation.timing import FirstToken
from offramp.models.input_processor import InputProcessor
from offramp.models.intercept import InterceptedModel
from offramp.models.vision_cache import VisionCache
from offramp.provenance import provenance
from offramp.runtimes.llama_cpp import EngineOptions, ExportFormats, LlamaCppRuntime, export_gguf
from offramp.runtimes.llama_cpp.gguf_export import export_whole
from offramp.runtimes.llama_cpp.runtime import DecoderEntry
from offramp.runtimes.llama_cpp.segment import Segment
from offramp.storage import JsonlLog, read_json, write_json

ROOT = Path(__file__).parent.parent
OUT, RECORD = ROOT / "runs" / "llama_cpp", ROOT / "benchmarks" / "records" / "llama-cpp.json"
FORMATS = ("f16", "q8_0", "q4_1")
ENGINE = EngineOptions(context=512)
OPTIONS = {"max_new_tokens": LONGEST["captions"], "do_sample": False}
Answer = tuple[int, ...]
Name = tuple[str, str, str]
"""Runtime, number format of the layers, mode."""


class Clock(FirstToken):
    """Also notes the CPU seconds when the first token was there."""

    cpu: float | None = None

    def __call__(self, *positional: Any, **named: Any) -> torch.Tensor:
        if self.cpu is None:
            self.cpu = time.process_time()
        return super().__call__(*positional, **named)


Method = Callable[[Mapping[str, Any], Clock], Answer]
"""Answers one prompt, and calls the clock when the first token is there."""


class OneFile:
    """llama.cpp alone: the whole decoder in one file, greedy, with nothing of Hugging Face around
    a token. It is fed with the same embeddings."""

    def __init__(self, adapter: Adapter, file: Path, end: int) -> None:
        self.backbone, self.end = adapter.backbone, end
        self.segment = Segment(file, ENGINE, tap_layer=None)
        self.embeddings = self.backbone.stack.get_input_embeddings().weight.detach().numpy()

    def __call__(self, inputs: Mapping[str, Any], clock: Clock) -> Answer:
        entry = DecoderEntry()
        model = InterceptedModel(self.backbone, entry).model
        with torch.inference_mode():
            states = entry.states(lambda: model(**inputs))[0].float().numpy()
        self.segment.crop(self.segment.length)
        tokens: list[int] = []
        while len(tokens) < OPTIONS["max_new_tokens"]:
            self.segment.feed(states, 1)
            tokens.append(int(np.argmax(self.segment.logits(1))))
            if len(tokens) == 1:
                clock(torch.zeros(1, 1, dtype=torch.long), None)
            if tokens[-1] == self.end:
                break
            states = self.embeddings[tokens[-1]][None]
        return tuple(tokens)


def generating(generate: Callable[..., Any], **options: Any) -> Method:
    """A method by anything that takes what `Adapter.generate` takes."""

    def run(inputs: Mapping[str, Any], clock: Clock) -> Answer:
        stop = StoppingCriteriaList([clock])
        output = generate(inputs, stopping_criteria=stop, **OPTIONS, **options)
        return tuple(output.new_tokens[0].tolist())

    return run


def stock(adapter: Adapter) -> Method:
    """Hugging Face's own `generate`."""

    def run(inputs: Mapping[str, Any], clock: Clock) -> Answer:
        model = adapter.backbone.model
        stop = StoppingCriteriaList([clock])
        ids = model.generate(**inputs, stopping_criteria=stop, **OPTIONS)
        return tuple(ids[0, inputs["input_ids"].shape[1] :].tolist())

    return run


@dataclass(frozen=True)
class Bench:
    """The model, its photographs and the exported files.

    photographs: of the measuring half, none of which chose a threshold.
    """

    adapter: Adapter
    encoder: InputProcessor
    photographs: Sequence[Example]

    @property
    def policies(self) -> dict[str, ExitPolicy]:
        """By mode. The shipped thresholds, also for drafts; every token at the exit, looked at."""
        shipped = self.adapter.policy
        every = replace(shipped, thresholds=dict.fromkeys(shipped.thresholds, 1e-6))
        return {
            "full": FULL,
            "early_exit": shipped,
            "every_token": every,
            "lossless": replace(shipped, lossless=True),
        }

    def runtime(self, layers: str, engine: EngineOptions = ENGINE) -> LlamaCppRuntime:
        folder = OUT / layers
        if not folder.is_dir():
            export_gguf(self.adapter, folder, layers)
        return LlamaCppRuntime(self.adapter, folder, engine=engine)

    def one_file(self, layers: str) -> OneFile:
        file = OUT / f"whole-{layers}.gguf"
        if not file.is_file():
            OUT.mkdir(parents=True, exist_ok=True)
            export_whole(self.adapter.backbone, file, ExportFormats(layers))
        return OneFile(self.adapter, file, self.encoder.eos)

    def methods(self, **options: Any) -> dict[Name, Method]:
        """By runtime, format and mode."""
        adapter = self.adapter
        methods: dict[Name, Method] = {("generate", "float32", "full"): stock(adapter)}
        for mode, policy in self.policies.items():
            method = generating(adapter.generate, policy=policy, **options)
            methods["offramp, torch", "float32", mode] = method
        for layers in FORMATS:
            methods["llama.cpp", layers, "full"] = self.one_file(layers)
            runtime = self.runtime(layers)
            for mode, policy in self.policies.items():
                method = generating(runtime.generate, policy=policy, **options)
                methods["offramp, llama.cpp", layers, mode] = method
        return methods


# -- answers ------------------------------------------------------------------------------------


COMPARED = ("full", "early_exit", "lossless")
"""Modes whose answers are compared."""


def answers(bench: Bench) -> dict[str, Any]:
    """Which answers are the same, and what they are worth. What is answered already is kept."""
    methods = bench.methods(vision_cache=VisionCache(1 << 28))
    skipped = {("generate", "full"), ("offramp, torch", "lossless")}
    methods = {n: w for n, w in methods.items() if n[2] in COMPARED and (n[0], n[2]) not in skipped}
    file = OUT / "answers.jsonl"
    rows_by_key = {row["key"]: row for row in JsonlLog.read(file)} if file.is_file() else {}
    with JsonlLog(file) as log:
        for example in tqdm(bench.photographs, "answers", disable=None):
            if example.key not in rows_by_key:
                inputs = bench.encoder.prompts([example])
                said = {
                    "/".join(name): list(method(inputs, Clock()))
                    for name, method in methods.items()
                }
                rows_by_key[example.key] = {"key": example.key, **said}
                log.append(rows_by_key[example.key])
    rows = [rows_by_key[example.key] for example in bench.photographs]
    return compare([*methods], bench, rows)


def compare(names: Sequence[Name], bench: Bench, rows: Sequence[Any]) -> dict[str, Any]:
    """Counts of identical answers, and CIDEr. rows: for each photograph, ids by joined names."""
    answers = {name: [tuple(row["/".join(name)]) for row in rows] for name in names}

    def same(name: Name, other: Name) -> int:
        return sum(a == b for a, b in zip(answers[name], answers[other], strict=True))

    ours, torch_ = "offramp, llama.cpp", "offramp, torch"
    full, early = (torch_, "float32", "full"), (torch_, "float32", "early_exit")
    return {
        "photographs": len(rows),
        "identical": {
            layers: {
                "lossless_as_full": same((ours, layers, "lossless"), (ours, layers, "full")),
                "full_as_one_file": same((ours, layers, "full"), ("llama.cpp", layers, "full")),
                "early_as_full": same((ours, layers, "early_exit"), (ours, layers, "full")),
                "early_as_float32_early": same((ours, layers, "early_exit"), early),
                "full_as_float32_full": same((ours, layers, "full"), full),
            }
            for layers in FORMATS
        },
        "float32": {"early_as_full": same(early, full)},
        "cider": _cider(bench, answers, full),
    }


def _cider(
    bench: Bench, answers_of: Mapping[Name, Sequence[Answer]], full: Name
) -> list[dict[str, Any]]:
    """CIDEr of each method, and its difference from the float32 full model, with its interval."""
    right = {str(i): example.answers for i, example in enumerate(bench.photographs)}

    def measure(answers: Sequence[Answer]) -> Any:
        texts = bench.encoder.tokenizer.batch_decode(answers, skip_special_tokens=True)
        said = {str(i): text.strip() for i, text in enumerate(texts)}
        scored = caption_scores(said, right, metrics=("CIDEr",), tokenizer="simple")
        return scored.measures["CIDEr"]

    whole = measure(answers_of[full])
    rows = []
    for (runtime, layers, mode), answers in answers_of.items():
        value = measure(answers)
        difference = interval(value, minus=whole)
        rows.append(
            {
                "runtime": runtime,
                "format": layers,
                "mode": mode,
                "CIDEr": value.value,
                "drop": 1 - value.value / whole.value,
                "difference_interval": difference,
            }
        )
    return rows


# -- timings ------------------------------------------------------------------------------------


def timings(bench: Bench, rounds: int) -> dict[str, Any]:
    """Tokens a second of decoding, interleaved; medians of rounds."""
    methods = bench.methods()
    inputs = [bench.encoder.prompts([example]) for example in bench.photographs]
    for method in methods.values():
        method(inputs[0], Clock())
    spent = {name: [[0.0, 0.0, 0.0] for _ in range(rounds)] for name in methods}
    tokens = dict.fromkeys(methods, 0)
    draw = np.random.default_rng(0)
    load_before = os.getloadavg()[0]
    for number in tqdm(range(rounds), "timings", disable=None):
        for prompt in inputs:
            for name in [list(methods)[i] for i in draw.permutation(len(methods))]:
                seconds, wall, cpu, count = _timed(methods[name], prompt)
                for place, value in enumerate((seconds, wall, cpu)):
                    spent[name][number][place] += value
                tokens[name] += count
    rows = []
    for name, totals in spent.items():
        runtime, layers, mode = name
        decoded = tokens[name] / rounds
        rows.append(
            {
                "runtime": runtime,
                "format": layers,
                "mode": mode,
                "tokens_per_second": decoded / median(r[1] for r in totals),
                "cpu_tokens_per_second": decoded / median(r[2] for r in totals),
                "end_to_end_seconds": median(r[0] for r in totals) / len(inputs),
                "tokens": decoded,
            }
        )
    return {
        "photographs": len(inputs),
        "rounds": rounds,
        "load": [round(load_before, 1), round(os.getloadavg()[0], 1)],
        "ways": _with_ratios(rows),
        "call_sizes": {layers: vars(bench.runtime(layers).call_sizes) for layers in FORMATS},
    }


def _timed(method: Method, inputs: Mapping[str, Any]) -> tuple[float, float, float, int]:
    """Seconds in all; of decoding alone, on the wall and of the CPU; and tokens decoded."""
    clock, begin = Clock(), time.perf_counter()
    answer = method(inputs, clock)
    end, cpu = time.perf_counter(), time.process_time()
    assert clock.seconds is not None and clock.cpu is not None
    return end - begin, end - clock.seconds, cpu - clock.cpu, len(answer) - 1


def _with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each method's CPU speed over llama.cpp's own at its format, and over Hugging Face's."""
    speeds = {(r["runtime"], r["format"], r["mode"]): r["cpu_tokens_per_second"] for r in rows}
    stock_speed = speeds["generate", "float32", "full"]
    for row in rows:
        alone = speeds.get(("llama.cpp", row["format"], "full"))
        speed = row["cpu_tokens_per_second"]
        row["over_generate"] = speed / stock_speed
        row["over_llama_cpp"] = None if alone is None else speed / alone
    return rows


def callback(bench: Bench, rounds: int) -> dict[str, Any]:
    """CPU milliseconds of a token that exits, by the callback that reads its state."""
    policy = bench.policies["every_token"]
    kinds = {"compiled": True, "python": False}
    methods = {}
    for name, compiled in kinds.items():
        runtime = bench.runtime("q4_1", replace(ENGINE, compiled_tap=compiled))
        methods[name] = generating(runtime.generate, policy=policy)
    inputs = [bench.encoder.prompts([example]) for example in bench.photographs]
    milliseconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, method in methods.items():
            timed = [_timed(method, prompt) for prompt in inputs]
            milliseconds[name].append(1e3 * sum(t[2] for t in timed) / sum(t[3] for t in timed))
    return {name: median(values) for name, values in milliseconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "runs" / "photo_vlm" / "model")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--parts", nargs="+", default=["answers", "timings", "callback"])
    parser.add_argument("--photographs", type=int, default=200, help="to compare answers on")
    parser.add_argument("--timed", type=int, default=6, help="photographs to time on")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    backbone, encoder = load(arguments.model, torch.float32)
    held = read_photographs(arguments.data)["captions_val"]
    measured = [example for example in held if half_of(example) == 1]
    bench = Bench(Adapter.load(ADAPTER, backbone), encoder, measured[: arguments.photographs])
    few = replace(bench, photographs=measured[: arguments.timed])
    parts = {
        "answers": lambda: answers(bench),
        "timings": lambda: timings(few, arguments.rounds),
        "callback": lambda: callback(few, arguments.rounds),
    }
    for name in arguments.parts:
        write_json(OUT / f"{name}.json", parts[name]())
    files = {name: OUT / f"{name}.json" for name in parts}
    record = {name: read_json(file) for name, file in files.items() if file.is_file()}
    about = provenance(0, sys.argv, None)
    write_json(RECORD, {**record, "provenance": {**about, "flags": _processor_flags()}})


def _processor_flags() -> list[str]:
    """Which of the processor's instructions for many numbers at once llama.cpp may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    flags = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    return [f for f in flags if f.startswith(("avx", "amx", "fma", "f16c"))]


if __name__ == "__main__":
    main()
