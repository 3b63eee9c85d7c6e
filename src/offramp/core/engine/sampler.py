"""A row's own rules for its next token: Hugging Face's processors and criteria, and its noise.

Noise belongs to a place in the answer, whoever asks for it: a place that is asked about again,
because its first token was only a draft, gets the same noise. `SeededNoise` serves requests with a
seed, and `offramp.core.engine.pytorch_noise` those of `generate` without one.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence, Set
from functools import cache, cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import EosTokenCriteria, LogitsProcessorList, MaxLengthCriteria
from transformers.generation import logits_process

from offramp.core.errors import InputError
from offramp.core.executors.prefill import Prepared

BY_ROW = frozenset(
    kind
    for name, kind in vars(logits_process).items()
    if isinstance(kind, type)
    and not name.startswith(("Encoder", "PrefixConstrained", "RepetitionPenalty", "Unbatched"))
)
"""Hugging Face's processors that look at one row of ids and logits at a time."""


class NothingAllowed(InputError):
    """An exit can say none of the tokens that may come next, so that another head must speak."""


@runtime_checkable
class Constraint(Protocol):
    """Rules about the next token that follow each row's answer by themselves."""

    def of_row(self, prompt: int, ends: Set[int]) -> Any:
        """Return the logits processor of one row's answer, which follows `prompt` tokens and
        ends at any of the tokens `ends`."""
        ...


class OnToken(Protocol):
    """A listener for each token that is given out: its place in the answer, id, depth and score."""

    def __call__(self, place: int, token: int, depth: int, score: float) -> None: ...


Observer = Callable[[int, int, Tensor], None]
"""Is told the processed logits [1, V] that a token is chosen from, by row and place in the answer;
of a place that is chosen again, again."""


class Noise(Protocol):
    """The source of randomness that chooses the tokens of sampled rows."""

    rows: int

    def choose(self, row: int, place: int, scores: Tensor) -> int:
        """Draw the token of a row at a place from the softmax of its scores [1, V].

        Raises:
            RuntimeError: the scores hold inf or nan, or all are -inf.
        """
        ...

    def settled(self, row: int, place: int) -> None:
        """Note that the token of a row at `place` can no longer change."""
        ...

    def hand_back(self, places: int) -> None:
        """Advance the generator of the noise past `places` tokens."""
        ...


class SeededNoise:
    """Noise of one row by its seed, as every engine has it (`offramp.core.decoding.noise`)."""

    rows = 1

    def __init__(self, seed: int | None = None) -> None:
        """seed: None: any, though not PyTorch's own, which other rows draw from too."""
        self._seed = secrets.randbits(63) if seed is None else seed

    def choose(self, row: int, place: int, scores: Tensor) -> int:
        from offramp.core.decoding.noise import gumbel  # few answers are sampled

        check_finite(scores.max())
        noise = torch.from_numpy(gumbel(self._seed, place, scores.shape[-1]))
        return int((scores[0] + noise.to(scores.device)).argmax())

    def settled(self, row: int, place: int) -> None:
        """Do nothing: this noise keeps no state."""

    def hand_back(self, places: int) -> None:
        """Do nothing, because seeded noise uses no generator."""


def check_finite(number: Tensor) -> None:
    """Raise `RuntimeError` for inf or nan."""
    if not bool(torch.isfinite(number)):
        raise RuntimeError("The logits to sample from hold inf or nan.")


@cache
def _one_of(ends: frozenset[int]) -> Callable[[int], bool]:
    """Return a function that tells end tokens; the same object for the same tokens."""
    return ends.__contains__


class StopTogether:
    """Rows of a batch without an end token: as in Hugging Face's `generate` each is written on
    until a criterion has ended them all.

    ended: by row, the tokens that it had when a criterion first ended it.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self.ended: dict[int, int] = {}

    @classmethod
    def of(cls, prepared: Prepared) -> StopTogether | None:
        """Return the `StopTogether` of a request's rows; None where each row ends by itself."""
        ends = any(hasattr(criterion, "eos_token_id") for criterion in prepared.criteria)
        return None if ends or len(prepared.ids) == 1 else cls(len(prepared.ids))

    def end(self, row: int, tokens: int) -> None:
        """Note that a criterion ended a row after `tokens` tokens."""
        self.ended.setdefault(row, tokens)

    @property
    def length(self) -> float:
        """The number of tokens of all rows, which is known once the last row has ended."""
        return max(self.ended.values()) if len(self.ended) == self._rows else math.inf


class Sampler:
    """The rules of one row: what may come next, and when it ends.

    ids: the prompt's token ids [1, T]. row: of the prepared request. plain: whether the next token
    is always that of the largest logit. scored: whether processors change the logits that an exit's
    score reads.
    """

    keep: Callable[[int, Tensor], None] | None = None
    """Is told the raw logits [V] that the token of a place is chosen from."""
    deep: int | None = None
    """A place whose token may not exit."""

    def __init__(
        self,
        prepared: Prepared,
        row: int = 0,
        *,
        noise: Noise | None = None,
        on_token: OnToken | None = None,
        on_end: Callable[[], None] | None = None,
        observer: Observer | None = None,
        together: StopTogether | None = None,
    ) -> None:
        """row: of the prepared request. noise: where it samples; None: with a seed of its own.
        on_end: is told that the answer is over. observer: is told the logits that each token is
        chosen from. together: of rows that end at once."""
        self.ids: Tensor = prepared.ids[row : row + 1]
        self.row: int = row
        self._rows = len(prepared.ids)
        self._lane = 0 if noise is None else min(row, noise.rows - 1)
        self._criteria = prepared.criteria
        self._on_token, self._on_end = on_token, on_end
        self._observer, self._together = observer, together
        self._ends: frozenset[int] = frozenset()
        self._custom = []
        for criterion in self._criteria:
            if type(criterion) is EosTokenCriteria:
                self._ends |= set(criterion.eos_token_id.flatten().tolist())
            elif type(criterion) is not MaxLengthCriteria:
                self._custom.append(criterion)
        self._own: list[Any] = []  # of this row alone
        self._processors = LogitsProcessorList(map(self._of_row, prepared.processors))
        self.samples: bool = bool(prepared.config.do_sample)
        self.plain: bool = not self.samples and not len(self._processors) and observer is None
        hard = [p for p in self._processors if not type(p).__name__.endswith("Warper")]
        self._hard = LogitsProcessorList(hard)
        self.scored: bool = bool(self._hard)
        longest = self._criteria.max_length
        self.most: int | None = None if longest is None else int(longest) - self.ids.shape[1]
        self._noise: Noise | None = noise
        if self.samples and noise is None:
            self._noise = SeededNoise()

    @property
    def ends(self) -> Callable[[int], bool]:
        """Return a function from a token id to whether the token ends the answer."""
        return _one_of(self._ends)

    @property
    def free(self) -> bool:
        ending = [stop for stop in self._custom if not hasattr(stop, "heard")]
        return self.plain and not ending and self._together is None

    @property
    def foreseen(self) -> bool:
        told = self._custom or self._on_token or self._on_end
        return self.free and not told

    @cached_property
    def prompt(self) -> list[int]:
        """Token ids of the row's prompt."""
        return self.ids[0].tolist()

    def choose(self, logits: Tensor, before: Sequence[int]) -> int:
        """Return the token id after the answer's tokens `before`, out of raw logits [1, V]."""
        # A copy: a processor may write into what it is given.
        scores = self.processed(logits, before)
        if self._observer is not None:
            self._observer(self.row, len(before), scores)
        if not self.samples:
            return int(scores.argmax(-1))
        assert self._noise is not None
        return self._noise.choose(self._lane, len(before), scores)

    def processed(self, logits: Tensor, before: Sequence[int]) -> Tensor:
        """Return logits [1, V] after the answer's tokens `before`, by all processors of the row."""
        return self._processed(self._processors, logits, before)

    def constrain(self, logits: Tensor, before: Sequence[int]) -> Tensor:
        """Return the logits [1, V] that an exit's score reads after the tokens `before`: with
        processors that forbid or penalise tokens (minimum length, repetition penalty, the user's
        own), without warpers of sampling (temperature, top-k, top-p, ...)."""
        return self._processed(self._hard, logits, before) if self._hard else logits

    def _of_row(self, processor: Any) -> Any:
        if not isinstance(processor, Constraint):
            return processor
        self._own.append(processor.of_row(self.ids.shape[1], self._ends))
        return self._own[-1]

    def _processed(self, processors: Any, logits: Tensor, before: Sequence[int]) -> Tensor:
        ids = self._with(before)
        scores = logits.to(ids.device, torch.float32, copy=True)
        if self._rows == 1 or all(type(p) in BY_ROW or p in self._own for p in processors):
            return processors(ids, scores)  # type: ignore[no-any-return]
        ids, scores = ids.expand(self._rows, -1), scores.expand(self._rows, -1)
        made: Tensor = processors(ids.contiguous(), scores.contiguous())
        return made[self.row : self.row + 1]

    def would_end(self, tokens: int, last: int) -> bool:
        """Return True if an answer of `tokens` tokens, with `last` as the last, is over by length
        or by its end token. Other criteria are only asked about tokens that are final."""
        if self.most is not None and tokens >= self.most:
            return True
        return last in self._ends

    def emit(self, ids: Sequence[int], place: int, depth: int, score: float) -> bool:
        """Give out the token at `place` of the answer `ids`; return True where the answer is over.

        A criterion with an attribute `heard` only listens, and is no longer asked once `heard` is
        true: each call costs a small model a tenth of its token. Errors of listeners and criteria
        are raised.
        """
        if self.samples and self._noise is not None:
            self._noise.settled(self._lane, place)
        if self._on_token is not None:
            self._on_token(place, ids[place], depth, score)
        over = self.would_end(place + 1, ids[place])
        if self._custom:
            text = self._with(ids[: place + 1])
            said = [torch.as_tensor(stop(text, None)) for stop in self._custom]
            ends = any(bool(each.all()) for each in said)
            over = over or (ends if self._together is None else False)
            if ends and self._together is not None:
                self._together.end(self.row, place + 1)
            self._custom = [stop for stop in self._custom if not getattr(stop, "heard", False)]
        if self._together is not None:
            over = over or place + 1 >= self._together.length
        if over and self._on_end is not None:
            self._on_end()
        return over

    def _with(self, tokens: Sequence[int]) -> Tensor:
        """The prompt and the answer as ids [1, T]."""
        if not len(tokens):
            return self.ids
        more = torch.tensor([list(tokens)], dtype=self.ids.dtype, device=self.ids.device)
        return torch.cat([self.ids, more], 1)
