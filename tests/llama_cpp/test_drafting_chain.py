"""Laws of exits that draft on inside llama.cpp: full depth's answer, in rounds of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from gguf_cases import (
    ENDS,
    EXACT,
    FURTHER,
    GREEDY,
    KINDS,
    adapter_of,
    depths_of,
    drafting,
    inputs_of,
    refused,
)
from hub_files import sliced, text_adapter

from offramp.core.decoding.drafting import DraftBudget, Drafts
from offramp.core.errors import AdapterError
from offramp.core.executors.drafter import DraftingExit
from offramp_llama_cpp import LlamaCppRuntime, export_gguf
from offramp_llama_cpp.chain import CallSizes
from offramp_llama_cpp.drafter import ChainDrafter
from offramp_llama_cpp.edge.model import EdgeModel
from offramp_llama_cpp.executor import ChainExecutor

pytestmark = pytest.mark.llama_cpp


@pytest.fixture
def knows(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[int]], None]:
    """`knows(answer)`: drafts are what mostly follows in it."""

    def tell(answer: Sequence[int]) -> None:
        following, draft = dict(pairwise([None, *answer])), ChainDrafter.draft

        def told(self: ChainDrafter, slot: int, token: int | None, room: DraftBudget) -> Drafts:
            made = Drafts(room)
            for _ in draft(self, slot, token, room._replace(ends=lambda _: False)).ids:
                if not made.add(following.get([token, *made.ids][-1], 0), 1.0):
                    break
            return made

        monkeypatch.setattr(ChainDrafter, "draft", told)

    return tell


def prompts_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is drafted before the first token is said, as in PyTorch where the tokens of a prompt
    see each other."""
    draft = ChainDrafter.draft

    def later(self: ChainDrafter, slot: int, token: int | None, room: DraftBudget) -> Drafts:
        return Drafts(room) if token is None else draft(self, slot, token, room)

    monkeypatch.setattr(ChainDrafter, "draft", later)


@pytest.mark.parametrize("formats", ["f32", "q8_0"])
@pytest.mark.parametrize("name", [*KINDS, *FURTHER])
def test_answers_are_full_depths(
    name: str, formats: str, drafting_runtime: Callable[..., LlamaCppRuntime], knows: Any
) -> None:
    runtime, inputs = drafting_runtime(name, formats), inputs_of(name)
    full = runtime.generate(inputs, mode="full", return_dict_in_generate=True, **GREEDY)
    made = runtime.generate(inputs, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(made.sequences, full.sequences)
    assert sum(count for count, _ in made.rounds) > 0
    knows(full.new_tokens[0].tolist())
    made = runtime.generate(inputs, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(made.sequences, full.sequences)
    assert sum(kept for _, kept in made.rounds) > 0
    assert set(made.depths[0].tolist()) <= {depths_of(name)[-1], runtime.backbone.depth}


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [True, False])
def test_drafts_go_on_as_far_as_pytorchs(
    compiled: bool, drafting_runtime: Callable[..., LlamaCppRuntime]
) -> None:
    """While the product of their probabilities is what the policy says: a round's counts tell."""
    runtime, inputs = drafting_runtime("llava", compiled=compiled), inputs_of("llava")
    counts = set[int]()
    for sure in (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.9):
        drafts = dict.fromkeys(runtime.adapter.exits.depths, sure)
        policy = replace(runtime.adapter.policy, drafts=drafts)
        ours = runtime.generate(inputs, policy=policy, return_dict_in_generate=True, **GREEDY)
        theirs = runtime.adapter.generate(inputs, policy=policy, **GREEDY)
        assert torch.equal(ours.sequences, theirs.sequences)
        assert ours.rounds == theirs.rounds
        counts |= {max(count for count, _ in ours.rounds)}
    assert counts == {0, 1, 2, 3}


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("name", [*KINDS, "qwen2-vl"])
def test_a_prompt_is_verified_with_the_exits_first_drafts(
    compiled: bool,
    name: str,
    drafting_runtime: Callable[..., LlamaCppRuntime],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The exit's own first token is drafted, and what it drafts after that."""
    runtime, inputs, drafts = (
        drafting_runtime(name, compiled=compiled),
        inputs_of(name),
        list[list[int]](),
    )
    draft = ChainDrafter.draft

    def drafted(self: ChainDrafter, slot: int, token: int | None, room: DraftBudget) -> Drafts:
        made = draft(self, slot, token, room)
        if token is None:
            drafts.append(made.ids)
        return made

    own = runtime.adapter.policy
    policy = replace(own, drafts=dict.fromkeys(runtime.adapter.exits.depths, 0.0), max_draft=3)
    [depth] = {max(own.thresholds)}
    static = replace(own, lossless=False, drafts={}, thresholds={depth: 0.0})
    exits = runtime.adapter.generate(inputs, policy=static, **{**GREEDY, "max_new_tokens": 1})
    monkeypatch.setattr(ChainDrafter, "draft", drafted)
    for tokens in (8, 1):
        options = {**GREEDY, "max_new_tokens": tokens}
        made = runtime.generate(inputs, policy=policy, return_dict_in_generate=True, **options)
        full = runtime.adapter.generate(inputs, mode="full", **options)
        assert torch.equal(made.sequences, full.sequences)
        assert int(made.depths[0, 0]) == runtime.backbone.depth
    assert len(drafts[0]) == 3 and drafts[0][0] == int(exits.new_tokens[0, 0])
    assert drafts[1:] == [[]]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("name", [*KINDS, "qwen2-vl", "qwen3-vl", "gemma3", "paligemma"])
def test_drafts_are_pytorchs(
    compiled: bool,
    name: str,
    drafting_runtime: Callable[..., LlamaCppRuntime],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime = drafting_runtime(name, compiled=compiled)
    alone: tuple[tuple[int, int], ...] = ()
    if not runtime.backbone.family.causal_prompt:
        prompts_run_alone(monkeypatch)
        alone = ((0, 0),)
    here, there = list[int](), list[int]()
    draft, tokens = ChainDrafter.draft, DraftingExit.tokens

    def drafted(self: ChainDrafter, slot: int, token: int | None, room: DraftBudget) -> Drafts:
        before = len(here)
        made = draft(self, slot, token, room)
        here[before:] = made.ids  # after an exit's own first token by a call inside
        return made

    def said(self: DraftingExit, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        made = tokens(self, states)
        there.extend(made[0].tolist())
        return made

    monkeypatch.setattr(ChainDrafter, "draft", drafted)
    monkeypatch.setattr(DraftingExit, "tokens", said)
    for seed in range(2):
        inputs = inputs_of(name, seed)
        ours = runtime.generate(inputs, return_dict_in_generate=True, **GREEDY)
        theirs = runtime.adapter.generate(inputs, **GREEDY)
        assert torch.equal(ours.sequences, theirs.sequences)
        assert ours.rounds == (*alone, *theirs.rounds)
        assert here == there and len(set(here)) > 1
        ending = {**GREEDY, "eos_token_id": int(theirs.new_tokens[0, 5])}
        ours = runtime.generate(inputs, return_dict_in_generate=True, **ending)
        assert ours.rounds == (*alone, *runtime.adapter.generate(inputs, **ending).rounds)
        assert here == there


@pytest.mark.parametrize(("free", "most"), [(None, 3), (3, 0), (6, 1)])
@pytest.mark.parametrize("name", ["llava", "smolvlm"])
def test_several_rows_are_answered_as_alone_however_many_drafts_are_free(
    name: str,
    free: int | None,
    most: int,
    drafting_runtime: Callable[..., LlamaCppRuntime],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime, alone = drafting_runtime(name, "f32", 3), drafting_runtime(name)
    monkeypatch.setattr(CallSizes, "free", property(lambda _: free))
    inputs, drafted = families.kind_of(name).inputs(3), list[list[int]]()
    drafts = ChainExecutor.draft

    def noted(self: ChainExecutor, *given: Any) -> list[Drafts]:
        made = drafts(self, *given)
        drafted.append([len(each.ids) for each in made])
        return made

    monkeypatch.setattr(ChainExecutor, "draft", noted)
    made = runtime.generate(inputs, return_dict_in_generate=True, **ENDS)
    assert max(max(counts) for counts in drafted if len(counts) == 3) <= most
    for row in range(3):
        one = families.one_row(name, inputs, row)
        expected = alone.generate(one, mode="full", return_dict_in_generate=True, **ENDS)
        length = expected.new_tokens.shape[1]
        assert torch.equal(made.new_tokens[row, :length], expected.new_tokens[0])


@pytest.mark.parametrize("name", ["llava", "smolvlm"])
def test_after_rounds_without_drafts_it_drafts_on_as_if_there_were_none(
    name: str, drafting_runtime: Callable[..., LlamaCppRuntime], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether nobody asked it in those rounds, or nobody looked at what it said."""
    runtime, inputs, told = drafting_runtime(name), inputs_of(name), list[list[Drafts]]()
    draft = ChainExecutor.draft
    for asked in (True, False):
        made = list[Drafts]()

        def paused(
            self: ChainExecutor, *given: Any, made: list[Drafts] = made, asked: bool = asked
        ) -> list[Drafts]:
            *places, budgets = given
            none = [budget._replace(max_drafts=0) for budget in budgets]
            pauses = len(made) < 3
            found = draft(self, *places, none if pauses and not asked else budgets)
            made.extend(found)
            return [*map(Drafts, none)] if pauses else found

        monkeypatch.setattr(ChainExecutor, "draft", paused)
        runtime.generate(inputs, **GREEDY)
        told.append(made[3:])
    assert [each.ids for each in told[0]] == [each.ids for each in told[1]]
    assert any(each.ids for each in told[0])


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("name", ["llava", "qwen2-vl", "gemma3"])
def test_by_trust_answers_are_pytorchs_at_every_level(
    compiled: bool, name: str, drafting_runtime: Callable[..., LlamaCppRuntime]
) -> None:
    """What is taken, what is verified, and the products by which that is decided."""
    runtime = drafting_runtime(name, compiled=compiled)
    drafts = dict.fromkeys(runtime.adapter.exits.depths, 0.0)
    for seed in range(2):
        inputs = inputs_of(name, seed)
        policy = replace(runtime.adapter.policy, trust=2.0, drafts=drafts, max_draft=12)
        run = runtime.generate(inputs, policy=policy, return_dict_in_generate=True, **ENDS)
        full = runtime.adapter.generate(inputs, mode="full", **ENDS)
        assert torch.equal(run.sequences, full.sequences)
        products = sorted({0.999 * product for product, _ in run.offers[0]}, reverse=True)
        for trust in (2.0, *products, 0.0):
            by = replace(policy, trust=trust)
            ours = runtime.generate(inputs, policy=by, return_dict_in_generate=True, **ENDS)
            theirs = runtime.adapter.generate(inputs, policy=by, **ENDS)
            assert torch.equal(ours.sequences, theirs.sequences)
            assert torch.equal(ours.depths, theirs.depths)
            torch.testing.assert_close(
                ours.scores, theirs.scores, equal_nan=True, rtol=1e-2, atol=1e-4
            )


def test_by_trust_several_rows_get_what_they_get_alone(
    drafting_runtime: Callable[..., LlamaCppRuntime],
) -> None:
    runtime, alone = drafting_runtime("llava", "f32", 3), drafting_runtime("llava")
    inputs = families.kind_of("llava").inputs(3)
    drafts = dict.fromkeys(runtime.adapter.exits.depths, 0.0)
    for trust in (0.0, 1e-3, 1e-2, 0.1):
        policy = replace(runtime.adapter.policy, trust=trust, drafts=drafts, max_draft=12)
        made = runtime.generate(inputs, policy=policy, return_dict_in_generate=True, **ENDS)
        for row in range(3):
            one = families.one_row("llava", inputs, row)
            expected = alone.generate(one, policy=policy, return_dict_in_generate=True, **ENDS)
            length = expected.new_tokens.shape[1]
            assert torch.equal(made.new_tokens[row, :length], expected.new_tokens[0])
            assert torch.equal(made.depths[row, :length], expected.depths[0])


def test_without_pytorch_answers_are_full_depths(tmp_path: Path) -> None:
    folder = sliced(drafting(text_adapter()), tmp_path)
    with EdgeModel(folder, engine=EXACT) as model:
        full = model.answer("abc", max_new_tokens=24, mode="full")
        made = model.answer("abc", max_new_tokens=24, mode="lossless")
        early = model.answer("abc", max_new_tokens=24, mode="early_exit")
    assert [step.token for step in made.steps] == [step.token for step in full.steps]
    assert {step.depth for step in early.steps} != {model.layers}


def test_what_enters_the_exit_must_be_of_the_export(tmp_path: Path) -> None:
    adapter = drafting(adapter_of("llava"))
    export_gguf(adapter, tmp_path / "made", "f32")
    (tmp_path / "made" / "drafter.npz").write_bytes(b"PK")
    refused(lambda: LlamaCppRuntime(adapter, tmp_path / "made"), AdapterError, "drafter.npz")
    refused(
        lambda: LlamaCppRuntime(adapter, tmp_path / "made", check_digests=False),
        AdapterError,
        "what enters an exit",
    )
