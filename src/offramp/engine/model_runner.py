"""The driver of one generation: which layers run for the token at hand, and who waits where.

A token that leaves at depth d runs exactly d decoder layers. Keys and values of the layers that it
skipped are filled by policy:

recompute: the token's state waits at its exit; when a later token must go deeper, the deeper
    layers run once over all that wait and the new token together. Exact: the cache is what the
    full model's would be.
propagate: the state at the exit is projected to the keys and values of every skipped layer at
    once (CALM, Schuster et al. 2022). Approximate; nothing ever waits.

In a batch the stack runs on the rows that are still written: finished ones are taken out, of the
cache too. A row that left early stays with the others: its keys and values are due at the deeper
layers as well.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from offramp.engine.confidence import check_thresholds, check_weights
from offramp.engine.exit_check import Constrain, ExitCheck, ExitScorer, gates_of_policy
from offramp.engine.policy import ExitPolicy
from offramp.engine.sampling import ActiveRows
from offramp.errors import InputError
from offramp.models.backbone import Backbone
from offramp.models.exits import Exits, ExitSet
from offramp.models.intercept import InterceptedModel
from offramp.models.shortlist import Gate


class _KeysStored(Exception):
    """Raised out of a layer once its keys and values are in the cache."""


class ModelRunner:
    """The driver of one generation: which layers run for the token at hand, and who waits where."""

    def __init__(
        self,
        backbone: Backbone,
        exits: ExitSet | Exits | None,
        policy: ExitPolicy,
    ) -> None:
        exits = None if exits is None else ExitSet.of(exits)
        depths = exits.depths if exits is not None else ()
        self.thresholds = check_thresholds(dict(policy.thresholds), depths)
        self.backbone = backbone
        self.policy = policy
        self.view = InterceptedModel(backbone, self)
        self.propagate = policy.kv == "propagate"
        self.exits = exits
        self.judge: ExitScorer | None = None
        self._gates: dict[int, tuple[Gate, float]] = {}
        self._watched: frozenset[int] = frozenset()  # layers whose input an exit's score reads
        if self.thresholds:
            check_weights(policy.weights, depths)
            assert exits is not None
            self.judge = ExitScorer(backbone, policy, tuple(self.thresholds), exits)
            self._gates = gates_of_policy(policy, exits)
            if policy.score == "saturation":
                self._watched = frozenset(depth - 1 for depth in self.thresholds)
        # per generation
        self.cache: Any = None
        self.constrain: Constrain | None = None
        self._rows = ActiveRows()
        self._waiting: dict[int, list[tuple[Tensor, Tensor | None]]] = {
            d: [] for d in self.thresholds
        }
        self._unseen: tuple[Tensor, Tensor] | None = None  # depths, scores of a token yet to start
        # per stack call
        self._start = 0
        self._chunk: Tensor | None = None
        self._positions: Tensor | None = None
        self._need: int | None = None
        self._left: int | None = None
        self._previous: Tensor | None = None  # what entered the last watched layer [B, D]
        # per token
        self._check = True
        self._open: Tensor
        self.logits: Tensor | None = None  # of the rows that left
        self.depths: Tensor
        self.scores: Tensor

    def release(self) -> None:
        """Let go of keys, values and states now: view and driver hold each other, so they would
        stay until the garbage collector comes by."""
        self.cache, self.constrain, self.logits, self._positions = None, None, None, None
        self._previous, self._waiting = None, {}

    # -- one token ---------------------------------------------------------------------------

    def keep(self, written: Tensor, live: int) -> None:
        """From here on only the rows `written` [B]: the others leave the cache and what waits.

        live: how many are unfinished.
        """
        stay = self._rows.keep(written, live)
        if stay is None:
            return
        self._unseen = None
        self.cache.batch_select_indices(stay)
        for depth, waiting in self._waiting.items():
            self._waiting[depth] = [
                (state[stay], None if at is None else at.index_select(-2, stay))
                for state, at in waiting
            ]

    def begin(self, unfinished: Tensor, *, check: bool = True) -> None:
        """A new token for each row; with `check=False` nobody leaves. unfinished: rows [B]."""
        self._check = check
        self._left = None
        self.logits = None
        self._open = self._rows.pick(unfinished)
        if self._unseen is None:
            rows, device = len(self._open), unfinished.device
            self._unseen = (
                torch.full((rows,), self.backbone.depth, device=device),
                torch.full((rows,), float("nan"), device=device),
            )
        self.depths, self.scores = self._unseen

    def prompt_stands_at(self, positions: Tensor | None) -> None:
        """Position ids of the prompt, known after the prefill, in case it waits at an exit."""
        for depth, waiting in self._waiting.items():
            self._waiting[depth] = [(state, positions) for state, _ in waiting]

    def call(self, **kw: Any) -> Tensor:
        """Run the stack for the new token, catching up those who wait if it must go deeper.

        kw: for all rows, also those not kept. Returns final-normed states [B, n, D] of the n tokens
        that went to full depth together, the new one last; meaningless where a row is not kept, or
        if everybody left.
        """
        kw = self._rows.pick_arguments(kw)
        self._positions = kw.get("position_ids")
        kw[_cache_name(kw)] = self._cache_from(0)
        out = self._to_the_end(self.view.stack(**kw).last_hidden_state, kw)
        self.depths = self._rows.spread(self.depths, self.backbone.depth)
        self.scores = self._rows.spread(self.scores, float("nan"))
        if self.logits is not None:
            self.logits = self._rows.spread(self.logits, 0.0)
        return out

    def flush(self, kw: dict[str, Any]) -> Tensor:
        """Take all who wait to full depth, with no new token; their states as `call` returns them.

        kw: the arguments of the last call.
        """
        kw = self._rows.pick_arguments(kw)
        self._left, self._check = None, False
        depth = next(d for d, waiting in self._waiting.items() if waiting)
        return self._to_the_end(self._catch_up(depth, kw), kw)

    def _to_the_end(self, out: Tensor, kw: dict[str, Any]) -> Tensor:
        """Catch up where tokens wait in the way; the states of all rows again."""
        while self._need is not None:
            out = self._catch_up(self._need, kw)
        return self._rows.spread(out, 0.0)

    @property
    def everybody_left(self) -> bool:
        return self._left is not None

    def merge(self, logits: Tensor) -> Tensor:
        """Logits [B, V] of the token: full-depth ones, but for the rows that left earlier."""
        if self.logits is None:
            return logits
        gone = self.depths < self.backbone.depth  # not those that are finished: they did not leave
        return torch.where(gone[:, None], self.logits, logits)

    # -- one layer ---------------------------------------------------------------------------

    def layer(
        self,
        index: int,
        layer: nn.Module,
        hidden: Tensor,
        args: tuple[Any, ...],
        kw: dict[str, Any],
    ) -> Any:
        """What the stack gets for layer `index`: its output, or the state handed through."""
        if index < self._start:  # a catch-up enters deeper
            return self.backbone.skipped_layer_output(index, hidden, args, kw)
        if self._left is not None or self._need is not None:
            if self.propagate and self._left is not None:
                self._store_skipped(index, layer, hidden, args, kw)
            return self.backbone.skipped_layer_output(index, hidden, args, kw)
        if index == self._start and self._chunk is not None:
            hidden = self._chunk
        elif index in self.thresholds and not self._goes_deeper(index, hidden, args, kw):
            if self.propagate:
                self._store_skipped(index, layer, hidden, args, kw)
            return self.backbone.skipped_layer_output(index, hidden, args, kw)
        if index in self._watched:
            self._previous = hidden[:, -1]
        return layer(hidden, *args, **kw)

    def _goes_deeper(
        self, depth: int, hidden: Tensor, args: tuple[Any, ...], kw: dict[str, Any]
    ) -> bool:
        """Run the exit at `depth`; False ends this stack call, all rows having left or waiting."""
        assert self.exits is not None
        waiting = self._waiting[depth]
        candidates = self._candidates(depth, hidden[:, -1])
        if candidates is None:  # nobody looks: only what later tokens attend to is computed
            self._store_keys(self.exits.at(depth), hidden, args, kw)
            leaves = False
        else:
            state = self.exits.run(depth, hidden, args, kw)
            leaves = self._leave(depth, state[:, -1], hidden[:, -1], candidates)
        if leaves:
            self._left = depth
            if not self.propagate:
                waiting.append((hidden, self._positions))
            return False
        if waiting:
            waiting.append((hidden, self._positions))
            self._need = depth
            return False
        return True

    def _candidates(self, depth: int, entry: Tensor) -> Tensor | None:
        """Rows [B] that may leave at `depth`, which `entry` [B, D] enters; None where none may."""
        if not self._check:
            return None
        if depth not in self._gates:
            return self._open
        gate, level = self._gates[depth]
        candidates = self._open & (gate(entry) >= level)
        return candidates if bool(candidates.any()) else None

    def _leave(self, depth: int, state: Tensor, entry: Tensor, candidates: Tensor) -> bool:
        """Let confident rows leave at `depth`; True once no unfinished row is left."""
        assert self.judge is not None
        constrain = self._rows.gathered(self.constrain)
        look = self.judge(depth, state, entry, self._previous, constrain)
        threshold = self.thresholds[depth]
        if threshold == 0.0:
            self.scores = self.scores.masked_fill(candidates, float("nan"))
            self._let_go(candidates, look)
            self._open = self._open & ~candidates
            return not bool(self._open.any())
        if len(state) == 1:  # the common case, in one transfer and no masks
            self.scores = look.score
            if not bool(look.score >= threshold):  # in the score's precision, as below
                return False
            self.logits, self.depths = look.logits, torch.full_like(self.depths, depth)
            return True
        self.scores = torch.where(candidates, look.score.to(self.scores), self.scores)
        leaving = candidates & (look.score >= threshold)
        self._open = self._open & ~leaving
        some_leave, some_stay = torch.stack([leaving, self._open]).any(1).tolist()
        if some_leave:
            self._let_go(leaving, look)
        return not some_stay

    def _let_go(self, rows: Tensor, look: ExitCheck) -> None:
        """Note that `rows` [B] leave with what `look` saw."""
        self.depths = self.depths.masked_fill(rows, look.depth)
        self.logits = (
            look.logits
            if self.logits is None
            else torch.where(rows[:, None], look.logits, self.logits)
        )

    def _catch_up(self, depth: int, kw: dict[str, Any]) -> Tensor:
        """Run the layers from `depth` on over all who wait there, the new token last."""
        waiting, self._waiting[depth] = self._waiting[depth], []
        self._need = None
        self._start = depth
        self._chunk = torch.cat([state for state, _ in waiting], 1)
        positions = [p for _, p in waiting]
        self._positions = None if positions[0] is None else torch.cat(positions, -1)  # type: ignore[arg-type]
        again = {name: v for name, v in kw.items() if name not in ("input_ids", "inputs_embeds")}
        again[_cache_name(kw)] = self._cache_from(depth)
        if self._positions is not None:
            again["position_ids"] = self._positions
        try:
            out = self.view.stack(inputs_embeds=self._chunk, **again).last_hidden_state
        finally:
            self._start, self._chunk = 0, None
        return out  # type: ignore[no-any-return]

    # -- the cache ---------------------------------------------------------------------------

    def adopt(self, cache: Any) -> None:
        """Take the empty KV cache of this generation and add the exits' own entries to it."""
        self.cache = cache
        halves = [cache]
        if hasattr(cache, "cross_attention_cache"):
            halves = [cache.self_attention_cache, cache.cross_attention_cache]
        _check_cache(halves)
        depths = self.exits.depths if self.exits is not None else ()
        if self.thresholds:
            for half in halves:
                half.layers.extend(copy.deepcopy(half.layers[d]) for d in depths)
        if len(halves) == 2:
            cache.is_updated.update({i: False for i in range(len(halves[0].layers))})

    def _cache_from(self, start: int) -> Any:
        """The same cache entries, with lengths and masks as the layers from `start` on see them.

        HF sizes the mask of each attention type by the first entry of that type. Only the layers
        from `start` to the first exit where tokens wait run in this call, and that exit; the
        entries of the rest are ahead or behind, so one of the same type that runs stands in for
        each.
        """
        from transformers.cache_utils import Cache, EncoderDecoderCache

        own = getattr(self.cache, "self_attention_cache", self.cache)
        layers, end = own.layers, self.backbone.depth
        stop = min((d for d, w in self._waiting.items() if w and d >= start), default=end)
        if start == 0 and (stop == end or len({type(entry) for entry in layers}) == 1):
            return self.cache  # the first entry of each type runs
        at_exits = zip(self.exits.depths if self.exits else (), layers[end:], strict=False)
        running = [*layers[start:stop], *(e for d, e in at_exits if d == stop)]

        def kin(index: int) -> Any:
            if start <= index < stop:
                return layers[index]
            alike = (entry for entry in running if type(entry) is type(layers[index]))
            return next(alike, running[0])

        seen = Cache(layers=[kin(i) for i in range(end)] + layers[end:])
        if own is self.cache:
            return seen
        both = EncoderDecoderCache(seen, self.cache.cross_attention_cache)
        both.is_updated = self.cache.is_updated
        return both

    def crop(self, tokens: int) -> None:
        """Take the last `tokens` tokens out of every entry; sliding windows shrink again."""
        own = getattr(self.cache, "self_attention_cache", self.cache)
        for entry in own.layers:
            if entry.is_initialized:  # an exit that is off or keeps no keys never writes to its own
                entry.crop(-tokens)

    def _store_skipped(
        self,
        index: int,
        layer: nn.Module,
        hidden: Tensor,
        args: tuple[Any, ...],
        kw: dict[str, Any],
    ) -> None:
        """Fill layer `index`'s keys and values (and those of an exit there) from `hidden`."""
        self._store_keys(layer, hidden, args, kw)
        if index in self.thresholds and index != self._left and self.exits is not None:
            self._store_keys(self.exits.at(index), hidden, args, kw)

    def _store_keys(
        self, layer: nn.Module, hidden: Tensor, args: tuple[Any, ...], kw: dict[str, Any]
    ) -> None:
        """Run a layer, not compiled, no further than until its keys and values are in the cache."""
        own = getattr(self.cache, "self_attention_cache", self.cache)
        store = own.update

        def store_and_stop(*a: Any, **k: Any) -> None:
            store(*a, **k)
            raise _KeysStored

        own.update = store_and_stop
        try:
            layer._call_impl(hidden, *args, **kw)  # type: ignore[no-untyped-call]
        except _KeysStored:
            pass
        finally:
            del own.update  # the instance attribute; the method shows again


def _cache_name(kw: Mapping[str, Any]) -> str:
    return "past_key_values" if "past_key_values" in kw else "cache"  # renamed in transformers 5.24


def _check_cache(halves: list[Any]) -> None:
    from transformers.cache_utils import DynamicCache

    for half in halves:
        if not isinstance(half, DynamicCache) or half.offloading or not half.layers:
            raise InputError(
                f"KV cache {type(half).__name__} is not supported with exits.",
                "Leave cache_implementation unset (the dynamic cache).",
            )
        if half.get_seq_length():
            raise InputError(
                "A KV cache from an earlier call was passed in, which lacks the exits' entries.",
                "Pass the whole prompt and no cache.",
            )
