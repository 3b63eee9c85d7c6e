"""Runs the decoder on the rows of a slot cache: up to the exit, from the exit on, or all the way.

*Shallow*: the layers below the exit and the exit itself, one token of every row; the states that
enter the exit are given back. *Deep*: such states, of any rows and several of a row, through the
layers above, where they catch up and are verified at once. *Full*: one token of every row through
all layers, no exit looked at. *Step*: the same, and the exits are looked at on the way.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from offramp.engine.kv_cache import cache_parameter, store_exit_keys
from offramp.engine.lean.arguments import CannotRehearseError
from offramp.engine.lean.bare import BareModules
from offramp.engine.lean.rehearsal import Stage
from offramp.engine.slots.attention import can_pack, with_packed_attention
from offramp.engine.slots.cache import SlotCache
from offramp.engine.slots.layout import LAYOUTS, CurrentCall, SlotCall, lay_out, one_each
from offramp.engine.slots.lean import BIASES, LeanCalls
from offramp.engine.slots.masks import with_slot_masks
from offramp.engine.slots.positions import ColumnPositions, RelativeBias
from offramp.errors import UnsupportedBackboneError, check_known
from offramp.models.backbone import Backbone, LayerCall
from offramp.models.exits import Exits, ExitSet, first
from offramp.models.intercept import InterceptedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class States:
    """What a call computed.

    final: final-normed states at full depth [N, D]; meaningless after a shallow call.
    entries: by depth of the exits that ran, the state that entered each [N, D].
    exits: by depth, what the exit made of it [N, D], before the final norm.
    previous: by depth, the state one layer before the exit's entry [N, D].
    """

    final: Tensor
    entries: Mapping[int, Tensor] = field(default_factory=dict)
    exits: Mapping[int, Tensor] = field(default_factory=dict)
    previous: Mapping[int, Tensor] = field(default_factory=dict)

    def picked(self, index: Tensor) -> States:
        """Of the tokens `index` [n] alone."""
        parts = [
            {depth: state.index_select(0, index) for depth, state in part.items()}
            for part in (self.entries, self.exits, self.previous)
        ]
        return States(self.final.index_select(0, index), *parts)


class SlotRunner:
    """The layer handler of a batch of slots.

    depths: of the exits in use, ascending; the first is where shallow and deep part. None: no
    exits, and every call is a full one. layout: of deep calls; None: packed where attention is
    Hugging Face's "sdpa", else flat.

    Raises:
        InputError: an unknown layout.
        UnsupportedBackboneError: attention that cannot take masks of ours, or not be packed.
    """

    def __init__(
        self,
        backbone: Backbone,
        exits: ExitSet | Exits | None,
        depths: Sequence[int],
        slots: int,
        limit: int,
        *,
        layout: str | None = None,
    ) -> None:
        check_known("Layout", [] if layout is None else [layout], LAYOUTS)
        self.backbone, self.exits, self.depths = backbone, exits, tuple(sorted(depths))
        self.split = self.depths[0] if self.depths else backbone.depth
        entries = backbone.depth + (len(exits.entries) if exits is not None else 0)
        self.cache = SlotCache(slots, entries, limit, backbone.is_encoder_decoder)
        self.intercepted = InterceptedModel(backbone, self)
        packs = can_pack(self.intercepted.stack)
        self.layout = layout or ("packed" if packs else "flat")
        with_slot_masks(self.intercepted.stack)
        self._current = CurrentCall()
        self._bare = BareModules(type(backbone.stack).forward.__module__)
        self._packed: dict[nn.Module, nn.Module] = {}  # twins of the deep layers and exits
        if self.layout == "packed":
            self._pack(packs)
        stack = self.intercepted.stack
        embed = getattr(stack, "embed_positions", None)
        if embed is not None and backbone.is_encoder_decoder:
            stack._modules["embed_positions"] = ColumnPositions(embed, self._current)
        self._cache_name = cache_parameter(self.intercepted.stack)
        self._offsets: Tensor | None = None  # position of column 0 [..., slots]
        self._mode = "off"
        self._chunk: Tensor | None = None
        self._relative = RelativeBias(backbone) if backbone.family.layers == "block" else None
        self._bias: tuple[Tensor, Tensor] | None = None
        self._lean: LeanCalls | None = None
        self._refused = bool(backbone.rare_layers or backbone.reads_ids)
        self._checked: set[bool] = set()
        self._rehearsed = self._ahead = 0  # positions in tables, and before the first column
        self._entries: dict[int, Tensor] = {}
        self._exits: dict[int, Tensor] = {}
        self._previous: dict[int, Tensor] = {}

    def _pack(self, packs: bool) -> None:
        """Make the twins that packed calls run."""
        if not packs:
            raise UnsupportedBackboneError(
                "Deep calls can be packed for 'sdpa' attention alone.", "Use layout='flat'."
            )
        deep: list[nn.Module] = [*self.backbone.layers[self.split :]]
        if self.exits is not None:
            deep += [self.exits.at(depth) for depth in self.depths[1:]]
        self._packed = {module: with_packed_attention(module, self._current) for module in deep}

    # -- rows --------------------------------------------------------------------------------

    def load(
        self, slot: int, source: Any, positions: Tensor | None, real: Tensor | None = None
    ) -> int:
        """Put a prompt that was run with the cache `source` into `slot`; return its length.

        positions: its position ids [..., 1, T], where the stack was given any.
        """
        length = self.cache.load(slot, source, real)
        if positions is not None:
            offset = positions[..., -1] + 1 - length  # [..., 1]
            if self._offsets is None:
                self._offsets = offset.new_zeros(*offset.shape[:-1], self.cache.slots)
            self._offsets[..., slot] = offset[..., 0]
            self._note_offset(offset)
        return length

    def _note_offset(self, offset: Tensor) -> None:
        """Tables are gathered by one number a token, which is all there is behind a prompt."""
        axes = offset.flatten()[-3:].tolist()
        self._refused = self._refused or len({*axes}) > 1
        self._ahead = max(self._ahead, axes[-1])

    def move(self, source: int, target: int, columns: int) -> None:
        """Copy a row of `columns` columns to a free slot."""
        self.cache.move(source, target, columns)
        if self._offsets is not None:
            self._offsets[..., target] = self._offsets[..., source]

    # -- calls -------------------------------------------------------------------------------

    def shallow(self, tokens: Tensor, columns: Sequence[int]) -> States:
        """Run tokens [R] of the first R slots at their columns up to and through the exit."""
        return self.run("shallow", one_each(columns, *self._room(columns)), tokens, lean=True)

    def full(self, tokens: Tensor, columns: Sequence[int], *, exits: bool = True) -> States:
        """Run tokens [R] of the first R slots through all layers.

        exits: whether these get their keys, which a row needs that will come to exits again.
        """
        call = one_each(columns, *self._room(columns))
        return self.run("full" if exits else "bare", call, tokens, lean=True)

    def step(self, tokens: Tensor, columns: Sequence[int]) -> States:
        """Run tokens [R] of the first R slots through all layers and all exits."""
        return self.run("step", one_each(columns, *self._room(columns)), tokens, lean=True)

    def deep(self, states: Tensor, slots: Sequence[int], columns: Sequence[int]) -> States:
        """Run states [N, D] that entered the first exit through the layers above it.

        slots, columns: of each state, slot by slot, in ascending order; a slot that is named is
        named with all its columns that are pending.
        """
        call = lay_out(self.layout, slots, columns, *self._room(columns))
        packed = self.layout == "packed"
        laid = states
        if call.gather is not None and not packed:
            laid = states.index_select(0, call.gather)
        out = self.run("deep", call, laid.view(*call.shape, -1), lean=True)
        return out if call.pick is None or packed else out.picked(call.pick)

    def _room(self, columns: Sequence[int]) -> tuple[int, torch.device]:
        """How many columns a call reads that writes to `columns`, and the device."""
        width = max(columns) + 1
        self.cache.reserve(width)
        return width, self.backbone.device

    def run(self, mode: str, call: SlotCall, inputs: Tensor, *, lean: bool = False) -> States:
        """One call, on tokens [B], or on states [B, T, D].

        lean: leave the stack's own code out, where that is exact.
        """
        lean = lean and self.backbone.lean_decoding and not self._refused
        if lean and self._rehearsed < self.cache.columns + self._ahead:
            self._rehearse()
        self._current.call, self._bias = call, None
        self._mode, self._chunk = mode, inputs if mode == "deep" else None
        self._entries, self._exits, self._previous = {}, {}, {}
        try:
            given = self._given(call, inputs)
            through = self._by_layers if lean and self._is_exact(given) else self._by_stack
            out = through(given)
        finally:
            self._mode, self._chunk = "off", None
            self.cache.release()
        return States(out.flatten(0, 1), self._entries, self._exits, self._previous)

    def _given(self, call: SlotCall, inputs: Tensor) -> dict[str, Any]:
        """What the stack is called with."""
        kw: dict[str, Any] = {self._cache_name: self.cache.seen_by(call)}
        kw |= {"input_ids": inputs[:, None]} if inputs.dim() == 1 else {"inputs_embeds": inputs}
        # Some stacks size a mask of their own by the cache where they are given none.
        kw["attention_mask"] = call.slots.new_ones(call.shape[0], call.width)
        if self._offsets is not None:
            positions = self._offsets[..., call.slots] + call.columns
            kw["position_ids"] = positions.view(*positions.shape[:-1], *call.shape)
        if self.cache.cross:
            kw |= self._encoder(call)
        return {**kw, "use_cache": True, "return_dict": True}

    def _by_stack(self, given: Mapping[str, Any]) -> Tensor:
        return self.intercepted.stack(**given).last_hidden_state  # type: ignore[no-any-return]

    def _by_layers(self, given: Mapping[str, Any]) -> Tensor:
        """The layers that run in this mode, one after the other."""
        lean, call, deep = self._lean, self._current.call, self._mode == "deep"
        assert lean is not None
        own = {self._cache_name: given[self._cache_name]}
        if self._relative is not None:
            own |= zip(BIASES, self._biases(), strict=True)
        arguments, layers, bare = lean.arguments(given, call, own), self.backbone.layers, self._bare
        hidden = given["inputs_embeds"] if deep else lean.enter(given, call)
        end = self.split + 1 if self._mode == "shallow" else len(layers)
        for index in range(self.split if deep else 0, end):
            args, kw = arguments[lean.kind_of[index]]
            hidden = first(self._run_layer(LayerCall(index, layers[index], hidden, args, kw, bare)))
        return hidden if self._mode == "shallow" else self.backbone.final_norm(hidden)

    def _encoder(self, call: SlotCall) -> dict[str, Any]:
        """What stands for the encoder: only the length of its states is looked at, and its mask."""
        lengths = torch.tensor(self.cache.encoder_lengths, device=self.backbone.device)
        lengths = lengths[: len(call.queries)] if call.reads is None else lengths[call.reads]
        width = max(self.cache.encoder_lengths)
        mask = torch.arange(width, device=lengths.device) < lengths[:, None]
        states = torch.zeros(1, 1, 1, dtype=self.backbone.dtype, device=lengths.device)
        return {
            "encoder_hidden_states": states.expand(len(lengths), width, 1),
            "encoder_attention_mask": mask,
        }

    # -- without the stack -------------------------------------------------------------------

    def _rehearse(self) -> None:
        """Make the tables, of all positions that there are columns for."""
        backbone = self.backbone
        self._rehearsed = count = self.cache.columns + self._ahead
        if self._relative is not None:
            count = 1  # there are no others
        elif backbone.positions is not None:
            count = min(count, backbone.positions)
        try:
            self._lean = LeanCalls(Stage(backbone, self.intercepted.stack), self._in_a_row(count))
            self._lean.check(self._in_a_row(1), self._current.call)  # as by itself
        except CannotRehearseError as error:
            self._refuse(error)
        finally:
            self.cache.release()
        self._checked.clear()

    def _in_a_row(self, count: int) -> dict[str, Any]:
        """What the stack is called with for so many positions, the states zero."""
        at = torch.arange(count, device=self.backbone.device)
        call = self._current.call = SlotCall((1, count), at * 0, at, None, at[None], 1)
        states = torch.zeros(
            1, count, self.backbone.width, dtype=self.backbone.dtype, device=at.device
        )
        given = self._given(call, states)
        if self._offsets is not None:
            given["position_ids"] = at.expand(*self._offsets.shape[:-1], 1, count)
        return given

    def _is_exact(self, given: Mapping[str, Any]) -> bool:
        """Whether the layers of this call get what the stack would hand them; for the first call of
        a kind, found out."""
        kind = "inputs_embeds" in given
        if self._lean is not None and kind not in self._checked:
            try:
                self._lean.check(given, self._current.call)
                self._checked.add(kind)
            except CannotRehearseError as error:
                self._refuse(error)
        return self._lean is not None

    def _refuse(self, error: CannotRehearseError) -> None:
        log.debug("The stack of %s runs itself in slots: %s", self.backbone.name, error)
        self._lean, self._refused = None, True

    # -- one layer ---------------------------------------------------------------------------

    def layer(self, call: LayerCall) -> Any:
        """What the stack gets for a layer: its output, or the state handed through."""
        args = call.args if self._relative is None else self._with_bias(call.args)
        bare = self._bare if self.backbone.lean_decoding else None
        return self._run_layer(LayerCall(call.index, call.layer, call.hidden, args, call.kw, bare))

    def _run_layer(self, call: LayerCall) -> Any:
        index = call.index
        if self._mode == "deep" and index <= self.split:
            if index < self.split:
                return self.backbone.skipped_layer_output(call)
            assert self._chunk is not None
            call = replace(call, hidden=self._chunk)
        elif index in self.depths and self._mode != "bare":
            self._at_exit(call)
        if self._mode == "shallow" and index >= self.split:
            return self.backbone.skipped_layer_output(call)
        if index + 1 in self.depths:
            self._previous[index + 1] = call.hidden.flatten(0, -2)
        return call.run(self._running(call.layer))

    def _running(self, module: nn.Module) -> nn.Module:
        """A layer or exit, or its twin in a packed call."""
        return self._packed.get(module, module) if self._mode == "deep" else module

    def _at_exit(self, call: LayerCall) -> None:
        """Run the exit before this layer, or in a full call only store its keys and values."""
        assert self.exits is not None
        depth = call.index
        if self._mode == "shallow" and depth > self.split:
            return
        if self._mode == "full":
            store_exit_keys(call.kw[self._cache_name], self.exits, call)
            return
        self._entries[depth] = call.hidden.flatten(0, -2)
        state = first(call.run(self._running(self.exits.at(depth))))
        self._exits[depth] = state.flatten(0, -2)

    # -- per family --------------------------------------------------------------------------

    def _with_bias(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """T5's blocks hand on biases that the first computes for one offset of all rows; here they
        are for each query."""
        own, across = self._biases()
        return (args[0], own, *args[2:4], args[4] if args[4] is not None else across, *args[5:])

    def _biases(self) -> tuple[Tensor, Tensor]:
        """T5's of the current call: the relative one, and zeros that fit any layout."""
        if self._bias is None:
            assert self._relative is not None
            own = self._relative.of(self._current.call, self.cache.columns)
            self._bias = own, own.new_zeros(1, 1, 1, 1)
        return self._bias
