"""Visual tokens that stay behind: at an exit, or before the decoder.

Behind an exit: a prompt of many visual tokens waits at the first exit, which has read all of it;
what goes on to the layers above, once a token needs them, is the text and those visual tokens that
the prompt's last one attends to most in the exit. FastV (Chen et al. 2024) ranks by attention after
a layer; that an exit's own says what to keep, and that most answers never ask the layers above, is
what is added here.

Before the decoder: the prompt that it reads is the text and those visual tokens that are least like
each other (DivPrune, Alvar et al. 2025), whatever is asked about the image.

Those that go on keep their positions, and layers have keys and values of them alone. So answers are
those of a model in which the others are hidden from these layers: not the full model's, and
thresholds are calibrated with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from offramp.engine.executors.slots.attention import attentions, with_attention
from offramp.engine.policy import PruningStage
from offramp.engine.prefill import image_tokens
from offramp.errors import InputError
from offramp.models.backbone import Backbone
from offramp.models.discovery.probe import accepts
from offramp.models.exits import ExitSet, first
from offramp.models.opened import LayerCall

LOOKING = "offramp_looking"


class Look:
    """The attention of the newest token of each row: shares [B, K] of the columns, the mean over
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


# -- which go on ---------------------------------------------------------------------------------


def by_attention(shares: Tensor, count: int) -> Tensor:
    """Return the places of those that are attended to most. shares: what each gets [n]."""
    return shares.argsort(descending=True, stable=True)[:count]


def by_diversity(states: Tensor, count: int) -> Tensor:
    """Return the places of those that are least like each other: begin with the one farthest from
    its nearest, then take the one that is farthest from all taken, by cosine. states: [n, D], as
    they enter the decoder.
    """
    unit = nn.functional.normalize(states.float(), dim=-1)
    far = 1 - unit @ unit.T
    nearest = far.clone().fill_diagonal_(float("inf")).amin(0)
    chosen = [int(nearest.argmax())]
    nearest = far[chosen[0]]
    for _ in range(count - 1):
        nearest[chosen[-1]] = -1.0  # nearer than any
        chosen.append(int(nearest.argmax()))
        nearest = nearest.minimum(far[chosen[-1]])
    return torch.tensor(chosen, device=states.device)


def by_chance(seen: Tensor, count: int) -> Tensor:
    """Any, of a row by itself: the same in any batch."""
    draw = torch.Generator().manual_seed(0)
    return torch.randperm(len(seen), generator=draw)[:count].to(seen.device)


CHOOSERS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "attention": by_attention,
    "random": by_chance,
    "divprune": by_diversity,
    "random-before": by_chance,
}
"""By ranking: the places of those of a row's visual tokens that go on, so many, out of what is seen
of each: its share of attention in the exit, or its state before the decoder."""


@dataclass(frozen=True, eq=False)
class Pruner:
    """Chooses which visual tokens of a backbone's prompts stay behind."""

    backbone: Backbone
    exits: ExitSet
    pruning: PruningStage

    def __post_init__(self) -> None:
        """Raise `InputError` where it cannot be exact, or nobody knows which tokens are visual."""
        why = _why_not(self.backbone, None if self.before else self.exits.at(self.pruning.depth))
        if why is not None:
            raise InputError(
                f"Visual tokens of {self.backbone.name} cannot stay behind: {why}.",
                "Use a policy without pruning.",
            )

    @property
    def before(self) -> bool:
        """Return True if they stay before the decoder."""
        return self.pruning.depth == 0

    def run(self, call: LayerCall) -> tuple[Tensor, Tensor]:
        """The exit's states [B, T, D], and what the newest token of each row attends to [B, T]."""
        look = Look()
        looking = with_attention(self.exits.at(self.pruning.depth), LOOKING, _look=look)
        return first(call.run(looking)), look.shares

    def goes_on(self, ids: Tensor, seen: Tensor, real: Tensor | None) -> Tensor:
        """Return which columns [B, T] of prompts of token ids [B, T] go on. seen: of each column,
        as `CHOOSERS` take it, [B, T] or [B, T, D]. real: no padding [B, T]."""
        marks = torch.tensor(image_tokens(self.backbone.model.config), device=ids.device)
        visual = torch.isin(ids, marks)
        on = ~visual if real is None else ~visual & real
        choose = CHOOSERS[self.pruning.ranking]
        for row, here in enumerate(visual):
            columns = here.nonzero().flatten()
            if len(columns):
                count = max(1, round(self.pruning.keep * len(columns)))
                on[row, columns[choose(seen[row, columns], count)]] = True
        return on

    def shorter(self, ids: Tensor, kw: Mapping[str, Any]) -> dict[str, Any]:
        """The stack's arguments for what goes on of prompts of token ids [B, T], each column at its
        position; rows with fewer are padded in front.

        Raises:
            InputError: its layers get more than states, positions and a mask of them.
        """
        embeds, mask = kw.get("inputs_embeds"), kw.get("attention_mask")
        more = [n for n, v in kw.items() if isinstance(v, Tensor | dict) and n not in _SHORTENED]
        if embeds is None or embeds.shape[:2] != ids.shape or more or _is_made(mask):
            raise InputError(
                f"Visual tokens of {self.backbone.name} cannot stay behind before its decoder, "
                f"which is given more than their states ({', '.join(more) or 'a mask'}).",
                "Use a policy without pruning, or with Pruning(ranking='attention').",
            )
        real = None if mask is None else mask.bool()
        on = self.goes_on(ids, embeds, real)
        length = int(on.sum(1).max())
        order = on.int().argsort(dim=1, stable=True)
        columns = order[:, -length:]  # those that go on stand last
        positions = kw.get("position_ids")
        if positions is None:
            whole = on.new_ones(on.shape) if real is None else real
            positions = (whole.cumsum(1) - 1).clamp(min=0)
        positions = positions.expand(*positions.shape[:-2], *on.shape)
        placed = columns.expand(*positions.shape[:-1], length)
        return {
            **{name: value for name, value in kw.items() if name != "cache_position"},
            "inputs_embeds": embeds.take_along_dim(columns[..., None], 1),
            "attention_mask": on.take_along_dim(columns, 1).to(torch.long),
            "position_ids": positions.take_along_dim(placed, -1),
        }


_SHORTENED = {"inputs_embeds", "attention_mask", "position_ids", "cache_position"}


def _is_made(mask: Any) -> bool:
    """Whether a mask is more than which tokens are padding."""
    return mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2)


def _why_not(backbone: Backbone, module: nn.Module | None) -> str | None:
    """module: of the exit that says which go on; None: none does."""
    config = backbone.text_config
    if backbone.is_encoder_decoder or not backbone.family.causal_prompt:
        return "its prompts are read as a whole"
    if not image_tokens(backbone.model.config):
        return "which tokens stand for an image is not known"
    if module is not None and getattr(config, "_attn_implementation", None) != "sdpa":
        return "its attention is not PyTorch's own (attn_implementation='sdpa')"
    if _by_distance(backbone):
        return "its layers attend by distance, which such a gap would change"
    if module is not None and not attentions(module):
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
