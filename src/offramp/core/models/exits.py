"""Exits: one decoder layer each, at a few depths, read by the backbone's own norm and LM head.

An exit at depth d takes the state after d decoder layers and gives an estimate of the state after
all of them. It is built like the layer that would have run next, so it takes that layer's mask,
positions and cross-attention as they come, in any family, and its own keys and values live in the
same cache, after the backbone's (entries L, L+1, ...). Untrained it is a copy of that layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from offramp.core.errors import InputError
from offramp.core.models.backbone import Backbone
from offramp.core.models.change import Unchanged
from offramp.core.models.exit_kinds import EXIT_KINDS, ExitKind, exit_kind
from offramp.core.models.fingerprint import fingerprint
from offramp.core.models.opened import LayerCall
from offramp.core.models.opened import first as first  # noqa: PLC0414  # a stable name of this module
from offramp.core.models.sharding import run_like
from offramp.core.models.weights import float_copy, float_dtype


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
    """Return `depths` sorted; raise `InputError` for a repeated one or one outside 1..layers-1."""
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
        """Return `hidden` [B, T, D] unchanged."""
        return hidden


def copy_layer(
    layer: nn.Module, entry: int, instead: Mapping[nn.Module, nn.Module] | None = None
) -> nn.Module:
    """Return a deep float32 copy of a decoder layer, without hooks, writing to cache entry `entry`.

    instead: replacements in the copy, for modules of the layer.
    """
    twin = float_copy(layer, float_dtype(layer), instead or {})
    for module in twin.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        if hasattr(module, "layer_idx"):
            module.layer_idx = entry  # type: ignore[assignment]
    return twin


class DraftInput(nn.Module):
    """The input of an exit's layer while it drafts on: W_e norm(embedding) + W_o norm(state).

    The embedding is of the token just written, and the state is the same layer's output for the
    token before, so no layer below runs. Two inputs joined for the next draft are EAGLE's (Li et
    al. 2024); unlike there, the layer is the exit's own and unchanged.
    """

    def __init__(self, embedded: int, width: int) -> None:
        """embedded: width of embeddings. width: D of states."""
        super().__init__()
        self.embedding_norm: nn.RMSNorm = nn.RMSNorm(embedded)
        self.state_norm: nn.RMSNorm = nn.RMSNorm(width)
        self.embedding: nn.Linear = nn.Linear(embedded, width, bias=False)
        self.state: nn.Linear = nn.Linear(width, width, bias=False)
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            start = 0.02 * torch.randn(width, embedded, generator=draw)
            self.embedding.weight.copy_(start)
            self.state.weight.copy_(torch.eye(width) / 2)

    def forward(self, embedded: Tensor, state: Tensor) -> Tensor:
        """Return inputs [..., D] from embeddings [..., E] and states [..., D]."""
        kind = self.state.weight.dtype
        one = self.embedding(self.embedding_norm(embedded.to(kind)))
        return one + self.state(self.state_norm(state.to(kind)))  # type: ignore[no-any-return]


def _copied(backbone: Backbone, depth: int, own: Sequence[int]) -> nn.Module:
    return copy_layer(backbone.layers[copied_index(backbone, depth)], own[0])


def _drafting(backbone: Backbone, depth: int, own: Sequence[int]) -> nn.Module:
    """A copied layer that can draft on; as an exit it is called as the layer is."""
    layer = _copied(backbone, depth, own)
    kind = next(layer.parameters()).dtype
    embedded = int(backbone.stack.get_input_embeddings().weight.shape[1])
    with torch.device("cpu"):
        made = DraftInput(embedded, backbone.width)
    layer.add_module("drafts", made.to(kind))
    return layer


EXIT_KINDS.update(
    layer=ExitKind(_copied), drafting=ExitKind(_drafting), lens=ExitKind(lambda *_: LogitLens())
)


class Exits(nn.ModuleDict):
    """Exits by depth. `state_dict` keys start with the depth; no parameter is shared.

    kind: of `kinds_of_exit`. entries: the depth of each cache entry that belongs to the exits.
    """

    def __init__(
        self, backbone: Backbone | nn.Module, depths: Sequence[int], *, kind: str = "layer"
    ) -> None:
        """Build an exit at each depth.

        kind: "layer", a copy of the backbone's next layer; "drafting", the same with a
            `DraftInput`; "dense", with one MLP in place of its experts; "lens", the logit lens; or
            one of `register_exit`.

        Raises:
            InputError: depths that do not fit the backbone, or an unknown kind.
        """
        backbone = Backbone.of(backbone)
        if backbone.split:
            fingerprint(backbone)  # while all processes are here: the one that saves is alone
        self.depths: tuple[int, ...] = check_depths(depths, backbone.depth)
        self.kind, made = kind, exit_kind(kind)
        build, entries = made.build, made.entries
        self.entries: tuple[int, ...] = tuple(
            depth for depth in self.depths for _ in range(entries)
        )
        first = backbone.depth
        super().__init__(
            {
                str(depth): build(
                    backbone, depth, range(first + i * entries, first + (i + 1) * entries)
                )
                for i, depth in enumerate(self.depths)
            }
        )
        self.place(backbone)
        self.requires_grad_(True)
        self.eval()  # no dropout: like the frozen layers, and resuming must be exact

    def place(self, backbone: Backbone) -> None:
        """Move each exit to the device of the layer that it precedes."""
        for depth in self.depths:
            run_like(self.at(depth), backbone.layers[depth])

    def at(self, depth: int) -> nn.Module:
        """The exit at `depth`."""
        return self[str(depth)]

    def draft_input(self, depth: int) -> DraftInput | None:
        """Return the module that makes inputs while the exit drafts on; None: it cannot."""
        found = getattr(self.at(depth), "drafts", None)
        return found if isinstance(found, DraftInput) else None

    def run(self, depth: int, call: LayerCall) -> Tensor:
        """Return the exit's estimate [B, T, D] of the final state, before the final norm.

        call: of the layer after the exit.
        """
        return call.state(self.at(depth))


@dataclass(frozen=True, eq=False)
class ExitSet:
    """The modules that an adapter attaches to a backbone.

    modules: the exits by depth.
    shortlist: token ids [S], ascending, that exits can say; None: the whole vocabulary.
    measured: results of learning the shortlist.
    score: a function from an `ExitCheck` to scores [B], in place of the policy's score; for exits
    that follow a script, by each token's position and row.
    """

    modules: Exits
    shortlist: Tensor | None = None
    measured: Mapping[str, Any] = field(default_factory=dict)
    score: Callable[[Any], Tensor] | None = None

    @classmethod
    def of(cls, exits: ExitSet | Exits) -> ExitSet:
        """Return `exits` if it is a set, or a set of these bare modules."""
        return exits if isinstance(exits, ExitSet) else cls(exits)

    @property
    def depths(self) -> tuple[int, ...]:
        """Return the depths of the exits, ascending."""
        return self.modules.depths

    @property
    def entries(self) -> tuple[int, ...]:
        """The depth of each cache entry that belongs to the exits."""
        return self.modules.entries

    @property
    def draft_on(self) -> bool:
        """Return True if any of the exits drafts on from its own state."""
        return any(self.modules.draft_input(depth) is not None for depth in self.depths)

    def at(self, depth: int) -> nn.Module:
        """The exit at `depth`."""
        return self.modules.at(depth)

    def by_depth(self) -> dict[int, nn.Module]:
        """Return all exits by depth."""
        return {depth: self.at(depth) for depth in self.depths}

    def run(self, depth: int, call: LayerCall) -> Tensor:
        """The estimate [B, T, D] of the final state; see `Exits.run`."""
        return self.modules.run(depth, call)

    def shortlist_head(self, backbone: Backbone) -> nn.Module | None:
        """Return the LM head's rows for the shortlist; None without a shortlist."""
        if self.shortlist is None:
            return None
        reader, unchanged, made = self.__dict__.get("_head", (None, None, None))
        if reader is not backbone.reader or not unchanged():
            head, made = backbone.head, backbone.head_rows(self.shortlist)
            self.__dict__["_head"] = backbone.reader, Unchanged(lambda: (head,)), made
        return made  # type: ignore[no-any-return]


def copied_index(backbone: Backbone, depth: int) -> int:
    """Return the index of the layer that an exit at `depth` is copied from: the next layer, or the
    nearest layer of the common kind if the next is of a rare kind."""
    alike = (index for index in range(backbone.depth) if index not in backbone.rare_layers)
    return min(alike, key=lambda index: (abs(index - depth), index < depth))
