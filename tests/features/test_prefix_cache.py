"""Laws of the prefix cache: a later turn is answered as if its prompt had been run whole, and only
what is new of it is run."""

from __future__ import annotations

import families
import pytest
import torch

from offramp.core.decoding.policy import FULL, ExitPolicy
from offramp.core.engine.generate import generate
from offramp.core.errors import InputError
from offramp.core.models.exits import Exits
from offramp.features.prefix_cache import PrefixCache
from offramp.serving.core import EngineCore
from offramp.serving.engine_config import EngineConfig
from offramp.serving.request import Request

OPTIONS = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": families.WORDLESS}
WORDS = range(10, 20)
SERVED = [n for n in families.NAMES if families.KINDS[n].padding == "left"]
POLICIES = {
    "full": lambda depths: FULL,
    "early": lambda depths: ExitPolicy(dict.fromkeys(depths, 0.05), first={}),
    "early, the first too": lambda depths: ExitPolicy(dict.fromkeys(depths, 0.05)),
    "lossless": lambda depths: ExitPolicy(dict.fromkeys(depths, 0.05), lossless=True),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", SERVED)
def test_the_next_turn_is_answered_as_without_and_only_the_new_is_run(
    name, policy, backbone, exits, batch
):
    whole, parts, first = backbone(name), exits(name), batch(name, 1)
    rule = POLICIES[policy](parts.depths)
    run = {"exits": parts if rule.thresholds else None, "policy": rule, **OPTIONS}
    cache = PrefixCache()
    turns = [first, families.longer(first, WORDS[:3]), first]
    plain = [generate(whole, turn, **run) for turn in turns[:2]] * 2
    seen = []
    handle = whole.layers[0].register_forward_pre_hook(lambda _, a: seen.append(a[0].shape[1]))
    try:
        for turn, alone in zip(turns, plain, strict=False):
            del seen[:]
            ours = generate(whole, turn, prefix_cache=cache, **run)
            assert torch.equal(ours.sequences, alone.sequences)
            assert torch.equal(ours.depths, alone.depths)
            if cache.reused:
                assert seen[0] in (1, 3)  # the last token of a known prompt is run again
    finally:
        handle.remove()
    served = cache.reused > 0
    kind = families.KINDS[name]
    causal = whole.family.causal_prompt and not whole.is_encoder_decoder
    sliding = any(
        "sliding" in str(t) for t in getattr(whole.text_config, "layer_types", None) or ()
    )
    assert served == (causal and not sliding), kind


def test_another_image_shares_nothing_behind_it(backbone, batch):
    whole, one = backbone("llava"), batch("llava", 1)
    other = {**one, "pixel_values": one["pixel_values"].flip(-1)}
    cache = PrefixCache()
    generate(whole, one, prefix_cache=cache, **OPTIONS)
    before = cache.reused
    ours = generate(whole, other, prefix_cache=cache, **OPTIONS)
    assert torch.equal(ours.sequences, generate(whole, other, **OPTIONS).sequences)
    image = (one["input_ids"][0] == families.IMAGE).nonzero()[0].item()
    assert cache.reused - before <= image


def test_exits_that_were_off_are_not_served_from_a_prompt_they_never_saw(backbone, exits, batch):
    whole, parts, inputs = backbone("llava"), exits("llava"), batch("llava", 1)
    cache = PrefixCache()
    generate(whole, inputs, prefix_cache=cache, **OPTIONS)
    policy = ExitPolicy({parts.depths[0]: 0.05})
    ours = generate(whole, inputs, exits=parts, policy=policy, prefix_cache=cache, **OPTIONS)
    assert cache.reused == 0
    plain = generate(whole, inputs, exits=parts, policy=policy, **OPTIONS)
    assert torch.equal(ours.sequences, plain.sequences)
    generate(whole, inputs, prefix_cache=cache, **OPTIONS)  # the full model may use what exits left
    assert cache.reused > 0
    others = Exits(whole, parts.depths)
    before = cache.reused
    generate(whole, inputs, exits=others, policy=policy, prefix_cache=cache, **OPTIONS)
    assert cache.reused == before


@pytest.fixture
def run_by(backbone):
    """Tokens that the first and the last layer of llava run, call by call."""
    whole, seen = backbone("llava"), {0: [], -1: []}
    handles = [
        whole.layers[n].register_forward_pre_hook(lambda _, a, n=n: seen[n].append(a[0].shape[1]))
        for n in seen
    ]
    yield seen
    for handle in handles:
        handle.remove()


def test_a_prompt_waits_at_its_exit_the_first_time_and_is_kept_the_second(
    backbone, exits, batch, run_by
):
    whole, parts, inputs = backbone("llava"), exits("llava"), batch("llava", 1)
    run = {"exits": parts, "policy": ExitPolicy({parts.depths[0]: 0.0}), **OPTIONS}
    cache, ran = PrefixCache(), []
    plain = generate(whole, inputs, **run)
    read = run_by[0][0]
    for turn in (inputs, inputs, inputs, families.longer(inputs, WORDS[:3])):
        before = cache.reused
        run_by[0].clear(), run_by[-1].clear()
        ours = generate(whole, turn, prefix_cache=cache, **run)
        if turn is inputs:
            assert torch.equal(ours.sequences, plain.sequences)
            assert torch.equal(ours.depths, plain.depths)
        ran.append((cache.reused - before, run_by[0][0], sum(run_by[-1])))
    # It waits; runs whole and is kept; is found, and its last token waits; what is new waits.
    assert ran == [(0, read, 0), (0, read, read), (read - 1, 1, 0), (read, 3, 0)]


@pytest.mark.slow
@pytest.mark.parametrize("engine", [False, True])
def test_of_a_prompt_that_waits_behind_a_known_one_no_keys_are_kept(engine, backbone, exits, batch):
    """Layers above the exit have keys of what was known, and none of what waits."""
    whole, parts = backbone("llava"), exits("llava")
    inputs = batch("llava", 1)
    policy, cache = ExitPolicy({parts.depths[0]: 0.0}), PrefixCache()
    turns = [inputs, inputs, *(families.longer(inputs, WORDS[:n]) for n in (3, 3, 6, 3, 6))]
    deeper = ExitPolicy({parts.depths[0]: 1.0})
    core = EngineCore(whole, parts, policy, EngineConfig(2, 128), prefix_cache=cache)
    for turn in turns:
        for rule in (policy, deeper, FULL):
            alone = generate(whole, turn, exits=parts, policy=rule, **OPTIONS)
            if not engine:
                run = {"exits": parts, "policy": rule, "prefix_cache": cache, **OPTIONS}
                ours = generate(whole, turn, **run)
            else:
                own = None if rule is FULL else rule.thresholds
                mode = "full" if rule is FULL else "early_exit"
                handle = core.add(Request(turn, mode, own, options=OPTIONS))
                core.run()
                ours = handle.result().output
            assert torch.equal(ours.sequences, alone.sequences)
            assert torch.equal(ours.depths, alone.depths)


def test_a_prompt_that_is_mostly_new_waits_though_its_beginning_came_before(
    backbone, exits, batch, run_by
):
    whole, parts, one = backbone("llava"), exits("llava"), batch("llava", 1)
    run = {"exits": parts, "policy": ExitPolicy({parts.depths[0]: 0.0}), **OPTIONS}
    cache = PrefixCache()
    generate(whole, one, prefix_cache=cache, **run)
    other = {**one, "pixel_values": one["pixel_values"].flip(-1)}
    generate(whole, other, prefix_cache=cache, **run)
    assert run_by[-1] == [] and cache.reused == 0


def test_batches_run_as_ever(backbone, batch):
    whole, inputs, cache = backbone("llava"), batch("llava", 3), PrefixCache()
    for _ in range(2):
        ours = generate(whole, inputs, prefix_cache=cache, **OPTIONS)
    assert cache.reused == 0
    assert torch.equal(ours.sequences, generate(whole, inputs, **OPTIONS).sequences)


def test_the_prompt_not_asked_for_longest_goes(backbone, batch):
    whole, inputs, cache = backbone("llava"), batch("llava", 1), PrefixCache(prompts=1)
    generate(whole, inputs, prefix_cache=cache, **OPTIONS)
    flipped = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}
    generate(whole, flipped, prefix_cache=cache, **OPTIONS)
    before = cache.reused
    generate(whole, inputs, prefix_cache=cache, **OPTIONS)
    image = (inputs["input_ids"][0] == families.IMAGE).nonzero()[0].item()
    assert cache.reused - before <= image


def test_a_cache_of_nothing_is_refused():
    with pytest.raises(InputError, match="holds nothing"):
        PrefixCache(0)
