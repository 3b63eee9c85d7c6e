"""A request's own rules for its next token: Hugging Face's processors and criteria, and its noise.

Sampling is by noise that belongs to a place in the answer, not to a call: a place that is drawn
again, because its first token was only a guess, is drawn with the same noise. So a seed gives the
same tokens whatever was guessed in between and whoever else was in the batch, the full model's
where the request is lossless. `torch.multinomial` for one draw takes the largest p / e, with e
exponential (Gumbel-max in other words), and so consumes the same noise whatever the probabilities;
that a guess and the full model share it makes them agree often (Daliri et al. 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from offramp.engine.sampling import SequenceState
from offramp.engine.slots.prompt import Prompt
from offramp.serving.rows.row import Choice


class RowRules:
    """What may come next in one answer, and when it ends.

    plain: the largest logit is the next token, so many rows can be asked at once. scored: whether
    processors change what an exit's score is about.
    """

    def __init__(
        self,
        prompt: Prompt,
        *,
        seed: int | None = None,
        streamer: Any = None,
        on_choice: Callable[[Choice], None] | None = None,
    ) -> None:
        """Raise whatever the streamer raises on the prompt."""
        self._state = SequenceState(prompt.prepared, streamer)
        self.ids = prompt.prepared.ids
        self._streamer, self._criteria = streamer, prompt.prepared.criteria
        self._on_choice = on_choice
        self._ends: set[int] = set()
        self._custom = False
        for criterion in prompt.prepared.criteria:
            if hasattr(criterion, "eos_token_id"):
                self._ends |= set(criterion.eos_token_id.flatten().tolist())
            elif type(criterion).__name__ != "MaxLengthCriteria":
                self._custom = True
        longest = prompt.prepared.criteria.max_length
        self.most = None if longest is None else int(longest) - prompt.prepared.ids.shape[1]
        self.samples = self._state.samples
        self.plain = not self.samples and not len(prompt.prepared.processors)
        self._so_far: list[int] = []
        self._constrain = self._state.constraints(lambda: self._with(self._so_far))
        self.scored = self._constrain is not None
        self._generator: torch.Generator | None = None
        self._noise: dict[int, Tensor] = {}  # state of the generator before each place is drawn
        if self.samples:
            self._generator = torch.Generator(prompt.prepared.ids.device)
            if seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(seed)
            self._noise[0] = self._generator.get_state()

    def choose(self, logits: Tensor, before: Sequence[int]) -> int:
        """The token behind the answer's tokens `before`, out of raw logits [1, V]."""
        scores = self._state.process(logits, self._with(before))
        if not self.samples:
            return int(scores.argmax(-1))
        generator, place = self._generator, len(before)
        assert generator is not None
        generator.set_state(self._noise[place])
        token = int(torch.multinomial(scores.softmax(-1), 1, generator=generator))
        self._noise.setdefault(place + 1, generator.get_state())
        return token

    def constrain(self, logits: Tensor, before: Sequence[int]) -> Tensor:
        """Logits [1, V] of what may come behind `before`, which an exit's score is about."""
        if self._constrain is None:
            return logits
        self._so_far = list(before)
        return self._constrain(logits)

    def would_end(self, tokens: int, last: int) -> bool:
        """Whether an answer of so many tokens, the last of them `last`, is over by length or by
        its end token. Other criteria are only asked about what is settled."""
        return last in self._ends or (self.most is not None and tokens >= self.most)

    def emit(self, tokens: Sequence[int], choice: Choice) -> bool:
        """Give out the answer's last token, all of it being `tokens`; True where it is over.

        choice: the last token with its depth and score. Raise whatever the streamer or a criterion
        raises.
        """
        self._noise.pop(len(tokens) - 1, None)  # that place is settled
        if self._streamer is not None:
            self._streamer.put(torch.tensor(tokens[-1:]))
        if self._on_choice is not None:
            self._on_choice(choice)
        if self._custom:
            return bool(self._criteria(self._with(tokens), None).all())
        return self.would_end(len(tokens), tokens[-1])

    def finish(self) -> None:
        """Tell the streamer that nothing more comes."""
        self._state.end()

    def _with(self, tokens: Sequence[int]) -> Tensor:
        """Prompt and answer [1, T]."""
        more = torch.tensor([list(tokens)], dtype=self.ids.dtype, device=self.ids.device)
        return torch.cat([self.ids, more], 1) if len(tokens) else self.ids
