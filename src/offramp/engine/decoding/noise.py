"""The noise that sampled tokens are chosen by: of a place in the answer, whoever asks.

`torch.multinomial` for one draw takes the largest p / e, with e exponential (Gumbel-max in other
words), and so consumes the same noise whatever the probabilities. Here e is drawn once a place: a
place that is asked about again, because its first token was only a guess or a draft, is asked with
the same noise, and what is chosen from the same probabilities is what `torch.multinomial` chooses.
"""

from __future__ import annotations

import secrets

import torch
from torch import Tensor


class Noise:
    """Of the rows that share a generator, drawn together for a place as Hugging Face's `generate`
    draws for a batch."""

    def __init__(self, generator: torch.Generator, rows: int = 1) -> None:
        self._generator, self.rows = generator, rows
        self._drawn: dict[int, Tensor] = {}  # by place [rows, V]
        self._states: dict[int, Tensor] = {}  # of the generator, before each place
        self._left: dict[int, set[int]] = {}  # rows that a place is not settled in
        self._places = 0

    @classmethod
    def seeded(cls, seed: int | None, device: torch.device) -> Noise:
        """Of one row. seed: of its generator; None: any."""
        seed = secrets.randbits(63) if seed is None else seed
        return cls(torch.Generator(device).manual_seed(seed))

    @classmethod
    def going_on(cls, rows: int, device: torch.device) -> Noise:
        """Of rows whose noise goes on from PyTorch's own, so that `torch.manual_seed` holds."""
        generator = torch.Generator(device)
        if device.type == "cpu":
            generator.set_state(torch.get_rng_state())
        else:
            generator.manual_seed(int(torch.randint(2**62, (1,))))
        return cls(generator, rows)

    def choose(self, row: int, place: int, probabilities: Tensor) -> int:
        """The token of a row at a place, by probabilities [1, V].

        Raises:
            RuntimeError: they are no probabilities.
        """
        if not bool(torch.isfinite(probabilities).all()):
            raise RuntimeError("The logits to sample from hold inf or nan.")
        while self._places <= place:  # in order, so that each place has its own
            at = self._places
            self._states[at] = self._generator.get_state()
            like = probabilities.new_empty(self.rows, probabilities.shape[-1])
            self._drawn[at] = like.exponential_(generator=self._generator)
            self._left[at] = set(range(self.rows))
            self._places += 1
        return int((probabilities[0] / self._drawn[place][row]).argmax())

    def settled(self, row: int, place: int) -> None:
        """The token of a row at a place can no longer change."""
        left = self._left.get(place)
        if left is not None:
            left.discard(row)
            if not left:
                del self._left[place], self._drawn[place]

    def hand_back(self, places: int) -> None:
        """Let PyTorch's own generator go on from behind so many places."""
        if self._generator.device.type == "cpu":
            state = self._states.get(places, self._generator.get_state())
            torch.set_rng_state(state)
