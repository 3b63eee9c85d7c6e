"""Laws of answers one after the other: each is `generate`'s, and can be stopped like a slot's."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import replace
from typing import Any

import families
import pytest
import torch
import zoo

from offramp import cli
from offramp.adapter.adapter import Adapter
from offramp.cli.command_line import build_parser
from offramp.cli.commands.serve import _slots
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.errors import InputError
from offramp.core.models.backbone import Backbone
from offramp.features.vision_cache import VisionCache
from offramp.serving.batch_engine import BatchEngine
from offramp.serving.request import Request
from offramp.serving.serial import SerialCore
from offramp.serving.server.config import ServerConfig
from offramp.serving.server.pytorch import service_of as service_of_model
from serving import asking, messages, scene_examples, service_of, shipped

NAME = "blip2-opt"
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
SAMPLED: dict[str, Any] = {"max_new_tokens": 8, "do_sample": True, "temperature": 1.5}
MODES = ("full", "early_exit", "lossless")


@pytest.fixture
def adapter(backbone, exits):
    return Adapter(backbone(NAME), exits(NAME), ExitPolicy({2: 0.05}))


@pytest.fixture
def rows(batch):
    whole = batch(NAME, 3)
    return [families.one_row(NAME, whole, row) for row in range(3)]


@pytest.mark.parametrize("mode", MODES)
def test_an_answer_is_what_generate_gives(mode: str, adapter: Adapter, rows: Any) -> None:
    core, noted = SerialCore(adapter), []
    handles = [core.add(Request(row, mode, on_token=noted.append, options=GREEDY)) for row in rows]
    while not core.idle:
        core.round()
    for row, handle in zip(rows, handles, strict=True):
        ours = handle.result()
        expected = adapter.generate(row, policy=adapter.policy.in_mode(mode), **GREEDY)
        assert torch.equal(ours.output.sequences, expected.sequences)
        told, noted = noted[: len(ours.gaps) + 1], noted[len(ours.gaps) + 1 :]
        assert [choice.token for choice in told] == expected.new_tokens[0].tolist()
        assert [choice.depth for choice in told] == expected.depths[0].tolist()
        assert ours.early_exit == (mode == "early_exit")
    assert core.tokens == 24 and not noted


def test_a_seed_draws_what_it_draws_alone_and_leaves_other_draws_alone(
    adapter: Adapter, rows: Any
) -> None:
    alone = adapter.generate(rows[0], seed=5, **SAMPLED).sequences
    state = torch.get_rng_state()
    core = SerialCore(adapter)
    handles = [core.add(Request(rows[0], seed=seed, options=SAMPLED)) for seed in (5, None, None)]
    while not core.idle:
        core.round()
    ours, *others = (handle.result().output.sequences for handle in handles)
    assert torch.equal(ours, alone)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(*others)


class Waiting:
    """Holds the engine's thread at a token until it may go on."""

    def __init__(self) -> None:
        self.reached, self.go = threading.Event(), threading.Event()

    def __call__(self, _: Any) -> None:
        self.reached.set()
        assert self.go.wait(60)


@pytest.fixture
def engine(adapter: Adapter) -> Iterator[BatchEngine]:
    with BatchEngine(SerialCore(adapter), queue=2) as found:
        yield found


def test_one_that_is_cancelled_ends_within_a_token(engine: BatchEngine, rows: Any) -> None:
    held, told = Waiting(), []
    more = {"on_token": lambda choice: (told.append(choice), held(choice))}
    written = engine.submit(rows[0], **{**GREEDY, "max_new_tokens": 40}, **more)
    assert held.reached.wait(60) and engine.running == 1
    queued, left = (engine.submit(row, **GREEDY) for row in rows[1:])
    assert engine.waiting == 2
    engine.cancel(queued)
    engine.cancel(written)
    held.go.set()
    for handle in (written, queued):
        with pytest.raises(CancelledError):
            handle.result(60)
    assert len(left.result(60).output.new_tokens[0]) == 8
    assert engine.drain(60) and len(told) == 1


def test_an_engine_that_closes_at_once_ends_the_answer_under_way(
    adapter: Adapter, rows: Any
) -> None:
    engine, held = BatchEngine(SerialCore(adapter)), Waiting()
    handles = [engine.submit(rows[0], **GREEDY, on_token=held), engine.submit(rows[1], **GREEDY)]
    assert held.reached.wait(60)
    closing = threading.Thread(target=engine.close, kwargs={"drain": False})
    closing.start()
    held.go.set()
    closing.join(60)
    assert not engine.alive and all(handle.cancelled() for handle in handles)


def test_what_fails_fails_alone(engine: BatchEngine, rows: Any) -> None:
    def broken(_: Any) -> None:
        raise RuntimeError("mine")

    bad = engine.submit(rows[0], **GREEDY, on_token=broken)
    unknown = engine.submit(rows[1], **GREEDY, thresholds={3: 0.5})
    assert isinstance(bad.exception(60), RuntimeError)
    assert isinstance(unknown.exception(60), InputError)
    assert engine.submit(rows[2], **GREEDY).result(60).output.new_tokens.numel() == 8


def test_layers_that_keep_a_state_are_answered_too() -> None:
    model = zoo.build("qwen3_5")
    inputs = zoo.inputs("qwen3_5", model, 1)
    with BatchEngine(SerialCore(Backbone(model))) as engine:
        ours = engine.submit(inputs, **GREEDY).result(60).output.sequences
    assert torch.equal(ours, model.generate(**inputs, **GREEDY))


@pytest.mark.parametrize("alone", [False, True])
def test_a_model_whose_vision_tower_is_not_known_is_served_without_image_features(
    alone: bool,
) -> None:
    shown, processor = shipped()
    backbone = copy.copy(shown.backbone)
    backbone.family = replace(backbone.family, vision=None)
    adapter = replace(shown, backbone=backbone)
    serial = adapter if alone else None
    service = service_of_model(
        adapter, processor, ServerConfig(NAME), serial=serial, vision_cache=VisionCache()
    )
    body = {"messages": messages(scene_examples()[0]), "max_tokens": 4, "temperature": 0}
    with asking(service) as client:
        found = client.post("/v1/chat/completions", json=body)
    service.close()
    assert found.status_code == 200, found.text


class Runtime:
    """Hands on to an adapter, under a name of its own."""

    name, rows = "other q4_1", 1

    def generate(self, inputs: Any, *, policy: Any = None, **options: Any) -> Any:
        return shipped()[0].generate(inputs, policy=policy, **options)


def test_a_server_answers_by_its_runtime() -> None:
    adapter, _ = shipped()
    service = service_of(more={"serial": Runtime()})
    encoder = service.prompter.processor
    inputs = encoder.prompts([scene_examples()[0]])
    body = {
        "messages": messages(scene_examples()[0]),
        "max_tokens": 12,
        "logprobs": True,
        "temperature": 0,
    }
    with asking(service) as client:
        card = client.get("/v1/models").json()["data"][0]
        assert card["offramp"]["guarantee"] is None
        for mode in MODES:
            asked = {**body, "offramp": {"mode": mode}}
            found = client.post("/v1/chat/completions", json=asked).json()
            policy = adapter.policy.in_mode(mode)
            output = adapter.generate(inputs, policy=policy, max_new_tokens=12, do_sample=False)
            assert found["choices"][0]["message"]["content"] == encoder.texts(output.new_tokens)[0]
            assert len(found["choices"][0]["logprobs"]["content"]) == 12
            assert found["usage"]["offramp"]["mode"] == mode
        streamed = client.post("/v1/chat/completions", json={**body, "stream": True}).text
        assert streamed.count("data: ") > 8 and streamed.strip().endswith("[DONE]")
        metrics = client.get("/metrics").text
    assert "offramp:num_requests_running" in metrics and "offramp:exit_rate" in metrics


def test_a_promise_is_about_the_answers_of_one_runtime() -> None:
    adapter = shipped()[0]
    assert adapter.standing().promise is not None
    assert f"answers of {Runtime.name} where" in adapter.standing(engine=Runtime.name).why
    calibration = dict(adapter.calibration or {})
    conditions = {**calibration["conditions"], "engine": Runtime.name, "kernels": None}
    other = replace(adapter, calibration={**calibration, "conditions": conditions})
    assert other.standing().promise is None
    assert other.standing(engine=Runtime.name).promise is not None


@pytest.mark.parametrize(
    "more, slots",
    [
        (["--engine", "torch"], 8),
        (["--engine", "torch", "--slots", "1"], 1),
        (["--engine", "exact-batches"], 8),
        (["--engine", "compiled"], 1),
        (["--engine", "llama.cpp"], 4),
        (["--engine", "llama.cpp", "--slots", "2"], 2),
        (["--engine", "llama.cpp", "--slots", "1"], 1),
    ],
)
def test_an_engine_has_slots_of_its_own_number(more: list[str], slots: int) -> None:
    given = build_parser().parse_args(["serve", "tiny-opt", *more])
    assert _slots(given.engine, given.slots) == slots


@pytest.mark.parametrize(
    "more, word",
    [
        (["--engine", "compiled", "--slots", "4"], "--slots"),
        (["--engine", "cuda-graphs", "--slots", "2"], "cuda-graphs"),
        (["--engine", "llama.cpp"], "--gguf"),
    ],
)
def test_options_of_slots_are_refused(
    more: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", "tiny-opt", *more]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 2 and word in said[0]
