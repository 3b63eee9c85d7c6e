"""One call of the layers on the columns of slots.

The layers run one after the other, without the stack's own code where that is exact; else through a
twin of the stack.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from offramp.core.executors.bare import called_in_place, stack_runs
from offramp.core.executors.kv_cache import cache_parameter
from offramp.core.executors.segments import Output, SegmentRunner
from offramp.core.executors.slots.attention import PACKED, WithAttention, with_slot_masks
from offramp.core.executors.slots.cache import Call, OneSlot, SlotCache
from offramp.core.executors.slots.rows import SlotRows
from offramp.core.executors.slots.tables import BIASES, CannotRehearseError, Given, Stage, Tables
from offramp.core.models.backbone import Backbone
from offramp.core.models.change import Unchanged
from offramp.core.models.exits import ExitSet
from offramp.core.models.opened import LayerCall

log = logging.getLogger(__name__)

_TABLES: WeakKeyDictionary[nn.Module, dict[Any, tuple[Unchanged, Tables | str]]]
_TABLES = WeakKeyDictionary()
"""By kind of attention, what was rehearsed of a stack, or why it must run itself; and whether what
stands in it beside its layers is what it was."""


class SlotRunner(SegmentRunner):
    """Runs layers, exits and the final norm over tokens at columns of a slot cache.

    slots: sequences at a time. limit: columns of a sequence, at most. Others as of `SegmentRunner`.

    held: the sequences. packs: whether calls over several columns of several slots are packed
    (`SlotCall`), which needs Hugging Face's attention "sdpa".

    Raises:
        UnsupportedBackboneError: attention that cannot take our masks.
    """

    def __init__(
        self,
        backbone: Backbone,
        exits: ExitSet | None,
        depths: Sequence[int],
        *,
        slots: int = 1,
        limit: int | None = None,
        **more: Any,
    ) -> None:
        super().__init__(backbone, exits, depths, **more)
        entries = backbone.depth + (len(exits.entries) if exits is not None else 0)
        encoded = backbone.is_encoder_decoder
        self.cache: SlotCache = SlotCache(slots, entries, limit, encoded)
        self.held: SlotRows = SlotRows(slots)
        self._device = backbone.device
        self.positions: int | None = backbone.room(0)
        self.packs: Any = with_slot_masks(self.intercepted.stack) == "sdpa"
        self._current = self.cache.current
        plain = called_in_place(backbone) if backbone.decoding.lean else None
        exact = backbone.decoding.exact_batches
        if exact is not None:
            exact.check(backbone, exits, self.packs)
        attention = PACKED if exact is None else exact.attention
        self._packed = WithAttention(attention, self._current, plain)
        self._plain: Any = plain if exact is None else self._packed
        self._instead: Any = self._plain  # what the current call calls in a module's place
        stack = self.intercepted.stack
        embed = getattr(stack, "embed_positions", None)
        if embed is not None and encoded:
            from offramp.core.executors.slots.positions import ColumnPositions

            stack._modules["embed_positions"] = ColumnPositions(embed, self._current)
        self._cache_name = cache_parameter(stack)
        self._layers = [*backbone.layers]
        # of tables
        self._refused = bool(
            backbone.rare_layers or backbone.reads_ids or not backbone.decoding.lean
        )
        self._relative: RelativeBias | None = None
        if backbone.family.layers == "block":
            from offramp.core.executors.slots.positions import RelativeBias

            self._relative = RelativeBias(backbone)
        self._bias: tuple[Tensor, Tensor] | None = None
        self._tables: Tables | None = None

    def run_layers(
        self, running: range, call: Call, inputs: Tensor, *, needs_exit: bool = True
    ) -> Output:
        """Run layers, and the exit after them or the final norm, on token ids [n] or states [B, T,
        D], at the columns of `call`.

        running: layers from the first or from an exit, up to an exit or the end. needs_exit: False:
        the exit only stores its keys.
        """
        self._needs_exit = needs_exit
        final = self._call(running, call, inputs)
        return final if running.stop == self.backbone.depth else self._taken()

    def _call(self, running: range, call: Call, inputs: Tensor) -> Tensor:
        """One call on token ids [n] or [B, T], or states [B, T, D]; final-normed states [n, D],
        which mean nothing where the last layer did not run."""
        self._current.call, self._bias = call, None
        self._instead = self._plain if call.gather is None else self._packed
        self._running, self._chunk = running, inputs if inputs.is_floating_point() else None
        self._output = self._previous = None
        given = self._given(call, inputs)
        try:
            tables = self._tables_for(given)
            if tables is None and given.offset is not None:
                stack_runs(self.backbone)
            out = self._by_stack(given) if tables is None else self._by_layers(given, tables)
        finally:
            self._chunk = self._seen = None
            self.cache.release()
        return out.flatten(0, 1)

    def _given(self, call: Call, inputs: Tensor) -> Given:
        offset, first = self.held.at_front(call)
        encoder = (lambda: self._encoder_of(call)) if self.cache.cross else None
        entering = inputs if self._chunk is not None else self.backbone.as_read(inputs)
        return Given(call, entering, self.held.offsets, offset, encoder, first)

    # -- by the stack ------------------------------------------------------------------------

    def _stack_arguments(self, given: Given) -> dict[str, Any]:
        """What the stack is called with."""
        call, inputs = given.call, given.inputs
        kw: dict[str, Any] = {self._cache_name: self._seen_by(call)}
        kw |= {"inputs_embeds": inputs} if given.ids is None else {"input_ids": given.ids}
        # Some stacks size a mask of their own by the cache where they are given none.
        kw["attention_mask"] = torch.ones(
            call.shape[0], call.width, dtype=torch.long, device=self._device
        )
        if given.offsets is not None:
            kw["position_ids"] = self._position_ids(given)
        if self.cache.cross:
            states, mask = given.encoder
            kw |= {"encoder_hidden_states": states, "encoder_attention_mask": mask}
        return {**kw, "use_cache": True, "return_dict": True}

    def _position_ids(self, given: Given) -> Tensor:
        positions, call = given.positions, given.call
        assert positions is not None
        if given.offset is not None or call.beside is None:
            return positions
        return self.held.with_own(positions, call)

    def _seen_by(self, call: Call) -> Any:
        self._seen = self.cache.seen_by(call, self._unread_in(call))
        return self._seen

    def _unread_in(self, call: Call) -> Sequence[int]:
        return () if call.beside is None else sorted(self.held.by_slot[call.beside[0]].unread)

    def _encoder_of(self, call: Call) -> tuple[Tensor, Tensor]:
        """Encoder states [n, S, D] and their mask [n, S] for a call: zeros of the right length,
        except where layers have yet to make keys of the real ones."""
        lengths, device = self.cache.encoder_lengths, self._device
        if call.beside is not None:
            slot = call.beside[0]
            length, states = lengths[slot], self.held.by_slot[slot].encoder
            if states is None:
                states = torch.zeros(1, 1, 1, dtype=self.backbone.dtype, device=device)
                states = states.expand(1, length, 1)
            return states, torch.ones(1, length, dtype=torch.bool, device=device)
        width, all_lengths = max(lengths), torch.tensor(lengths, device=device)
        own = all_lengths[: len(call.queries)] if call.reads is None else all_lengths[call.reads]
        states = torch.zeros(1, 1, 1, dtype=self.backbone.dtype, device=device)
        mask = torch.arange(width, device=device) < own[:, None]
        return states.expand(len(own), width, 1), mask

    def _by_stack(self, given: Given) -> Tensor:
        out = self.intercepted.stack(**self._stack_arguments(given))
        return out.last_hidden_state  # type: ignore[no-any-return]

    # -- without the stack -------------------------------------------------------------------

    def _by_layers(self, given: Given, tables: Tables) -> Tensor:
        """The layers that run, one after the other."""
        running = self._running
        own: dict[str, Any] = {self._cache_name: self._seen_by(given.call)}
        if self._relative is not None:
            own |= zip(BIASES, self._biases(), strict=True)
        arguments, kind_of = tables.arguments(given, own), tables.kind_of
        layers, instead = self._layers, self._instead
        hidden = given.inputs if given.ids is None else tables.enter(given)
        end, before = running.stop, running.stop - 1 if self._needs_previous else -1
        for index in running:
            args, kw = arguments[kind_of[index]]
            if index == before:
                self._previous = hidden.flatten(0, -2)
            out = instead[layers[index]](hidden, *args, **kw)
            hidden = out[0] if isinstance(out, tuple) else out
        if end == self.backbone.depth:
            return self.backbone.final_norm(hidden)
        args, kw = arguments[kind_of[end]]
        self._at_exit(LayerCall(end, layers[end], hidden, args, kw, instead))
        return hidden

    def _tables_for(self, given: Given) -> Tables | None:
        """The tables for a call; None where the stack must run itself. Of the first call of a kind
        it is found out whether its layers get what the stack would hand them."""
        if self._refused or self.held.uneven or given.offset is None:
            return None
        tables = self._tables
        needed = self.cache.columns + self.held.ahead
        if self.positions is not None:
            needed = min(needed, self.positions)
        counted = given.offsets is not None
        if tables is None or tables.positions < needed or tables.counted != counted:
            tables = self._tables = self._rehearsed(needed)
        if tables is None:
            return None
        kind = given.ids is not None, given.call.beside is None, given.call.shape[1] == 1
        if kind not in tables.checked:
            try:
                tables.check(given, self._stage, self._stack_arguments(given))
                tables.checked.add(kind)
            except CannotRehearseError as error:
                self._refuse(error)
                return None
        return tables

    @cached_property
    def _stage(self) -> Stage:
        return Stage(self.backbone, self.intercepted.stack)

    def _rehearsed(self, positions: int) -> Tables | None:
        """Tables of so many positions, made once for a backbone."""
        backbone, current = self.backbone, self._current.call
        attention, layers = backbone.text_config._attn_implementation, backbone.family.layers
        kind = attention, self.held.offsets is None, backbone.dtype, backbone.device
        known = _TABLES.setdefault(backbone.stack, {})
        same, made = known.get(kind, (None, None))
        if same is None or not same():
            stack = ref(backbone.stack)
            same, made = Unchanged(lambda: _held(stack), lambda: _layers(stack, layers)), None
        if isinstance(made, str):
            self._refused = True
            return None
        if made is not None and made.positions >= positions:
            return made
        if self._relative is None:  # the others have none
            positions = max(positions, 256)
            if self.positions is not None:
                positions = min(positions, self.positions)
        try:
            given = self._in_a_row(1 if self._relative is not None else positions)
            tables = Tables(self._stage, self._stack_arguments(given), positions)
            # As by themselves: tables may depend on how many positions they are for. All positions,
            # on states that are not zero: what a stack does to states may begin at a length.
            counts = {1, max(1, tables.positions // 2), tables.positions}
            for count in counts if self._relative is None else {1}:
                again = self._in_a_row(count, filled=True)
                tables.check(again, self._stage, self._stack_arguments(again))
        except CannotRehearseError as error:
            known[kind] = same, str(error)
            self._refuse(error)
            return None
        finally:
            self._current.call = current
        known[kind] = same, tables
        return tables

    def _in_a_row(self, count: int, *, filled: bool = False) -> Given:
        """A call on so many positions, the states zero, or filled with numbers between -1 and 1."""
        backbone = self.backbone
        call = self._current.call = OneSlot(0, 0, count, self._device)
        states = torch.zeros(1, count, backbone.width, dtype=backbone.dtype, device=backbone.device)
        if filled:
            states += torch.linspace(-1, 1, backbone.width, device=backbone.device)
        offsets = None if self.held.offsets is None else torch.zeros_like(self.held.offsets)
        encoder = (lambda: self._encoder_of(call)) if self.cache.cross else None
        return Given(call, states, offsets, 0, encoder)

    def _refuse(self, error: CannotRehearseError) -> None:
        log.debug("The stack of %s runs itself in slots: %s", self.backbone.name, error)
        self._tables, self._refused = None, True

    # -- one layer ---------------------------------------------------------------------------

    def layer(self, call: LayerCall) -> Any:
        """Return a layer's output to the stack, or the state unchanged where it does not run."""
        args = call.args if self._relative is None else self._with_bias(call.args)
        made = LayerCall(call.index, call.layer, call.hidden, args, call.kw, self._instead)
        return super().layer(made)

    @property
    def _runs_anyway(self) -> bool:
        call = self._current.call
        return call.gather is not None or bool(self._unread_in(call))

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


def _held(stack: ref[nn.Module]) -> list[nn.Module]:
    held = stack()
    return [] if held is None else [held]


def _layers(stack: ref[nn.Module], layers: str) -> list[nn.Module]:
    return [part for each in _held(stack) for n, part in each.named_children() if n == layers]
