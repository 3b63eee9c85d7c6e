"""Tiny random models of every supported family, with inputs as their processors would give them.

Six decoder layers or more, width 32, a vision tower of one or two layers. The weights are drawn
wide enough that greedy outputs wander over the vocabulary: a decoder that repeats one token would
agree with anything.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tiny_families import models
from tiny_families.text import (
    BOS,
    EOS,
    FIRST_WORD,
    IMAGE,
    PAD,
    VIDEO,
    VISION_END,
    VISION_START,
    VOCABULARY,
    granite,
    llama,
    opt_config,
    qwen,
    qwen3_experts,
    t5,
)

PROMPTS = (7, 3, 5, 4)
"""Words in each row's prompt: rows of a batch need padding."""


@dataclass(frozen=True)
class Kind:
    """One family: how to build it, and what its processor returns besides ids and mask.

    images: tokens an image takes in the prompt. extra: further inputs, from ids, mask and a
    generator of random numbers. wide, loud: standard deviation of the matrices and of the token
    embeddings. frame: tokens around the image.
    """

    build: Callable[[], Any]
    images: int
    extra: Callable[[Tensor, Tensor, torch.Generator], dict[str, Tensor]]
    padding: str = "left"
    wide: float = 0.25
    loud: float = 0.1
    frame: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())

    def inputs(self, batch: int, seed: int = 0) -> dict[str, Tensor]:
        """What the processor would return for `batch` rows, each with one image."""
        draw = torch.Generator().manual_seed(1000 + seed)
        before, after = self.frame
        rows = []
        for row in range(batch):
            words = torch.randint(
                FIRST_WORD, VOCABULARY, (PROMPTS[row % len(PROMPTS)],), generator=draw
            )
            rows.append([*before, *[IMAGE] * self.images, *after, *words.tolist()])
        text = models.pad(rows, self.padding)
        pixels = torch.Generator().manual_seed(2000 + seed)
        return {**text, **self.extra(text["input_ids"], text["attention_mask"], pixels)}


def kind_of(name: str) -> Kind:
    return KINDS[name] if name in KINDS else FURTHER[name]


def build(
    name: str, dtype: torch.dtype = torch.float32, seed: int = 0, wide: float | None = None
) -> Any:
    """The tiny model of a family, with weights drawn from `seed`; `wide` overrides its scale."""
    kind = kind_of(name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind.build()
        draw_weights(model, kind.wide if wide is None else wide, kind.loud)
    # Random weights hit the end token early; laws on stopping set it themselves.
    for part in (model, getattr(model, "language_model", None)):
        config = getattr(part, "generation_config", None)
        if config is not None:
            config.eos_token_id = None
            config.pad_token_id = PAD
    return model.to(dtype).eval()


@torch.no_grad()
def draw_weights(model: Any, wide: float, loud: float) -> None:
    """wide, loud: standard deviation of the matrices and of the token embeddings."""
    for path, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        if parameter.dim() > 1:
            parameter.normal_(0.0, wide)
        elif path.endswith("bias"):
            parameter.normal_(0.0, 0.05)
        elif "gate" in path:  # shut, cross-attention would do nothing
            parameter.normal_(0.0, 0.5)
    with suppress(NotImplementedError):  # it has none
        # Faint, or a tied head would only repeat the last token.
        model.get_input_embeddings().weight.normal_(0.0, loud)
    model.tie_weights()


_FRAME = ((VISION_START,), (VISION_END,))

KINDS: dict[str, Kind] = {
    "blip2-opt": Kind(lambda: models.blip2(opt_config()), 4, models.square(28)),
    "blip2-llama": Kind(lambda: models.blip2(llama()), 4, models.square(28)),
    "blip2-t5": Kind(lambda: models.blip2(t5()), 4, models.square(28), padding="right"),
    "instructblip-opt": Kind(lambda: models.instructblip(opt_config()), 4, models.with_question),
    "instructblip-llama": Kind(lambda: models.instructblip(llama()), 4, models.with_question),
    "instructblip-t5": Kind(
        lambda: models.instructblip(t5(tied=True)), 4, models.with_question, padding="right"
    ),
    "llava": Kind(models.llava, 4, models.square(28)),
    "llava-next": Kind(models.llava_next, 4 + 6, models.crops),
    "idefics3": Kind(lambda: models.tiled("Idefics3"), 4, models.tiles),
    "smolvlm": Kind(lambda: models.tiled("SmolVLM"), 4, models.tiles),
    "qwen2-vl": Kind(models.qwen2, 4, models.patches, frame=_FRAME),
    "qwen2.5-vl": Kind(models.qwen25, 4, models.patches, frame=_FRAME),
    "qwen3-vl": Kind(models.qwen3, 4, models.patches, frame=_FRAME),
    "paligemma": Kind(lambda: models.paligemma(model_type="gemma"), 4, models.prefix),
    "paligemma2": Kind(
        lambda: models.paligemma(model_type="gemma2", sliding_window=6, query_pre_attn_scalar=8),
        4,
        models.prefix,
    ),
    "gemma3": Kind(models.gemma3, 4, models.blocks, frame=_FRAME),
    "internvl": Kind(lambda: models.internvl(qwen()), 4, models.square(32)),
    "florence2": Kind(
        models.florence2, 16 + 1, models.square(32), padding="right", wide=0.1, loud=0.02
    ),
}

NAMES = tuple(KINDS)
FURTHER: dict[str, Kind] = {
    "internvl-qwen3": Kind(lambda: models.internvl(qwen(third=True)), 4, models.square(32)),
    "internvl-experts": Kind(lambda: models.internvl(qwen3_experts()), 4, models.square(32)),
    "qwen3-vl-experts": Kind(lambda: models.qwen3(experts=True), 4, models.patches, frame=_FRAME),
    "granite": Kind(lambda: models.llava_next(granite()), 4 + 6, models.crops),
    "paligemma2-wide": Kind(  # a window longer than the prompt, and shorter than the answer
        lambda: models.paligemma(model_type="gemma2", sliding_window=22, query_pre_attn_scalar=6),
        4,
        models.prefix,
    ),
}
"""Kinds that are no family of their own, for tests that are about their text model."""
WORDLESS = [BOS, EOS, IMAGE, VISION_START, VISION_END, VIDEO]
"""Never said, where outputs go back in as a prompt: an image token there would want an image."""


@torch.no_grad()
def perturb(exits: nn.Module) -> None:
    """Add noise to exits in place: no longer copies of layers, as after some training."""
    draw = torch.Generator().manual_seed(7)
    for parameter in exits.parameters():
        noise = torch.randn(parameter.shape, generator=draw)
        parameter.add_((0.03 * noise).to(parameter.dtype))


def depths(name: str) -> tuple[int, ...]:
    """Two exits; in Gemma 3 at a full and a sliding layer, with no full layer above the second."""
    return (2, 7) if name == "gemma3" else (2, 4)


LOOKS_AHEAD = ("qwen3-vl", "paligemma", "paligemma2", "gemma3")
CAUSAL_PROMPT = tuple(name for name in NAMES if name not in LOOKS_AHEAD)
