"""Laws of rotary frequencies that depend on the length: the model's own answer on either side of
where they change, an error across it, and nothing of the model is written."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import families
import pytest
import torch
from decoding import agreeing
from transformers import Phi3Config, Phi3ForCausalLM

from offramp.core.decoding.policy import FULL, ExitPolicy
from offramp.core.engine.generate import generate
from offramp.core.errors import InputError
from offramp.core.executors.choice import executor_for
from offramp.core.executors.slots.executor import SlotExecutor
from offramp.core.executors.stack import StackExecutor
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits
from offramp.core.models.rope import LengthDependentRope
from offramp.features.prefix_cache import PrefixCache
from offramp.serving.batch_engine import BatchEngine, EngineConfig
from offramp.serving.server.pytorch import _within_positions

SWITCH = 24
SIDES = {"below": 14, "above": SWITCH + 1}
GREEDY = {"do_sample": False, "suppress_tokens": families.WORDLESS}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [3.0, 9.0, 27.0, 50.0],
    "original_max_position_embeddings": SWITCH,
    "factor": 4.0,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0}


def phi3() -> Any:
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=families.VOCABULARY,
        hidden_size=families.WIDTH,
        intermediate_size=64,
        num_hidden_layers=families.LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        original_max_position_embeddings=SWITCH,
        rope_parameters=LONG,
        bos_token_id=families.BOS,
        eos_token_id=families.EOS,
        pad_token_id=families.PAD,
    )
    return Phi3ForCausalLM(config).eval()


def ntk() -> Any:
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    config = families.llama_config(rope_parameters=DYNAMIC)
    config.max_position_embeddings = SWITCH
    return LlamaForCausalLM(config).eval()


MODELS: dict[str, Callable[[], Any]] = {"longrope": phi3, "dynamic": ntk}


def prompt(tokens: int, rows: int = 1) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(tokens)
    ids = torch.randint(10, families.VOCABULARY, (rows, tokens), generator=draw)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def own(name: str, inputs: Any, new: int) -> torch.Tensor:
    """What a model that nothing else was asked of generates."""
    return _own(name, str(inputs["input_ids"].tolist()), new)


@functools.cache
def _own(name: str, ids: str, new: int) -> torch.Tensor:
    given = torch.tensor(json.loads(ids))
    inputs = {"input_ids": given, "attention_mask": torch.ones_like(given)}
    answer: torch.Tensor = MODELS[name]().generate(**inputs, max_new_tokens=new, **GREEDY)
    return answer


def buffers(model: Any) -> dict[str, Any]:
    return {
        **{name: value.clone() for name, value in model.named_buffers()},
        **{name: getattr(m, "max_seq_len_cached", None) for name, m in model.named_modules()},
    }


def unchanged(model: Any, before: dict[str, Any]) -> None:
    after = buffers(model)
    assert after.keys() == before.keys()
    for name, value in before.items():
        same = torch.equal(after[name], value) if torch.is_tensor(value) else after[name] == value
        assert same, f"{name} was written"


CASES = [("longrope", "below"), ("longrope", "above"), ("dynamic", "below")]
POLICIES = {
    "full": lambda depth: FULL,
    "never": lambda depth: ExitPolicy({depth: 1.0}),
    "drafts": lambda depth: ExitPolicy({depth: 0.0}, lossless=True),
    "some exits": lambda depth: ExitPolicy({depth: 0.1}),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("name", "side"), CASES)
def test_every_mode_gives_the_models_own_answer(name: str, side: str, policy: str) -> None:
    """Up to the last token below the boundary, and from the first one beyond."""
    whole = Backbone(MODELS[name]())
    parts = agreeing(whole)
    rule = POLICIES[policy](parts.depths[0])
    inputs, before = prompt(SIDES[side]), buffers(whole.model)
    new = SWITCH - SIDES[side] + 1 if side == "below" else 12
    cache = PrefixCache()
    for kept in (None, cache, cache):
        ours = generate(
            whole,
            inputs,
            exits=None if rule is FULL else parts,
            policy=rule,
            prefix_cache=kept,
            max_new_tokens=new,
            **GREEDY,
        )
        assert torch.equal(ours.sequences, own(name, inputs, new))
    unchanged(whole.model, before)


def test_early_exits_are_alike_in_slots_and_in_the_stack() -> None:
    """Every token exits, below the boundary: keys that are caught up are of its frequencies."""
    found = []
    for engine in ("slots", "stack"):
        whole = Backbone(phi3())
        parts = Exits(whole, (2,))
        whole.engine = engine
        policy = ExitPolicy({2: 0.0143}, first={})
        made = generate(whole, prompt(14), exits=parts, policy=policy, max_new_tokens=10, **GREEDY)
        found.append(made)
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert torch.equal(found[0].depths, found[1].depths)
    assert len(found[0].depths.unique()) > 1


@pytest.mark.parametrize("name", MODELS)
def test_an_answer_across_the_boundary_is_refused(name: str) -> None:
    whole = Backbone(MODELS[name]())
    for policy in (FULL, ExitPolicy({3: 0.0}, lossless=True)):
        parts = None if policy is FULL else Exits(whole, (3,))
        with pytest.raises(InputError, match=f"longer than the backbone's {SWITCH} ") as error:
            generate(whole, prompt(20), exits=parts, policy=policy, max_new_tokens=10, **GREEDY)
        assert str(error.value).count("\n") == 1
    if name == "dynamic":
        with pytest.raises(InputError, match="longer than"):
            generate(whole, prompt(SWITCH + 1), max_new_tokens=1, **GREEDY)


def test_rows_on_both_sides_are_no_batch() -> None:
    inputs = prompt(30, rows=2)
    inputs["attention_mask"][0, :10] = 0
    whole = Backbone(phi3())
    with pytest.raises(InputError, match="20 and 30 tokens in one batch"):
        generate(whole, inputs, max_new_tokens=2, **GREEDY)
    inputs["attention_mask"][0, :10] = 1
    ours = generate(whole, inputs, max_new_tokens=6, **GREEDY).sequences
    assert torch.equal(ours, own("longrope", inputs, 6))


def test_the_engine_writes_what_each_gets_alone() -> None:
    """Short and long ones side by side, prompts read in parts, with a cache of prompts."""
    whole = Backbone(phi3())
    before = buffers(whole.model)
    lengths = (10, SWITCH + 1, 14, 40, 15, 40)
    for limit in (SWITCH, 64):
        config = EngineConfig(slots=3, limit=limit, budget=8)
        with BatchEngine(whole, config=config, prefix_cache=PrefixCache()) as engine:
            asked = [n for n in lengths if n + 9 <= limit and (n > SWITCH or n + 9 <= SWITCH)]
            handles = [engine.submit(prompt(n), max_new_tokens=9, **GREEDY) for n in asked]
            for length, handle in zip(asked, handles, strict=True):
                answer = handle.result(timeout=60).output.sequences
                assert torch.equal(answer, own("longrope", prompt(length), 9)), length
            with pytest.raises(InputError, match="do not fit"):
                engine.submit(prompt(20), max_new_tokens=9, **GREEDY).result(timeout=60)
    unchanged(whole.model, before)


def test_slots_run_what_stays_below() -> None:
    whole = Backbone(phi3())
    for longest, kind in ((SWITCH, SlotExecutor), (SWITCH + 1, StackExecutor)):
        own = whole.has_own_frequencies(longest)
        made = executor_for(whole, None, (), own_frequencies=own, slots=1)
        assert type(made) is kind
        made.close()


def test_where_frequencies_change_is_read_of_the_configuration() -> None:
    def of(**more: Any) -> LengthDependentRope:
        config = families.llama_config()
        vars(config).update(more)
        return LengthDependentRope.of(config)

    assert of() == LengthDependentRope()
    assert of(rope_parameters=None) == LengthDependentRope()
    assert of(rope_parameters={"rope_type": "linear", "factor": 2.0}) == LengthDependentRope()
    assert of(rope_parameters=LONG) == LengthDependentRope(switches=SWITCH)
    assert of(rope_parameters=DYNAMIC) == LengthDependentRope(grows=128)
    older = SimpleNamespace(
        rope_scaling={"type": "dynamic", "factor": 2.0}, max_position_embeddings=128
    )
    assert LengthDependentRope.of(older) == LengthDependentRope(grows=128)
    kinds = {"full_attention": DYNAMIC, "sliding_attention": {"rope_type": "default"}}
    assert of(rope_parameters=kinds) == LengthDependentRope(grows=128)


def test_tables_that_depend_on_their_length_are_found() -> None:
    """Of a home-made stack, whose configuration says nothing: it runs itself."""
    model = ntk()
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    whole = Backbone(model)
    assert whole.rope == LengthDependentRope()
    whole.engine = "slots"
    inputs = prompt(10)
    ours = generate(whole, inputs, max_new_tokens=8, **GREEDY).sequences
    assert torch.equal(ours, own("dynamic", inputs, 8))


def test_a_server_takes_no_longer_a_text_than_the_model_answers() -> None:
    """And says so at /v1/models: learned positions are not the only ones that end."""
    backbone = Backbone(ntk())
    assert _within_positions(EngineConfig(), backbone).limit == backbone.positions == SWITCH
