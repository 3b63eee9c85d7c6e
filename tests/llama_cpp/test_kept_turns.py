"""Laws of prompts whose beginning is kept inside llama.cpp: a later turn of a dialogue is answered
as if its prompt had been run whole, and runs only what is new."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import families
import pytest
import torch
from gguf_cases import ENDS, GREEDY, adapter_of, inputs_of

from offramp.core.decoding.policy import FULL, ExitPolicy
from offramp.features.prefix_cache import PrefixCache
from offramp_llama_cpp import LlamaCppRuntime

pytestmark = pytest.mark.llama_cpp

NAMES = ("llava", "qwen2-vl", "qwen3-vl")
"""Plain; several positions a row, which the rows of an image share; and features beside the rows.
"""


def policies(runtime: LlamaCppRuntime) -> dict[str, ExitPolicy]:
    own, depths = runtime.policy, runtime.adapter.exits.depths
    drafts = dict.fromkeys(depths, 0.0)
    early = replace(own, lossless=False, drafts={}, thresholds=dict.fromkeys(depths, 0.3))
    return {
        "full": FULL,
        "lossless": own,
        "early exit": early,
        "every token at the exit": replace(early, thresholds={depths[0]: 0.0}),
        "trust 0": replace(own, lossless=False, thresholds={}, drafts=drafts, trust=0.0),
    }


@pytest.mark.parametrize("name", NAMES)
def test_turns_are_answered_as_if_they_were_run_whole(name: str, drafting_runtime: Any) -> None:
    """In each mode, and in one after another: what a mode left to the layers above its exits the
    next one runs."""
    runtime = drafting_runtime(name)
    ways = policies(runtime)
    orders = [[way] * 3 for way in ways]
    orders += [["every token at the exit", "lossless", "full"], ["full", "trust 0", "early exit"]]
    orders += [["trust 0", "early exit", "full"], ["lossless", "full", "lossless"]]
    for order in orders:
        cache, turns, inputs = PrefixCache(1), list[tuple[Any, Any, Any]](), inputs_of(name)
        for turn, way in enumerate(order):
            how = {"policy": ways[way], "return_dict_in_generate": True, **ENDS}
            whole = runtime.generate(inputs, **how)
            turns.append((inputs, how, whole))
            if way in ("full", "lossless"):
                stock = adapter_of(name).backbone.model.generate(**inputs, **ENDS)
                assert torch.equal(whole.sequences, stock)
            inputs = families.longer(inputs, [*whole.new_tokens[0].tolist(), 11 + turn, 12, 13])
        for turn, (inputs, how, whole) in enumerate(turns):  # each behind what the last one kept
            kept = cache.reused
            ours = runtime.generate(inputs, prefix_cache=cache, **how)
            assert torch.equal(ours.sequences, whole.sequences), (order, turn)
            assert torch.equal(ours.depths, whole.depths), (order, turn)
            if turn and len({*order}) == 1:
                assert cache.reused > kept


def test_what_is_new_is_all_that_runs(drafting_runtime: Any) -> None:
    runtime, cache, inputs = drafting_runtime("llava"), PrefixCache(1), inputs_of("llava")
    how = {"policy": FULL, "return_dict_in_generate": True, **GREEDY}
    first = inputs["input_ids"].shape[1]
    said = runtime.generate(inputs, **how).new_tokens[0].tolist()
    runtime.generate(families.longer(inputs, [*said, 11]), prefix_cache=cache, **how)
    assert (cache.reused, cache.run) == (first, len(said) + 1)


@pytest.mark.parametrize("name", NAMES)
def test_another_image_behind_the_same_words_is_looked_at(name: str, drafting_runtime: Any) -> None:
    runtime, cache = drafting_runtime(name), PrefixCache(1)
    one, other = inputs_of(name), inputs_of(name)
    half = other["pixel_values"].clone()
    half[..., half.shape[-1] // 2 :] *= -1
    other["pixel_values"] = half
    for inputs in (one, other, one):
        ours = runtime.generate(inputs, policy=FULL, prefix_cache=cache, **GREEDY)
        stock = adapter_of(name).backbone.model.generate(**inputs, **GREEDY)
        assert torch.equal(ours.sequences, stock)


def test_rows_that_see_each_other_are_run_whole(drafting_runtime: Any) -> None:
    runtime, cache, inputs = drafting_runtime("gemma3"), PrefixCache(1), inputs_of("gemma3")
    for ids in ([11], [12, 13]):
        asked = families.longer(inputs, ids)
        ours = runtime.generate(asked, policy=FULL, prefix_cache=cache, **GREEDY)
        stock = adapter_of("gemma3").backbone.model.generate(**asked, **GREEDY)
        assert torch.equal(ours.sequences, stock)
    assert cache.reused == 0


def test_a_prompt_that_ran_without_exits_has_none_of_their_keys(drafting_runtime: Any) -> None:
    runtime, cache, inputs = drafting_runtime("llava"), PrefixCache(1), inputs_of("llava")
    ways = policies(runtime)
    runtime.generate(inputs, policy=FULL, **GREEDY)
    asked = families.longer(inputs, [11])
    runtime.generate(asked, policy=ways["early exit"], prefix_cache=cache, **GREEDY)
    assert cache.reused == 0
    runtime.generate(families.longer(asked, [12]), policy=FULL, prefix_cache=cache, **GREEDY)
    assert cache.reused == asked["input_ids"].shape[1]


@pytest.mark.parametrize("way", ["full", "lossless", "every token at the exit", "trust 0"])
def test_after_an_answer_that_was_cut_off(way: str, drafting_runtime: Any) -> None:
    """By an error wherever the chain is run."""
    runtime, inputs = drafting_runtime("llava"), inputs_of("llava")
    how = {"policy": policies(runtime)[way], "return_dict_in_generate": True, **ENDS}
    asked = families.longer(inputs, [11, 12])
    want = runtime.generate(asked, **how)
    for place, at in ((0, 1), (0, 3), (-1, 1), (-1, 2)):
        cache, calls = PrefixCache(1), 0
        segment = runtime._chain.segments[place]
        feed = segment.feed

        def cut(*args: Any, feed: Any = feed, at: int = at, **kw: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == at:
                raise RuntimeError("cut off")
            feed(*args, **kw)

        segment.feed = cut
        try:
            runtime.generate(inputs, prefix_cache=cache, **how)
        except RuntimeError:
            pass
        finally:
            del segment.feed
        ours = runtime.generate(asked, prefix_cache=cache, **how)
        assert torch.equal(ours.sequences, want.sequences)
        assert torch.equal(ours.depths, want.depths)
