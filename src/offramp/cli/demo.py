"""The first run: exits for a tiny VLM, trained, calibrated and timed beside the full model.

Four sets of images that no two steps share: `train` for the exits (no labels: the model writes
the answers), `calibration` for the threshold, `test` for quality and speed.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from offramp.adapter.adapter import Adapter
from offramp.adapter.answers import Answer, generate_answers
from offramp.adapter.shipped import PHOTO, example_picture, load_tiny
from offramp.calibration.calibrate import calibrate, calibrated
from offramp.calibration.draft_thresholds import draft_speeds, with_drafts
from offramp.calibration.profiler import measure_costs
from offramp.common.progress import progress
from offramp.common.provenance import provenance
from offramp.core.decoding.policy import FULL, ExitPolicy, policy_to_json
from offramp.core.models.exits import Exits, ExitSet
from offramp.core.storage import write_atomic, write_json
from offramp.data.scenes.tasks import Task, captions, captions_and_questions, questions
from offramp.engines import TORCH
from offramp.engines.loading import load, usual_prompt
from offramp.evaluation.run_log import Done
from offramp.evaluation.timing import (
    GenerateFn,
    Timing,
    exit_generate_fn,
    speedup,
    speedups,
    stock_generate_fn,
    time_interleaved,
)
from offramp.features.input_processor import InputProcessor
from offramp.inputs.example import Example
from offramp.report.report import Source
from offramp.report.report import report as page
from offramp.report.sections import TITLES, demo_modes
from offramp.training.config import FREE, TrainConfig
from offramp.training.trainer import train

log = logging.getLogger(__name__)

OPTIONS: dict[str, Any] = {"max_new_tokens": 48, "do_sample": False}
DEPTHS = {"opt": (2,), "t5": (2,)}
SHOWN = 8
"""Of each task's answers, those on the page."""
TARGET = 0.0075  # of answers; below the 1% of quality that the demo is meant to keep


@dataclass(frozen=True)
class DemoSizes:
    """Numbers of images in each part of the demo; each image gives one caption and two
    questions."""

    train: int = 1200
    calibration: int = 2000
    drafts: int = 10
    quality: int = 500
    timed: int = 40
    rounds: int = 5
    steps: int = 1000


def photograph(paint: Callable[[str, int, int], str]) -> list[str]:
    """Return the photo model's caption of one photograph, in a line for full depth and a line for
    its exits, each with its CPU seconds.

    paint: returns a token as it is shown, from the token, its depth and the model's.

    Raises:
        InputError: the photo model's package, or one that it needs, is not installed.
    """
    torch.set_num_threads(1)  # so that CPU seconds are those that pass
    loaded = load("photo", engine=TORCH, vision=TORCH)
    example = Example(example_picture(PHOTO), usual_prompt(loaded.adapter), (), key="picture")
    inputs, lines = loaded.encoder.prompts([example]), []
    for mode in ("full", "early_exit"):
        policy, spent = loaded.adapter.policy.in_mode(mode), list[float]()
        for _ in range(4):  # the first one also warms up
            began = time.process_time()
            made = loaded.model.generate(
                inputs, policy=policy, max_new_tokens=loaded.longest, do_sample=False
            )
            spent.append(time.process_time() - began)
        read = loaded.encoder.tokenizer
        told = " ".join(
            paint(read.decode([i]), depth, made.layers)
            for i, depth in zip(made.new_tokens[0].tolist(), made.depths[0].tolist(), strict=True)
            if i not in read.all_special_ids
        )
        lines.append(f"{TITLES[mode]:<12}{median(spent[1:]):6.3f} s  {told}")
    return lines


def demo(
    kind: str, out: Path, sizes: DemoSizes = DemoSizes(), *, target: float = TARGET
) -> dict[str, Any]:
    """Run the whole demo for the tiny model `kind`; write `out`/report.json and report.html, and
    return the report."""
    torch.set_num_threads(1)  # at this size a second thread costs more than it gives
    started = time.perf_counter()
    backbone, processor = load_tiny(kind)
    encoder = InputProcessor(backbone, processor)
    log.info(f"tiny-{kind}: {backbone.depth} decoder layers, frozen")

    adapter = Adapter(backbone, ExitSet(Exits(backbone, DEPTHS[kind])))
    answers(adapter, encoder, [captions("train", 32)], FULL)
    inference_bytes = _peak_bytes()
    config = TrainConfig(
        depths=DEPTHS[kind], steps=sizes.steps, batch_size=32, exit_kind="layer", **FREE
    )
    began = time.perf_counter()
    adapter = train(
        backbone,
        processor,
        captions_and_questions("train", sizes.train),
        config,
        out / kind,
        overwrite=True,
        command=["offramp", "demo", f"tiny-{kind}"],
    )
    training_seconds = time.perf_counter() - began
    memory = {"inference_bytes": inference_bytes, "training_bytes": _peak_bytes()}
    log.info(f"trained in {training_seconds:.0f} s; agreement {adapter.metrics['agreement']}")

    held_out = captions_and_questions("calibration", sizes.calibration)
    costs = measure_costs(backbone, encoder.prompts(held_out[:1]), adapter.exits)
    calibration = calibrate(
        adapter,
        encoder,
        held_out,
        ExitPolicy(),
        target=target,
        costs=costs,
        progress=_bar("calibrate"),
        **OPTIONS,
    )
    adapter = calibrated(adapter, calibration, held_out)
    log.info(calibration.reason or f"thresholds {dict(adapter.policy.thresholds)}")

    drafted = [encoder.prompts([e]) for e in captions_and_questions("calibration", sizes.drafts)]
    drafting = draft_speeds(
        adapter, drafted, rounds=min(3, sizes.rounds), progress=_bar("draft threshold"), **OPTIONS
    )
    adapter = with_drafts(adapter, drafting)
    adapter.save(out / kind)
    log.info(f"lossless drafts by {dict(adapter.policy.drafts)}")

    report, shown = _measure(adapter, encoder, sizes)
    report |= {
        "backbone": f"tiny-{kind}",
        "training_seconds": training_seconds,
        "peak_memory": memory,
        "total_seconds": time.perf_counter() - started,
        "calibration": calibration.to_json(),
        "policy": policy_to_json(adapter.policy),
        "sizes": asdict(sizes),
        "provenance": provenance(config.seed, sys.argv, adapter.provenance["data_digest"]),
    }
    write_json(out / "report.json", report)
    write_json(out / f"report-{kind}.json", report)
    write_atomic(out / "report.html", demo_page(report, shown))
    return report


def demo_page(report: Mapping[str, Any], shown: Done) -> str:
    """Return the page of a demo's report and some of its answers."""
    source = Source("demo", f"{report['backbone']}, demo", report, shown)
    return page([source], captions_and_questions("test", SHOWN))


def _measure(
    adapter: Adapter, encoder: InputProcessor, sizes: DemoSizes
) -> tuple[dict[str, Any], Done]:
    """Quality over the test images and interleaved timing over some of them, for each mode; and
    some answers by mode and key."""
    backbone = adapter.backbone
    tasks = [captions("test", sizes.quality), questions("test", sizes.quality)]
    full = answers(adapter, encoder, tasks, FULL)
    early = answers(adapter, encoder, tasks, adapter.policy)

    lossless = replace(adapter.policy, lossless=True)
    methods: dict[str, GenerateFn] = {
        "generate": stock_generate_fn(backbone, **OPTIONS),
        "full": generate_fn(adapter, FULL),
        "early_exit": generate_fn(adapter, adapter.policy),
        "lossless": generate_fn(adapter, lossless),
    }
    timed = captions_and_questions("test", sizes.timed)
    inputs = [encoder.prompts([e]) for e in timed]
    timings = time_interleaved(
        methods, inputs, rounds=sizes.rounds, progress=_bar("timing"), drafting={"lossless"}
    )
    quality_full = {t.name: _share_right(t, full[t.name]) for t in tasks}
    quality_early = {t.name: _share_right(t, early[t.name]) for t in tasks}
    depths = [d for t in tasks for answer in early[t.name] for d in answer.depths]
    pairs = [
        (a.ids, b.ids) for t in tasks for a, b in zip(full[t.name], early[t.name], strict=True)
    ]
    modes = {name: _speed(timing) for name, timing in timings.items()}
    modes["generate"]["quality"] = modes["full"]["quality"] = quality_full
    modes["early_exit"] |= {
        "quality": quality_early,
        "quality_drop": {
            name: (quality_full[name] - quality_early[name]) / max(quality_full[name], 1e-9)
            for name in quality_full
        },
        "agreement": sum(a == b for a, b in pairs) / len(pairs),
        "mean_depth": sum(depths) / len(depths),
        **speedups(timings, "early_exit"),
    }
    rounds = _draft_rounds(adapter, encoder, lossless, timed)
    modes["lossless"] |= {
        "quality": quality_full,
        "identical": timings["lossless"].answers == timings["full"].answers,
        "draft_threshold": next(iter(lossless.effective.thresholds.values()), None),
        "mean_accepted_drafts": sum(accepted for _, accepted in rounds) / max(1, len(rounds)),
        "acceptance": sum(accepted for _, accepted in rounds)
        / max(1, sum(made for made, _ in rounds)),
        **speedups(timings, "lossless"),
    }
    report = {
        "layers": backbone.depth,
        "exits": list(adapter.exits.depths),
        "full_equals_generate": timings["full"].answers == timings["generate"].answers,
        "full_vs_generate": speedup(timings["generate"].decode, timings["full"].decode),
        "modes": modes,
    }
    return report, {**shown_rows("full", tasks, full), **shown_rows("early_exit", tasks, early)}


def shown_rows(mode: str, tasks: Sequence[Task], answers: Mapping[str, Sequence[Answer]]) -> Done:
    """Return the answers to some of each task's examples, as rows of an evaluation."""
    return {
        (mode, example.key): {
            "key": example.key,
            "answer": answer.text,
            "ids": list(answer.ids),
            "depths": list(answer.depths),
        }
        for task in tasks
        for example, answer in list(zip(task.examples, answers[task.name], strict=True))[:SHOWN]
    }


def answers(
    adapter: Adapter, encoder: InputProcessor, tasks: Sequence[Task], policy: ExitPolicy
) -> dict[str, list[Answer]]:
    """Return the generated answers to every task's examples, by task."""
    return {
        task.name: generate_answers(
            adapter, encoder, task.examples, policy, progress=_bar(f"test {task.name}"), **OPTIONS
        )
        for task in tasks
    }


def _share_right(task: Task, answers: Sequence[Answer]) -> float:
    right = [task.correct(a.text, e) for a, e in zip(answers, task.examples, strict=True)]
    return sum(right) / len(right)


def generate_fn(adapter: Adapter, policy: ExitPolicy) -> GenerateFn:
    """Return a function that generates by `policy`, with the demo's options."""
    return exit_generate_fn(adapter.backbone, adapter.exits, policy, **OPTIONS)


def _speed(timing: Timing) -> dict[str, Any]:
    return {
        "tokens_per_second": timing.tokens_per_second,
        "seconds_end_to_end": median(timing.seconds),
        "seconds_decode": median(timing.decode),
        "tokens": timing.tokens,
    }


def _draft_rounds(
    adapter: Adapter, encoder: InputProcessor, policy: ExitPolicy, examples: Sequence[Example]
) -> list[tuple[int, int]]:
    """(drafted, accepted) of every lossless round over `examples`."""
    made = [
        adapter.generate(encoder.prompts([example]), policy=policy, **OPTIONS)
        for example in examples
    ]
    return [counts for output in made for counts in output.rounds]


def _peak_bytes() -> int | None:
    """The process's largest resident size so far; None where the system does not report it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _bar(title: str) -> Any:
    return lambda iterable: progress(iterable, title)


def table(report: Mapping[str, Any]) -> str:
    """Return the report as a table for a terminal."""
    early, lossless = (report["modes"][name] for name in ("early_exit", "lossless"))
    promise = report["calibration"]
    kept = promise["reason"] or f"promised: at most {promise['target']:.2%} of answers change"
    return (
        f"{demo_modes(report).plain()}\n\n"
        f"early exit: {early['agreement']:.1%} of answers are full depth's ({kept}), mean depth "
        f"{early['mean_depth']:.1f} of {report['layers']}; lossless: "
        f"{'all' if lossless['identical'] else 'NOT all'} of them"
    )
