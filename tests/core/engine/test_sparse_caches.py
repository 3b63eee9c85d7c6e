"""Caches that also hold the keys of an indexer, by which attention chooses what it reads."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_families
import torch
import zoo
from tiny_families.text import VOCABULARY
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LogitsProcessor
from zoo.config import FIRST_WORD, shrink

from offramp.adapter.adapter import Adapter
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.errors import OfframpError
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits

CHOSEN = 16
"""Tokens that attention reads at most."""
LENGTHS = (6, 48)
"""Of prompts: fewer tokens than are chosen, and more."""
NEW = 12
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
DEPTHS = (2, 4)


def text_model() -> Any:
    heads = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "qk_head_dim": 16, "head_dim": 8}
    index = {"index_head_dim": 16, "index_topk": CHOSEN, "index_n_heads": 2}
    kind = CONFIG_MAPPING["deepseek_v32"]
    sizes = {**shrink(kind().to_dict()), **heads, **index, "num_key_value_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(kind.from_dict(sizes))
        tiny_families.draw_weights(model, 0.25, 0.1)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.float().eval()


def image_model() -> Any:
    model: Any = zoo.build("dots3_note")
    model.generation_config.eos_token_id = None
    return model


MODELS = {"deepseek_v32": text_model, "dots3_note": image_model}


def prompt(name: str, model: Any, length: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(length)
    words = torch.randint(FIRST_WORD, VOCABULARY, (1, length), generator=draw)
    made = {"input_ids": words, "attention_mask": torch.ones_like(words)}
    if name == "deepseek_v32":
        return made
    shown = zoo.inputs(name, model, 1)
    rows = {n: torch.cat([shown[n], made[n]], 1) for n in made}
    return {**{n: v for n, v in shown.items() if n == "pixel_values" or "grid" in n}, **rows}


class Forced(LogitsProcessor):
    """Says the tokens of an answer."""

    def __init__(self, begin: int, tokens: torch.Tensor) -> None:
        self.begin, self.tokens = begin, tokens

    def __call__(self, ids: Any, scores: Any) -> Any:
        place = ids.shape[1] - self.begin
        return torch.full_like(scores, -torch.inf).index_fill(1, self.tokens[place : place + 1], 0)


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [LENGTHS, LENGTHS[::-1]], ids=str)
@pytest.mark.parametrize("mode", ["lossless", "early_exit"])
@pytest.mark.parametrize("name", MODELS)
def test_answers_beside_an_indexers_keys_are_the_models_own_in_either_order(
    name: str, mode: str, lengths: tuple[int, ...]
) -> None:
    """Of early answers each token of full depth is, after the tokens before it; or all is refused,
    in two lines."""
    model = MODELS[name]()
    whole = Backbone(model, example=prompt(name, model, 6)).with_decoding(again=0.01)
    exits = Exits(whole, DEPTHS).requires_grad_(False)
    adapter = Adapter(whole, exits, ExitPolicy(dict.fromkeys(DEPTHS, 0.2)))
    for length in (*lengths, lengths[0]):
        inputs = prompt(name, model, length)
        try:
            made = adapter.generate(inputs, mode=mode, **GREEDY)
        except OfframpError as error:
            assert len(str(error).splitlines()) == 2
            continue
        begin, tokens = inputs["input_ids"].shape[1], made.new_tokens[0]
        own = model.generate(
            **inputs,
            **GREEDY,
            logits_processor=[Forced(begin, tokens)],
            output_logits=True,
            return_dict_in_generate=True,
        )
        said = torch.stack(own.logits, 1)[0]
        # The model's best token, or one as good up to rounding.
        short = (said.amax(-1) - said.gather(1, tokens[:, None])[:, 0]) / said.abs().amax(-1)
        full = (made.depths[0] == whole.depth) | (mode == "lossless")
        assert bool(full.any()) and bool((short[full] <= 1e-5).all()), (length, short, made.depths)
