"""The executor of models that keep keys and values: many sequences in slots of one cache.

The layers run one after the other, without the stack's own code where that is exact; else through a
twin of the stack. Calls over one slot are calls on contiguous columns; calls over several write and
read by index, the tokens of each slot at columns of their own.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from offramp.engine.decoding.executor import Ends, Loaded, Span
from offramp.engine.decoding.prompt import Prompt
from offramp.engine.decoding.reader import Looks, anyone, no_one
from offramp.engine.drafter import Drafter
from offramp.engine.executors.modules.compiled import called_in_place, cannot_compile
from offramp.engine.executors.slots.attention import EACH, PACKED, can_pack, with_attention
from offramp.engine.executors.slots.cache import SlotCache
from offramp.engine.executors.slots.exact_batches import check_exact_batches
from offramp.engine.executors.slots.layout import (
    Call,
    CurrentCall,
    OneSlot,
    flat,
    one_each,
    packed,
)
from offramp.engine.executors.slots.masks import with_slot_masks
from offramp.engine.executors.slots.positions import ColumnPositions, RelativeBias
from offramp.engine.executors.slots.rehearsal import CannotRehearseError, Stage
from offramp.engine.executors.slots.tables import BIASES, Given, Tables
from offramp.engine.exit_check import ExitOutput, Output, joined, picked
from offramp.engine.kv_cache import cache_parameter, entries_between, store_exit_keys
from offramp.models.backbone import Backbone
from offramp.models.exits import ExitSet, first
from offramp.models.intercept import InterceptedModel
from offramp.models.opened import LayerCall

log = logging.getLogger(__name__)

_TABLES: WeakKeyDictionary[nn.Module, dict[Any, Tables | str]] = WeakKeyDictionary()
"""What was rehearsed of a model, by kind of attention; or why a stack must run itself."""


class SlotExecutor:
    """Runs a backbone with exits on the rows of a slot cache. The layer handler of its twin stack.

    depths: of the exits in use. slots: sequences at a time. limit: columns of one, at most.
    watches: whether scores read the state before an exit's entry. drafter: of the exit that drafts
    on, one of `depths`.

    packs: whether calls over several columns of several slots are packed (`layout`), as they can be
    where attention is Hugging Face's "sdpa".

    Raises:
        UnsupportedBackboneError: attention that cannot take masks of ours.
    """

    rows: int | None = None
    prunes = True
    """Whether visual tokens of a prompt may stay behind at an exit."""

    def __init__(
        self,
        backbone: Backbone,
        exits: ExitSet | None,
        depths: Sequence[int],
        *,
        slots: int = 1,
        limit: int | None = None,
        watches: bool = False,
        drafter: Drafter | None = None,
    ) -> None:
        self.backbone, self.exits, self.depths = backbone, exits, tuple(sorted(depths))
        self._bounds = (0, *self.depths, backbone.depth)
        entries = backbone.depth + (len(exits.entries) if exits is not None else 0)
        encoded = backbone.is_encoder_decoder
        self.cache = SlotCache(slots, entries, limit, encoded)
        self.intercepted = InterceptedModel(backbone, self)
        self._watches, self._device = watches, backbone.device
        self._drafter = drafter
        self.positions = backbone.room(0)
        self.packs = can_pack(self.intercepted.stack)
        with_slot_masks(self.intercepted.stack)
        self._current = CurrentCall()
        self._instead = called_in_place(backbone)
        self._exact = backbone.decoding.exact_batches
        if self._exact:
            check_exact_batches(backbone, exits, self.packs)
        self._twins: dict[nn.Module, nn.Module] = {}  # of layers and exits, with attention of ours
        stack = self.intercepted.stack
        embed = getattr(stack, "embed_positions", None)
        if embed is not None and encoded:
            stack._modules["embed_positions"] = ColumnPositions(embed, self._current)
        self._cache_name = cache_parameter(stack)
        self._layers = [*backbone.layers]
        # of slots
        self._slot_of: dict[int, int] = {}
        self._handles: list[int] = []  # by slot
        self._count = 0
        self._offsets: Tensor | None = None  # position of column 0 [..., slots]
        self._offset_of: list[int | None] = [0] * slots
        self._first_of = [0] * slots  # of the first of several axes
        self._places: dict[int, Tensor] = {}  # positions of a prompt that waits [..., T], by slot
        self._behind: dict[int, tuple[int, int]] = {}  # depth at which columns stay, how many do
        self._encoder: dict[int, Tensor] = {}  # states of an encoder [1, S, D], by slot
        self._unread: dict[int, set[int]] = {}  # layers which these have not gone through
        self._verified: dict[int, tuple[int, Tensor]] = {}  # a column, the drafter's from it
        self._entered: dict[int, tuple[int, Tensor]] = {}  # a column whose keys it has, what enters
        self._entries: dict[int, Tensor] = {}  # by segment, states before it [slots, room, D]
        self._base: dict[int, list[int]] = {k: [0] * slots for k in range(1, len(self._bounds) - 1)}
        # of tables
        self._refused = bool(
            backbone.rare_layers or backbone.reads_ids or not backbone.decoding.lean
        )
        self._relative = RelativeBias(backbone) if backbone.family.layers == "block" else None
        self._bias: tuple[Tensor, Tensor] | None = None
        self._tables: Tables | None = None
        self._ahead = 0  # positions before the first column
        # of the current call
        self._running = range(0)
        self._keys_only = self._verifies = False
        self._looks: Looks | None = None
        self._chunk: Tensor | None = None
        self._output: ExitOutput | None = None
        self._previous: Tensor | None = None

    # -- sequences ---------------------------------------------------------------------------

    def load(self, prompt: Prompt, row: int) -> Loaded:
        """Put a row of a prompt that was read into a free slot.

        Raises:
            UnsupportedBackboneError: layers that keep a state instead of keys and values.
        """
        slot = len(self._handles)
        real = None if prompt.real is None else prompt.real[row]
        states, mask = prompt.encoder or (None, None)
        encoder = None if mask is None else mask[row].bool()
        if encoder is not None and bool(encoder.all()):
            encoder = None
        columns = self.cache.load(slot, prompt.cache, row, real, encoder)
        self._place(slot, prompt, row, columns)
        ran = [columns] * (len(self._bounds) - 1)
        if prompt.waits is not None:
            depth, waiting = prompt.waits
            segment = self.depths.index(depth) + 1
            mine = waiting[row]
            if prompt.goes_on is not None:
                mine = mine[prompt.goes_on[row]]
                if len(mine) < columns:
                    self._behind[slot] = depth, columns - len(mine)
            elif real is not None and not bool(real.all()):
                mine = mine[real[-len(mine) :]]
            self._keep(segment, slot, columns - len(mine), mine)
            ran[segment:] = [columns - len(mine)] * (len(ran) - segment)
            for later in range(segment + 1, len(ran)):
                self._base[later][slot] = columns - len(mine)
            if states is not None:
                mine = states[row : row + 1]
                self._encoder[slot] = mine if encoder is None else mine[:, encoder]
                self._unread[slot] = {e for k in range(segment, len(ran)) for e in self._written(k)}
        for segment in self._base:
            if ran[segment] == columns:
                self._base[segment][slot] = columns
        if prompt.kept is not None:
            self._entered[slot] = columns - 1, prompt.kept[row : row + 1]
        self._count += 1
        self._handles.append(self._count)
        self._slot_of[self._count] = slot
        return Loaded(self._count, columns, ran)

    def _place(self, slot: int, prompt: Prompt, row: int, columns: int) -> None:
        """Note the positions of a prompt, where the stack takes any."""
        positions = prompt.positions
        if positions is None:
            return
        every = own = positions[..., row if positions.shape[-2] > 1 else 0, :]  # [..., T]
        if prompt.real is not None and own.shape[-1] == prompt.real.shape[1]:
            own = own[..., prompt.real[row]]
        offset = own[..., -1] + 1 - columns
        if self._offsets is None:
            self._offsets = offset.new_zeros(*offset.shape, self.cache.slots)
        self._offsets[..., slot] = offset
        axes = offset.flatten()[-3:].tolist()
        # Tables are gathered by one number a token, which is all there is behind a prompt.
        self._refused = self._refused or len({*axes}) > 1
        self._offset_of[slot], self._first_of[slot] = axes[-1], int(offset.flatten()[0])
        self._ahead = max(self._ahead, axes[-1])
        if prompt.goes_on is not None:
            self._places[slot] = every[..., prompt.goes_on[row]]
        elif prompt.waits is not None:
            plain = torch.arange(columns, device=own.device) + offset[..., None]
            before = columns - own.shape[-1]  # of an earlier prompt; they wait nowhere
            if not torch.equal(plain[..., before:].expand_as(own), own):
                self._places[slot] = torch.cat([plain[..., :before], own], -1)

    def release(self, handle: int) -> None:
        """Free a slot; the last sequence moves there, so that those in use stand at the front."""
        slot = self._slot_of.pop(handle)
        source = len(self._handles) - 1
        last = self._handles.pop()
        if source != slot:
            self._handles[slot] = last
            self._slot_of[last] = slot
            self.cache.move(source, slot)
            if self._offsets is not None:
                self._offsets[..., slot] = self._offsets[..., source]
            self._offset_of[slot] = self._offset_of[source]
            self._first_of[slot] = self._first_of[source]
            for kept in self._entries.values():
                kept[slot] = kept[source]
            for base in self._base.values():
                base[slot] = base[source]
        held: tuple[dict[int, Any], ...] = (
            self._places, self._encoder, self._unread, self._verified, self._entered, self._behind,
        )  # fmt: skip
        for table in held:
            table.pop(slot, None)
            if source in table:
                table[slot] = table.pop(source)

    def allow_crops(self, handle: int) -> bool:
        return True

    def crop(self, handle: int, column: int) -> None:
        slot = self._slot_of[handle]
        for base in self._base.values():
            base[slot] = min(base[slot], column)

    def trial(
        self, handles: Sequence[int], ids: Sequence[int], columns: Sequence[int]
    ) -> Tensor | None:
        slots = [self._slot_of[handle] for handle in handles]
        return self._pass(slots, columns, self._ids(ids))  # what it writes is written again

    def close(self) -> None:
        """Drop keys, values and states now: handler and model hold each other."""
        self.cache.drop()
        self._entries, self._tables, self._looks = {}, None, None
        self._verified, self._entered = {}, {}

    # -- calls -------------------------------------------------------------------------------

    def feed(
        self, handles: Sequence[int], ids: Sequence[int], columns: Sequence[int], looks: Looks
    ) -> ExitOutput:
        slots = [self._slot_of[handle] for handle in handles]
        output = self._run_segment(0, self._one_each(slots, columns), self._ids(ids), looks)
        assert isinstance(output, ExitOutput)
        self._note(1, slots, columns, output.entry)
        return output

    def full(
        self,
        handles: Sequence[int],
        ids: Sequence[int],
        columns: Sequence[int],
        *,
        exits: bool,
    ) -> Tensor:
        slots = [self._slot_of[handle] for handle in handles]
        self._keys_only = exits and bool(self.depths)
        try:
            final = self._pass(slots, columns, self._ids(ids))
        finally:
            self._keys_only = False
        entry, self._output = self._output, None
        for i, (slot, column) in enumerate(zip(slots, columns, strict=True)):
            for base in self._base.values():
                base[slot] = column + 1
            if entry is not None:
                self._entered[slot] = column, entry.entry[i : i + 1]
        return final

    def _pass(self, slots: Sequence[int], columns: Sequence[int], ids: Tensor) -> Tensor:
        """One token of each slot through all layers; final-normed states [n, D]."""
        if not any(slot in self._behind for slot in slots):
            return self._call(range(self.backbone.depth), self._one_each(slots, columns), ids)
        states: Any = ids
        for segment, start in enumerate(self._bounds[:-1]):  # each has columns of its own
            call = self._one_each(slots, self._stood(slots, columns, start))
            output = self._run_segment(segment, call, states, no_one)
            if isinstance(output, ExitOutput):
                states = output.entry.view(*call.shape, -1)
        assert isinstance(output, Tensor)
        return output

    def _stood(self, slots: Sequence[int], columns: Sequence[int], depth: int) -> list[int]:
        """Where columns of sequences stand in the layers from `depth` on: nearer to the front by
        those that stayed behind before."""
        return [
            column - self._gap(slot, depth) for slot, column in zip(slots, columns, strict=True)
        ]

    def _gap(self, slot: int, depth: int) -> int:
        at, count = self._behind.get(slot, (0, 0))
        return count if depth >= at else 0

    def draft(
        self,
        handles: Sequence[int],
        ids: Sequence[int],
        columns: Sequence[int],
        most: Sequence[int],
        ends: Sequence[Ends],
    ) -> list[list[int]]:
        written: list[list[int]] = [[] for _ in handles]
        if self._drafter is None:
            return written
        slots = [self._slot_of[handle] for handle in handles]
        self._enter([slot for slot, count in zip(slots, most, strict=True) if count])
        rows, begin = [], []
        for row, (slot, column) in enumerate(zip(slots, columns, strict=True)):
            first, made = self._verified.get(slot, (column, ()))
            if most[row] and 0 <= column - 1 - first < len(made):
                rows.append(row)
                begin.append(made[column - 1 - first])
        if not rows:
            return written
        # All go as far as the one that goes farthest: what is too much is not looked at.
        going, step = set(rows), 0
        tokens, states = self._ids([ids[row] for row in rows]), torch.stack(begin)
        while going:
            ahead = [columns[row] + step for row in rows]
            states = self._drafted(
                [slots[row] for row in rows], ahead, self._drafter.inputs(tokens, states)
            )
            tokens, step = self._drafter.tokens(states), step + 1
            for row, token in zip(rows, tokens.tolist(), strict=True):
                if row in going:
                    written[row].append(token)
                    if step == most[row] or ends[row](token):
                        going.remove(row)
        return written

    def _enter(self, slots: Sequence[int]) -> None:
        """Let the drafting exit run the columns of which it has only stored the keys."""
        late = [(slot, *self._entered.pop(slot)) for slot in slots if slot in self._entered]
        if late:
            named, columns, entries = zip(*late, strict=True)
            states = self._drafted(named, columns, torch.cat(entries))
            for i, (slot, column) in enumerate(zip(named, columns, strict=True)):
                self._verified[slot] = column, states[i : i + 1]

    def _drafted(
        self, slots: Sequence[int], columns: Sequence[int], inputs: Tensor
    ) -> Tensor:
        """What the drafting exit makes [n, D] of a column of each slot."""
        assert self._drafter is not None
        depth, call = self._drafter.depth, self._one_each(slots, columns)
        output = self.run_layers(range(depth, depth), call, inputs.view(*call.shape, -1), anyone)
        assert isinstance(output, ExitOutput) and output.state is not None
        return output.state

    def verify(
        self, handles: Sequence[int], ids: Sequence[Sequence[int]], columns: Sequence[int]
    ) -> Tensor:
        slots = [self._slot_of[handle] for handle in handles]
        spans = [
            Span(handle, column, column + len(tokens))
            for handle, tokens, column in zip(handles, ids, columns, strict=True)
        ]
        self._verifies = True
        try:
            if len(slots) == 1:
                call = self._beside(slots[0], spans[0])
                made: Any = self._through_all(call, self._ids(ids[0])[None])
            else:
                made = self._several(slots, spans, [*map(self._ids, ids)], self._through_all)
        finally:
            self._verifies = False
        if self._drafter is None:  # whoever drafts reads no states of an exit
            return made  # type: ignore[no-any-return]
        states = torch.split(made.state, [len(tokens) for tokens in ids])
        for slot, span, own in zip(slots, spans, states, strict=True):
            self._verified[slot] = span.first, own
            self._entered.pop(slot, None)
            for base in self._base.values():
                base[slot] = span.end
        return made.entry  # type: ignore[no-any-return]

    def _through_all(self, call: Call, ids: Tensor) -> Output:
        """Final-normed states of ids [B, T], and what the drafting exit makes of them, if any."""
        final = self._call(range(self.backbone.depth), call, ids)
        if self._drafter is None:
            return final
        output, self._output = self._output, None
        assert output is not None
        return ExitOutput(final, output.state)

    def run(
        self, segment: int, spans: Sequence[Span], asked: Sequence[int], looks: Looks
    ) -> Output:
        slots = [self._slot_of[span.handle] for span in spans]
        base = self._base[segment]
        states = [
            self._entries[segment][slot, span.first - base[slot] : span.end - base[slot]]
            for slot, span in zip(slots, spans, strict=True)
        ]
        alone = [slot in self._places or slot in self._encoder for slot in slots]
        stand = [
            Span(span.handle, *self._stood([slot, slot], span[1:], self._bounds[segment]))
            for slot, span in zip(slots, spans, strict=True)
        ]
        if len(spans) == 1 or any(alone):
            made = [
                self._run_segment(segment, self._beside(slot, span), state[None], looks)
                for slot, span, state in zip(slots, stand, states, strict=True)
            ]
            output = joined(made)
        else:
            output = self._several(
                slots,
                stand,
                states,
                lambda call, laid: self._run_segment(segment, call, laid, looks),
            )
        for slot, span in zip(slots, spans, strict=True):
            base[slot] = span.end
            self._read(slot, segment, span)
        if isinstance(output, ExitOutput):
            at = 0
            for slot, span in zip(slots, spans, strict=True):
                new = span.end - span.first
                self._keep(segment + 1, slot, span.first, output.entry[at : at + new])
                at += new
        total = sum(span.end - span.first for span in spans)
        if len(asked) == total:
            return output
        if len(asked) == 1:
            return picked(output, slice(asked[0], asked[0] + 1))
        return picked(output, torch.tensor(asked, dtype=torch.long, device=self._device))

    def _several(
        self,
        slots: Sequence[int],
        spans: Sequence[Span],
        inputs: Sequence[Tensor],
        run: Callable[[Call, Tensor], Output],
    ) -> Output:
        """What `run` makes of columns of several slots in one call. inputs: each slot's, ids [n] or
        states [n, D]."""
        order = sorted(range(len(slots)), key=lambda i: slots[i])
        spelt = [(slots[i], c) for i in order for c in range(spans[i].first, spans[i].end)]
        named, columns = [slot for slot, _ in spelt], [column for _, column in spelt]
        width = max(columns) + 1
        self.cache.reserve(width)
        call = (packed if self.packs else flat)(named, columns, width, self._device)
        laid = torch.cat([inputs[i] for i in order])
        output = run(call, laid.view(*call.shape, *laid.shape[1:]))
        if order == [*range(len(slots))]:
            return output
        where, at = {}, 0
        for i in order:
            where[i] = at
            at += spans[i].end - spans[i].first
        index = [
            where[i] + n for i in range(len(spans)) for n in range(spans[i].end - spans[i].first)
        ]
        return picked(output, torch.tensor(index, device=self._device))

    def _ids(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor(ids, device=self._device)

    def _beside(self, slot: int, span: Span) -> OneSlot:
        self.cache.reserve(span.end)
        return OneSlot(slot, span.first, span.end, self._device)

    def _one_each(self, slots: Sequence[int], columns: Sequence[int]) -> Call:
        """One token of each slot."""
        width = max(columns) + 1
        self.cache.reserve(width)
        if len(slots) == 1:
            return OneSlot(slots[0], columns[0], width, self._device)
        return one_each(slots, columns, width, self._device)

    # -- what waits --------------------------------------------------------------------------

    def _note(
        self, segment: int, slots: Sequence[int], columns: Sequence[int], entries: Tensor
    ) -> None:
        """Keep one state of each slot that is to enter a segment."""
        base = self._base[segment]
        places = [column - base[slot] for slot, column in zip(slots, columns, strict=True)]
        kept = self._room(segment, max(places) + 1, entries)
        if len(slots) == 1:
            kept.select(0, slots[0]).narrow(0, places[0], 1).copy_(entries)
        else:
            kept[slots, places] = entries

    def _keep(self, segment: int, slot: int, first: int, states: Tensor) -> None:
        """Keep states [n, D] of a slot's columns from `first` on that are to enter a segment."""
        if not len(states):
            return
        base = self._base[segment]
        kept = self._entries.get(segment)
        if kept is None or first <= base[slot]:
            base[slot] = first
        at = first - base[slot]
        kept = self._room(segment, at + len(states), states)
        kept[slot, at : at + len(states)] = states

    def _room(self, segment: int, columns: int, like: Tensor) -> Tensor:
        """What is kept before a segment, with room for so many columns of a slot."""
        kept = self._entries.get(segment)
        if kept is None or kept.shape[1] < columns:
            larger = like.new_zeros(self.cache.slots, max(64, 2 * columns), like.shape[-1])
            if kept is not None:
                larger[:, : kept.shape[1]] = kept
            kept = self._entries[segment] = larger
        return kept

    def _read(self, slot: int, segment: int, span: Span) -> None:
        """Note that a segment has run a slot's columns: of a prompt that waited, with the encoder's
        states."""
        if slot in self._unread:
            self._unread[slot].difference_update(self._written(segment))
            last = self.backbone.depth - 1
            if last not in self._unread[slot]:
                del self._unread[slot], self._encoder[slot]
        if slot in self._places and segment == len(self._bounds) - 2:
            del self._places[slot]

    def _written(self, segment: int) -> list[int]:
        """Entries of the cache that a segment writes."""
        start, end = self._bounds[segment : segment + 2]
        return entries_between(self.backbone, self.exits, start, end)

    # -- one call ----------------------------------------------------------------------------

    def _run_segment(
        self, segment: int, call: Call, inputs: Tensor, looks: Looks
    ) -> Output:
        """Layers of a segment and the exit behind them, or the final norm."""
        running = range(self._bounds[segment], self._bounds[segment + 1])
        return self.run_layers(running, call, inputs, looks)

    def run_layers(
        self, running: range, call: Call, inputs: Tensor, looks: Looks
    ) -> Output:
        """Layers, and the exit behind them or the final norm, on token ids [n] or states [B, T, D].

        For programs, which know themselves where they write. running: from the first layer or an
        exit on, to an exit or the end.
        """
        self._looks = looks
        final = self._call(running, call, inputs)
        if running.stop == self.backbone.depth:
            return final
        output, self._output = self._output, None
        assert output is not None
        return output

    def _call(self, running: range, call: Call, inputs: Tensor) -> Tensor:
        """One call on token ids [n] or [B, T], or states [B, T, D]; final-normed states [n, D],
        which mean nothing where the last layer did not run."""
        self._current.call, self._bias = call, None
        self._running, self._chunk = running, inputs if running.start else None
        self._output = self._previous = None
        given = self._given(call, inputs)
        try:
            tables = self._tables_for(given)
            if tables is None and given.offset is not None:
                cannot_compile(self.backbone, "this model or request needs its own stack")
            out = self._by_stack(given) if tables is None else self._by_layers(given, tables)
        finally:
            self._chunk = None
            self.cache.release()
        return out.flatten(0, 1)

    def _given(self, call: Call, inputs: Tensor) -> Given:
        offset: int | None = 0
        if call.beside is not None:
            slot, start = call.beside
            gap = self._gap(slot, self._running.start)
            offset = (self._offset_of[slot] or 0) + gap if self._offsets is not None else 0
            places = self._places.get(slot)
            if places is not None and start < places.shape[-1]:
                offset = None  # a prompt's positions are its own
        encoder = (lambda: self._encoder_of(call)) if self.cache.cross else None
        first = 0 if call.beside is None else self._first_of[call.beside[0]] + gap
        return Given(call, inputs, self._offsets_here, offset, encoder, first)

    @property
    def _offsets_here(self) -> Tensor | None:
        """Positions of column 0 [..., slots] in the layers of the current call."""
        offsets, start = self._offsets, self._running.start
        if offsets is None or not any(start >= depth for depth, _ in self._behind.values()):
            return offsets
        gaps = [self._gap(slot, start) for slot in range(self.cache.slots)]
        return offsets + torch.tensor(gaps, device=offsets.device)

    def _stack_arguments(self, given: Given) -> dict[str, Any]:
        """What the stack is called with."""
        call, inputs = given.call, given.inputs
        kw: dict[str, Any] = {self._cache_name: self.cache.seen_by(call, self._unread_in(call))}
        kw |= {"inputs_embeds": inputs} if given.ids is None else {"input_ids": given.ids}
        # Some stacks size a mask of their own by the cache where they are given none.
        kw["attention_mask"] = torch.ones(
            call.shape[0], call.width, dtype=torch.long, device=self._device
        )
        if given.takes_positions:
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
        slot, start = call.beside
        own = self._places[slot][..., start : start + call.shape[1]]
        positions = positions.clone()
        positions[..., 0, : own.shape[-1]] = own
        return positions

    def _unread_in(self, call: Call) -> Sequence[int]:
        return () if call.beside is None else sorted(self._unread.get(call.beside[0], ()))

    def _encoder_of(self, call: Call) -> tuple[Tensor, Tensor]:
        """What stands for the encoder: only the length of its states is looked at, and its mask.
        Its states, where layers have yet to make keys of them."""
        lengths, device = self.cache.encoder_lengths, self._device
        if call.beside is not None:
            slot = call.beside[0]
            length = lengths[slot]
            states = self._encoder.get(slot)
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

    def _by_layers(self, given: Given, tables: Tables) -> Tensor:
        """The layers that run, one after the other."""
        call, running = given.call, self._running
        own: dict[str, Any] = {self._cache_name: self.cache.seen_by(call, self._unread_in(call))}
        if self._relative is not None:
            own |= zip(BIASES, self._biases(), strict=True)
        arguments, kind_of = tables.arguments(given, own), tables.kind_of
        layers, instead, ours = self._layers, self._instead, self._ours
        hidden = given.inputs if running.start else tables.enter(given)
        end, before = running.stop, running.stop - 1 if self._watches else -1
        for index in running:
            args, kw = arguments[kind_of[index]]
            module = layers[index]
            if (self._keys_only or self._verifies) and index in self.depths:
                self._pass_exit(LayerCall(index, module, hidden, args, kw, instead))
            if index == before:
                self._previous = hidden.flatten(0, -2)
            out = instead[self._running_module(module) if ours else module](hidden, *args, **kw)
            hidden = out[0] if isinstance(out, tuple) else out
        if end == self.backbone.depth:
            return self.backbone.final_norm(hidden)
        args, kw = arguments[kind_of[end]]
        self._at_exit(LayerCall(end, layers[end], hidden, args, kw, instead))
        return hidden

    # -- without the stack -------------------------------------------------------------------

    def _tables_for(self, given: Given) -> Tables | None:
        """The tables for a call; None where the stack must run itself. Of the first call of a kind
        it is found out whether its layers get what the stack would hand them."""
        if self._refused or given.offset is None:
            return None
        tables = self._tables
        needed = self.cache.columns + self._ahead
        if self.positions is not None:
            needed = min(needed, self.positions)
        if tables is None or tables.positions < needed:
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
        attention = backbone.text_config._attn_implementation
        kind = attention, self._offsets is None, backbone.dtype, backbone.device
        known = _TABLES.setdefault(backbone.model, {})
        made = known.get(kind)
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
            # As by themselves: tables may depend on how many positions they are for.
            for count in {1, max(1, tables.positions // 2)} if self._relative is None else {1}:
                fewer = self._in_a_row(count)
                tables.check(fewer, self._stage, self._stack_arguments(fewer))
        except CannotRehearseError as error:
            known[kind] = str(error)
            self._refuse(error)
            return None
        finally:
            self._current.call = current
            self.cache.release()
        known[kind] = tables
        return tables

    def _in_a_row(self, count: int) -> Given:
        """A call on so many positions, the states zero."""
        backbone = self.backbone
        call = self._current.call = OneSlot(0, 0, count, self._device)
        states = torch.zeros(1, count, backbone.width, dtype=backbone.dtype, device=backbone.device)
        offsets = None if self._offsets is None else torch.zeros_like(self._offsets)
        encoder = (lambda: self._encoder_of(call)) if self.cache.cross else None
        return Given(call, states, offsets, 0, encoder)

    def _refuse(self, error: CannotRehearseError) -> None:
        log.debug("The stack of %s runs itself in slots: %s", self.backbone.name, error)
        self._tables, self._refused = None, True

    # -- one layer ---------------------------------------------------------------------------

    def layer(self, call: LayerCall) -> Any:
        """What the stack gets for a layer: its output, or the state handed through."""
        args = call.args if self._relative is None else self._with_bias(call.args)
        instead = self._instead if self.backbone.decoding.lean else None
        made = LayerCall(call.index, call.layer, call.hidden, args, call.kw, instead)
        return self._run_layer(made)

    def _run_layer(self, call: LayerCall) -> Any:
        index, running = call.index, self._running
        if index < running.start or index > running.stop:
            return self.backbone.skipped_layer_output(call)
        if index == running.start and self._chunk is not None:
            call = replace(call, hidden=self._chunk)
        if index == running.stop:
            self._at_exit(call)
            return self.backbone.skipped_layer_output(call)
        if (self._keys_only or self._verifies) and index in self.depths:
            self._pass_exit(call)
        if self._watches and index + 1 == running.stop:
            self._previous = call.hidden.flatten(0, -2)
        return call.run(self._running_module(call.layer))

    def _running_module(self, module: nn.Module) -> nn.Module:
        """A layer or exit, or its twin where attention is ours."""
        if not self._ours:
            return module
        if module not in self._twins:
            kind = EACH if self._exact else PACKED
            self._twins[module] = with_attention(module, kind, _current=self._current)
        return self._twins[module]

    def _pass_exit(self, call: LayerCall) -> None:
        """Of a call through all layers: run the drafting exit where it verifies, and store the
        others' keys."""
        if self._drafter is not None and call.index == self._drafter.depth:
            self._looks = anyone if self._verifies else no_one
            self._at_exit(call)
        elif self._packs:
            assert self.exits is not None
            call.run(self._running_module(self.exits.at(call.index)))
        else:
            self._store_exit_keys(call)

    def _at_exit(self, call: LayerCall) -> None:
        """Run the exit before this layer, or only store its keys where nobody looks."""
        assert self.exits is not None and self._looks is not None
        entry = call.hidden.flatten(0, -2)
        whole = self._packs or bool(self._unread_in(self._current.call))
        if not whole and not self._looks(call.index, entry):
            self._store_exit_keys(call)
            self._output = ExitOutput(entry, None, self._previous)
            return
        if self._ours:
            state = first(call.run(self._running_module(self.exits.at(call.index))))
        else:
            state = self.exits.run(call.index, call)
        self._output = ExitOutput(entry, state.flatten(0, -2), self._previous)

    def _store_exit_keys(self, call: LayerCall) -> None:
        assert self.exits is not None
        named = {**dict(zip(_names(call.layer), call.args, strict=False)), **call.kw}
        store_exit_keys(named[self._cache_name], self.exits, call)

    @property
    def _ours(self) -> bool:
        """Whether the attention of this call is ours."""
        return self._exact or self._packs

    @property
    def _packs(self) -> bool:
        call = self._current.call
        return call.beside is None and call.gather is not None

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


def _names(layer: nn.Module) -> list[str]:
    """Of a layer's arguments behind the hidden states."""
    return [*inspect.signature(type(layer).forward).parameters][2:]
