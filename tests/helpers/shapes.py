"""Small decoders with random weights, of Hugging Face's own classes, to try things out on.

The vision tower, the Q-Former and a text encoder have one layer each; time is the model's own, and
what it writes is noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from offramp.core.errors import check_known

if TYPE_CHECKING:
    from torch import Tensor

    from offramp.core.models.backbone import Backbone

FIRST_WORD, IMAGES, SIDE = 8, 4, 28
"""The first id that is a word; tokens that an image takes in the prompt, and its side in pixels."""


@dataclass(frozen=True)
class Shape:
    """A backbone to build: `config` is the text model's, and `wrap`, of
    `tiny_families.models`, puts a VLM around it."""

    name: str
    config: Callable[[], Any]
    wrap: str

    def build(self, seed: int = 0) -> Backbone:
        """The backbone in float32, its weights drawn from `seed`."""
        import torch
        from tiny_families import models

        from offramp.core.models.backbone import Backbone

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: Any = getattr(models, self.wrap)(self.config(), layers=1)
        return Backbone(model, name=self.name)

    def inputs(
        self, backbone: Backbone, batch: int = 1, words: int = 32, seed: int = 0
    ) -> dict[str, Tensor]:
        """What a processor would return for `batch` prompts of an image and `words` words."""
        import torch
        from tiny_families import models
        from tiny_families.text import IMAGE

        draw = torch.Generator().manual_seed(seed)
        text = torch.randint(FIRST_WORD, backbone.vocabulary, (batch, words), generator=draw)
        ids = torch.cat([torch.full((batch, IMAGES), IMAGE), text], 1)
        mask = torch.ones_like(ids)
        pixels = torch.Generator().manual_seed(seed)
        extra = models.sized(ids, mask, pixels, SIDE)
        return {"input_ids": ids, "attention_mask": mask, **extra}


def shape(name: str) -> Shape:
    """A known shape. Raise `InputError` with those there are."""
    check_known("Shape", [name], tuple(SHAPES))
    return SHAPES[name]


def _opt() -> Any:
    from tiny_families import text

    return text.opt_config(
        num_hidden_layers=8,
        hidden_size=32,
        num_attention_heads=2,
        vocab_size=512,
        word_embed_proj_dim=32,
        ffn_dim=128,
        max_position_embeddings=2048,
    )


def _t5() -> Any:
    from tiny_families import text

    return text.t5(
        num_layers=8,
        num_decoder_layers=8,
        d_model=32,
        d_kv=64,
        d_ff=64,
        num_heads=2,
        vocab_size=512,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
    )


def _llama() -> Any:
    from tiny_families import text

    return text.llama(
        num_hidden_layers=8,
        hidden_size=32,
        num_attention_heads=4,
        vocab_size=512,
        num_key_value_heads=2,
        intermediate_size=64,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
    )


SHAPES: dict[str, Shape] = {
    s.name: s
    for s in (
        Shape("mini-opt", _opt, "blip2"),
        Shape("mini-t5", _t5, "blip2"),
        Shape("mini-llava", _llama, "llava"),
    )
}
"""By name."""
