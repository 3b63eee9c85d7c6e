"""A row's own rules for its next token: Hugging Face's processors and criteria, and its noise.

Sampling is by noise that belongs to a place in the answer, not to a call: a place that is drawn
again, because its first token was only a guess or a draft, is drawn with the same noise. So a seed
gives the same tokens whatever was guessed in between, in whatever company, and lossless decoding
gives the full model's sample of that seed. `torch.multinomial` for one draw takes the largest
p / e, with e exponential (Gumbel-max in other words), and so consumes the same noise whatever the
probabilities; that a draft and the full model share it makes them agree often (Daliri et al. 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process

from offramp.engine.prefill import Prepared

BY_ROW = frozenset(
    kind
    for name, kind in vars(logits_process).items()
    if isinstance(kind, type)
    and not name.startswith(("Encoder", "PrefixConstrained", "RepetitionPenalty", "Unbatched"))
)
"""Hugging Face's processors that look at one row of ids and logits at a time."""


class OnToken(Protocol):
    """Is told of each token that is given out: its place in the answer, id, depth and score."""

    def __call__(self, place: int, token: int, depth: int, score: float) -> None: ...


Observer = Callable[[int, int, Tensor], None]
"""Is told the processed logits [1, V] that a token is chosen from, by row and place in the answer;
of a place that is chosen again, again."""


class Sampler:
    """What may come next in one row, and when it ends.

    ids: the prompt's token ids [1, T]. row: of the prepared request. plain: the largest logit is
    the next token, so many rows can be asked at once. scored: whether processors change what an
    exit's score is about.
    """

    def __init__(
        self,
        prepared: Prepared,
        row: int = 0,
        *,
        generator: torch.Generator | None = None,
        on_token: OnToken | None = None,
        observer: Observer | None = None,
        stops: bool = True,
    ) -> None:
        """row: of the prepared request. generator: of the row's noise, where it samples; None: one
        with a seed of its own. observer: is told the logits that each token is chosen from. stops:
        whether the answer ends where a criterion says so."""
        self.ids: Tensor = prepared.ids[row : row + 1]
        self.row, self._rows = row, len(prepared.ids)
        self._processors, self._criteria = prepared.processors, prepared.criteria
        self._on_token, self._observer, self._stops = on_token, observer, stops
        self.samples = bool(prepared.config.do_sample)
        self.plain = not self.samples and not len(self._processors) and observer is None
        self._hard = [p for p in self._processors if not type(p).__name__.endswith("Warper")]
        self.scored = bool(self._hard)
        self._ends: frozenset[int] = frozenset()
        self._custom = []
        for criterion in self._criteria:
            if hasattr(criterion, "eos_token_id"):
                self._ends |= set(criterion.eos_token_id.flatten().tolist())
            elif type(criterion).__name__ != "MaxLengthCriteria":
                self._custom.append(criterion)
        longest = self._criteria.max_length
        self.most = None if longest is None else int(longest) - self.ids.shape[1]
        self.ended: int | None = None  # tokens when a criterion first said that it is over
        self._noise: dict[int, Tensor] = {}  # state of the generator before each place is drawn
        if self.samples:
            if generator is None:
                generator = torch.Generator(self.ids.device)
                generator.seed()
            self._generator = generator
            self._noise[0] = generator.get_state()

    def choose(self, logits: Tensor, before: Sequence[int]) -> int:
        """The token behind the answer's tokens `before`, out of raw logits [1, V]."""
        # A copy: a processor may write into what it is given.
        scores = self._processed(self._processors, logits, before)
        if self._observer is not None:
            self._observer(self.row, len(before), scores)
        if not self.samples:
            return int(scores.argmax(-1))
        place = len(before)
        self._generator.set_state(self._noise[place])
        token = int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))
        self._noise[place + 1] = self._generator.get_state()
        return token

    def constrain(self, logits: Tensor, before: Sequence[int]) -> Tensor:
        """Logits [1, V] of what may come behind `before`, which an exit's score is about: by the
        processors that say what may come (minimum length, repetition penalty, the user's own),
        without the warpers that only shape sampling (temperature, top-k, top-p, ...)."""
        return self._processed(self._hard, logits, before) if self._hard else logits

    def _processed(self, processors: Any, logits: Tensor, before: Sequence[int]) -> Tensor:
        ids = self._with(before)
        scores = logits.to(ids.device, torch.float32, copy=True)
        if self._rows == 1 or all(type(p) in BY_ROW for p in processors):
            return _through(processors, ids, scores)
        ids, scores = ids.expand(self._rows, -1), scores.expand(self._rows, -1)
        made = _through(processors, ids.contiguous(), scores.contiguous())
        return made[self.row : self.row + 1]

    def would_end(self, tokens: int, last: int) -> bool:
        """Whether an answer of so many tokens, the last of them `last`, is over by length or by
        its end token. Other criteria are only asked about what is settled."""
        if self.most is not None and tokens >= self.most:
            return True
        return self._stops and last in self._ends

    def emit(self, ids: Sequence[int], place: int, depth: int, score: float) -> bool:
        """Give out the token at `place` of the answer `ids`; True where the answer is over.

        Raise whatever the one who is told of it, or a criterion, raises.
        """
        if self.samples:
            self._noise.pop(place, None)  # that place is settled
        if self._on_token is not None:
            self._on_token(place, ids[place], depth, score)
        over = self.would_end(place + 1, ids[place])
        if self._custom:
            text = self._with(ids[: place + 1])
            if any([bool(stop(text, None).all()) for stop in self._custom]):
                if self.ended is None:
                    self.ended = place + 1
                over = over or self._stops
        return over

    def hand_back(self, tokens: int) -> None:
        """Let PyTorch's own generator go on from behind so many tokens, where it began here."""
        if self.samples and self.ids.device.type == "cpu" and tokens in self._noise:
            torch.set_rng_state(self._noise[tokens])

    def _with(self, tokens: Sequence[int]) -> Tensor:
        """Prompt and answer [1, T]."""
        if not len(tokens):
            return self.ids
        more = torch.tensor([list(tokens)], dtype=self.ids.dtype, device=self.ids.device)
        return torch.cat([self.ids, more], 1)


def _through(processors: Any, ids: Tensor, scores: Tensor) -> Tensor:
    own = isinstance(processors, LogitsProcessorList)
    chain: Any = processors if own else LogitsProcessorList(processors)
    return chain(ids, scores)  # type: ignore[no-any-return]


def generators(rows: int, seed: int | None, device: torch.device) -> list[torch.Generator]:
    """One for each row. Without a seed the first goes on from PyTorch's own, so that
    `torch.manual_seed` holds as it does of Hugging Face's `generate`."""
    made = []
    for row in range(rows):
        generator = torch.Generator(device)
        if seed is not None:
            generator.manual_seed(seed + row)
        elif row == 0 and device.type == "cpu":
            generator.set_state(torch.get_rng_state())
        else:
            generator.manual_seed(int(torch.randint(2**62, (1,))))
        made.append(generator)
    return made
