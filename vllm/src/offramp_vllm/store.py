"""What a token needs to go deeper later, by cache slot: its state at each exit and its position.

Slots carry prefix caching, preemption and chunked prefill: what is known of a cached block is known
to every request that finds the block, and a slot that is written anew waits again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from offramp_vllm.rows import Ints

Parts = Mapping[str, Tensor]
"""A state between two layers by the names that the model's own pipeline stages hand on."""


class Store:
    """States of S slots at E exits. What is known of slots is known to the host.

    level: for each slot [S] how many of the parts above the exits have run, 0 to E.
    heard: for each exit and slot [E, S] 1 where the exit has run, so that its keys are there.
    gaps: whether a call has left an exit out, so that a slot may lack its keys.
    """

    gaps = False

    def __init__(self, slots: int, exits: int, like: Parts, axes: int) -> None:
        """slots: S. exits: E. like: a state of any number of tokens. axes: of a position; more than
        1 where positions are of time, height and width."""
        device = next(iter(like.values())).device
        self.states: Sequence[dict[str, Tensor]] = [
            {
                n: torch.zeros((slots, *t.shape[1:]), dtype=t.dtype, device=device)
                for n, t in like.items()
            }
            for _ in range(exits)
        ]
        self.positions = torch.zeros((axes, slots), dtype=torch.int64, device=device)
        self.level = np.full(slots, exits, dtype=np.uint8)
        self.heard = np.ones((exits, slots), dtype=np.uint8)

    @staticmethod
    def bytes_a_slot(exits: int, like: Parts, axes: int) -> int:
        """Bytes that a slot takes on the device."""
        states = sum(t[0].numel() * t.element_size() for t in like.values())
        return exits * states + 8 * axes

    def begin(self, slots: Tensor, known: Ints, positions: Tensor) -> None:
        """Have slots [T] wait at the first exit. known: the same on the host. positions: [axes,
        T]."""
        self.positions.index_copy_(1, slots, positions)
        self.level[known] = 0
        self.heard[:, known] = 0

    def put(self, exit: int, slots: Tensor, state: Parts) -> None:
        """Keep the states of tokens at an exit. exit: from 0. slots: [T]. state: [T, ...]."""
        for name, kept in self.states[exit].items():
            kept.index_copy_(0, slots, state[name])

    def at(self, exit: int, slots: Tensor) -> dict[str, Tensor]:
        """Copies of the states at an exit."""
        return {name: kept.index_select(0, slots) for name, kept in self.states[exit].items()}

    def places(self, slots: Tensor) -> Tensor:
        """Positions of slots [T], or [3, T] where they are of time, height and width."""
        found = self.positions[:, slots]
        return found[0] if len(found) == 1 else found
