"""Whole captions of photographs, from the file to the text, step by step; in end_to_end.json.

`python -m offramp_lab.records.end_to_end` needs photographs and the packages onnxruntime and
llama-cpp-python (a quarter of an hour of one core). Every photograph is captioned in all ways, in
an order of its own; CPU seconds of the process from opening the file to the last token, and of its
parts: opening and preparing, vision and prompt up to the first token, decoding. Steps: exits at the
shipped thresholds while prompts run whole; prompts that wait at their exit (`ExitPolicy.first`);
the vision tower by ONNX Runtime; with `--careful FOLDER`, the thresholds of the same exits in that
folder, calibrated to a smaller loss. Rivals: Hugging Face's `generate`, exits off by the same
kernels, llama.cpp alone with its own tower and with the same one. Then questions about photographs,
and photographs eight at a time in the batch engine. What was answered is kept in runs/end_to_end,
so that a run that was cut off goes on there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from examples.photo_vlm.evaluate import LONGEST, accuracy, caption_measures

from offramp.adapter import Adapter
from offramp.data.example import Example
from offramp.engine.policy import FULL, ExitPolicy
from offramp.evaluation.statistics import interval, mean_of
from offramp.evaluation.timing import GenerateFn, generate_fn, stock_generate_fn, timed
from offramp.runtimes.llama_cpp import ExportFormats, LlamaCppRuntime, export_gguf
from offramp.runtimes.llama_cpp.gguf_export import export_whole
from offramp.serving.core import EngineCore
from offramp.serving.engine_config import EngineConfig
from offramp.serving.request import Request
from offramp_lab.experiments.experiment import Experiment, Rates, same, times
from offramp_lab.places import RUNS
from offramp_lab.records.record import Kept, Record, asked
from offramp_lab.records.runtimes.methods import ENGINE, OneFile
from offramp_lab.records.subjects import halves, load_photo

RECORD = Record("end_to_end")
FORMAT = "q8_0"
OURS = ("PyTorch", FORMAT)
TOWERS = ("torch", "onnxruntime", "openvino-bf16")
"""The last one rounds: inside llama.cpp alone."""
CAREFUL = "early exit, careful"
SLOTS = 8
Name = tuple[str, str, str]
"""What decodes, mode, what runs the vision tower."""
Answered = tuple[list[int], float, float, float]
"""Ids, and CPU seconds: opening and preparing, up to the first token, decoding."""
Way = Callable[..., Answered]
"""Answers an example; `most`: tokens."""
Modes = Mapping[str, ExitPolicy]


def modes(shipped: Adapter, careful: Adapter | None) -> Modes:
    """careful: the same exits, calibrated to a smaller loss."""
    policy = shipped.policy
    found = {
        "full": FULL,
        "early exit, prompt run whole": replace(policy, first={}),
        "early exit": policy,
        "lossless": replace(policy, lossless=True),
    }
    return found if careful is None else {**found, CAREFUL: careful.policy}


def ways(
    adapters: Mapping[str, tuple[Adapter, Any]], policies: Modes, work: Path
) -> dict[Name, Way]:
    """By name. adapters: by what runs the vision tower, with the encoder. work: for exported
    files."""
    found: dict[Name, Way] = {}
    chain, whole = work / FORMAT, work / f"whole-{FORMAT}.gguf"
    for tower, (adapter, encoder) in adapters.items():
        if not chain.is_dir():
            export_gguf(adapter, chain, FORMAT)
            export_whole(adapter.backbone, whole, ExportFormats(FORMAT))
        runtime = LlamaCppRuntime(adapter, chain, engine=ENGINE)
        alone = OneFile(adapter, whole, encoder.eos)
        rounds = tower == TOWERS[-1]
        if not rounds:
            stock = partial(stock_generate_fn, adapter.backbone, do_sample=False)
            found["generate", "full", tower] = partial(_answer, encoder, stock)
        found["llama.cpp alone", "full", tower] = partial(_answer, encoder, partial(partial, alone))
        for mode, policy in policies.items():
            by: Any
            for engine, by in zip(OURS, (adapter, runtime), strict=True):
                if rounds and engine == OURS[0]:
                    continue
                ours = partial(generate_fn, by.generate, policy=policy, do_sample=False)
                found[engine, mode, tower] = partial(_answer, encoder, ours)
    return found


def _answer(
    encoder: Any, writing: Callable[..., GenerateFn], example: Example, most: int
) -> Answered:
    """writing: what writes `max_new_tokens` at most."""
    begin = time.process_time()
    inputs = encoder.prompts([example])
    opened = time.process_time() - begin
    write = writing(max_new_tokens=most)
    whole, decode, ids = timed(write, inputs, time.process_time)
    return [*ids], opened, whole - decode, decode


# -- figures --------------------------------------------------------------------------------------


def captioned(
    found: Mapping[Name, Way], examples: Sequence[Example], texts: Any, kept: Kept
) -> list[dict[str, Any]]:
    """An entry for each way: milliseconds of a caption by parts; how many times as fast it is as
    full depth of what decodes it, as llama.cpp alone, as it comes and behind the same tower; and
    what its captions are worth beside full depth's."""
    told = _answers(found, examples, LONGEST["captions"], kept)
    rates = {name: _rates(answers) for name, answers in told.items()}
    decoding = {name: _rates(answers, since=2) for name, answers in told.items()}
    scores = {
        name: caption_measures([texts(ids) for ids, *_ in answers], examples, ("CIDEr", "ROUGE_L"))
        for name, answers in told.items()
    }
    entries = []
    for name, answers in told.items():
        engine, _, tower = name
        bases = {
            "full": (engine, "full", TOWERS[0]),
            "same_full": (engine, "full", tower),
            "alone": ("llama.cpp alone", "full", TOWERS[0]),
            "alone_same_tower": ("llama.cpp alone", "full", tower),
        }
        full = bases["full"]
        parts = 1e3 * np.array([row[1:] for row in answers]).mean(0)
        entries.append(
            {
                **_named(name),
                "milliseconds": dict(zip(("opened", "first_token", "decoded"), parts, strict=True)),
                "whole_milliseconds": float(parts.sum()),
                **{f"over_{base}": times(rates[name], rates[of]) for base, of in bases.items()},
                "decoding_over_full": times(decoding[name], decoding[full]),
                "as_full": _same(answers, told[full]),
                **{
                    metric: {
                        "value": scores[name][metric].value,
                        "difference": interval(scores[name][metric], minus=scores[full][metric]),
                    }
                    for metric in ("CIDEr", "ROUGE_L")
                },
            }
        )
    return entries


def questioned(
    found: Mapping[Name, Way], examples: Sequence[Example], texts: Any, kept: Kept
) -> list[dict[str, Any]]:
    """Of each way, how many answers are right, beside full depth's, and how fast it is."""
    ours = {name: way for name, way in found.items() if name[0] in OURS}
    told = _answers(ours, examples, LONGEST["questions"], kept)
    groups = [example.group for example in examples]
    right = {
        name: mean_of(
            [accuracy([texts(row[0])], [e]) for row, e in zip(rows, examples, strict=True)]
        )
        for name, rows in told.items()
    }
    entries = []
    for name, answers in told.items():
        full = (name[0], "full", TOWERS[0])
        entries.append(
            {
                **_named(name),
                "right": right[name].value,
                "difference": interval(right[name], groups, minus=right[full]),
                "as_full": _same(answers, told[full]),
                "over_full": times(_rates(answers), _rates(told[full])),
            }
        )
    return entries


def together(
    adapters: Mapping[str, tuple[Adapter, Any]], policies: Modes, examples: Sequence[Example]
) -> list[dict[str, Any]]:
    """Photographs in the batch engine, in PyTorch: CPU milliseconds a caption, in groups of
    `SLOTS`, of each mode and tower in turn."""
    found = {
        (mode, tower): partial(_engine, adapter, encoder, policy)
        for tower, (adapter, encoder) in adapters.items()
        for mode, policy in policies.items()
        if tower != TOWERS[-1]
    }
    groups = [examples[i : i + SLOTS] for i in range(0, len(examples), SLOTS)]
    taken = {
        name: rows
        for name, [rows] in Experiment(found, groups, warm=1, title="together").run().items()
    }
    sizes = [len(group) for group in groups]
    rates = {n: np.array([sizes, [s for _, s in rows]], float) for n, rows in taken.items()}
    before = ("early exit, prompt run whole", TOWERS[0])
    said = {name: [ids for group, _ in rows for ids in group] for name, rows in taken.items()}
    return [
        {
            "mode": mode,
            "tower": tower,
            "milliseconds": 1e3 * float(own[1].sum() / own[0].sum()),
            "over_before": times(own, rates[before]),
            "over_full": times(own, rates["full", TOWERS[0]]),
            "as_before": same(said[mode, tower], said[before]),
        }
        for (mode, tower), own in rates.items()
    ]


def _engine(
    adapter: Adapter, encoder: Any, policy: ExitPolicy, group: Sequence[Example]
) -> tuple[list[list[int]], float]:
    """Ids of each, and CPU seconds: photographs are opened in the same thread."""
    options = {"max_new_tokens": LONGEST["captions"], "do_sample": False}
    exits = None if policy is FULL else adapter.exits
    begin = time.process_time()
    config = EngineConfig(slots=SLOTS, limit=128)
    core = EngineCore(adapter.backbone, exits, policy, config)
    mode = "lossless" if policy.lossless else "early_exit" if exits else "full"
    requests = [Request(encoder.prompts([e]), mode, options=options) for e in group]
    handles = [core.add(request) for request in requests]
    core.run()
    ids = [handle.result().output.new_tokens[0].tolist() for handle in handles]
    return ids, time.process_time() - begin


def _answers(
    found: Mapping[Name, Way], examples: Sequence[Example], most: int, kept: Kept
) -> dict[Name, list[Answered]]:
    ways = {name: partial(way, most=most) for name, way in found.items()}
    return kept.answers(ways, examples, lambda example: example, f"{len(examples)} examples")


def _same(one: Sequence[Answered], other: Sequence[Answered]) -> int:
    """How many have the same ids."""
    return same([ids for ids, *_ in one], [ids for ids, *_ in other])


def _rates(answers: Sequence[Answered], since: int = 0) -> Rates:
    """Answers, each of them one, and their seconds from a part of them on."""
    seconds = np.array([row[1:] for row in answers], float)[:, since:].sum(1)
    return np.stack([np.ones(len(answers)), seconds])


def _named(name: Name) -> dict[str, str]:
    return dict(zip(("engine", "mode", "tower"), name, strict=True))


def _promised(careful: Adapter) -> dict[str, Any]:
    """What was calibrated, but for the path of thresholds that led there."""
    assert careful.calibration is not None, "its thresholds have a guarantee"
    return {name: of for name, of in careful.calibration.items() if name != "path"}


def main() -> None:
    arguments = asked(__doc__, photo=True, photographs=100, questions=100, careful=Path)
    work = RUNS / RECORD.name
    adapters = {tower: load_photo(arguments.adapter, vision=tower) for tower in TOWERS}
    encoder = adapters[TOWERS[0]][1]
    captions = halves(arguments.data)[1][: arguments.photographs]
    questions = halves(arguments.data, "questions_val")[1][: arguments.questions]

    def texts(ids: list[int]) -> str:
        return str(encoder.texts(torch.tensor([ids]))[0])

    shipped = adapters[TOWERS[0]][0]
    careful = arguments.careful and Adapter.load(arguments.careful, shipped.backbone)
    policies = modes(shipped, careful)
    found = ways(adapters, policies, work)
    RECORD.write(
        {
            "photographs": len(captions),
            "questions": len(questions),
            "format": FORMAT,
            "thresholds": {str(d): t for d, t in shipped.policy.thresholds.items()},
            "first": {str(d): t for d, t in (shipped.policy.first or {}).items()},
            "careful": _promised(careful) if careful else None,
            "captioned": captioned(found, captions, texts, Kept(work / "captions.jsonl")),
            "questioned": questioned(found, questions, texts, Kept(work / "questions.jsonl")),
            "slots": SLOTS,
            "together": together(adapters, policies, captions),
        }
    )


if __name__ == "__main__":
    main()
