"""Which token comes next, in numpy: the sampler of PyTorch's engines (`engine.decoding.sampler`)
without Hugging Face's processors. Both draw by the same noise (`engine.decoding.noise`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from offramp.engine.decoding.noise import gumbel
from offramp.errors import InputError
from offramp.runtimes.llama_cpp.array_reader import Ids
from offramp.runtimes.llama_cpp.graphs import Array


@dataclass(frozen=True)
class Sampling:
    """temperature: 0 takes the likeliest token. top_p, top_k: of the likeliest; 1 and 0: all.
    repetition_penalty: as Hugging Face has it, over prompt and answer. seed: of the noise.

    Raises:
        InputError: a number that nothing can be drawn by.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = [
            name
            for name, fits in (
                ("temperature", self.temperature == 0.0 or 1e-6 <= self.temperature <= 1e6),
                ("top_p", 0.0 < self.top_p <= 1.0),
                ("top_k", type(self.top_k) is int and self.top_k >= 0),
                ("repetition_penalty", 1e-3 <= self.repetition_penalty <= 1e3),
                ("seed", type(self.seed) is int and 0 <= self.seed < 2**64),
            )
            if not fits
        ]
        if wrong:
            raise InputError(
                f"{wrong[0]} is {getattr(self, wrong[0])!r}, by which nothing can be drawn.",
                "Use temperature 0 to 1e6, top_p above 0 and at most 1, top_k and seed from 0, "
                "repetition_penalty 0.001 to 1000.",
            )


class Sampler:
    """The rules of one answer: which token comes next, and when it ends.

    plain: the largest logit is the next token. most: tokens.
    """

    def __init__(
        self,
        sampling: Sampling,
        vocabulary: int,
        prompt: Sequence[int] = (),
        *,
        most: int = 1,
        ends: Callable[[int], bool] = lambda token: False,
        on_token: Callable[[int], bool] = lambda token: False,
    ) -> None:
        """prompt: token ids that the penalty counts. most: tokens. ends: whether a token ends the
        answer. on_token: is told of each that is settled; whether the answer ends with it."""
        self._sampling, self._vocabulary = sampling, vocabulary
        self._prompt, self._most = set(prompt), most
        self._ends, self._on_token = ends, on_token
        self.plain = sampling.temperature == 0.0 and sampling.repetition_penalty == 1.0

    def allowed(self, logits: Array, ids: Ids | None, before: Sequence[int]) -> Array:
        """Logits [S] after the penalty. ids: of their tokens; None: all. before: the answer's
        tokens that stand before it."""
        penalty = self._sampling.repetition_penalty
        if penalty == 1.0:
            return logits
        seen = np.fromiter(self._prompt | set(before), dtype=np.int64)
        places = seen if ids is None else np.flatnonzero(np.isin(ids, seen))
        places = places[places < len(logits)]
        logits = logits.copy()
        chosen = logits[places]
        logits[places] = np.where(chosen > 0, chosen / penalty, chosen * penalty)
        return logits

    def choose(self, logits: Array, ids: Ids | None, before: Sequence[int]) -> int:
        """The token behind `before`, of `allowed` logits [S]."""
        sampling = self._sampling
        if sampling.temperature == 0.0:
            best = int(logits.argmax())
        else:
            # Single precision, as Hugging Face's warpers compute.
            scaled = self._warped(logits.astype(np.float32) / np.float32(sampling.temperature))
            if not np.isfinite(scaled.max()):
                raise RuntimeError("The logits to sample from hold inf or nan.")
            noise = gumbel(sampling.seed, len(before), self._vocabulary)
            best = int((scaled + (noise[: len(logits)] if ids is None else noise[ids])).argmax())
        return best if ids is None else int(ids[best])

    def would_end(self, tokens: int, last: int) -> bool:
        """Whether an answer of so many tokens, the last of them `last`, is over."""
        return tokens >= self._most or self._ends(last)

    def emit(self, ids: Sequence[int], place: int, depth: int, score: float) -> bool:
        """Give out the token at `place` of the answer `ids`; True where the answer is over."""
        stopped = self._on_token(ids[place])
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
