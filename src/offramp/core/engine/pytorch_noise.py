"""Noise that goes on from PyTorch's own generator, as Hugging Face's sampling does."""

from __future__ import annotations

import torch
from torch import Tensor

from offramp.core.engine.sampler import check_finite


class PyTorchNoise:
    """Noise for a batch from PyTorch's own generator: a caller's `torch.manual_seed` gives the same
    sample as in Hugging Face's `generate`.

    `torch.multinomial` for one draw takes the largest p / e, with e exponential, and consumes the
    same noise whatever the probabilities p. Here e is drawn once a place, for all rows together.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.rows: int = rows
        self._generator = torch.Generator(device)
        if device.type == "cpu":
            self._generator.set_state(torch.get_rng_state())
        else:
            self._generator.manual_seed(int(torch.randint(2**62, (1,))))
        self._drawn: dict[int, Tensor] = {}  # by place [rows, V]
        self._states: dict[int, Tensor] = {}  # of the generator, before each place
        self._left: dict[int, set[int]] = {}  # rows that a place is not settled in

    def choose(self, row: int, place: int, scores: Tensor) -> int:
        probabilities = scores.softmax(-1)
        check_finite(probabilities.sum())
        while (at := len(self._states)) <= place:  # in order, so that each place has its own
            self._states[at] = self._generator.get_state()
            like = probabilities.new_empty(self.rows, probabilities.shape[-1])
            self._drawn[at] = like.exponential_(generator=self._generator)
            self._left[at] = set(range(self.rows))
        return int((probabilities[0] / self._drawn[place][row]).argmax())

    def settled(self, row: int, place: int) -> None:
        left = self._left.get(place)
        if left is not None:
            left.discard(row)
            if not left:
                del self._left[place], self._drawn[place]

    def hand_back(self, places: int) -> None:
        """Advance PyTorch's own generator to where `generate` leaves it after `places` tokens."""
        if self._generator.device.type == "cpu":
            state = self._states.get(places, self._generator.get_state())
            torch.set_rng_state(state)
