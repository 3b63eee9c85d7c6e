"""The ways to answer a photograph: by runtime, number format and mode."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from examples.photo_vlm.evaluate import LONGEST
from numpy.typing import NDArray
from offramp_llama_cpp import EngineOptions, ExportFormats, LlamaCppRuntime, export_gguf
from offramp_llama_cpp.architectures import architecture_of
from offramp_llama_cpp.entry import Embeddings, PromptEntry
from offramp_llama_cpp.gguf_export import export_whole
from offramp_llama_cpp.segment import Segment
from torch import Tensor
from transformers import StoppingCriteriaList

from offramp.adapter.adapter import Adapter
from offramp.core.decoding.policy import FULL, ExitPolicy
from offramp.evaluation.timing import GenerateFn, beside_full, generate_fn, stock_generate_fn, timed
from offramp.features.compiled.compiled import COMPILED as BY_CODE
from offramp.features.input_processor import InputProcessor
from offramp.inputs.example import Example
from offramp_lab.experiments.experiment import TIMES, Experiment, Rates, Rounds, each, times
from offramp_lab.records.runtimes.ways import greedy

FORMATS = ("f16", "q8_0", "q4_1", "iq4_nl")
ENGINE = EngineOptions(context=512)
STOCK = replace(ENGINE, kernels=False)
"""As llama.cpp comes."""
OPTIONS: dict[str, Any] = {"max_new_tokens": LONGEST["captions"], "do_sample": False}
IN_LLAMA, IN_TORCH = "offramp, llama.cpp", "offramp, torch"
WITH_ITS_KERNELS = "offramp, llama.cpp, its own kernels"
COMPILED = "offramp, torch, compiled"
Name = tuple[str, str, str]
"""Runtime, number format of the layers, mode."""
WAY = ("runtime", "format", "mode")
"""The same in a record."""


Taken = tuple[NDArray[np.float64], NDArray[np.float64], tuple[int, ...]]
"""Seconds of an answer, and of decoding it, each on the wall and of the CPU [2]; and its ids."""


class Alone:
    """llama.cpp without exits or kernels of ours: the decoder in one file, greedy, and fed with the
    rows that we feed ours."""

    def __init__(self, adapter: Adapter, file: Path, end: int) -> None:
        backbone = adapter.backbone
        self.entry = PromptEntry(backbone, architecture_of(backbone), STOCK)
        self.segment, self.end = Segment(file, STOCK, tap_layer=None), end
        self.embeddings = Embeddings(backbone)

    def __call__(
        self, inputs: Mapping[str, Any], stop: StoppingCriteriaList, max_new_tokens: int
    ) -> Tensor:
        options = {"max_new_tokens": max_new_tokens, "do_sample": False}
        with torch.inference_mode():
            _, [prompt] = self.entry.read(inputs, options)
        none = torch.zeros(1, 1, dtype=torch.long)  # it only hears that a token is there
        answer = greedy(
            self.segment,
            prompt.states,
            lambda ids: self.embeddings.of_token(ids[0], 0),
            lambda token: token == self.end,
            max_new_tokens,
            lambda: stop(none, None),
        )
        return torch.tensor(answer)


def taken(method: GenerateFn, inputs: Mapping[str, Any]) -> Taken:
    def clock() -> Any:
        return np.array([time.perf_counter(), time.process_time()])

    whole, decode, ids = timed(method, inputs, clock)
    return whole, decode, ids  # type: ignore[return-value]  # numbers of both kinds


def drafted(names: Iterable[Name]) -> dict[Name, Name]:
    """Of each lossless method, the one at full depth of the same runtime and format."""
    return {name: (*name[:2], "full") for name in names if name[2] == "lossless"}


def speeds(rounds: Rounds) -> dict[str, float]:
    """Medians of the rounds of a method: tokens a second of decoding, those seconds and tokens, and
    seconds of an answer, on the wall and of the CPU."""
    tokens = sum(len(ids) - 1 for *_, ids in each(rounds)) / len(rounds)
    totals = np.sum([[seconds for *seconds, _ in by_input] for by_input in rounds], 1)
    (whole, whole_cpu), (wall, cpu) = np.median(totals, 0).tolist()
    return {
        "tokens_per_second": tokens / wall,
        "cpu_tokens_per_second": tokens / cpu,
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "tokens": tokens,
        "end_to_end_seconds": whole / len(rounds[0]),
        "end_to_end_cpu_seconds": whole_cpu / len(rounds[0]),
    }


def rates_of(rounds: Rounds) -> Rates:
    """Decoded tokens and CPU seconds of each input, medians of the rounds."""
    spent = [[(len(ids) - 1, decode[1]) for _, decode, ids in by_input] for by_input in rounds]
    found: Rates = np.median(np.array(spent, float), 0).T
    return found


def with_ratios(
    entries: list[dict[str, Any]],
    runs: Mapping[Name, Rounds],
    bases: Callable[[Name], Mapping[str, Name]],
) -> list[dict[str, Any]]:
    """Entries with their CPU speed over that of others, each with its interval over inputs.

    bases: of a method, the others by the name of the ratio; None where one was not measured."""
    rates = {name: rates_of(found) for name, found in runs.items()}
    for entry in entries:
        name = entry["runtime"], entry["format"], entry["mode"]
        for over, base in bases(name).items():
            ratio = times(rates[name], rates[base]) if base in rates else dict.fromkeys(TIMES)
            entry[over], *ends = (ratio[part] for part in TIMES)
            entry[f"{over}_interval"] = ends if base in rates and base != name else None
    return entries


def in_turns(
    methods: Mapping[Name, Callable[[Any], Taken]],
    inputs: Sequence[Any],
    rounds: int,
    warm: int,
    bases: Callable[[Name], Mapping[str, Name]],
) -> dict[str, Any]:
    """What all methods took, in turns on the same inputs. bases: as of `with_ratios`."""
    load = os.getloadavg()[0]
    runs = Experiment(methods, inputs, rounds, warm, title="timings").run()
    runs = beside_full(runs, drafted(runs))
    entries = [{**dict(zip(WAY, name, strict=True)), **speeds(runs[name])} for name in runs]
    return {
        "photographs": len(inputs),
        "rounds": rounds,
        "load": [round(load, 1), round(os.getloadavg()[0], 1)],
        "entries": with_ratios(entries, runs, bases),
    }


def policies(shipped: ExitPolicy) -> dict[str, ExitPolicy]:
    """By mode: exits off, the shipped thresholds, and lossless."""
    return {"full": FULL, "early_exit": shipped, "lossless": replace(shipped, lossless=True)}


def stock_compiled(adapter: Adapter) -> GenerateFn:
    """Hugging Face's own with its static cache, whose step inductor compiles at the first call."""
    from transformers.generation.configuration_utils import CompileConfig

    config = CompileConfig(fullgraph=False, mode="default")
    config._compile_all_devices = True  # type: ignore[assignment]  # else a CPU is left out
    return stock_generate_fn(
        adapter.backbone, cache_implementation="static", compile_config=config, **OPTIONS
    )


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

    def methods(self) -> dict[Name, GenerateFn]:
        """By runtime, format and mode."""
        adapter = self.adapter
        methods: dict[Name, GenerateFn] = {
            ("generate", "float32", "full"): stock_generate_fn(adapter.backbone, **OPTIONS)
        }
        for mode, policy in self.policies.items():
            method = generate_fn(adapter.generate, policy=policy, **OPTIONS)
            methods[IN_TORCH, "float32", mode] = method
        for layers in FORMATS:
            alone = Alone(adapter, self.whole(layers), self.encoder.eos)
            methods["llama.cpp", layers, "full"] = partial(
                alone, max_new_tokens=LONGEST["captions"]
            )
            for name, engine in ((IN_LLAMA, ENGINE), (WITH_ITS_KERNELS, STOCK)):
                runtime = self.runtime(layers, engine)
                for mode, policy in self.policies.items():
                    method = generate_fn(runtime.generate, policy=policy, **OPTIONS)
                    methods[name, layers, mode] = method
        return methods

    def compiled_methods(self) -> dict[Name, GenerateFn]:
        """What inductor compiles at the first call, which takes minutes."""
        own = self.adapter
        by_code = replace(own, backbone=own.backbone.with_decoding(instead=BY_CODE))
        methods: dict[Name, GenerateFn] = {
            ("generate, static cache, compiled", "float32", "full"): stock_compiled(self.adapter)
        }
        for mode, policy in self.policies.items():
            methods[COMPILED, "float32", mode] = generate_fn(
                by_code.generate, policy=policy, **OPTIONS
            )
        return methods
