"""Keys and values of prompts, kept between calls: a dialogue's next turn runs only what is new.

What enters the decoder decides: where the embeddings of a prompt, image included, and its positions
begin with those of an earlier prompt, bit for bit, and the weights are what they were, keys and
values are the same, and so is all that follows. Prompts with a mask that hides anything run whole.
Answers are not kept, only prompts: of the turn before, the next one runs the answer and what was
asked then.

A prompt that waits at its exit has no keys above it to be kept. Most prompts never come again, so
it may wait the first time; once more of it was run before than is new, it runs whole and is kept.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from cachetools import Cache, LRUCache
from torch import Tensor, nn

from offramp.core.errors import InputError
from offramp.core.executors.prompt import can_shorten, part_of
from offramp.core.models.backbone import Backbone
from offramp.core.models.change import state_of
from offramp.core.models.exits import ExitSet
from offramp.core.models.intercept import InterceptedModel
from offramp.features.cache_salt import current_salt


class Reader(Protocol):
    """The reader of a prompt. cache: that the prompt is read into. exits_on: depths of the exits
    that store keys."""

    backbone: Backbone
    exits: ExitSet | None
    exits_on: tuple[int, ...]
    cache: Any
    intercepted: InterceptedModel


Weights = Mapping[nn.Module, list[Any]]
"""The version of each module that makes keys: see `state_of`."""


@dataclass(frozen=True)
class _Kept:
    """A prompt of P tokens: its embeddings [P, D], and keys and values [1, H, P, Dh] by layer.

    weights: the version of the stack, which no other backbone has, and of each exit that attended.
    positions: [..., P], where the stack was given any. salt: under which it was kept, and is found.
    """

    weights: Weights
    embeds: Tensor
    positions: Tensor | None
    layers: Sequence[tuple[Tensor, Tensor]]
    exits: Sequence[tuple[nn.Module, tuple[Tensor, Tensor]]]
    salt: str | None

    def common(self, embeds: Tensor, positions: Tensor | None) -> int:
        """How many tokens `embeds` [Q, D] begins with that this prompt begins with too, at the same
        `positions` [..., Q]."""
        n = min(len(embeds), len(self.embeds))
        same = (embeds[:n] == self.embeds[:n]).all(1)
        if positions is not None and self.positions is not None:
            if positions.shape[:-1] != self.positions.shape[:-1]:
                return 0
            alike = positions[..., :n] == self.positions[..., :n]
            same &= alike.reshape(-1, n).all(0)
        elif positions is not self.positions:
            return 0
        return int(same.long().cumprod(0).sum())

    def outdated(self, weights: Weights) -> bool:
        """Whether one of its modules has changed since, so that its keys are other ones."""
        return any(weights.get(it, version) != version for it, version in self.weights.items())


class PrefixCache:
    """The latest prompts of a backbone, reused by later prompts with the same beginning.
    Thread-safe.

    reused, run: numbers of prompt tokens with cached keys and values, and of those computed.
    Serves batches of one on decoder-only backbones with plain attention and a causal prompt; others
    run without it.

    Raises:
        InputError: `prompts` is below 1.
    """

    def __init__(self, prompts: int = 4) -> None:
        if prompts < 1:
            raise InputError(
                f"A cache of {prompts} prompts holds nothing.", "Give 1 or more, or use no cache."
            )
        self.prompts = prompts
        self.reused: int = 0
        self.run: int = 0
        self._held: LRUCache[int, _Kept] = LRUCache(prompts)
        self._glimpsed: LRUCache[int, _Kept] = LRUCache(prompts)  # they waited: without keys
        self._count = 0
        self._lock = threading.Lock()

    @contextmanager
    def serving(self, run: Reader) -> Iterator[PrefixUse | None]:
        """Serve kept keys and values to the reader `run` while it reads a prompt, and keep that
        prompt."""
        if not run.backbone.reads_in_parts:
            yield None
            return
        served = PrefixUse(self, run)
        try:
            yield served
        finally:
            served.leave()
        served.end()

    def best(self, weights: Weights, embeds: Tensor, positions: Tensor | None) -> Any:
        """Return the kept prompt with the longest common beginning with `embeds` [Q, D], the length
        of that beginning, and the longest one with a prompt that waited and was not kept.

        weights: of the stack and of the exits that will attend to it. positions: of the tokens
        [..., Q], where the stack is given any. Prompts by other weights are dropped.
        """
        prompt, most = self._likest(self._held, weights, embeds, positions)
        _, glimpsed = self._likest(self._glimpsed, weights, embeds, positions)
        return prompt, min(most, len(embeds) - 1), glimpsed

    def _likest(
        self, held: LRUCache[int, _Kept], weights: Weights, embeds: Tensor, positions: Tensor | None
    ) -> tuple[_Kept | None, int]:
        with self._lock:
            # Not as `items` does, which would mark all of them as used.
            candidates = [(key, Cache.__getitem__(held, key)) for key in held]
        best, prompt, most = None, None, 0
        for key, candidate in candidates:
            if candidate.outdated(weights):
                with self._lock:
                    held.pop(key, None)
                continue
            same = weights.keys() <= candidate.weights.keys()  # the stack is one of them
            fits = same and candidate.salt == current_salt()
            common = candidate.common(embeds, positions) if fits else 0
            if common > most:
                best, prompt, most = key, candidate, common
        with self._lock:
            if best is not None:
                held.get(best)  # marks it as used
        return prompt, most

    def count(self, reused: int, run: int) -> None:
        """Add to the counts of reused and of computed prompt tokens."""
        with self._lock:
            self.reused += reused
            self.run += run

    def keep(self, prompt: _Kept) -> None:
        """Add a prompt; one without layers has waited. The least recently used prompt is
        dropped."""
        with self._lock:
            self._count += 1
            (self._held if prompt.layers else self._glimpsed)[self._count] = prompt


class PrefixUse:
    """One generation's use of the cache: shortens its prefill, and keeps its prompt.

    keeps: whether the prompt must run whole; known once the stack was called.
    """

    keeps: bool = False

    def __init__(self, cache: PrefixCache, run: Reader) -> None:
        self._cache, self._run = cache, run
        self._embeds: Tensor | None = None
        self._positions: Tensor | None = None
        self._weights: Weights = {}
        self._hook = run.intercepted.stack.register_forward_pre_hook(
            self._shorten, with_kwargs=True
        )

    def _shorten(self, _: nn.Module, args: Any, kw: dict[str, Any]) -> Any:
        """Shorten the stack's first call, on the prompt, by what is kept."""
        self._hook.remove()
        embeds, mask = kw.get("inputs_embeds"), kw.get("attention_mask")
        if embeds is None or not can_shorten(kw, self._run.cache, self._run.backbone):
            return None
        if mask is not None and not bool(mask.all()):
            return None
        self._embeds = embeds[0].clone()
        positions = kw.get("position_ids")
        self._positions = None if positions is None else positions.clone()
        exits = self._exits()
        modules = (self._run.backbone.stack, *(module for module, _ in exits))
        self._weights = {module: state_of(module) for module in modules}
        cached, common, glimpsed = self._cache.best(self._weights, self._embeds, self._positions)
        length = embeds.shape[1]
        self.keeps = glimpsed - common > max(1, length - glimpsed)
        self._cache.count(common, length - common)
        if cached is None:
            return None
        for entry, (keys, values) in zip(self._run.cache.layers, cached.layers, strict=False):
            entry.update(keys[:, :, :common], values[:, :, :common])
        for module, entry in exits:
            keys, values = next(pair for known, pair in cached.exits if known is module)
            entry.update(keys[:, :, :common], values[:, :, :common])
        return args, part_of(kw, common, length)

    def _exits(self) -> list[tuple[nn.Module, Any]]:
        """The exits that are on and attend, and their entries in the cache."""
        run = self._run
        if not run.exits_on or run.exits is None:
            return []
        entries = run.cache.layers[run.backbone.depth :]
        pairs = zip(run.exits.entries, entries, strict=True)
        return [
            (run.exits.at(depth), entry)
            for depth, entry in pairs
            if depth in run.exits_on and list(run.exits.at(depth).parameters())
        ]

    def leave(self) -> None:
        """Remove the hook from the stack, whether the stack was called or not."""
        self._hook.remove()

    def end(self) -> None:
        """Keep the prompt, with its keys if all layers have them as the full model would."""
        if self._embeds is None:
            return
        length, exits = len(self._embeds), self._exits()
        layers = self._run.cache.layers[: self._run.backbone.depth]
        entries = [*layers, *(entry for _, entry in exits)]
        if any(not e.is_initialized or e.get_seq_length() < length for e in entries):
            layers, exits = [], []  # it waits at an exit
        with torch.inference_mode():
            self._cache.keep(
                _Kept(
                    self._weights,
                    self._embeds,
                    self._positions,
                    [_start(entry, length) for entry in layers],
                    [(module, _start(entry, length)) for module, entry in exits],
                    current_salt(),
                )
            )


def _start(entry: Any, length: int) -> tuple[Tensor, Tensor]:
    """Copies of an entry's first keys and values: a slice would hold all of them."""
    return entry.keys[:, :, :length].clone(), entry.values[:, :, :length].clone()
