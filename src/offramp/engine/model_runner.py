"""Runs the decoder of one generation: the layers that the current tokens need, and no others.

A token that exits at depth d runs exactly d decoder layers. Keys and values of the layers that it
skipped are filled by policy:

recompute: the token's state is pending at its exit; when a later token must go deeper, the deeper
    layers run once over all pending states and the new token together. Exact: the cache is what the
    full model's would be.
propagate: the state at the exit is projected to the keys and values of every skipped layer at
    once (CALM, Schuster et al. 2022). Approximate; nothing is ever pending.

In a batch the stack runs on the active rows: finished ones are taken out, of the cache too. A row
that exited early stays with the others: its keys and values are due at the deeper layers as well.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from offramp.engine.exit_check import Constrain, ExitDecider
from offramp.engine.kv_cache import (
    add_exit_entries,
    cache_name,
    check_projects,
    crop,
    select_rows,
    self_attention,
    stand_in,
    store_exit_keys,
    store_keys,
)
from offramp.engine.lean.compiled import cannot_compile
from offramp.engine.lean.stack import LeanStack, lean_stack
from offramp.engine.sampling import ActiveRows
from offramp.models.backbone import Backbone, LayerCall
from offramp.models.exits import ExitSet
from offramp.models.intercept import InterceptedModel


class _Part(NamedTuple):
    """States [B, T, D] of one call, their position ids, and their token ids [B, T]."""

    states: Tensor
    positions: Tensor | None
    ids: Tensor | None

    def select_rows(self, rows: Tensor) -> _Part:
        """Position ids may have an axis before the rows, and one row for all."""
        at, ids = self.positions, self.ids
        rows = rows.to(self.states.device)
        if at is not None and at.shape[-2] > 1:
            at = at.index_select(-2, rows.to(at.device))
        return _Part(self.states[rows], at, None if ids is None else ids[rows.to(ids.device)])


def _joined(parts: Iterable[Tensor | None]) -> Tensor | None:
    """Along the last axis; None where one is not known."""
    known = list(parts)
    whole = [part for part in known if part is not None]
    return torch.cat(whole, -1) if whole and len(whole) == len(known) else None


class PendingStates:
    """States that entered an exit and have yet to run the layers behind it, by depth, in order.

    Each part is the states [B, T, D] of one call, their position ids where the stack has any, and
    their token ids where they are known.
    """

    def __init__(self, depths: Iterable[int]) -> None:
        self._parts: dict[int, list[_Part]] = {d: [] for d in depths}

    def at(self, depth: int) -> bool:
        """Whether any are pending at `depth`."""
        return bool(self._parts.get(depth))

    def next_from(self, start: int) -> int | None:
        """The first depth from `start` on where any are pending."""
        return min((d for d, parts in self._parts.items() if parts and d >= start), default=None)

    def add(self, depth: int, part: _Part) -> None:
        self._parts[depth].append(part)

    def take(self, depth: int) -> _Part:
        """All that is pending at `depth`, oldest first."""
        parts, self._parts[depth] = self._parts[depth], []
        states = torch.cat([part.states for part in parts], 1)
        return _Part(states, _joined(p.positions for p in parts), _joined(p.ids for p in parts))

    def place(self, positions: Tensor | None) -> None:
        """Set the position ids of what is pending: the prompt's are known after its pass."""
        for depth, parts in self._parts.items():
            self._parts[depth] = [_Part(part.states, positions, None) for part in parts]

    def select_rows(self, rows: Tensor) -> None:
        """Keep the rows of these indices alone."""
        for depth, parts in self._parts.items():
            self._parts[depth] = [part.select_rows(rows) for part in parts]


class Step(NamedTuple):
    """What one token of each row came to.

    states: final-normed states [B, n, D] of the n tokens that ran to full depth together, the new
        one last; None where all rows exited.
    exit_logits: [B, V] where rows exited; None where none did.
    depths, scores: of the token [B]; see `GenerationOutput`.
    """

    states: Tensor | None
    exit_logits: Tensor | None
    depths: Tensor
    scores: Tensor

    def logits(self, backbone: Backbone) -> Tensor:
        """Logits [B, V] of the token: of its exit, or of the full model."""
        if self.states is None:
            assert self.exit_logits is not None
            return self.exit_logits
        return self.merge(backbone.logits(self.states[:, -1]), backbone.depth)

    def merge(self, full: Tensor, layers: int) -> Tensor:
        """Full-depth logits [B, V], but for the rows that exited before depth `layers`."""
        if self.exit_logits is None:
            return full
        return torch.where((self.depths < layers)[:, None], self.exit_logits, full)


class ModelRunner:
    """The layer handler of one generation. Without a decider every layer runs: the full model.

    decider: says at each exit which rows exit. exits: those it decides about. propagate: fill
    skipped keys and values at once instead of keeping states pending.
    start: the layer that the states of the current call enter. tokens: that have entered the first.
    """

    def __init__(
        self,
        backbone: Backbone,
        exits: ExitSet | None = None,
        decider: ExitDecider | None = None,
        *,
        propagate: bool = False,
    ) -> None:
        self.backbone, self.exits, self.decider = backbone, exits, decider
        self.intercepted = InterceptedModel(backbone, self)
        self._lean: LeanStack | None = None
        self._wants_lean = backbone.lean_decoding
        self.propagate = propagate
        self.cache: Any = None
        self.constrain: Constrain | None = None
        self.pending = PendingStates(self.exits_on)
        self._exits_at = frozenset(self.exits_on)
        self._watched = frozenset() if decider is None else decider.watched
        self._one_kind = False  # whether all entries of the cache are alike
        self._rows = ActiveRows()
        self._prompt_tokens: int | None = None
        self._full: tuple[Tensor, Tensor] | None = None  # depths, scores of the full model
        # of the current call of the stack
        self.start = 0
        self._chunk: Tensor | None = None
        self._positions: Tensor | None = None
        self._ids: Tensor | None = None
        self.tokens = 0
        self._catch_up_at: int | None = None
        self._exited_at: int | None = None
        self._previous: Tensor | None = None  # what entered the last watched layer [B, D]

    @property
    def exits_on(self) -> tuple[int, ...]:
        """Depths where tokens may exit."""
        return () if self.decider is None else tuple(self.decider.thresholds)

    def adopt(self, cache: Any) -> None:
        """Take the empty KV cache of this generation and give the exits entries of their own.

        Raises:
            InputError: a cache that cannot have them; see `add_exit_entries`.
        """
        self.cache = cache
        entries = self.exits.entries if self.exits is not None and self.exits_on else ()
        add_exit_entries(cache, entries, self.backbone.depth)
        if self.propagate and self.exits_on:
            check_projects(cache)
        self._one_kind = len({type(entry) for entry in self_attention(cache).layers}) == 1

    def release(self) -> None:
        """Drop keys, values and states now. Handler and model hold each other, so they would stay
        until the garbage collector runs."""
        self.cache, self.constrain, self._positions, self._previous = None, None, None, None
        self._lean = None
        self.pending = PendingStates(())

    # -- one token ---------------------------------------------------------------------------

    def keep_rows(self, active: Tensor, live: int) -> None:
        """From here on only the rows `active` [B]: the others leave the cache and what is pending.

        live: how many are unfinished.
        """
        stay = self._rows.keep(active, live)
        if stay is None:
            return
        select_rows(self.cache, stay)
        if self._lean is not None:
            self._lean.forget()
        self.pending.select_rows(stay)

    def begin(self, unfinished: Tensor, ids: Tensor, *, check: bool = True) -> None:
        """A new token for each row; with `check=False` no row exits.

        unfinished: rows [B]. ids: token ids so far [B, T].
        """
        self._exited_at = None
        if self._prompt_tokens is None:
            self._prompt_tokens = ids.shape[1]
        if self.decider is not None:
            constrain = self._rows.gathered(self.constrain)
            rows, token = self._rows.pick(unfinished), {}
            if self.decider.watched:  # a score that may read more than logits
                place = ids.shape[1] - self._prompt_tokens
                token["position"] = torch.full_like(rows, place, dtype=torch.long)
                token["previous_token"] = self._rows.pick(ids[:, -1])
            self.decider.begin(rows, constrain, check=check, **token)

    def step(self, **kw: Any) -> Step:
        """Run the stack for the new token, with the pending states where it must go deeper.

        kw: the stack's arguments for all rows, also those that are not active; see
        `Prefill.extend`. In what is returned, rows that are not active mean nothing.
        """
        kw = self._rows.pick_arguments(kw)
        self._positions, self._ids = kw.get("position_ids"), kw.get("input_ids")
        if self._wants_lean:
            self._go_lean(kw)
        return self._finish(self._stack(kw, 0), kw)

    def catch_up(self, kw: dict[str, Any]) -> Step:
        """Take all pending states to full depth, with no new token.

        kw: the arguments of the last step.
        """
        kw = self._rows.pick_arguments(kw)
        depth = self.pending.next_from(0)
        assert depth is not None and self.decider is not None
        self._exited_at, self.decider.checks = None, False
        return self._finish(self._from(depth, kw), kw)

    def prompt_step(self, positions: Tensor | None, unfinished: Tensor) -> Step:
        """What the prompt's pass, which runs the whole model, came to.

        positions: its position ids, in case it is pending at an exit. unfinished: rows [B].
        """
        self.pending.place(positions)
        return self._step_of(None, unfinished)

    def _finish(self, out: Tensor, kw: dict[str, Any]) -> Step:
        """Catch up where states are pending on the way, and put the rows in their places."""
        while self._catch_up_at is not None:
            out = self._from(self._catch_up_at, kw)
        out = self.backbone.here(out)
        states = None if self._exited_at is not None else self._rows.spread(out, 0.0)
        return self._step_of(states, out)

    def _step_of(self, states: Tensor | None, like: Tensor) -> Step:
        spread, full = self._rows.spread, self.backbone.depth
        if self.decider is None:
            if self._full is None:
                rows, device = len(like), like.device  # of the prompt's pass: all rows
                self._full = (
                    torch.full((rows,), full, device=device),
                    torch.full((rows,), float("nan"), device=device),
                )
            return Step(states, None, *self._full)
        said = self.decider
        return Step(
            states,
            None if said.logits is None else spread(said.logits, 0.0),
            spread(said.depths, full),
            spread(said.scores, float("nan")),
        )

    def _from(self, depth: int, kw: dict[str, Any]) -> Tensor:
        """Run the layers from `depth` on over all that is pending there, the new token last."""
        self._catch_up_at = None
        self.start = depth
        self._chunk, self._positions, self._ids = self.pending.take(depth)
        again = {name: v for name, v in kw.items() if name not in ("input_ids", "inputs_embeds")}
        if self._positions is not None:
            again["position_ids"] = self._positions
        if self.backbone.reads_ids and self._ids is not None:
            again["input_ids"] = self._ids
        else:
            again["inputs_embeds"] = self._chunk.clone()  # BLIP adds positions where it lies
        try:
            return self._stack(again, depth)
        finally:
            self.start, self._chunk = 0, None

    def _stack(self, kw: dict[str, Any], depth: int) -> Tensor:
        """What the layers from `depth` on make, and the final norm."""
        stack = self.intercepted.stack if self._lean is None else self._lean
        kw[cache_name(kw)] = self._cache_from(depth)
        return stack(**kw).last_hidden_state  # type: ignore[no-any-return]

    def _go_lean(self, kw: dict[str, Any]) -> None:
        """With the first token behind the prompt: from here on without the stack, if it can be."""
        self._wants_lean = False
        self.tokens = int(self_attention(self.cache).get_seq_length()) or self.tokens
        self._lean = lean_stack(self.backbone, self, self.intercepted.stack, self.cache, kw)
        if self._lean is not None:
            self.cache = self._lean.cache
        else:
            cannot_compile(self.backbone, "this model or request needs its own stack")

    # -- one layer ---------------------------------------------------------------------------

    @property
    def ended(self) -> bool:
        """Whether the layers that follow have nothing to do in the current call."""
        exited = self._exited_at is not None and not self.propagate
        return exited or self._catch_up_at is not None

    def layer(self, call: LayerCall) -> Any:
        """What the stack gets for a layer: its output, or the state handed through."""
        index = call.index
        if index == 0 and self.start == 0:
            self.tokens += call.hidden.shape[1]
        if index < self.start:  # a catch-up enters deeper
            return self.backbone.skipped_layer_output(call)
        if self._exited_at is not None or self._catch_up_at is not None:
            if self.propagate and self._exited_at is not None:
                self._store_skipped(call)
            return self.backbone.skipped_layer_output(call)
        if index == self.start and self._chunk is not None:
            call = replace(call, hidden=self._chunk)
        elif index in self._exits_at and not self._goes_deeper(call):
            if self.propagate:
                self._store_skipped(call)
            return self.backbone.skipped_layer_output(call)
        if index in self._watched:
            self._previous = self.backbone.here(call.hidden[:, -1])
        return call.run(call.layer)

    def _goes_deeper(self, call: LayerCall) -> bool:
        """Run the exit before this layer; False ends the pass: all exited, or are pending."""
        assert self.exits is not None and self.decider is not None
        depth, hidden, here = call.index, call.hidden, self.backbone.here
        candidates = self.decider.candidates(depth, here(hidden[:, -1]))
        if candidates is None:  # no check: only what later tokens attend to is computed
            store_exit_keys(self.cache, self.exits, call)
            all_exit = False
        else:
            state, entry = here(self.exits.run(depth, call)[:, -1]), here(hidden[:, -1])
            all_exit = self.decider.decide(depth, state, entry, self._previous, candidates)
        if all_exit:
            self._exited_at = depth
            if not self.propagate:
                self.pending.add(depth, _Part(hidden, self._positions, self._ids))
            return False
        if self.pending.at(depth):
            self.pending.add(depth, _Part(hidden, self._positions, self._ids))
            self._catch_up_at = depth
            return False
        return True

    # -- the cache ---------------------------------------------------------------------------

    def crop(self, tokens: int) -> None:
        """Take the last `tokens` tokens out of the cache."""
        self.tokens -= tokens
        crop(self.cache, tokens, self.backbone.rare_layers)

    def _cache_from(self, start: int) -> Any:
        """The cache as the layers from `start` to the next pending exit see it, and that exit."""
        if self._lean is not None or (start == 0 and self._one_kind):
            return self.cache  # the first entry runs
        end, stop = self.backbone.depth, self.pending.next_from(start)
        if start == 0 and stop is None:
            return self.cache  # the first entry of each kind runs
        tokens = self.tokens - (0 if self._chunk is None else self._chunk.shape[1])
        seen: dict[str, Any] = {"rare": self.backbone.rare_layers, "tokens": tokens}
        if stop is None or self.exits is None:
            return stand_in(self.cache, end, range(start, end), **seen)
        at_stop = [end + i for i, depth in enumerate(self.exits.entries) if depth == stop]
        return stand_in(self.cache, end, range(start, stop), at_stop, **seen)

    def _store_skipped(self, call: LayerCall) -> None:
        """Fill a skipped layer's keys and values, and those of an exit there."""
        index = call.index
        store_keys(self.cache, call.layer, call)
        if index in self._exits_at and index != self._exited_at and self.exits is not None:
            store_exit_keys(self.cache, self.exits, call)
