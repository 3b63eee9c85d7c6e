"""Laws of a watched guarantee on the shipped model: it notices images that it was not made for."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fakes
import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from offramp.adapter.answers import Answer
from offramp.calibration.calibrate import calibrate
from offramp.calibration.risk_functions import RISKS
from offramp.cli.commands.serve import _judge
from offramp.core.decoding.policy import ExitPolicy, GenerationOutput
from offramp.core.decoding.scheduler import Schedule
from offramp.core.errors import InputError, StorageError
from offramp.data.formats import read_items
from offramp.data.scenes import tasks
from offramp.features.input_processor import InputProcessor
from offramp.inputs.example import Example
from offramp.promises.guarantee import Promise
from offramp.promises.likeness import Likeness
from offramp.promises.verdict import BROKEN, EXACT, NONE
from offramp.serving.batch_engine import BatchEngine
from offramp.serving.engine_config import EngineConfig
from offramp.serving.monitor.sample import Sample
from offramp.serving.monitor.watch_config import WatchConfig
from offramp.serving.monitor.watcher import Watcher, draws_of_one
from offramp_lab.records import lookalikes
from serving import asking, messages, running, scene_examples, service_of, shipped

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
    promise = more.pop("promise", adapter.standing().promise)
    return Watcher(engine, engine.processor, promise, config, **more)


@pytest.mark.slow
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
    """The same question about the image under noise."""
    pixels = np.asarray(example.open_image(), float)
    noisy = pixels + np.random.default_rng([*example.key.encode()]).normal(0, 97, pixels.shape)
    return replace(example, image=Image.fromarray(noisy.clip(0, 255).astype(np.uint8)))


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


def test_each_kind_of_prompt_may_lose_what_was_promised_of_it(engine: BatchEngine) -> None:
    """In units of the smallest target, so that one bet watches all kinds."""
    captions, questions = (of("test", 4).examples[:4] for of in (tasks.captions, tasks.questions))
    own = Promise("consistency", 0.2, 0.95, own_targets={"Caption:": 0.8, "": 0.2})

    def kind_of(prompt: str) -> str:
        return prompt if prompt == "Caption:" else ""

    for examples, each in ((captions, 0.25), (questions, 1.0)):
        watcher = watcher_of(engine, promise=own, kind_of=kind_of, loss=lambda early, full: 1.0)
        try:
            watched(engine, examples, watcher)
            assert watcher.risk.n > 0
            assert watcher.risk.total == pytest.approx(each * watcher.risk.n)
            assert watcher.report()["alarm_above"] == 0.2
        finally:
            watcher.close()


@pytest.mark.slow
def test_what_is_kept_is_an_example_to_calibrate_on(engine: BatchEngine, tmp_path: Path) -> None:
    watcher = watcher_of(engine, replace(ALL, keep=tmp_path / "kept"))
    try:
        question = tasks.questions("test", 1, 50).examples[0]
        watched(engine, [*tasks.captions("test", 4).examples, question], watcher)
    finally:
        watcher.close()
    items = read_items([str(tmp_path / "kept" / "rows.jsonl")])
    assert len(items) == 5
    assert items[-1].example.prompt == question.prompt
    adapter, _ = shipped()
    assert engine.processor is not None
    found = calibrate(
        adapter,
        engine.processor,
        [item.example for item in items],
        ExitPolicy(),
        target=0.4,
        confidence=0.6,
        thresholds=(0.9,),
        **GREEDY,
    )
    assert found.n == 5


def test_the_draw_is_before_the_answer_and_as_often_as_asked(engine: BatchEngine) -> None:
    watcher = watcher_of(engine, WatchConfig(share=0.01), seed=3)
    try:
        drawn = sum(watcher.draws() for _ in range(4000))
        assert 700 < drawn < 900  # of as many blocks of 20 one is compared as 1% of these
    finally:
        watcher.close()


@pytest.mark.parametrize(
    "change",
    [
        {"share": 0.0},
        {"share": 1.5},
        {"level": 0.0},
        {"action": "x"},
        {"slack": 0.5},
        {"slack": np.inf},
        {"slack": np.nan},
        {"deadline": -1},
        {"deadline": np.inf},
        {"watchers": 0},
        {"a_client": 0},
        {"frequencies": Path("nowhere.jsonl")},
    ],
)
def test_a_watch_that_tells_nothing_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        WatchConfig(**change)


# -- without a model: an engine whose slots are as busy as one says -------------------------------


class _BusyEngine:
    """Answers as the full model whatever it is asked; so many of 8 slots, and a queue, are in use
    by others."""

    def __init__(self, running: int, waiting: int = 0) -> None:
        self.running, self.waiting, self.asked = running, waiting, 0
        self.core = SimpleNamespace(config=SimpleNamespace(slots=8))

    def submit(self, inputs: Any, *, mode: str, **options: Any) -> Future[Any]:
        assert mode == "full"
        self.asked += 1
        done: Future[Any] = Future()
        done.set_result(SimpleNamespace(output=inputs["full"]))
        return done

    def cancel(self, handle: Any) -> None:
        """Nothing is under way."""


def output(token: int) -> GenerationOutput:
    return GenerationOutput(torch.tensor([[token]]), torch.tensor([[2]]), torch.zeros(1, 1), 12)


def samples(images: list[Image.Image], *, wrong: bool = False, client: str = "") -> list[Sample]:
    inputs = {"full": output(5)}
    early = output(6 if wrong else 5)
    return [Sample(inputs, {}, early, image, "Caption:", client) for image in images]


PROMISE = Promise("disagreement", 0.0075, 0.95)


def idle_watcher(engine: Any, config: WatchConfig, **more: Any) -> Watcher:
    _, processor = shipped()
    encoder = InputProcessor(shipped()[0].backbone, processor)
    return Watcher(engine, encoder, more.pop("promise", PROMISE), config, **more)


@pytest.mark.parametrize(("running", "waiting"), [(4, 0), (7, 0), (8, 20)])
def test_a_busy_server_is_watched(running: int, waiting: int) -> None:
    """With half the slots busy nothing is let go; with all of them, requests take their turn."""
    engine = _BusyEngine(running, waiting)
    watcher = idle_watcher(engine, replace(ALL, deadline=0.05))
    try:
        for sample in samples([fakes.picture(i) for i in range(60)]):
            watcher.offer(sample)
        assert watcher.settle(60)
        assert engine.asked == watcher.risk.n == 60
        assert watcher.coverage == 1.0 and not watcher.blind and watcher.let_go == 0
    finally:
        watcher.close()


class _Queue(_BusyEngine):
    """An engine whose requests wait for others: each is answered after so many seconds."""

    def __init__(self, running: int, waiting: int, seconds: float) -> None:
        super().__init__(running, waiting)
        self.seconds, self.canceled = seconds, 0

    def submit(self, inputs: Any, *, mode: str, **options: Any) -> Future[Any]:
        self.asked += 1
        later: Future[Any] = Future()
        answer = SimpleNamespace(output=inputs["full"])
        timer = threading.Timer(self.seconds, later.set_result, [answer])
        timer.daemon = True
        timer.start()
        return later

    def cancel(self, handle: Any) -> None:
        self.canceled += 1


def test_samples_wait_for_their_deadlines_together() -> None:
    """One after the other, 40 of them would take 12 seconds."""
    engine = _Queue(8, 40, 0.2)
    watcher = idle_watcher(engine, replace(ALL, deadline=0.3))
    begin = time.monotonic()
    try:
        for number, image in enumerate(map(fakes.picture, range(40))):
            watcher.offer(samples([image], client=str(number % 4))[0])
        assert watcher.settle(60) and time.monotonic() - begin < 6
        assert watcher.risk.n == 40 and watcher.coverage is None and watcher.let_go == 0
    finally:
        watcher.close()


def test_what_is_on_its_way_when_a_watch_ends_is_cancelled() -> None:
    engine = _Queue(0, 0, 60.0)
    watcher = idle_watcher(engine, ALL)
    watcher.offer(samples([fakes.picture(1)])[0])
    while not engine.asked:
        time.sleep(0.01)
    watcher.close()
    assert engine.canceled == 1


@pytest.mark.parametrize("unit", ["image", "answer"])
def test_the_unit_that_was_promised_is_what_is_drawn(unit: str) -> None:
    """By image: as often however often it is asked about; by answer: every request alike."""
    promise = Promise("disagreement", 0.01, 0.95, unit, largest=40)
    watcher = idle_watcher(_BusyEngine(0), WatchConfig(share=0.1), promise=promise, seed=5)
    try:
        seldom = [fakes.picture(i) for i in range(200)]
        often = [fakes.picture(1000 + i) for i in range(100)]
        drawn = {
            "seldom": [watcher.draws("a", image) for image in seldom],
            "often": [watcher.draws("a", image) for image in often for _ in range(40)],
        }
        # By image of each block of 10 one is compared.
        expected = {"image": (200, 100), "answer": (20, 400)}[unit]
        per_image = {"image": 40, "answer": 1}[unit]  # drawn again until it is compared
        found = [sum(drawn["seldom"]), sum(drawn["often"]) / per_image]
        for some, wanted in zip(found, expected, strict=True):
            assert abs(some - wanted) <= 4 * wanted**0.5
        compared = next(im for im, was in zip(seldom, drawn["seldom"], strict=True) if was)
        watcher.offer(samples([compared])[0])
        assert unit == "answer" or not watcher.draws("a", compared)
    finally:
        watcher.close()


def scored(token: int, score: float) -> GenerationOutput:
    return replace(output(token), scores=torch.full((1, 1), score))


@pytest.mark.slow
def test_of_each_block_one_image_is_compared_more_likely_one_that_exits_doubted() -> None:
    """And what is seen is, on average, what all of them lose."""
    engine, risks = _BusyEngine(0), list[float]()
    for seed in range(4):
        watcher = idle_watcher(engine, WatchConfig(share=0.05, backlog=4096), seed=seed)
        try:
            for number in range(200):
                unsure = number % 10 == 0  # one in ten is unsure, and all of these are wrong
                early = scored(6, 0.4) if unsure else scored(5, 0.99)
                image = fakes.picture(number)
                watcher.offer(Sample({"full": output(5)}, {}, early, image, "Caption:"))
            assert watcher.settle(60) and watcher.risk.n == 10
            risks.append(watcher.risk.total / watcher.risk.n)
        finally:
            watcher.close()
    assert engine.asked == 40  # one of each block of 20
    assert np.mean(risks) == pytest.approx(0.1, abs=0.05)
    assert max(risks) < 0.25  # a uniform draw of ten would often be further off


def test_of_a_promise_by_answer_each_drawn_answer_counts() -> None:
    promise = Promise("disagreement", 0.01, 0.95, "answer", largest=3)
    watcher = idle_watcher(_BusyEngine(0), ALL, promise=promise)
    try:
        for _ in range(5):
            watcher.offer(samples([fakes.picture(1)])[0])
        assert watcher.settle(60) and watcher.risk.n == 3  # no more than were calibrated
    finally:
        watcher.close()
    assert [draws_of_one(40, share) for share in (0.01, 0.1, 1.0)] == [3, 11, 40]


def test_the_watch_is_not_blind_and_seeing_in_turns(caplog: pytest.LogCaptureFixture) -> None:
    watcher = idle_watcher(_BusyEngine(0), ALL)
    try:
        draw = np.random.default_rng(0)
        for seen in draw.random(3000) < 0.5:
            with watcher._lock:
                watcher._note(bool(seen))
        said = [record.getMessage() for record in caplog.records if "watch_" in record.getMessage()]
        assert len(said) <= 1
    finally:
        watcher.close()


def test_lost_coverage_is_an_alarm_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    watcher = idle_watcher(_BusyEngine(8, 1), replace(ALL, backlog=2, deadline=60.0))
    try:
        for sample in samples([fakes.picture(i) for i in range(60)]):
            watcher.offer(sample)
        assert watcher.blind and watcher.report()["coverage"] < 0.1
        assert "watch_blind" in caplog.text
    finally:
        watcher.close()


def test_no_client_fills_the_backlog_or_the_draws() -> None:
    watcher = idle_watcher(_BusyEngine(8, 1), replace(ALL, backlog=8, deadline=60.0))
    try:
        for sample in samples([fakes.picture(i) for i in range(20)], client="loud"):
            watcher.offer(sample)
        for sample in samples([fakes.picture(i) for i in range(20, 24)], client="quiet"):
            watcher.offer(sample)
        assert watcher._waiting["loud"] == 4 and watcher._waiting["quiet"] >= 3
        assert all(watcher.draws("loud") for _ in range(100))  # it asks alone
        evenly = [(watcher.draws("loud"), watcher.draws("quiet")) for _ in range(500)]
        assert min(np.mean(evenly, 0)) > 0.9
        flood = [watcher.draws("loud" if i % 20 else "quiet") for i in range(2000)]
        assert all(flood[::20])
        assert 50 < sum(flood) - sum(flood[::20]) < 110  # as many as of the other's 100
        assert all([watcher.draws("loud") for _ in range(200)][64:])  # it asks alone again
    finally:
        watcher.close()


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("clients", [2, 3, 20])
def test_clients_that_ask_as_often_are_drawn_as_often(share: float, clients: int) -> None:
    """Also where they are too few for each to have no more than its share."""
    watcher = idle_watcher(_BusyEngine(8, 1), replace(ALL, a_client=share))
    try:
        drawn = [[watcher.draws(str(one)) for one in range(clients)] for _ in range(100)]
        assert min(np.mean(drawn, 0)) > 0.9
    finally:
        watcher.close()


def test_variants_of_a_few_pixels_count_once_and_forms_each() -> None:
    watcher = idle_watcher(_BusyEngine(0), ALL)
    try:
        chart = lookalikes.chart(0)
        variants = [chart.copy() for _ in range(5)]
        for place, variant in enumerate(variants):
            variant.putpixel((100 + place, 40), (255, 0, 0))
        for sample in samples([chart, *variants, *lookalikes.images("forms", 5)]):
            watcher.offer(sample)
        assert watcher.settle(60) and watcher.risk.n == 6
    finally:
        watcher.close()


def test_an_alarm_outlives_a_restart_until_it_is_reset(tmp_path: Path) -> None:
    config = replace(ALL, state=tmp_path / "watch.json")
    watcher = idle_watcher(_BusyEngine(0), config, about="exits")
    for sample in samples([fakes.picture(i) for i in range(12)], wrong=True):
        watcher.offer(sample)
    assert watcher.settle(60) and watcher.broken
    watcher.close()
    other = idle_watcher(_BusyEngine(0), config, about="others")
    assert not other.broken
    other.close()
    again = idle_watcher(_BusyEngine(0), config, about="exits")
    assert again.broken and again.risk.n == 12 and again.risk.interval == watcher.risk.interval
    again.reset()
    assert not again.broken
    again.close()
    last = idle_watcher(_BusyEngine(0), config, about="exits")
    assert not last.broken and last.risk.n == 0
    last.close()
    (tmp_path / "watch.json").write_text("{}")
    torn = idle_watcher(_BusyEngine(0), config, about="exits")
    assert torn.risk.n == 0
    torn.close()


def test_after_a_reset_the_same_images_count_again() -> None:
    watcher = idle_watcher(_BusyEngine(0), ALL)
    try:
        for _ in range(2):
            for sample in samples([fakes.picture(i) for i in range(12)], wrong=True):
                assert watcher.draws("a", sample.image)
                watcher.offer(sample)
            assert watcher.settle(60) and watcher.broken and watcher.risk.n == 12
            watcher.reset()
    finally:
        watcher.close()


def test_an_answer_that_moves_on_to_its_block_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    enters = Watcher._enter

    def slowly(watcher: Watcher, one: Any) -> None:
        time.sleep(0.2)
        enters(watcher, one)

    monkeypatch.setattr(Watcher, "_enter", slowly)
    watcher = idle_watcher(_BusyEngine(0), ALL)
    try:
        watcher.offer(samples([fakes.picture(50)])[0])
        assert watcher.settle(60) and watcher.risk.n == 1
    finally:
        watcher.close()


def compare_one(config: WatchConfig) -> None:
    """A watcher that compares one answer, keeps its state and ends."""
    watcher = idle_watcher(_BusyEngine(0), config)
    watcher.offer(samples([fakes.picture(50)])[0])
    assert watcher.settle(60)
    watcher.close()


@pytest.mark.parametrize("change", [{"level": 0.001}, {"slack": 2.0}, {"watchers": 3}])
def test_an_alarm_outlives_a_restart_with_another_watch(
    tmp_path: Path, change: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(ALL, state=tmp_path / "watch.json")
    compare_one(config)
    idle_watcher(_BusyEngine(0), replace(config, **change)).close()
    assert "starts anew" in caplog.text and next(iter(change)) in caplog.text
    watcher = idle_watcher(_BusyEngine(0), config)
    for sample in samples([fakes.picture(i) for i in range(12)], wrong=True):
        watcher.offer(sample)
    assert watcher.settle(60) and watcher.broken
    watcher.close()
    again = idle_watcher(_BusyEngine(0), replace(config, **change))
    assert again.broken and "POST /v1/watch/reset" in caplog.text
    again.reset()
    assert not again.broken
    again.close()


@pytest.mark.parametrize(
    "damage",
    [{"promised": None}, {"promised": 0.5}, {"level": 1e-9}, {"total": None}, {"bets": None}],
)
def test_a_damaged_state_switches_no_watch_off(
    tmp_path: Path, damage: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(ALL, state=tmp_path / "watch.json")
    compare_one(config)
    kept = json.loads((tmp_path / "watch.json").read_text())
    kept["risk"] |= damage
    (tmp_path / "watch.json").write_text(json.dumps(kept))
    again = idle_watcher(_BusyEngine(0), config)
    try:
        assert "says nothing of the watch; it starts anew" in caplog.text
        for sample in samples([fakes.picture(i) for i in range(12)], wrong=True):
            again.offer(sample)
        assert again.settle(60) and again.broken
    finally:
        again.close()


def test_a_state_file_is_of_one_watcher_at_a_time(tmp_path: Path) -> None:
    """Of two, the one that saves last would write over the other's alarm."""
    config, link = replace(ALL, state=tmp_path / "watch.json"), tmp_path / "link.json"
    link.symlink_to("watch.json")
    first = idle_watcher(_BusyEngine(0), config)
    for state in (config.state, link):
        with pytest.raises(StorageError, match="Another server") as refused:
            idle_watcher(_BusyEngine(0), replace(config, state=state))
        assert "--watch state=FILE" in refused.value.remedy
    for sample in samples([fakes.picture(i) for i in range(12)], wrong=True):
        first.offer(sample)
    assert first.settle(60) and first.broken
    first.close()
    after = idle_watcher(_BusyEngine(0), config)
    assert after.broken
    after.close()


def test_a_state_file_that_cannot_be_written_stops_no_watch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    watcher = idle_watcher(_BusyEngine(0), replace(ALL, state=tmp_path / "file" / "watch.json"))
    watcher.reset()
    assert "What the watch learnt is not kept" in caplog.text
    watcher.close()


def test_watchers_share_a_level_and_slack_moves_the_limit() -> None:
    watcher = idle_watcher(_BusyEngine(0), replace(ALL, watchers=4, slack=2.0))
    try:
        assert watcher.risk.level == 0.0025 and watcher.risk.promised == 0.015
        assert watcher.report()["alarm_above"] == 0.015
    finally:
        watcher.close()


CIDER = Promise("cider_drop", 0.025, 0.95)


def words_lost(early: Answer, full: Answer, references: Sequence[str]) -> float:
    """A drop of 1 where the full model is right alone, -1 where the early answer is."""
    return float(full.text in references) - float(early.text in references)


@pytest.mark.slow
def test_right_answers_of_people_break_a_promise_about_right_answers(tmp_path: Path) -> None:
    """Of answers that were compared alone, once each; and over a restart."""
    config = replace(ALL, state=tmp_path / "watch.json")
    more: dict[str, Any] = {"right": CIDER, "judge": words_lost, "about": "exits"}
    watcher = idle_watcher(_BusyEngine(0), config, **more)
    decode = watcher._encoder.tokenizer.decode
    early, full = decode([6]), decode([5])
    assert early != full
    for number, sample in enumerate(samples([fakes.picture(i) for i in range(40)], wrong=True)):
        watcher.offer(replace(sample, id=f"a{number}"))
    assert watcher.settle(60)
    watcher.risk = watcher._new_risk()  # what differs is a test of its own
    assert not watcher.judge("another", [full]) and watcher.report()["judged"]["answers"] == 0
    for number in range(10):
        assert watcher.judge(f"a{number}", [early, full])  # both are right: nothing is lost
    told = watcher.report()["judged"]
    assert told["risk"] == pytest.approx(0) and told["lower"] < 0 < told["upper"]
    assert not watcher.judge("a0", [full]) and not watcher.broken
    watcher.close()
    again = idle_watcher(_BusyEngine(0), config, **more)
    assert again.judged is not None and again.judged.n == 10
    for number, sample in enumerate(samples([fakes.picture(i) for i in range(40)], wrong=True)):
        again.offer(replace(sample, id=f"a{number}"))
    assert again.settle(60)
    again.risk = again._new_risk()
    for number in range(40):
        again.judge(f"a{number}", [full])
    assert again.broken and again.replaces == "lossless"
    again.reset()
    assert not again.broken and again.judged.n == 0
    again.close()


def test_what_is_kept_to_calibrate_on_is_drawn_uniformly(tmp_path: Path) -> None:
    images = [fakes.picture(number) for number in range(200)]
    for keep, drawn in ((None, 200), (tmp_path / "kept", 20)):
        watcher = idle_watcher(_BusyEngine(0), WatchConfig(share=0.1, keep=keep), seed=1)
        try:
            assert abs(sum(watcher.draws("a", image) for image in images) - drawn) <= 16
        finally:
            watcher.close()


@pytest.mark.parametrize("name", ["rouge_l_drop", "cider_drop"])
def test_people_judge_by_the_score_that_was_promised(name: str, tmp_path: Path) -> None:
    """Words of captions are weighed by other images', or nobody can judge."""
    fakes.picture(0).save(tmp_path / "0.png")
    said = ("a dog runs", "a cat sleeps", "two birds on a tree")
    rows = [json.dumps({"image": "0.png", "prompt": "Caption:", "answer": words}) for words in said]
    (tmp_path / "captions.jsonl").write_text("\n".join(rows))
    judge = _judge(RISKS[name], tmp_path / "captions.jsonl")
    dog, cat = (Answer((token,), words) for token, words in enumerate(said[:2]))
    assert judge(dog, dog, ["a dog runs"]) == 0
    assert 0 < judge(cat, dog, ["a dog runs"]) <= 1
    assert judge(dog, cat, ["a dog runs"]) == -judge(cat, dog, ["a dog runs"])
    assert (_judge(RISKS[name], None) is None) == (name == "cider_drop")


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
            verdict = told["verdict"]
            assert verdict["why"] == BROKEN and verdict["exact"] == (action != "warn")
            assert not verdict["promised"]
        own = ask(number, offramp={"thresholds": {"2": 0.9}})
        assert own["mode"] == "early_exit"  # what a client chose itself was never promised
        text = httpx.get(f"{address}/metrics").text
        assert 'offramp:guarantee_broken{model_name="tiny-opt"} 1.0' in text
        assert 'offramp:risk_target{model_name="tiny-opt"} 0.0075' in text
        watch_told = httpx.get(f"{address}/v1/models").json()["data"][0]["offramp"]["watch"]
        assert watch_told["broken"] and watch_told["action"] == action


def test_the_watch_is_reset_by_the_first_key_alone() -> None:
    both = ("k", "another")
    asked = (((), None, 403), (("k",), None, 401), (both, "another", 403), (both, "k", 200))
    for keys, sent, status in asked:
        watch = {"watch": WatchConfig(share=1.0), "loss": lambda early, full: 1.0}
        service = service_of(slots=2, more=watch, keys=keys)
        assert service.watcher is not None
        for _ in range(20):
            service.watcher.risk.add(1.0)
        assert service.watcher.broken
        headers = {} if sent is None else {"Authorization": f"Bearer {sent}"}
        with running(service) as address:
            answer = httpx.post(f"{address}/v1/watch/reset", json={}, headers=headers)
        assert answer.status_code == status
        assert service.watcher.broken == (status != 200)


def test_a_reset_says_what_there_is_to_reset() -> None:
    """Without a watch the alarm over unlike requests; without either, that nothing is watched."""
    service = service_of(slots=1, keys=("k",))
    service.alarm.raised = True
    client = asking(service)
    headers = {"Authorization": "Bearer k"}
    try:
        found = client.post("/v1/watch/reset", json={}, headers=headers).raise_for_status().json()
        assert found["watch"] is None and not found["likeness"]["alarm"]
        service.served.likeness = Likeness({})  # type: ignore[misc]
        refused = client.post("/v1/watch/reset", json={}, headers=headers)
        assert refused.status_code == 404
        assert "--watch 0" in refused.json()["error"]["message"]
    finally:
        service.close()


def test_people_judge_what_was_compared_by_its_id_and_with_a_key() -> None:
    def judge(early: Answer, full: Answer, references: Sequence[str]) -> float:
        return 1.0

    body = {"messages": messages(scene_examples()[0])}
    for keys, status in (((), 403), (("k",), 200)):
        more = {"watch": WatchConfig(share=1.0), "judge": judge}
        service = service_of(slots=2, more=more, keys=keys)
        client, watcher = asking(service), service.watcher
        headers = {"Authorization": "Bearer k"}
        try:
            reply = client.post("/v1/chat/completions", json=body, headers=headers).json()
            assert watcher is not None and watcher.settle(300)
            said = {"id": reply["id"], "references": ["a red square"]}
            for counted in (True, False):
                found = client.post("/v1/watch/answer", json=said, headers=headers)
                assert found.status_code == status
                assert status != 200 or found.json()["counted"] == counted
            blank = said | {"references": [" "]}
            refused = client.post("/v1/watch/answer", json=blank, headers=headers)
            assert refused.status_code == 400
        finally:
            service.close()
    service = service_of(slots=1, more={"watch": WatchConfig(share=1.0)}, keys=("k",))
    try:
        found = asking(service).post("/v1/watch/answer", json=said, headers=headers)
        assert found.status_code == 404 and "frequencies" in found.json()["error"]["message"]
    finally:
        service.close()


@pytest.mark.parametrize("keys", [(), ("one", "two")])
def test_a_client_of_the_watch_is_its_key_or_its_address_however_it_is_written(
    keys: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = service_of(slots=1, keys=keys, more={"watch": WatchConfig(share=1.0)})
    assert service.watcher is not None
    asked: list[str] = []
    monkeypatch.setattr(service.watcher, "draws", lambda client, image: asked.append(client))
    client = asking(service)
    basic = base64.b64encode(b"anybody:one").decode()
    ways = ("Bearer one", "bearer  one", f"Basic {basic}", "Bearer two")
    body = {"messages": messages(scene_examples()[0]), "max_tokens": 1}
    try:
        for way in ways:
            found = client.post("/v1/chat/completions", json=body, headers={"Authorization": way})
            assert found.status_code == 200
    finally:
        service.close()
    assert len(set(asked[:3])) == 1
    assert (asked[3] != asked[0]) == bool(keys)  # without keys the header says nothing
    assert not any(key in name for key in ("one", "two") for name in asked)


def test_a_request_says_where_nothing_is_guaranteed_of_it() -> None:
    service = service_of(slots=4)
    caption, question = scene_examples()[0], scene_examples()[-1]
    with running(service) as address:

        def told(example: Example, **more: Any) -> str:
            body = {"messages": messages(example), **more}
            answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=300)
            verdict = answer.raise_for_status().json()["usage"]["offramp"]["verdict"]
            return f"{verdict['says']} {verdict['why']}"

        for example in (caption, question):
            for more in ({}, {"max_tokens": 20}):
                assert told(example, **more).startswith("Promised: at most 0.75% differ. with 95%")
        for words, more in {
            "up to 150 tokens where up to 48": {"max_tokens": 150},
            "sampled": {"temperature": 1.0},
            "thresholds 2: 0.1 where 2: ": {"offramp": {"thresholds": {"2": 0.1}}},
        }.items():
            assert told(caption, **more).startswith(NONE)
            assert words in told(caption, **more)
        other = replace(caption, prompt="Write a poem.")
        assert "a prompt unlike the calibrated ones" in told(other)
        for mode in ("full", "lossless"):
            assert told(other, offramp={"mode": mode}) == f"{EXACT} "
        card = httpx.get(f"{address}/v1/models").json()["data"][0]["offramp"]
        assert card["guarantee"]["unit"] == "image" and card["guarantee"]["max_tokens"] == 48
        assert card["guarantee"]["words"].startswith("the mean over images of the share of answers")
        assert card["not_guaranteed"] is None


def test_only_answers_that_were_promised_are_compared() -> None:
    watch = WatchConfig(share=1.0)
    service = service_of(slots=4, more={"watch": watch})
    watcher = service.watcher
    assert watcher is not None
    with running(service) as address:
        chat = f"{address}/v1/chat/completions"
        base = {"messages": messages(scene_examples()[0])}
        for more in (
            {"temperature": 1.0},
            {"n": 2},
            {"stop": "x"},
            {"logprobs": True},
            {"presence_penalty": 1},
            {"offramp": {"mode": "full"}},
            {"offramp": {"mode": "lossless"}},
            {"offramp": {"thresholds": {"2": 0.1}}},
            {"max_tokens": 100},
        ):
            httpx.post(chat, json={**base, **more}, timeout=300).raise_for_status()
        assert watcher.settle(60) and watcher.risk.n == 0
        httpx.post(chat, json=base, timeout=300).raise_for_status()
        assert watcher.settle(60) and watcher.risk.n == 1
        assert watcher.risk.mean == 0.0


def test_a_drawn_request_whose_answer_is_cut_off_is_counted_as_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    service = service_of(slots=1, more={"watch": WatchConfig(share=1.0)}, seconds=1.0)
    watcher = service.watcher
    assert watcher is not None
    monkeypatch.setattr(service.engine, "submit", lambda *_, **__: Future())  # it never ends
    monkeypatch.setattr(service.engine, "cancel", lambda handle: None)
    client = asking(service)
    try:
        for more, lost in (({}, 1), ({"temperature": 1.0}, 1)):  # the second was not promised
            body = {"messages": messages(scene_examples()[lost]), "max_tokens": 40, **more}
            assert client.post("/v1/chat/completions", json=body).status_code == 504
            assert watcher.let_go == watcher.report()["lost"] == lost
    finally:
        service.close()
