"""The ways to answer a photograph: by runtime, number format and mode."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from examples.photo_vlm.evaluate import LONGEST
from transformers import StoppingCriteriaList

from offramp.adapter import Adapter
from offramp.data.example import Example
from offramp.engine.policy import FULL, ExitPolicy
from offramp.evaluation.timing import FirstToken
from offramp.models.input_processor import InputProcessor
from offramp.models.intercept import InterceptedModel
from offramp.runtimes.llama_cpp import EngineOptions, ExportFormats, LlamaCppRuntime, export_gguf
from offramp.runtimes.llama_cpp.entry import DecoderEntry
from offramp.runtimes.llama_cpp.gguf_export import export_whole
from offramp.runtimes.llama_cpp.segment import Segment
from offramp_lab.experiments.experiment import TIMES, Rates, Rounds, each, times

FORMATS = ("f16", "q8_0", "q4_1", "iq4_nl")
THRESHOLDS = (0.5, 0.3, 0.2, 0.1)
"""Safest first."""
ENGINE = EngineOptions(context=512)
STOCK = replace(ENGINE, kernels=False)
"""As llama.cpp comes."""
OPTIONS: dict[str, Any] = {"max_new_tokens": LONGEST["captions"], "do_sample": False}
IN_LLAMA, IN_TORCH = "offramp, llama.cpp", "offramp, torch"
WITH_ITS_KERNELS = "offramp, llama.cpp, its own kernels"
COMPILED = "offramp, torch, compiled"
Answer = tuple[int, ...]
Name = tuple[str, str, str]
"""Runtime, number format of the layers, mode."""
WAY = ("runtime", "format", "mode")
"""The same in a record."""


class Clock(FirstToken):
    """Also notes the CPU seconds when the first token was there."""

    cpu: float | None = None

    def __call__(self, *positional: Any, **named: Any) -> torch.Tensor:
        if self.cpu is None:
            self.cpu = time.process_time()
        return super().__call__(*positional, **named)


Method = Callable[..., Answer]
"""Answers one prompt, and calls the clock, its second argument, when the first token is there."""


class OneFile:
    """llama.cpp alone: the whole decoder in one file, greedy, with nothing of Hugging Face around
    a token. It is fed with the same embeddings."""

    def __init__(self, adapter: Adapter, file: Path, end: int) -> None:
        self.backbone, self.end = adapter.backbone, end
        self.segment = Segment(file, STOCK, tap_layer=None)
        self.embeddings = self.backbone.stack.get_input_embeddings().weight.detach().numpy()

    def __call__(
        self, inputs: Mapping[str, Any], clock: Clock, max_new_tokens: int = LONGEST["captions"]
    ) -> Answer:
        entry = DecoderEntry()
        model = InterceptedModel(self.backbone, entry).model
        with torch.inference_mode():
            states = entry.call(lambda: model(**inputs)).hidden[0].float().numpy()
        self.segment.crop(self.segment.length_of())
        tokens: list[int] = []
        while len(tokens) < max_new_tokens:
            self.segment.feed(states, 1)
            tokens.append(int(np.argmax(self.segment.logits(1))))
            if len(tokens) == 1:
                clock(torch.zeros(1, 1, dtype=torch.long), None)
            if tokens[-1] == self.end:
                break
            states = self.embeddings[tokens[-1]][None]
        return tuple(tokens)


@dataclass(frozen=True)
class Taken:
    """An answer, and seconds: in all, of decoding, of the CPU while decoding, of the CPU in all."""

    answer: Answer
    seconds: tuple[float, float, float, float]


def timed(method: Method, inputs: Mapping[str, Any]) -> Taken:
    clock, begin, cpu_begin = Clock(), time.perf_counter(), time.process_time()
    answer = method(inputs, clock)
    end, cpu = time.perf_counter(), time.process_time()
    assert clock.seconds is not None and clock.cpu is not None
    spent = (end - begin, end - clock.seconds, cpu - clock.cpu, cpu - cpu_begin)
    return Taken(answer, spent)


def answers_of(rounds: Rounds) -> list[Answer]:
    return [taken.answer for taken in each(rounds)]


def speeds(rounds: Rounds) -> dict[str, float]:
    """Medians of the rounds of a method: tokens a second of decoding, those seconds and tokens, and
    seconds of an answer, on the wall and of the CPU."""
    tokens = sum(len(answer) - 1 for answer in answers_of(rounds)) / len(rounds)
    totals = [[sum(column) for column in zip(*(t.seconds for t in r), strict=True)] for r in rounds]
    whole, wall, cpu, whole_cpu = (median(column) for column in zip(*totals, strict=True))
    return {
        "tokens_per_second": tokens / wall, "cpu_tokens_per_second": tokens / cpu,
        "wall_seconds": wall, "cpu_seconds": cpu, "tokens": tokens,
        "end_to_end_seconds": whole / len(rounds[0]),
        "end_to_end_cpu_seconds": whole_cpu / len(rounds[0]),
    }  # fmt: skip


def rates_of(rounds: Rounds) -> Rates:
    """Decoded tokens and CPU seconds of each input, medians of the rounds."""
    spent = [[(len(t.answer) - 1, t.seconds[2]) for t in found] for found in rounds]
    found: Rates = np.median(np.array(spent, float), 0).T
    return found


def with_ratios(
    entries: list[dict[str, Any]],
    rates: Mapping[Name, Rates],
    bases: Callable[[Name], Mapping[str, Name]],
) -> list[dict[str, Any]]:
    """Entries with their CPU speed over that of others, each with its interval over inputs.

    bases: of a method, the others by the name of the ratio; None where one was not measured."""
    for entry in entries:
        name = entry["runtime"], entry["format"], entry["mode"]
        for over, base in bases(name).items():
            ratio = times(rates[name], rates[base]) if base in rates else dict.fromkeys(TIMES)
            entry[over], *ends = (ratio[part] for part in TIMES)
            entry[f"{over}_interval"] = ends if base in rates and base != name else None
    return entries


def policies(shipped: ExitPolicy) -> dict[str, ExitPolicy]:
    """By mode: exits off, the shipped thresholds, every token at the exit (looked at), and
    lossless."""
    return {
        "full": FULL,
        "early_exit": shipped,
        "every_token": replace(shipped, thresholds=dict.fromkeys(shipped.thresholds, 1e-6)),
        "lossless": replace(shipped, lossless=True),
    }


def generating(generate: Callable[..., Any], **options: Any) -> Method:
    """A method by anything that takes what `Adapter.generate` takes."""

    def run(inputs: Mapping[str, Any], clock: Clock, **more: Any) -> Answer:
        stop = StoppingCriteriaList([clock])
        output = generate(inputs, stopping_criteria=stop, **{**OPTIONS, **options, **more})
        return tuple(output.new_tokens[0].tolist())

    return run


def stock(adapter: Adapter, **options: Any) -> Method:
    """Hugging Face's own `generate`."""

    def run(inputs: Mapping[str, Any], clock: Clock, **more: Any) -> Answer:
        stop = StoppingCriteriaList([clock])
        asked = {**OPTIONS, **options, **more}
        ids = adapter.backbone.model.generate(**inputs, stopping_criteria=stop, **asked)
        return tuple(ids[0, inputs["input_ids"].shape[1] :].tolist())

    return run


def stock_compiled(adapter: Adapter) -> Method:
    """The same with its static cache, whose step inductor compiles at the first call."""
    from transformers.generation.configuration_utils import CompileConfig

    config = CompileConfig(fullgraph=False, mode="default")
    config._compile_all_devices = True  # type: ignore[assignment]  # else a CPU is left out
    return stock(adapter, cache_implementation="static", compile_config=config)


@dataclass(frozen=True)
class Bench:
    """The model, its photographs and the exported files.

    photographs: of the measuring half, none of which chose a threshold. out: folder that files are
    written to once, and results kept in.
    """

    adapter: Adapter
    encoder: InputProcessor
    photographs: Sequence[Example]
    out: Path

    @property
    def policies(self) -> dict[str, ExitPolicy]:
        """By mode."""
        return policies(self.adapter.policy)

    @property
    def other_thresholds(self) -> dict[str, ExitPolicy]:
        """Early exit at the other thresholds that are tried, by mode."""
        shipped = self.adapter.policy
        [depth] = shipped.thresholds
        policies = {t: replace(shipped, thresholds={depth: t}) for t in THRESHOLDS}
        return {f"early_exit at {t:g}": p for t, p in policies.items() if p != shipped}

    def files(self, layers: str) -> Path:
        """The exported chain."""
        folder = self.out / layers
        if not folder.is_dir():
            export_gguf(self.adapter, folder, layers)
        return folder

    def whole(self, layers: str) -> Path:
        """The decoder in one file."""
        file = self.out / f"whole-{layers}.gguf"
        if not file.is_file():
            self.out.mkdir(parents=True, exist_ok=True)
            export_whole(self.adapter.backbone, file, ExportFormats(layers))
        return file

    def runtime(self, layers: str, engine: EngineOptions = ENGINE) -> LlamaCppRuntime:
        return LlamaCppRuntime(self.adapter, self.files(layers), engine=engine)

    def methods(self, **options: Any) -> dict[Name, Method]:
        """By runtime, format and mode. options: of ours, such as `vision_cache`."""
        adapter = self.adapter
        methods: dict[Name, Method] = {("generate", "float32", "full"): stock(adapter)}
        for mode, policy in self.policies.items():
            method = generating(adapter.generate, policy=policy, **options)
            methods[IN_TORCH, "float32", mode] = method
        for layers in FORMATS:
            methods["llama.cpp", layers, "full"] = OneFile(
                adapter, self.whole(layers), self.encoder.eos
            )
            for name, engine, policies in (
                (IN_LLAMA, ENGINE, self.policies | self.other_thresholds),
                (WITH_ITS_KERNELS, STOCK, self.policies),
            ):
                runtime = self.runtime(layers, engine)
                for mode, policy in policies.items():
                    method = generating(runtime.generate, policy=policy, **options)
                    methods[name, layers, mode] = method
        return methods

    def compiled_methods(self) -> dict[Name, Method]:
        """What inductor compiles at the first call, which takes minutes."""
        own = self.adapter
        by_code = replace(own, backbone=own.backbone.with_decoding(compiled=True))
        methods: dict[Name, Method] = {
            ("generate, static cache, compiled", "float32", "full"): stock_compiled(self.adapter)
        }
        for mode, policy in self.policies.items():
            methods[COMPILED, "float32", mode] = generating(by_code.generate, policy=policy)
        return methods

    def weights_bytes(self, runtime: str, layers: str) -> int:
        """Of the decoder with its head and exits, as it lies in memory while one token is written;
        embeddings are looked up and not counted."""
        if runtime == "llama.cpp" or runtime.startswith("OpenVINO"):
            return self.whole(layers).stat().st_size if layers in FORMATS else 0
        if runtime == IN_LLAMA:
            with self.runtime(layers) as loaded:
                if loaded.packed_bytes:
                    return loaded.packed_bytes
        if runtime in (IN_LLAMA, WITH_ITS_KERNELS):
            return sum(file.stat().st_size for file in self.files(layers).glob("*.gguf"))
        backbone = self.adapter.backbone
        modules: list[Any] = [*backbone.layers, backbone.head]
        if runtime in (IN_TORCH, COMPILED):
            modules.append(self.adapter.exits.modules)
        return sum(p.nbytes for module in modules for p in module.parameters())
