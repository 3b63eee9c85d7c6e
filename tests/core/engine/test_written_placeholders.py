"""An answer may hold the id that stands for an image: a wrapper may read it as another token."""

from __future__ import annotations

import families
import home_made
import pytest
import torch
import zoo

from offramp.core.decoding.policy import ExitPolicy
from offramp.core.engine.generate import generate
from offramp.core.errors import UnsupportedBackboneError
from offramp.core.models.backbone import Backbone
from offramp.core.models.discovery.probe import text_prompt
from offramp.core.models.exits import Exits
from offramp.serving.core import EngineCore
from offramp.serving.engine_config import EngineConfig
from offramp.serving.request import Request

NEW = 8
WRITTEN = (1, 2, 4)
"""Places of the answer at which a placeholder is written."""
DRAFTS = ExitPolicy({1: 0.0}, lossless=True, max_draft=3)


class Writes:
    """A logits processor that lets one token come at `WRITTEN`, and ordinary words elsewhere."""

    def __init__(self, prompt: int, token: int) -> None:
        self.prompt, self.token = prompt, token

    def __call__(self, ids, scores):
        if ids.shape[1] - self.prompt not in WRITTEN:
            return scores.index_fill(1, torch.arange(families.FIRST_WORD), -torch.inf)
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([self.token]), 0.0)


def by_generate(whole, inputs, options):
    return [generate(whole, inputs, **options).sequences]


def by_drafts(whole, inputs, options):
    exits = Exits(whole, (1,)).requires_grad_(False)
    return [generate(whole, inputs, exits=exits, policy=DRAFTS, **options).sequences]


def by_engine(whole, inputs, options):
    core = EngineCore(whole, None, ExitPolicy(), EngineConfig(slots=2, limit=64))
    handles = [core.add(Request(inputs, options=options)) for _ in range(2)]
    core.run()
    return [handle.result(timeout=0).output.sequences for handle in handles]


@pytest.mark.parametrize(
    ("name", "door"),
    [
        ("gemma4", by_drafts),
        ("gemma4_unified", by_generate),
        ("kimi_k25", by_engine),
        ("muse_glimmer", by_drafts),
        ("muse_spark", by_engine),
    ],
)
def test_a_placeholder_that_is_written_is_read_as_the_model_reads_it(name, door):
    model = zoo.build(name)
    inputs, token = text_prompt(model), model.config.image_token_id
    whole = Backbone(model)
    options = {
        "logits_processor": [Writes(inputs["input_ids"].shape[1], token)],
        "max_new_tokens": NEW,
        "min_new_tokens": NEW,
        "do_sample": False,
        "num_beams": 1,
    }
    own = model.generate(**inputs, **options)
    assert (own == token).sum() == len(WRITTEN)
    assert all(torch.equal(each, own) for each in door(whole, inputs, options))


class Masks(home_made.Head):
    """Reads an image's id as no token at all."""

    def forward(self, input_ids=None, inputs_embeds=None, **kw):  # type: ignore[no-untyped-def, override]
        if input_ids is not None and kw.get("pixel_values") is None:
            shown = (input_ids == families.IMAGE)[..., None]
            inputs_embeds = self.get_input_embeddings()(input_ids).masked_fill(shown, 0.0)
            input_ids = None
        return super().forward(input_ids, inputs_embeds=inputs_embeds, **kw)


def test_a_placeholder_that_is_read_as_no_token_is_refused(batch):
    model = families.build("llava")
    model.__class__ = Masks
    with pytest.raises(UnsupportedBackboneError, match="token 3") as caught:
        Backbone(model, example=batch("llava", 1))
    assert len(str(caught.value).splitlines()) == 2


def test_models_that_read_each_id_as_itself_are_told_nothing(backbone):
    assert backbone("llava").read_as == {} == backbone("blip2-t5").read_as
