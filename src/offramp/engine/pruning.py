"""Visual tokens that stay behind at an exit: the layers above it run over a part of a prompt alone.

A prompt of many visual tokens waits at the first exit. The exit has read all of it; what goes on to
the layers above, once a token needs them, is the text and those visual tokens that the prompt's
last one attends to most in the exit. They keep their positions, and the layers above have keys and
values of them alone. So answers are those of a model in which the others are hidden from these
layers: not the full model's, and thresholds are calibrated with it.

FastV (Chen et al. 2024) ranks by attention after a layer; that an exit's own says what to keep, and
that most answers never ask the layers above, is what is added here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from offramp.engine.executors.slots.attention import attentions, with_attention
from offramp.engine.policy import Pruning
from offramp.engine.prefill import image_tokens
from offramp.errors import InputError
from offramp.models.backbone import Backbone
from offramp.models.discovery.probe import accepts
from offramp.models.exits import ExitSet, first
from offramp.models.opened import LayerCall

LOOKING = "offramp_looking"


class Look:
    """What the newest token of each row attends to: shares [B, K] of the columns, the mean over
    heads."""

    shares: Tensor


def looking_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **more: Any,
) -> Any:
    """Hugging Face's "sdpa", of queries [B, H, T, Dh], keys and values [B, Hk, K, Dh]; what the
    last query attends to is noted in the module's `_look`."""
    rows, heads, _, size = query.shape
    newest = query[:, :, -1].reshape(rows, key.shape[1], heads // key.shape[1], size)
    scores = (newest @ key.transpose(2, 3)).flatten(1, 2).float()
    scores = scores * (size**-0.5 if scaling is None else scaling)  # [B, H, K]
    if attention_mask is not None:
        seen = attention_mask[:, :, -1, : key.shape[2]]
        hidden = torch.zeros(seen.shape, device=seen.device)
        if seen.dtype == torch.bool:
            scores = scores + hidden.masked_fill(~seen, float("-inf"))
        else:
            scores = scores + seen.float()
    module.__dict__["_look"].shares = scores.softmax(-1).mean(1)
    return ALL_ATTENTION_FUNCTIONS["sdpa"](
        module, query, key, value, attention_mask, scaling=scaling, **more
    )


ALL_ATTENTION_FUNCTIONS.register(LOOKING, looking_attention)


@dataclass(frozen=True, eq=False)
class Pruner:
    """What stays behind of the prompts of a backbone."""

    backbone: Backbone
    exits: ExitSet
    pruning: Pruning

    def __post_init__(self) -> None:
        """Raise `InputError` where it cannot be exact, or nobody knows which tokens are visual."""
        why = _why_not(self.backbone, self.exits.at(self.pruning.depth))
        if why is not None:
            raise InputError(
                f"Visual tokens of {self.backbone.name} cannot stay behind at an exit: {why}.",
                "Use a policy with visual_keep=1.",
            )

    def run(self, call: LayerCall) -> tuple[Tensor, Tensor]:
        """The exit's states [B, T, D], and what the newest token of each row attends to [B, T]."""
        look = Look()
        looking = with_attention(self.exits.at(self.pruning.depth), LOOKING, _look=look)
        return first(call.run(looking)), look.shares

    def goes_on(self, ids: Tensor, shares: Tensor, real: Tensor | None) -> Tensor:
        """Which columns [B, T] of prompts of token ids [B, T] go on. real: no padding [B, T]."""
        marks = torch.tensor(image_tokens(self.backbone.model.config), device=ids.device)
        visual = torch.isin(ids, marks)
        on = ~visual if real is None else ~visual & real
        for row, here in enumerate(visual):
            columns = here.nonzero().flatten()
            if len(columns):
                ranked = self._ranked(shares[row, columns])
                on[row, columns[ranked[: max(1, round(self.pruning.keep * len(columns)))]]] = True
        return on

    def _ranked(self, shares: Tensor) -> Tensor:
        """Places of visual tokens, the first to be kept first."""
        if self.pruning.ranking == "random":
            draw = torch.Generator().manual_seed(0)  # of a row by itself: the same in any batch
            return torch.randperm(len(shares), generator=draw).to(shares.device)
        return shares.argsort(descending=True, stable=True)


def _why_not(backbone: Backbone, module: nn.Module) -> str | None:
    config = backbone.text_config
    if backbone.is_encoder_decoder or not backbone.family.causal_prompt:
        return "its prompts are read as a whole"
    if not image_tokens(backbone.model.config):
        return "which tokens stand for an image is not known"
    if getattr(config, "_attn_implementation", None) != "sdpa":
        return "its attention is not PyTorch's own (attn_implementation='sdpa')"
    if _by_distance(backbone):
        return "its layers attend by distance, which such a gap would change"
    if not attentions(module):
        return "an exit that attends to nothing says nothing of them"
    return None


def _by_distance(backbone: Backbone) -> bool:
    """Whether what a layer attends to depends on how many columns lie between: windows, chunks and
    biases. Rotary and learned positions are each token's own."""
    config = backbone.text_config
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["window" if getattr(config, "sliding_window", None) else "full_attention"]
    other = {*kinds} != {"full_attention"} or getattr(config, "alibi", False)
    return bool(other) or not accepts(backbone.stack, "position_ids")
