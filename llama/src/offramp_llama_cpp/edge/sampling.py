"""Which token comes next, in numpy: the sampler of PyTorch's engines (`engine.sampler`)
without Hugging Face's processors. Both draw by the same noise (`engine.decoding.noise`).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from offramp.core.decoding.noise import gumbel
from offramp.core.errors import InputError
from offramp.serving.host import OnSettled
from offramp_llama_cpp.array_reader import Ids
from offramp_llama_cpp.graphs import Array


@dataclass(frozen=True)
class Sampling:
    """temperature: 0 takes the likeliest token. top_p, top_k: of the likeliest; 1 and 0: all.
    repetition_penalty: as Hugging Face has it, over prompt and answer. seed: which sample; None:
    any. presence_penalty, frequency_penalty: as OpenAI has them, over the answer.

    Raises:
        InputError: a number that nothing can be drawn by.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        wrong = [
            name
            for name, fits in (
                ("temperature", self.temperature == 0.0 or 1e-6 <= self.temperature <= 1e6),
                ("top_p", 0.0 < self.top_p <= 1.0),
                ("top_k", type(self.top_k) is int and self.top_k >= 0),
                ("repetition_penalty", 1e-3 <= self.repetition_penalty <= 1e3),
                ("seed", self.seed is None or type(self.seed) is int),
                ("presence_penalty", abs(self.presence_penalty) <= 1e3),
                ("frequency_penalty", abs(self.frequency_penalty) <= 1e3),
            )
            if not fits
        ]
        if wrong:
            raise InputError(
                f"{wrong[0]} is {getattr(self, wrong[0])!r}, by which nothing can be drawn.",
                "Use temperature 0 to 1e6, top_p above 0 and at most 1, top_k from 0, whole seeds, "
                "repetition_penalty 0.001 to 1000, other penalties up to 1000.",
            )


class Notes(Protocol):
    """Is told the log-probabilities that tokens are chosen from."""

    def note(self, place: int, logits: Array, ids: Ids | None) -> None:
        """Note the logits [S] that the token at a place is chosen from. ids: of their tokens."""
        ...


class Sampler:
    """The rules of one answer: which token comes next, and when it ends.

    plain: the largest logit is the next token. most: tokens.
    """

    def __init__(
        self,
        sampling: Sampling,
        vocabulary: int,
        prompt: Iterable[int] = (),
        *,
        most: int = 1,
        ends: Callable[[int], bool] = lambda token: False,
        stop: Callable[[Sequence[int]], bool] | None = None,
        banned: Sequence[int] = (),
        noted: Notes | None = None,
        on_token: OnSettled | None = None,
        seed: int | None = None,
    ) -> None:
        """prompt: token ids that the penalty counts. most: tokens. ends: whether a token ends the
        answer. stop: whether the answer's tokens end it. banned: tokens that are never said. noted:
        is told the log-probabilities that a token is chosen from. on_token: is told of each that is
        settled. seed: instead of that of `sampling`."""
        self._sampling, self._vocabulary = sampling, vocabulary
        self.prompt: tuple[int, ...] = tuple(prompt)
        self._most = most
        self._stop, self._on_token = stop, on_token
        self.ends: Callable[[int], bool] = ends
        self._banned, self._noted = np.asarray(banned, dtype=np.int64), noted
        self._counted = bool(sampling.presence_penalty or sampling.frequency_penalty)
        known = sampling.seed if seed is None else seed
        self._seed = secrets.randbits(63) if known is None else known
        rules = sampling.repetition_penalty != 1.0 or self._counted or len(self._banned)
        self.plain: bool = sampling.temperature == 0.0 and not rules and noted is None

    @property
    def free(self) -> bool:
        return self.plain and self._stop is None

    @property
    def foreseen(self) -> bool:
        return self.free and self._on_token is None

    def allowed(self, logits: Array, ids: Ids | None, before: Sequence[int]) -> Array:
        """Logits [S] after penalties. ids: of their tokens; None: all. before: the answer's tokens
        that stand before it."""
        sampling = self._sampling
        logits = logits.copy()
        if sampling.repetition_penalty != 1.0:
            seen = np.fromiter({*self.prompt, *before}, dtype=np.int64)
            places, _ = _places(seen, ids, len(logits))
            chosen = logits[places]
            penalty = np.float32(sampling.repetition_penalty)
            logits[places] = np.where(chosen > 0, chosen / penalty, chosen * penalty)
        if len(self._banned):
            logits[_places(self._banned, ids, len(logits))[0]] = -np.inf
        if self._counted and before:
            said, counts = np.unique(np.asarray(before, dtype=np.int64), return_counts=True)
            places, known = _places(said, ids, len(logits))
            lost = sampling.frequency_penalty * counts[known] + sampling.presence_penalty
            logits[places] -= lost.astype(logits.dtype)
        return logits

    def choose(self, logits: Array, ids: Ids | None, before: Sequence[int]) -> int:
        """The token after `before`, of `allowed` logits [S]."""
        if self._noted is not None:
            self._noted.note(len(before), logits, ids)
        sampling = self._sampling
        if sampling.temperature == 0.0:
            best = int(logits.argmax())
        else:
            # Single precision, as Hugging Face's warpers compute.
            scaled = self._warped(logits.astype(np.float32) / np.float32(sampling.temperature))
            if not np.isfinite(scaled.max()):
                raise RuntimeError("The logits to sample from hold inf or nan.")
            noise = gumbel(self._seed, len(before), self._vocabulary)
            best = int((scaled + (noise[: len(logits)] if ids is None else noise[ids])).argmax())
        return best if ids is None else int(ids[best])

    def would_end(self, tokens: int, last: int) -> bool:
        """Return True if an answer of so many tokens, the last of them `last`, is over."""
        return tokens >= self._most or self.ends(last)

    def emit(self, ids: Sequence[int], place: int, depth: int, score: float) -> bool:
        """Give out the token at `place` of the answer `ids`; True where the answer is over."""
        if self._on_token is not None:
            self._on_token(place, ids[place], depth, score)
        stopped = self._stop is not None and self._stop(ids[: place + 1])
        return stopped or self.would_end(place + 1, ids[place])

    def _warped(self, scaled: Array) -> Array:
        """Logits, minus infinity where top-k and top-p leave a token out."""
        sampling = self._sampling
        if 0 < sampling.top_k < len(scaled):
            least = np.partition(scaled, -sampling.top_k)[-sampling.top_k]
            scaled = np.where(scaled < least, -np.inf, scaled)
        if sampling.top_p < 1.0:
            order = np.argsort(-scaled, kind="stable")
            shares = np.exp(scaled[order] - scaled[order[0]])
            before = np.cumsum(shares) - shares
            left_out = order[before >= sampling.top_p * shares.sum()]
            scaled = scaled.copy()
            scaled[left_out[left_out != order[0]]] = -np.inf
        return scaled


def _places(tokens: Ids, ids: Ids | None, size: int) -> tuple[Ids, npt.NDArray[np.bool_]]:
    """Where tokens stand among logits [size]; and which of them do. ids: the logits' tokens, in any
    order; None: all of the vocabulary."""
    if ids is None:
        known = tokens < size
        return tokens[known], known
    order = np.argsort(ids)
    at = np.searchsorted(ids, tokens, sorter=order).clip(max=len(ids) - 1)
    places = order[at]
    known = ids[places] == tokens
    return places[known], known
