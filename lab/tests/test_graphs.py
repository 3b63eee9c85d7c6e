"""Laws of recorded programs: they write what `generate` writes, token for token, depth for depth.

Without a GPU the programs run unrecorded over the same buffers, so that all but the recording is
tried here.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from fakes import picture
from families import NAMES, one_row
from gguf_cases import refused
from schemas import random_model

from offramp.adapter.adapter import Adapter
from offramp.core.decoding.policy import FULL, ExitPolicy, GenerationOutput
from offramp.core.engine.generate import generate
from offramp.core.errors import InputError, UnsupportedBackboneError
from offramp.core.models.exits import ExitSet
from offramp.features.constraint import JsonConstraint
from offramp.features.input_processor import InputProcessor
from offramp.inputs.example import Example
from offramp_lab.graphs.recording import Mailbox, Recorder
from offramp_lab.graphs.runtime import GraphRuntime

ENCODERS = ("blip2-t5", "instructblip-t5", "florence2")
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}


def middle(whole: Any, exits: Any, inputs: Any) -> dict[int, float]:
    """A threshold that about half of the tokens reach."""
    depth = exits.depths[0]
    looked = generate(whole, inputs, exits=exits, policy=ExitPolicy({depth: 1.0}), **GREEDY)
    scores = looked.scores[0].sort().values
    return {depth: float(scores[5] + scores[6]) / 2}


def same(made: GenerationOutput, expected: GenerationOutput) -> None:
    assert torch.equal(made.sequences, expected.sequences)
    assert torch.equal(made.depths, expected.depths)
    # In lossless mode alone recorded programs read the prompt whole, and draft after it.
    first = 1 if expected.rounds else 0
    ours, theirs = made.scores[:, first:], expected.scores[:, first:]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5, equal_nan=True)
    if not expected.rounds:
        assert made.rounds == expected.rounds


@pytest.fixture
def case(backbone: Any, exits: Any, batch: Any) -> Any:
    """`case(name)`: an adapter with a threshold, and a prompt."""

    def make(name: str, row: int = 0) -> tuple[Adapter, dict[str, Any]]:
        whole, parts = backbone(name), exits(name)
        inputs = one_row(name, batch(name, 2), row)
        return Adapter(whole, parts, ExitPolicy(middle(whole, parts, inputs))), inputs

    return make


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ENCODERS])
def test_every_mode_is_generates_own(name: str, case: Any) -> None:
    adapter, inputs = case(name)
    runtime = GraphRuntime(adapter, context=128)
    always = ExitPolicy(dict.fromkeys(adapter.policy.thresholds, 0.0))
    drafting = replace(adapter.policy, lossless=True, max_draft=3)
    for policy in (adapter.policy, FULL, always, drafting):
        expected = adapter.generate(inputs, policy=policy, **GREEDY)
        same(runtime.generate(inputs, policy=policy, **GREEDY), expected)
        if policy is adapter.policy:
            assert len(expected.depths.unique()) == 2, "the threshold tells nothing apart"


class Rehearsed(Recorder):
    """Tries programs out as a recorder does, and records nothing."""

    records = True

    def __init__(self, device: torch.device) -> None:
        self.tried = 0

    def record(self, program: Any) -> Any:
        for _ in range(3):
            program()
        self.tried += 1
        return program


def test_what_is_tried_out_while_recording_changes_no_answer(
    case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, inputs = case("blip2-llama")
    monkeypatch.setattr("offramp_lab.graphs.programs.Recorder", Rehearsed)
    runtime = GraphRuntime(adapter, context=200)
    drafting = replace(adapter.policy, lossless=True)
    for policy in (adapter.policy, drafting, FULL):
        expected = adapter.generate(inputs, policy=policy, **GREEDY)
        same(runtime.generate(inputs, policy=policy, **GREEDY), expected)


def test_more_tokens_than_states_may_wait_and_more_than_the_narrowest_columns(
    case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, inputs = case("llava")
    monkeypatch.setattr("offramp_lab.graphs.programs.NARROWEST", 16)
    runtime = GraphRuntime(adapter, context=64)
    always = ExitPolicy(dict.fromkeys(adapter.policy.thresholds, 0.0))
    options = {**GREEDY, "max_new_tokens": 30}
    for policy in (always, FULL):
        expected = adapter.generate(inputs, policy=policy, **options)
        same(runtime.generate(inputs, policy=policy, **options), expected)


def test_several_exits_and_drafts_are_generates_own(backbone: Any, exits: Any, batch: Any) -> None:
    whole, parts = backbone("blip2-llama"), exits("blip2-llama")
    first, second = parts.depths[:2]
    inputs = one_row("blip2-llama", batch("blip2-llama", 2), 0)
    at = middle(whole, parts, inputs) | {second: 0.012}
    adapter = Adapter(whole, parts, ExitPolicy(at))
    runtime = GraphRuntime(adapter, context=128)
    options = {**GREEDY, "max_new_tokens": 40}
    seen = set()
    for more in (
        {},
        {"lossless": True, "max_draft": 3},
        {"max_draft": 30},
        {"lossless": True, "max_draft": 30},
        {"thresholds": dict.fromkeys(at, 0.0)},
    ):
        policy = replace(adapter.policy, **more)
        expected = adapter.generate(inputs, policy=policy, **options)
        same(runtime.generate(inputs, policy=policy, **options), expected)
        seen |= set(expected.depths[0].tolist())
    assert seen == {first, second, whole.depth}


@pytest.mark.parametrize("score", ["idle", "margin"])
def test_scores_that_programs_do_not_compute_are_asked_behind_them(
    score: str, backbone: Any, exits: Any, batch: Any, idle: str
) -> None:
    whole, parts = backbone("llava"), exits("llava")
    inputs = one_row("llava", batch("llava", 2), 0)
    at = dict.fromkeys(parts.depths[:2], 0.5)
    adapter = Adapter(whole, parts, ExitPolicy(at, score=score))
    never = replace(adapter.policy, thresholds=dict.fromkeys(at, 1.0))
    scores = adapter.generate(inputs, policy=never, **GREEDY).scores[0].unique()
    level = float(scores[: len(scores) // 2 + 1][-2:].mean())  # between two, so that none ties
    usual = replace(adapter.policy, thresholds=dict.fromkeys(at, level))
    for policy in (usual, replace(usual, lossless=True)):
        runtime = GraphRuntime(adapter, policy=policy, context=64)
        same(runtime.generate(inputs, **GREEDY), adapter.generate(inputs, policy=policy, **GREEDY))


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 1.5, "seed": 5},
        {"repetition_penalty": 1.7},
        {"do_sample": True, "repetition_penalty": 1.3, "top_k": 30, "seed": 6},
    ],
    ids=str,
)
def test_requests_with_rules_of_their_own_are_generates_own(options: Any, case: Any) -> None:
    adapter, inputs = case("qwen2-vl")
    runtime = GraphRuntime(adapter, context=64)
    before = torch.get_rng_state()
    asked = {**GREEDY, **options}
    for policy in (adapter.policy, FULL, replace(adapter.policy, lossless=True)):
        expected = adapter.generate(inputs, policy=policy, **asked)
        same(runtime.generate(inputs, policy=policy, **asked), expected)
    assert torch.equal(torch.get_rng_state(), before), "the global generator is nobody's"
    same(runtime.generate(inputs, **GREEDY), adapter.generate(inputs, **GREEDY))


def test_an_answer_by_a_schema_is_generates_own() -> None:
    backbone, exits, processor = random_model()
    adapter = Adapter(backbone, exits, ExitPolicy({1: 0.6, 3: 0.2}))
    example = Example(picture(0), "What is shown?", (), "0")
    inputs = InputProcessor(backbone, processor).prompts([example])
    runtime = GraphRuntime(adapter, context=256)
    schema = {"type": "array", "items": {"enum": ["a", 1, None]}, "minItems": 3, "maxItems": 3}
    asked = {"max_new_tokens": 60, "logits_processor": [JsonConstraint(schema, processor)]}
    for policy in (adapter.policy, FULL, replace(adapter.policy, lossless=True)):
        made = runtime.generate(inputs, policy=policy, do_sample=False, **asked)
        same(made, adapter.generate(inputs, policy=policy, do_sample=False, **asked))
        answer = processor.tokenizer.decode(made.new_tokens[0], skip_special_tokens=True)
        assert len(json.loads(answer)) == 3


def test_a_request_that_failed_leaves_nothing_behind(case: Any) -> None:
    adapter, inputs = case("llava")
    runtime = GraphRuntime(adapter, context=64)

    def stop(ids: torch.Tensor, _: Any) -> torch.Tensor:
        if ids.shape[1] > inputs["input_ids"].shape[1] + 4:
            raise ValueError("enough")
        return torch.zeros(len(ids), dtype=torch.bool)

    with pytest.raises(ValueError, match="enough"):
        runtime.generate(inputs, stopping_criteria=[stop], **GREEDY)
    same(runtime.generate(inputs, **GREEDY), adapter.generate(inputs, **GREEDY))


def test_a_token_is_begun_before_the_last_is_known_and_counts(
    case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, inputs = case("llava")
    runtime = GraphRuntime(adapter, context=64)
    fed: list[int] = []
    feed = runtime._programs.feed

    def counted(segment: int, column: int) -> Any:
        fed.append(column)
        return feed(segment, column)

    monkeypatch.setattr(runtime._programs, "feed", counted)
    always = ExitPolicy(dict.fromkeys(adapter.policy.thresholds, 0.0))
    for policy in (always, FULL):
        fed.clear()
        runtime.generate(inputs, policy=policy, **GREEDY)
        # The first token is the prompt's, the last is not fed; one more was begun for nothing.
        assert fed == [*range(fed[0], fed[0] + GREEDY["max_new_tokens"])]


def test_a_shortlist_an_end_token_and_a_streamer(case: Any) -> None:
    adapter, inputs = case("blip2-llama")
    plain = adapter.generate(inputs, **GREEDY)
    words = torch.arange(adapter.backbone.vocabulary)[::2]
    parts = replace(ExitSet.of(adapter.exits), shortlist=words)
    listed = Adapter(adapter.backbone, parts, replace(adapter.policy, shortlist=True))
    runtime = GraphRuntime(listed, context=128)
    heard: list[Any] = []

    class Streamer:
        def put(self, value: Any) -> None:
            heard.append(value.flatten().tolist())

        def end(self) -> None:
            heard.append("end")

    ends = {**GREEDY, "eos_token_id": int(plain.new_tokens[0, 5])}
    expected = listed.generate(inputs, **ends)
    same(runtime.generate(inputs, streamer=Streamer(), **ends), expected)
    assert heard[1:] == [[token] for token in expected.new_tokens[0].tolist()] + ["end"]
    lossless = replace(listed.policy, lossless=True)
    expected = listed.generate(inputs, policy=lossless, **ends)
    same(runtime.generate(inputs, policy=lossless, **ends), expected)


def test_what_cannot_be_recorded_is_refused(
    case: Any, backbone: Any, exits: Any, batch: Any
) -> None:
    adapter, inputs = case("blip2-opt")
    runtime = GraphRuntime(adapter, context=64)
    depth = adapter.exits.depths[0]

    def wants(problem: str, **options: Any) -> None:
        refused(lambda: runtime.generate(inputs, **{**GREEDY, **options}), InputError, problem)

    wants("--context", max_new_tokens=60)
    wants("num_beams", num_beams=2)
    wants("GraphRuntime with that policy", policy=ExitPolicy({depth: 0.5}, score="margin"))
    several = ExitPolicy(dict.fromkeys(adapter.exits.depths, 0.5))
    wants("GraphRuntime with that policy", policy=several)
    two = batch("blip2-opt", 2)
    refused(lambda: runtime.generate(two, **GREEDY), InputError, "one answer at a time")
    other = Adapter(backbone("blip2-t5"), exits("blip2-t5"), ExitPolicy())
    refused(lambda: GraphRuntime(other), UnsupportedBackboneError, "encoder-decoder")
    refused(lambda: GraphRuntime(adapter, context=10**12), InputError, "slots")


def test_a_letter_is_what_was_sent() -> None:
    box = Mailbox(3, torch.device("cpu"))
    numbers = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    first = box.send(numbers)
    numbers.zero_()
    assert first() == [1.0, 2.0, 3.0]
