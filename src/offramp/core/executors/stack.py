"""The executor of models that must run themselves: recurrent states, masks of their own, several
devices.

The model's own stack runs, its layers asking what to do; each sequence has a cache of Hugging
Face's. One sequence a call: nothing says that such layers would keep several apart.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from offramp.core.decoding.drafting import DraftBudget, Drafts
from offramp.core.decoding.executor import LoadedPrompt, Span
from offramp.core.executors.bare import stack_runs
from offramp.core.executors.kv_cache import cache_name, crop, croppable, self_attention, stand_in
from offramp.core.executors.prefill import Prefill
from offramp.core.executors.prompt import Prompt
from offramp.core.executors.segments import (
    ExitOutput,
    Output,
    SegmentRunner,
    in_one_copy,
    joined,
    picked,
)
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import ExitSet
from offramp.core.models.opened import LayerCall


@dataclass(eq=False)
class _Waiting:
    """States [1, T, D] that wait before a segment, from a column on, with their position ids and
    ids, where these are known."""

    begin: int
    states: Tensor
    positions: Tensor | None
    ids: Tensor | None

    def until(self, column: int) -> _Waiting:
        """The states before a column."""
        n = max(0, column - self.begin)
        positions = None if self.positions is None else self.positions[..., :n]
        ids = None if self.ids is None else self.ids[:, :n]
        return _Waiting(self.begin, self.states[:, :n], positions, ids)

    def followed_by(self, more: _Waiting) -> _Waiting:
        states = torch.cat([self.states, more.states], 1)
        positions, ids = (
            None if one is None or other is None else torch.cat([one, other], -1)
            for one, other in ((self.positions, more.positions), (self.ids, more.ids))
        )
        return _Waiting(self.begin, states, positions, ids)


@dataclass(eq=False)
class _Row:
    """One sequence. tokens: columns that have entered the first layer. waits: by segment, what
    waits before it. ran: columns that each segment ran."""

    cache: Any
    prefill: Prefill
    tokens: int
    waits: dict[int, _Waiting] = field(default_factory=dict)
    ran: list[int] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)  # arguments of the newest call
    verified: tuple[int, Tensor] | None = None  # a column, and the drafting exit's [n, D] from it


class StackExecutor(SegmentRunner):
    """Runs a backbone with exits through the model's own stack; arguments as of `SegmentRunner`."""

    rows: int | None = 1
    opens = False
    positions: int | None = None  # counted where its arguments are made

    def __init__(
        self, backbone: Backbone, exits: ExitSet | None, depths: Sequence[int], **more: Any
    ) -> None:
        super().__init__(backbone, exits, depths, **more)
        stack_runs(backbone)
        self._held: list[_Row] = []
        self._verifies = False  # of the current call: whether the drafting exit runs on the way

    # -- sequences ---------------------------------------------------------------------------

    def load(self, prompt: Prompt, row: int) -> LoadedPrompt:
        cache, prefill = prompt.cache, prompt.prefill
        if prompt.rows > 1:
            cache, prefill = _row_of(cache, row), prefill.of_row(row)
        tokens = prompt.columns
        held = _Row(cache, prefill, tokens)
        ran = [tokens] * len(self._segments)
        if prompt.waits is not None:
            depth, states = prompt.waits
            segment, mine = self.depths.index(depth) + 1, states[row : row + 1]
            places = prefill.positions
            if places is not None:
                places = places[..., -mine.shape[1] :]
            held.waits[segment] = _Waiting(tokens - mine.shape[1], mine, places, None)
            ran[segment:] = [tokens - mine.shape[1]] * (len(ran) - segment)
        if prompt.kept is not None:
            held.verified = tokens - 1, prompt.kept[row : row + 1]
        held.ran = [*ran]
        self._held.append(held)
        return LoadedPrompt(held, tokens, ran)

    def release(self, handle: _Row) -> None:
        self._held.remove(handle)

    def close(self) -> None:
        for row in self._held:
            row.cache, row.waits, row.last = None, {}, {}
        self._held = []

    def allow_crops(self, handle: _Row) -> bool:
        """Return False for recurrent states: they hold the whole text, and undo no draft."""
        cache = handle.cache
        if not croppable(cache):
            return False
        cache.activate_past_recording()  # sliding windows keep what a crop may need
        crop(cache, dict.fromkeys(range(len(self_attention(cache).layers)), 0))
        return True

    def crop(self, handle: _Row, column: int) -> None:
        row, undone = handle, handle.tokens - column
        if undone > 0:
            row.tokens = column
            row.waits = {segment: held.until(column) for segment, held in row.waits.items()}
            crop(row.cache, self._surplus(row, column))
            row.prefill.rollback(undone)
            row.ran = [min(ran, column) for ran in row.ran]

    def _surplus(self, row: _Row, column: int) -> dict[int, int]:
        """The number of columns from `column` on, by entry of layers and exits."""
        surplus: dict[int, int] = {}
        for running, ran in zip(self._segments, row.ran, strict=True):
            surplus |= dict.fromkeys(self._entries(running), max(0, ran - column))
        return {i: n for i, n in surplus.items() if i not in self.backbone.rare_layers}

    # -- calls -------------------------------------------------------------------------------

    def feed(
        self,
        handles: Sequence[_Row],
        ids: Sequence[int],
        columns: Sequence[int],
        *,
        needs_exit: bool,
    ) -> ExitOutput:
        self._needs_exit = needs_exit
        return ExitOutput.joined([*map(self._feed, handles, ids)])

    def _feed(self, row: _Row, token: int) -> ExitOutput:
        kw = self._arguments(row, [token])
        self._call(row, self._segments[0], kw)
        output = self._taken()
        assert self._entry is not None
        places = kw.get("position_ids")
        self._wait(row, 1, _Waiting(row.tokens - 1, self._entry, places, kw["input_ids"]))
        row.ran[0] += 1
        return output

    def _arguments(self, row: _Row, tokens: Sequence[int]) -> dict[str, Any]:
        kw = row.prefill.extend(len(tokens))
        kw["input_ids"] = torch.tensor([[*tokens]], device=self.backbone.device)
        row.last = kw
        row.tokens += len(tokens)
        return kw

    def full(self, handles: Sequence[_Row], ids: Sequence[int], columns: Sequence[int]) -> Tensor:
        return torch.cat(
            [self._full(row, [token]) for row, token in zip(handles, ids, strict=True)]
        )

    def _full(self, row: _Row, tokens: Sequence[int], *, verifies: bool = False) -> Tensor:
        """Run tokens of a row through all layers."""
        whole, kw = range(self.backbone.depth), self._arguments(row, tokens)
        made = self._call(row, whole, kw, verifies=verifies)
        row.ran = [ran + len(tokens) for ran in row.ran]
        return made

    def draft(
        self,
        handles: Sequence[_Row],
        ids: Sequence[int],
        columns: Sequence[int],
        budgets: Sequence[DraftBudget],
    ) -> list[Drafts]:
        return [*map(self._draft, handles, ids, columns, budgets)]

    def _draft(self, row: _Row, token: int, column: int, budget: DraftBudget) -> Drafts:
        drafter, drafts = self._drafter, Drafts(budget)
        if drafter is None or not budget.max_drafts:
            return drafts
        first, states = row.verified or (column, torch.empty(0))
        if not 0 <= column - 1 - first < len(states):
            return drafts
        state, goes_on = states[column - 1 - first, None], True
        begin = row.tokens
        try:
            while goes_on:
                given = torch.tensor([token], device=self.backbone.device)
                state = self._drafted(row, drafter.inputs(given, state)[None], given[None])
                [said], [share] = in_one_copy(*drafter.tokens(state))
                token = int(said)
                goes_on = drafts.add(token, share)
        finally:
            self._undo(row, row.tokens - begin)
        return drafts

    def _drafted(self, row: _Row, states: Tensor, ids: Tensor | None = None) -> Tensor:
        """What the drafting exit makes [1, D] of states [1, 1, D] at the next column."""
        assert self._drafter is not None
        depth, kw = self._drafter.depth, row.prefill.extend(1)
        row.tokens += 1
        self._chunk, self._needs_exit = states, True
        enters = ids if self.backbone.reads_ids else states.clone()
        kw["input_ids" if self.backbone.reads_ids else "inputs_embeds"] = enters
        try:
            self._call(row, range(depth, depth), kw)
        finally:
            self._chunk = None
        state = self._taken().state
        assert state is not None
        return state

    def _undo(self, row: _Row, columns: int) -> None:
        """Take the newest columns of the drafting exit back."""
        assert self._drafter is not None
        depth = self._drafter.depth
        row.tokens -= columns
        row.prefill.rollback(columns)
        crop(row.cache, dict.fromkeys(self._entries(range(depth, depth)), columns))

    def verify(
        self, handles: Sequence[_Row], ids: Sequence[Sequence[int]], columns: Sequence[int]
    ) -> Tensor:
        made = []
        for row, tokens, column in zip(handles, ids, columns, strict=True):
            made.append(self._full(row, tokens, verifies=self._drafter is not None))
            if self._drafter is not None:
                state = self._taken().state
                assert state is not None
                row.verified = column, state
        return torch.cat(made)

    def run(self, segment: int, spans: Sequence[Span], asked: Sequence[int]) -> Output:
        self._needs_exit = len(asked) > 0
        made = joined([self._run(segment, span) for span in spans])
        return picked(made, torch.tensor(asked, dtype=torch.long, device=self.backbone.device))

    def _run(self, segment: int, span: Span) -> Output:
        row, running = span.handle, self._segments[segment]
        waiting: _Waiting = row.waits.pop(segment)
        states, positions, ids = waiting.states, waiting.positions, waiting.ids
        assert states.shape[1] == span.end - span.first
        kw = {n: v for n, v in row.last.items() if n not in ("input_ids", "inputs_embeds")}
        if positions is not None:
            kw["position_ids"] = positions
        if self.backbone.reads_ids and ids is not None:
            kw["input_ids"] = ids
        else:
            kw["inputs_embeds"] = states.clone()  # BLIP adds positions where it lies
        self._chunk = states
        try:
            final = self._call(row, running, kw)
        finally:
            self._chunk = None
        row.ran[segment] = span.end
        if segment == len(self.depths):
            return final
        output = self._taken()
        assert self._entry is not None
        self._wait(row, segment + 1, _Waiting(span.first, self._entry, positions, ids))
        return output

    def _wait(self, row: _Row, segment: int, more: _Waiting) -> None:
        before = row.waits.get(segment)
        if before is not None and before.states.shape[1]:
            more = before.followed_by(more)
        row.waits[segment] = more

    def _call(
        self, row: _Row, running: range, kw: dict[str, Any], *, verifies: bool = False
    ) -> Tensor:
        """One call of the stack; final-normed states [n, D], void where the last layer did not
        run."""
        self._running, self._verifies = running, verifies
        self._needs_exit = self._needs_exit or verifies
        self._output = self._entry = self._previous = None
        given = dict(kw)
        given[cache_name(given)] = self._seen = self._cache(row)
        try:
            out = self.intercepted.stack(**given).last_hidden_state
        finally:
            self._seen = None
        return self.backbone.here(out).flatten(0, 1)

    def layer(self, call: LayerCall) -> Any:
        if self._verifies and self._drafter is not None and call.index == self._drafter.depth:
            self._at_exit(call)
        return super().layer(call)

    def _cache(self, row: _Row) -> Any:
        """The cache as the layers that run see it, and the exit after them."""
        running, end, tokens = self._running, self.backbone.depth, row.tokens
        own = self_attention(row.cache).layers
        one_kind = len({type(entry) for entry in own}) == 1
        if running.start == 0 and (one_kind or running.stop == end):
            return row.cache  # the first entry of each kind runs
        new = 1 if self._chunk is None else self._chunk.shape[1]
        seen: dict[str, Any] = {"rare": self.backbone.rare_layers, "tokens": tokens - new}
        also = self._entries(range(running.stop, running.stop))
        return stand_in(row.cache, end, running, also, **seen)


def _row_of(cache: Any, row: int) -> Any:
    """A copy of one row of a cache."""
    made = copy.deepcopy(cache)
    device = next(
        (
            e.keys.device
            for e in self_attention(cache).layers
            if getattr(e, "keys", None) is not None
        ),
        torch.device("cpu"),
    )
    made.reorder_cache(torch.tensor([row], device=device))
    return made
