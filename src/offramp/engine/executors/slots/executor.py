"""The executor of models that keep keys and values: many sequences in slots of one cache.

The layers run one after the other, without the stack's own code where that is exact; else through a
twin of the stack. Calls over one slot are calls on contiguous columns; calls over several write and
read by index, the tokens of each slot at columns of their own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from offramp.engine.decoding.drafting import DraftBudget, Drafts
from offramp.engine.decoding.executor import Loaded, Span
from offramp.engine.executors.modules.in_place import called_in_place, cannot_compile
from offramp.engine.executors.segments import SegmentRunner
from offramp.engine.executors.slots.attention import (
    EACH,
    PACKED,
    check_exact_batches,
    with_attention,
    with_slot_masks,
)
from offramp.engine.executors.slots.cache import SlotCache
from offramp.engine.executors.slots.layout import (
    Call,
    OneSlot,
    flat,
    packed,
)
from offramp.engine.executors.slots.positions import ColumnPositions, RelativeBias
from offramp.engine.executors.slots.tables import (
    BIASES,
    CannotRehearseError,
    Given,
    Stage,
    Tables,
)
from offramp.engine.exit_check import ExitOutput, Output, joined, picked
from offramp.engine.kv_cache import cache_parameter
from offramp.engine.prompt import Prompt
from offramp.models.backbone import Backbone
from offramp.models.exits import ExitSet, first
from offramp.models.opened import LayerCall

log = logging.getLogger(__name__)

_TABLES: WeakKeyDictionary[nn.Module, dict[Any, Tables | str]] = WeakKeyDictionary()
"""What was rehearsed of a model, by kind of attention; or why a stack must run itself."""


@dataclass(eq=False)
class _Row:
    """A sequence and the slot that it is in.

    base: by segment, the column of the first state that is kept before it. offset, first: position
    of column 0, and that on the first of several axes. places: positions [..., T] of a prompt that
    waits and does not go up one by one. behind: the depth at which columns stay, and how many do.
    encoder: states [1, S, D] of an encoder that layers have yet to read; unread: which. verified: a
    column, and the drafting exit's states [n, D] from it on. entered: a column of which that exit
    has only stored the keys, and the states [1, D] that enter it.
    """

    slot: int
    base: dict[int, int]
    offset: int = 0
    first: int = 0
    places: Tensor | None = None
    behind: tuple[int, int] = (0, 0)
    encoder: Tensor | None = None
    unread: set[int] = field(default_factory=set)
    verified: tuple[int, Tensor] | None = None
    entered: tuple[int, Tensor] | None = None

    def gap(self, depth: int) -> int:
        """How much nearer to the front columns stand in the layers from `depth` on: by those that
        stayed behind before."""
        at, count = self.behind
        return count if depth >= at else 0


class SlotExecutor(SegmentRunner):
    """Runs a backbone with exits on the rows of a slot cache.

    slots: sequences at a time. limit: columns of one, at most. The rest as of `SegmentRunner`.

    packs: whether calls over several columns of several slots are packed (`layout`), as they can be
    where attention is Hugging Face's "sdpa".

    Raises:
        UnsupportedBackboneError: attention that cannot take masks of ours.
    """

    rows: int | None = None
    stages = frozenset({"pruning"})
    """Whether visual tokens of a prompt may stay behind at an exit."""

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
        self.cache = SlotCache(slots, entries, limit, encoded)
        self._device = backbone.device
        self.positions = backbone.room(0)
        self.packs = self.intercepted.stack.config._attn_implementation == "sdpa"
        with_slot_masks(self.intercepted.stack)
        self._current = self.cache.current
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
        self._rows: list[_Row] = []  # by slot
        self._offsets: Tensor | None = None  # position of column 0 [..., slots]
        self._pending: dict[int, Tensor] = {}  # by segment, states before it [slots, room, D]
        # of tables
        self._refused = bool(
            backbone.rare_layers or backbone.reads_ids or not backbone.decoding.lean
        )
        self._relative = RelativeBias(backbone) if backbone.family.layers == "block" else None
        self._bias: tuple[Tensor, Tensor] | None = None
        self._tables: Tables | None = None
        self._ahead = 0  # positions before the first column

    # -- sequences ---------------------------------------------------------------------------

    def load(self, prompt: Prompt, row: int) -> Loaded:
        """Put a row of a prompt that was read into a free slot.

        Raises:
            UnsupportedBackboneError: layers that keep a state instead of keys and values.
        """
        slot = len(self._rows)
        real = None if prompt.real is None else prompt.real[row]
        states, mask = prompt.encoder or (None, None)
        encoder = None if mask is None else mask[row].bool()
        if encoder is not None and bool(encoder.all()):
            encoder = None
        columns = self.cache.load(slot, prompt.cache, row, real, encoder)
        held = _Row(slot, dict.fromkeys(range(1, len(self._segments)), columns))
        self._place(held, prompt, row, columns)
        ran = [columns] * len(self._segments)
        if prompt.waits is not None:
            depth, waiting = prompt.waits
            segment = self.depths.index(depth) + 1
            mine = waiting[row]
            if prompt.goes_on is not None:
                mine = mine[prompt.goes_on[row]]
                if len(mine) < columns:
                    held.behind = depth, columns - len(mine)
            elif real is not None and not bool(real.all()):
                mine = mine[real[-len(mine) :]]
            self._keep(segment, held, columns - len(mine), mine)
            ran[segment:] = [columns - len(mine)] * (len(ran) - segment)
            for later in range(segment + 1, len(ran)):
                held.base[later] = columns - len(mine)
            if states is not None:
                mine = states[row : row + 1]
                held.encoder = mine if encoder is None else mine[:, encoder]
                above = self._segments[segment:]
                held.unread = {entry for running in above for entry in self._entries(running)}
        if prompt.kept is not None:
            held.entered = columns - 1, prompt.kept[row : row + 1]
        self._rows.append(held)
        return Loaded(held, columns, ran)

    def _place(self, held: _Row, prompt: Prompt, row: int, columns: int) -> None:
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
        self._offsets[..., held.slot] = offset
        axes = offset.flatten()[-3:].tolist()
        # Tables are gathered by one number a token, which is all there is behind a prompt.
        self._refused = self._refused or len({*axes}) > 1
        held.offset, held.first = axes[-1], int(offset.flatten()[0])
        self._ahead = max(self._ahead, axes[-1])
        if prompt.goes_on is not None:
            held.places = every[..., prompt.goes_on[row]]
        elif prompt.waits is not None:
            plain = torch.arange(columns, device=own.device) + offset[..., None]
            before = columns - own.shape[-1]  # of an earlier prompt; they wait nowhere
            if not torch.equal(plain[..., before:].expand_as(own), own):
                held.places = torch.cat([plain[..., :before], own], -1)

    def release(self, handle: _Row) -> None:
        """Free a slot; the last sequence moves there, so that those in use stand at the front."""
        last = self._rows.pop()
        if last is handle:
            return
        source, slot = last.slot, handle.slot
        self._rows[slot], last.slot = last, slot
        self.cache.move(source, slot)
        if self._offsets is not None:
            self._offsets[..., slot] = self._offsets[..., source]
        for kept in self._pending.values():
            kept[slot] = kept[source]

    def allow_crops(self, handle: _Row) -> bool:
        return True

    def crop(self, handle: _Row, column: int) -> None:
        for segment, base in handle.base.items():
            handle.base[segment] = min(base, column)

    def close(self) -> None:
        """Drop keys, values and states now: handler and model hold each other."""
        self.cache.drop()
        self._pending, self._tables, self._rows = {}, None, []

    # -- calls -------------------------------------------------------------------------------

    def feed(
        self,
        handles: Sequence[_Row],
        ids: Sequence[int],
        columns: Sequence[int],
        *,
        needs_exit: bool,
    ) -> ExitOutput:
        call = self._one_each(handles, columns)
        output = self.run_layers(self._segments[0], call, self._ids(ids), needs_exit=needs_exit)
        assert isinstance(output, ExitOutput)
        self._note(1, handles, columns, output.entry)
        return output

    def full(self, handles: Sequence[_Row], ids: Sequence[int], columns: Sequence[int]) -> Tensor:
        final = self._pass(handles, columns, self._ids(ids))
        for row, column in zip(handles, columns, strict=True):
            row.base = dict.fromkeys(row.base, column + 1)
        return final

    def _pass(self, rows: Sequence[_Row], columns: Sequence[int], ids: Tensor) -> Tensor:
        """Run one token of each slot through all layers; final-normed states [n, D]."""
        if not any(row.behind[1] for row in rows):
            return self._call(range(self.backbone.depth), self._one_each(rows, columns), ids)
        states: Any = ids
        for running in self._segments:  # each has columns of its own
            gaps = [row.gap(running.start) for row in rows]
            stood = [column - gap for column, gap in zip(columns, gaps, strict=True)]
            call = self._one_each(rows, stood)
            output = self.run_layers(running, call, states, needs_exit=False)
            if isinstance(output, ExitOutput):
                states = output.entry.view(*call.shape, -1)
        assert isinstance(output, Tensor)
        return output

    def draft(
        self,
        handles: Sequence[_Row],
        ids: Sequence[int],
        columns: Sequence[int],
        budgets: Sequence[DraftBudget],
    ) -> list[list[int]]:
        drafts = [*map(Drafts, budgets)]
        written = [made.ids for made in drafts]
        if self._drafter is None:
            return written
        self._enter([row for row, own in zip(handles, budgets, strict=True) if own.max_drafts])
        places, begin = [], []
        for place, (row, column) in enumerate(zip(handles, columns, strict=True)):
            first, made = row.verified or (column, ())
            if budgets[place].max_drafts and 0 <= column - 1 - first < len(made):
                places.append(place)
                begin.append(made[column - 1 - first])
        if not places:
            return written
        # All go as far as the one that goes farthest: what is too much is not looked at, and
        # written over what no draft has reached yet.
        last = (self.cache.limit or max(columns) + max(b.max_drafts for b in budgets)) - 1
        going, step, rows = set(places), 0, [handles[place] for place in places]
        tokens, states = self._ids([ids[place] for place in places]), torch.stack(begin)
        while going:
            ahead = [min(columns[place] + step, last) for place in places]
            states = self._drafted(rows, ahead, self._drafter.inputs(tokens, states))
            (tokens, shares), step = self._drafter.tokens(states), step + 1
            for place, token, share in zip(places, tokens.tolist(), shares.tolist(), strict=True):
                if place in going and not drafts[place].add(token, share):
                    going.remove(place)
        return written

    def _enter(self, rows: Sequence[_Row]) -> None:
        """Let the drafting exit run the columns of which it has only stored the keys."""
        late = [(row, *row.entered) for row in rows if row.entered is not None]
        if late:
            named, columns, entries = zip(*late, strict=True)
            states = self._drafted(named, columns, torch.cat(entries))
            for i, (row, column) in enumerate(zip(named, columns, strict=True)):
                row.verified, row.entered = (column, states[i : i + 1]), None

    def _drafted(self, rows: Sequence[_Row], columns: Sequence[int], inputs: Tensor) -> Tensor:
        """What the drafting exit makes [n, D] of a column of each slot."""
        assert self._drafter is not None
        depth, call = self._drafter.depth, self._one_each(rows, columns)
        output = self.run_layers(range(depth, depth), call, inputs.view(*call.shape, -1))
        assert isinstance(output, ExitOutput) and output.state is not None
        return output.state

    def verify(
        self, handles: Sequence[_Row], ids: Sequence[Sequence[int]], columns: Sequence[int]
    ) -> Tensor:
        spans = [
            Span(handle, column, column + len(tokens))
            for handle, tokens, column in zip(handles, ids, columns, strict=True)
        ]
        if len(spans) == 1:
            made: Any = self._through_all(self._beside(spans[0]), self._ids(ids[0])[None])
        else:
            made = self._several(spans, [*map(self._ids, ids)], self._through_all)
        if self._drafter is None:  # whoever drafts reads no states of an exit
            return made  # type: ignore[no-any-return]
        states = torch.split(made.state, [len(tokens) for tokens in ids])
        for (row, start, end), own in zip(spans, states, strict=True):
            row.verified, row.entered = (start, own), None
            row.base = dict.fromkeys(row.base, end)
        return made.entry  # type: ignore[no-any-return]

    def _through_all(self, call: Call, ids: Tensor) -> Output:
        """Final-normed states of ids [B, T], and what the drafting exit makes of them, if any."""
        final = self._call(range(self.backbone.depth), call, ids, verifies=True)
        return final if self._drafter is None else ExitOutput(final, self._taken().state)

    def run(self, segment: int, spans: Sequence[Span], asked: Sequence[int]) -> Output:
        needs_exit = len(asked) > 0
        states, stand, running = list[Tensor](), list[Span](), self._segments[segment]
        for row, start, end in spans:
            base, gap = row.base[segment], row.gap(running.start)
            states.append(self._pending[segment][row.slot, start - base : end - base])
            stand.append(Span(row, start - gap, end - gap))
        alone = [row.places is not None or row.encoder is not None for row, _, _ in spans]
        if len(spans) == 1 or any(alone):
            made = [
                self.run_layers(running, self._beside(span), state[None], needs_exit=needs_exit)
                for span, state in zip(stand, states, strict=True)
            ]
            output = joined(made)
        else:
            output = self._several(
                stand,
                states,
                lambda call, laid: self.run_layers(running, call, laid, needs_exit=needs_exit),
            )
        at = 0
        for row, start, end in spans:
            row.base[segment] = end
            self._read(row, segment)
            if isinstance(output, ExitOutput):
                self._keep(segment + 1, row, start, output.entry[at : at + end - start])
                at += end - start
        total = sum(span.end - span.first for span in spans)
        if len(asked) == total:
            return output
        if len(asked) == 1:
            return picked(output, slice(asked[0], asked[0] + 1))
        return picked(output, torch.tensor(asked, dtype=torch.long, device=self._device))

    def _several(
        self,
        spans: Sequence[Span],
        inputs: Sequence[Tensor],
        run: Callable[[Call, Tensor], Output],
    ) -> Output:
        """What `run` makes of columns of several slots in one call. inputs: each slot's, ids [n] or
        states [n, D]."""
        order = sorted(range(len(spans)), key=lambda i: spans[i].handle.slot)
        ordered = [spans[i] for i in order]
        spelt = [(row.slot, c) for row, first, end in ordered for c in range(first, end)]
        named, columns = [slot for slot, _ in spelt], [column for _, column in spelt]
        width = max(columns) + 1
        self.cache.reserve(width)
        call = (packed if self.packs else flat)(named, columns, width, self._device)
        laid = torch.cat([inputs[i] for i in order])
        output = run(call, laid.view(*call.shape, *laid.shape[1:]))
        if order == [*range(len(spans))]:
            return output
        whose = [i for i in order for _ in range(spans[i].first, spans[i].end)]
        index = sorted(range(len(whose)), key=whose.__getitem__)  # each span's stay in order
        return picked(output, torch.tensor(index, device=self._device))

    def _ids(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor(ids, device=self._device)

    def _beside(self, span: Span) -> OneSlot:
        self.cache.reserve(span.end)
        return OneSlot(span.handle.slot, span.first, span.end, self._device)

    def _one_each(self, rows: Sequence[_Row], columns: Sequence[int]) -> Call:
        """One token of each slot."""
        width = max(columns) + 1
        self.cache.reserve(width)
        if len(rows) == 1:
            return OneSlot(rows[0].slot, columns[0], width, self._device)
        return flat([row.slot for row in rows], columns, width, self._device)

    # -- what waits --------------------------------------------------------------------------

    def _note(
        self, segment: int, rows: Sequence[_Row], columns: Sequence[int], entries: Tensor
    ) -> None:
        """Keep one state of each slot that is to enter a segment."""
        places = [column - row.base[segment] for row, column in zip(rows, columns, strict=True)]
        kept = self._room(segment, max(places) + 1, entries)
        if len(rows) == 1:
            kept.select(0, rows[0].slot).narrow(0, places[0], 1).copy_(entries)
        else:
            kept[[row.slot for row in rows], places] = entries

    def _keep(self, segment: int, row: _Row, first: int, states: Tensor) -> None:
        """Keep states [n, D] of a slot's columns from `first` on that are to enter a segment."""
        if not len(states):
            return
        if segment not in self._pending or first <= row.base[segment]:
            row.base[segment] = first
        at = first - row.base[segment]
        kept = self._room(segment, at + len(states), states)
        kept[row.slot, at : at + len(states)] = states

    def _room(self, segment: int, columns: int, like: Tensor) -> Tensor:
        """What is kept before a segment, with room for so many columns of a slot."""
        kept = self._pending.get(segment)
        if kept is None or kept.shape[1] < columns:
            larger = like.new_zeros(self.cache.slots, max(64, 2 * columns), like.shape[-1])
            if kept is not None:
                larger[:, : kept.shape[1]] = kept
            kept = self._pending[segment] = larger
        return kept

    def _read(self, row: _Row, segment: int) -> None:
        """Note that a segment has run what waited of a row: of a prompt, with the encoder's
        states."""
        row.unread.difference_update(self._entries(self._segments[segment]))
        if self.backbone.depth - 1 not in row.unread:
            row.unread, row.encoder = set(), None
        if segment == len(self._segments) - 1:
            row.places = None

    # -- one call ----------------------------------------------------------------------------

    def run_layers(
        self, running: range, call: Call, inputs: Tensor, *, needs_exit: bool = True
    ) -> Output:
        """Run layers, and the exit after them or the final norm, on token ids [n] or states
        [B, T, D].

        For programs, which know themselves where they write. running: from the first layer or an
        exit on, to an exit or the end. needs_exit: False where the exit only stores its keys.
        """
        self._needs_exit = needs_exit
        final = self._call(running, call, inputs)
        return final if running.stop == self.backbone.depth else self._taken()

    def _call(
        self, running: range, call: Call, inputs: Tensor, *, verifies: bool = False
    ) -> Tensor:
        """One call on token ids [n] or [B, T], or states [B, T, D]; final-normed states [n, D],
        which mean nothing where the last layer did not run."""
        self._current.call, self._bias, self._verifies = call, None, verifies
        self._needs_exit = self._needs_exit or verifies
        self._running, self._chunk = running, inputs if running.start else None
        self._output = self._previous = None
        given = self._given(call, inputs)
        try:
            tables = self._tables_for(given)
            if tables is None and given.offset is not None:
                cannot_compile(self.backbone, "this model or request needs its own stack")
            out = self._by_stack(given) if tables is None else self._by_layers(given, tables)
        finally:
            self._chunk = self._seen = None
            self.cache.release()
        return out.flatten(0, 1)

    def _given(self, call: Call, inputs: Tensor) -> Given:
        offset: int | None = 0
        first = 0
        if call.beside is not None:
            row, start = self._rows[call.beside[0]], call.beside[1]
            gap = row.gap(self._running.start)
            offset, first = row.offset + gap if self._offsets is not None else 0, row.first + gap
            if row.places is not None and start < row.places.shape[-1]:
                offset = None  # a prompt's positions are its own
        encoder = (lambda: self._encoder_of(call)) if self.cache.cross else None
        return Given(call, inputs, self._offsets_here, offset, encoder, first)

    @property
    def _offsets_here(self) -> Tensor | None:
        """Positions of column 0 [..., slots] in the layers of the current call."""
        if self._offsets is None or not any(row.behind[1] for row in self._rows):
            return self._offsets
        gaps = [row.gap(self._running.start) for row in self._rows]
        gaps += [0] * (self.cache.slots - len(gaps))  # of slots that are free
        return self._offsets + torch.tensor(gaps, device=self._offsets.device)

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
        row, start = self._rows[call.beside[0]], call.beside[1]
        assert row.places is not None
        own = row.places[..., start : start + call.shape[1]]
        positions = positions.clone()
        positions[..., 0, : own.shape[-1]] = own
        return positions

    def _seen_by(self, call: Call) -> Any:
        self._seen = self.cache.seen_by(call, self._unread_in(call))
        return self._seen

    def _unread_in(self, call: Call) -> Sequence[int]:
        return () if call.beside is None else sorted(self._rows[call.beside[0]].unread)

    def _encoder_of(self, call: Call) -> tuple[Tensor, Tensor]:
        """What stands for the encoder: only the length of its states is looked at, and its mask.
        Its states, where layers have yet to make keys of them."""
        lengths, device = self.cache.encoder_lengths, self._device
        if call.beside is not None:
            slot = call.beside[0]
            length, states = lengths[slot], self._rows[slot].encoder
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
        running = self._running
        own: dict[str, Any] = {self._cache_name: self._seen_by(given.call)}
        if self._relative is not None:
            own |= zip(BIASES, self._biases(), strict=True)
        arguments, kind_of = tables.arguments(given, own), tables.kind_of
        layers, instead, ours = self._layers, self._instead, self._ours
        hidden = given.inputs if running.start else tables.enter(given)
        end, before = running.stop, running.stop - 1 if self._needs_previous else -1
        drafting = -1
        if self._verifies and self._drafter is not None:
            drafting = self._drafter.depth
        for index in running:
            args, kw = arguments[kind_of[index]]
            module = layers[index]
            if index == drafting:
                self._at_exit(LayerCall(index, module, hidden, args, kw, instead))
            if index == before:
                self._previous = hidden.flatten(0, -2)
            out = instead[self._called(module) if ours else module](hidden, *args, **kw)
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
            # As by themselves: tables may depend on how many positions they are for. All positions,
            # on states that are not zero: what a stack does to states may begin at a length.
            counts = {1, max(1, tables.positions // 2), tables.positions}
            for count in counts if self._relative is None else {1}:
                again = self._in_a_row(count, filled=True)
                tables.check(again, self._stage, self._stack_arguments(again))
        except CannotRehearseError as error:
            known[kind] = str(error)
            self._refuse(error)
            return None
        finally:
            self._current.call = current
        known[kind] = tables
        return tables

    def _in_a_row(self, count: int, *, filled: bool = False) -> Given:
        """A call on so many positions, the states zero, or filled with numbers between -1 and 1."""
        backbone = self.backbone
        call = self._current.call = OneSlot(0, 0, count, self._device)
        states = torch.zeros(1, count, backbone.width, dtype=backbone.dtype, device=backbone.device)
        if filled:
            states += torch.linspace(-1, 1, backbone.width, device=backbone.device)
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
        return super().layer(made)

    def _called(self, module: nn.Module) -> nn.Module:
        """A layer or exit, or its twin where attention is ours."""
        if not self._ours:
            return module
        if module not in self._twins:
            kind = EACH if self._exact else PACKED
            self._twins[module] = with_attention(module, kind, _current=self._current)
        return self._twins[module]

    @property
    def _runs_anyway(self) -> bool:
        return self._packs or bool(self._unread_in(self._current.call))

    def _run_exit(self, call: LayerCall) -> Tensor:
        if self.exits is None or not self._ours:
            return super()._run_exit(call)
        return first(call.run(self._called(self.exits.at(call.index))))

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
