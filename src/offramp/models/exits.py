"""Exits: one decoder layer each, at a few depths, read by the backbone's own norm and LM head.

An exit at depth d takes the state after d decoder layers and gives an estimate of the state after
all of them. It is built like the layer that would have run next, so it takes that layer's mask,
positions and cross-attention as they come, in any family, and its own keys and values live in the
same cache, behind the backbone's (entries L, L+1, ...). Untrained it is a copy of that layer.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from offramp.errors import InputError
from offramp.models.backbone import Backbone
from offramp.models.shortlist import Gate


def propose_depths(layers: int, exits: int = 1) -> tuple[int, ...]:
    """Depths for `exits` exits on a decoder of `layers` layers: a quarter, then evenly to 3/4.

    Early and few: an exit costs a layer and a head whether it fires or not, and what it can save
    shrinks with depth.
    """
    if not 1 <= exits < layers:
        raise InputError(
            f"{exits} exits were asked for on {layers} decoder layers.",
            f"Ask for 1 to {layers - 1}.",
        )
    first, last = max(1, round(layers / 4)), max(1, round(3 * layers / 4))
    if last - first + 1 < exits:  # too many for the middle half
        first, last = 1, layers - 1
    step = (last - first) / max(1, exits - 1)
    return tuple(round(first + i * step) for i in range(exits))


def check_depths(depths: Sequence[int], layers: int) -> tuple[int, ...]:
    """`depths` sorted; raise `InputError` if one is repeated or outside 1..layers-1."""
    # True is an int to Python, and would silently be depth 1.
    wrong = [d for d in depths if type(d) is not int or not 1 <= d < layers]
    if wrong or not depths:
        raise InputError(
            f"Exit depths {list(depths)} do not fit {layers} decoder layers.",
            f"Give whole numbers from 1 to {layers - 1}, e.g. {list(propose_depths(layers))}.",
        )
    if len(set(depths)) != len(depths):
        raise InputError(f"Exit depths {list(depths)} repeat a depth.", "Give each depth once.")
    return tuple(sorted(depths))


class LogitLens(nn.Module):
    """An exit without parameters: the state at its depth is read as if it were the last one.

    The logit lens (nostalgebraist 2020), the untrained baseline. It attends to nothing, so its
    entry in the cache stays empty.
    """

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        """`hidden` [B, T, D] itself."""
        return hidden


class Exits(nn.ModuleDict):
    """Exits by depth. `state_dict` keys start with the depth; nothing is shared."""

    def __init__(self, backbone: Backbone, depths: Sequence[int], *, lens: bool = False) -> None:
        """Copy-initialise an exit at each depth from the backbone's next layer, or place a lens."""
        self.depths = check_depths(depths, backbone.depth)
        super().__init__(
            {
                str(depth): LogitLens()
                if lens
                else _copy_layer(backbone.layers[depth], backbone.depth + slot)
                for slot, depth in enumerate(self.depths)
            }
        )
        self.requires_grad_(True)
        self.eval()  # dropout off: the layers are frozen kin, and resuming must be exact

    def at(self, depth: int) -> nn.Module:
        """The exit at `depth`."""
        return self[str(depth)]

    def run(self, depth: int, hidden: Tensor, args: tuple[Any, ...], kw: dict[str, Any]) -> Tensor:
        """The estimate [B, T, D] of the final state, before the final norm."""
        return first(self[str(depth)](hidden, *args, **kw))


@dataclass(frozen=True, eq=False)
class ExitSet:
    """All that an adapter attaches to a backbone: the exits, and what reads or guards them.

    modules: the exits by depth.
    shortlist: token ids [S], ascending, that exits can say; None: the whole vocabulary.
    gates: by depth (`offramp.models.shortlist`).
    discriminators: by depth; only the "discriminator" score asks them.
    measured: what was measured when shortlist and gates were learnt.
    """

    modules: Exits
    shortlist: Tensor | None = None
    gates: Mapping[int, Gate] = field(default_factory=dict)
    discriminators: nn.ModuleDict | None = None
    measured: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, exits: ExitSet | Exits) -> ExitSet:
        """`exits` itself, or bare modules with nothing beside them."""
        return exits if isinstance(exits, ExitSet) else cls(exits)

    @property
    def depths(self) -> tuple[int, ...]:
        """Where exits stand, ascending."""
        return self.modules.depths

    def at(self, depth: int) -> nn.Module:
        """The exit at `depth`."""
        return self.modules.at(depth)

    def run(self, depth: int, hidden: Tensor, args: tuple[Any, ...], kw: dict[str, Any]) -> Tensor:
        """The estimate [B, T, D] of the final state; see `Exits.run`."""
        return self.modules.run(depth, hidden, args, kw)

    def shortlist_head(self, backbone: Backbone) -> nn.Linear | None:
        """The LM head's rows of the shortlist, made once; None without one."""
        if self.shortlist is None:
            return None
        if "_head" not in self.__dict__:
            object.__setattr__(self, "_head", backbone.head_rows(self.shortlist))
        return self.__dict__["_head"]  # type: ignore[no-any-return]


def first(output: Any) -> Tensor:
    """The hidden state of a layer's output, which in some families is a tuple."""
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


def _copy_layer(layer: nn.Module, slot: int) -> nn.Module:
    """A deep copy whose attention writes to cache entry `slot`, without the user's hooks."""
    twin = copy.deepcopy(layer)
    for module in twin.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        if hasattr(module, "layer_idx"):
            module.layer_idx = slot  # type: ignore[assignment]
    return twin
