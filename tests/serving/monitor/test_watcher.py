"""Laws of a watched guarantee on the shipped model: it notices images that it was not made for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from offramp.calibration.calibrate import calibrate
from offramp.data.example import Example
from offramp.data.formats import read_items
from offramp.data.scenes import tasks
from offramp.engine.decoding.scheduler import Schedule
from offramp.engine.policy import ExitPolicy
from offramp.errors import InputError
from offramp.models.input_processor import InputProcessor
from offramp.serving.batch_engine import BatchEngine
from offramp.serving.core import EngineConfig
from offramp.serving.monitor.watcher import Promise, Sample, WatchConfig, Watcher
from offramp_lab.inputs.corruptions import CORRUPTIONS, corrupted
from serving import messages, running, scene_examples, service_of, shipped

ALL = WatchConfig(share=1.0, level=0.01, backlog=4096)
GREEDY: dict[str, Any] = {"max_new_tokens": 48, "do_sample": False}


@pytest.fixture(scope="module")
def engine() -> Iterator[BatchEngine]:
    adapter, processor = shipped()
    encoder = InputProcessor(adapter.backbone, processor)
    config = EngineConfig(8, 128, schedule=Schedule.of(8))
    with BatchEngine(adapter, encoder, config, queue=4096) as found:
        yield found


def watched(engine: BatchEngine, examples: list[Example], watcher: Watcher) -> None:
    """Answer examples early, and have all compared."""
    encoder = engine.processor
    assert encoder is not None
    samples = []
    for example in examples:
        inputs = encoder.prompts([example])
        samples.append((inputs, example, engine.submit(inputs, wait=True, **GREEDY)))
    for inputs, example, handle in samples:
        image = example.open_image()
        output = handle.result().output
        watcher.offer(Sample(inputs, GREEDY, output, image, example.prompt))
    assert watcher.settle(600)


def watcher_of(engine: BatchEngine, config: WatchConfig = ALL, **more: Any) -> Watcher:
    adapter, _ = shipped()
    assert engine.processor is not None
    promise = more.pop("promise", Promise.of(adapter.calibration))
    return Watcher(engine, engine.processor, promise, config, **more)


def test_a_stream_that_turns_to_damaged_images_is_noticed(engine: BatchEngine) -> None:
    watcher = watcher_of(engine)
    try:
        clean = tasks.captions("test", 8).examples
        watched(engine, clean, watcher)
        assert watcher.risk.n == 8
        assert not watcher.broken and watcher.replaces is None
        for start in range(100, 180, 4):
            later = tasks.captions("test", 4, start).examples
            watched(engine, [damage(example) for example in later], watcher)
            if watcher.broken:
                break
        assert watcher.broken and watcher.replaces == "lossless"
        assert watcher.report()["lower"] > 0.0075
    finally:
        watcher.close()


def damage(example: Example) -> Example:
    return corrupted(example, "noise", 5, 0)


def test_each_image_counts_once_and_too_many_are_let_go(engine: BatchEngine) -> None:
    watcher = watcher_of(engine, replace(ALL, backlog=1))
    try:
        example = scene_examples()[0]
        for _ in range(3):
            watched(engine, [example], watcher)
        assert watcher.risk.n == 1
        watched(engine, [replace(e, key=e.key + "x") for e in scene_examples()[:6]], watcher)
        assert watcher.risk.n + watcher.let_go >= 5
    finally:
        watcher.close()


def test_what_is_kept_is_an_example_to_calibrate_on(engine: BatchEngine, tmp_path: Path) -> None:
    watcher = watcher_of(engine, replace(ALL, keep=tmp_path / "kept"))
    try:
        question = tasks.questions("test", 1, 50).examples[0]
        watched(engine, [*tasks.captions("test", 4).examples, question], watcher)
    finally:
        watcher.close()
    items = read_items([str(tmp_path / "kept" / "rows.jsonl")], None, "auto")
    assert len(items) == 5
    assert items[-1].example.prompt == question.prompt
    adapter, _ = shipped()
    assert engine.processor is not None
    found = calibrate(
        adapter, engine.processor, [item.example for item in items], ExitPolicy(),
        target=0.4, confidence=0.6, thresholds=(0.9,), **GREEDY,
    )  # fmt: skip
    assert found.n == 5


def test_the_draw_is_before_the_answer_and_as_often_as_asked(engine: BatchEngine) -> None:
    watcher = watcher_of(engine, WatchConfig(share=0.25), seed=3)
    try:
        drawn = sum(watcher.draws() for _ in range(4000))
        assert 900 < drawn < 1100
    finally:
        watcher.close()


@pytest.mark.parametrize(
    "change", [{"share": 0.0}, {"share": 1.5}, {"level": 0.0}, {"action": "x"}]
)
def test_a_watch_that_tells_nothing_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        WatchConfig(**change)


# -- in the server ---------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["lossless", "full", "warn"])
def test_a_broken_promise_changes_answers_metrics_and_what_the_page_is_told(action: str) -> None:
    watch = WatchConfig(share=1.0, level=0.05, action=action)
    service = service_of(slots=4, more={"watch": watch, "loss": lambda early, full: 1.0})
    watcher = service.watcher
    assert watcher is not None
    with running(service) as address:

        def ask(number: int, **more: Any) -> dict[str, Any]:
            body = {"messages": messages(tasks.captions("test", 1, number).examples[0]), **more}
            answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=300)
            return dict(answer.raise_for_status().json()["usage"]["offramp"])

        number = 0
        while not watcher.broken:
            assert ask(number)["mode"] == "early_exit"
            assert watcher.settle(300)
            number += 1
        assert 1 < number < 20
        expected = "early_exit" if action == "warn" else action
        for more in ({}, {"offramp": {"mode": "early_exit"}}):
            told = ask(number, **more)
            assert told["mode"] == expected
            assert told.get("guarantee") == (None if action == "warn" else "broken")
        own = ask(number, offramp={"thresholds": {"2": 0.9}})
        assert own["mode"] == "early_exit"  # what a client chose itself was never promised
        text = httpx.get(f"{address}/metrics").text
        assert 'offramp:guarantee_broken{model_name="tiny-opt"} 1.0' in text
        assert 'offramp:risk_target{model_name="tiny-opt"} 0.0075' in text
        watch_told = httpx.get(f"{address}/v1/models").json()["data"][0]["offramp"]["watch"]
        assert watch_told["broken"] and watch_told["action"] == action


def test_only_answers_that_were_promised_are_compared() -> None:
    watch = WatchConfig(share=1.0)
    service = service_of(slots=4, more={"watch": watch})
    watcher = service.watcher
    assert watcher is not None
    with running(service) as address:
        chat = f"{address}/v1/chat/completions"
        base = {"messages": messages(scene_examples()[0])}
        for more in (
            {"temperature": 1.0}, {"n": 2}, {"stop": "x"}, {"logprobs": True},
            {"presence_penalty": 1}, {"offramp": {"mode": "full"}},
            {"offramp": {"mode": "lossless"}}, {"offramp": {"thresholds": {"2": 0.1}}},
        ):  # fmt: skip
            httpx.post(chat, json={**base, **more}, timeout=300).raise_for_status()
        assert watcher.settle(60) and watcher.risk.n == 0
        httpx.post(chat, json=base, timeout=300).raise_for_status()
        assert watcher.settle(60) and watcher.risk.n == 1
        assert watcher.risk.mean == 0.0


def test_kinds_of_damage_are_known() -> None:
    assert "noise" in CORRUPTIONS
