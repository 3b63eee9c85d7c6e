"""One dense MLP in the place of a mixture of experts.

A copied layer with 128 experts is as large as any layer of the model, though each token runs
through few of them. An exit may do with an MLP of the size that one token uses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from offramp.core.errors import UnsupportedBackboneError
from offramp.core.models.backbone import Backbone
from offramp.core.models.exit_kinds import EXIT_KINDS, ExitKind
from offramp.core.models.exits import copied_index, copy_layer
from offramp.core.models.sharding import device_of, gathered

_CHOSEN = ("top_k", "num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")
"""How blocks and configurations call the number of experts that a token runs through."""


def dense_exit(width: int | None = None) -> Callable[[Backbone, int, Sequence[int]], nn.Module]:
    """Return a builder of exits: copied layers with a dense MLP in place of their experts.

    width: of the MLP; None: as many weights as one token uses of the experts.
    """

    def build(backbone: Backbone, depth: int, own: Sequence[int]) -> nn.Module:
        layer = gathered(backbone.layers[copied_index(backbone, depth)])
        config = backbone.text_config
        instead = {
            block: dense_block(block, backbone.width, config, width)
            for block in expert_blocks(layer)
        }
        return copy_layer(layer, own[0], instead)

    return build


EXIT_KINDS["dense"] = ExitKind(dense_exit())


class DenseBlock(nn.Module):
    """A gated MLP in place of a block of experts, with the same call and outputs.

    It adds nothing before training. values: number of values that the block returns; 0: states
    alone.
    """

    def __init__(self, states: int, width: int, values: int) -> None:
        super().__init__()
        self.gate: nn.Linear = nn.Linear(states, width, bias=False)
        self.up: nn.Linear = nn.Linear(states, width, bias=False)
        self.down: nn.Linear = nn.Linear(width, states, bias=False)
        nn.init.zeros_(self.down.weight)
        self.values = values

    def forward(self, states: Tensor, *_: Any, **__: Any) -> Any:
        """Return states [..., D] for states [..., D]; None for the block's other outputs."""
        made = self.down(silu(self.gate(states)) * self.up(states))
        return (made, *[None] * (self.values - 1)) if self.values else made


def expert_blocks(layer: nn.Module) -> list[nn.Module]:
    """The blocks of a decoder layer that choose among experts, and hold them as `experts`."""
    blocks = [part for part in layer.modules() if isinstance(_experts(part), nn.Module)]
    if layer in blocks:
        raise UnsupportedBackboneError(
            f"The experts of {type(layer).__name__} are no block of their own in it.",
            "Use exits of the kind 'layer'.",
        )
    return blocks


def _experts(block: nn.Module) -> Any:
    return block._modules.get("experts")


def dense_block(block: nn.Module, states: int, config: Any, width: int | None) -> DenseBlock:
    """Return a dense replacement of a block of experts.

    states: their width D. config: of the text model. width: of the MLP; None: as many weights as
    one token uses of the block.
    """
    experts: Any = _experts(block)
    if width is None:
        one = next(experts.parameters())
        count = len(experts) if isinstance(experts, nn.ModuleList) else len(one)
        chosen = _chosen(block, config)
        size = sum(p.numel() for p in experts.parameters())
        others = sum(
            p.numel()
            for name, part in block.named_children()
            if "expert" in name and part is not experts
            for p in part.parameters()
        )
        width = max(1, round((chosen * size / count + others) / (3 * states)))
    like = next(p for p in block.parameters() if p.is_floating_point())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = DenseBlock(states, width, _values(block, like.new_zeros(1, 1, states)))
    return made.to(device_of(block), like.dtype)


def _chosen(block: Any, config: Any) -> int:
    for holder in (block, getattr(block, "gate", None), getattr(block, "router", None), config):
        for name in _CHOSEN:
            if isinstance(getattr(holder, name, None), int):
                return int(getattr(holder, name))
    raise UnsupportedBackboneError(
        f"How many experts a token runs through in {type(block).__name__} is not known.",
        "State the width: register_exit('narrow', dense_exit(width=...)).",
    )


def _values(block: nn.Module, states: Tensor) -> int:
    """How many values the block returns; 0: the states alone."""
    with torch.no_grad():
        made = block(states)
    return len(made) if isinstance(made, tuple) else 0
