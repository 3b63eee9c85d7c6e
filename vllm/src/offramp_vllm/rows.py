"""Which rows leave, which cache slots wait, and the ragged call that goes deeper: pure functions,
without vLLM.

R requests in a step, each with a block table of N blocks. A slot is a place in the paged cache:
block number times block size, plus the place in the block. What is decided is decided on the host,
in arrays of its own: the host waits for the device only where `fetched` is called.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]


def fetched(values: Tensor) -> NDArray[Any]:
    """What the device has found, on the host, which waits for it."""
    return values.cpu().numpy()  # type: ignore[no-any-return]


def sent(values: NDArray[Any], like: Tensor) -> Tensor:
    """The host's values on the device of `like`, which nobody waits for."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(like.device, non_blocking=True)


def leaves(scores: Tensor, thresholds: Tensor) -> Tensor:
    """Whether each token leaves [A]; at a threshold of 0 in any case, at NaN never."""
    return (thresholds == 0.0) | (scores >= thresholds)


def verified(said: Tensor, drafts: Tensor, counts: Tensor) -> Tensor:
    """The tokens of each request [R, K + 1] by what the model says greedily: its drafts as long as
    they are the model's own tokens, and the token after them; then -1.

    said: for each request its tokens in the drafts' places, then the one after all of them [D + R].
    drafts: of all requests [D]. counts: drafts of each request [R], K at most.
    """
    requests, rows = len(counts), counts + 1
    wide = int(rows.max())
    places = torch.arange(wide, device=said.device).expand(requests, wide)
    made = said.new_full((requests, wide), -1)
    made[places < rows[:, None]] = said
    proposed = torch.full_like(made, -1)
    proposed[places < counts[:, None]] = drafts.to(said)
    kept = ((made == proposed) & (proposed >= 0)).long().cumprod(1)
    return made.masked_fill(places > kept.sum(1, keepdim=True), -1)


PUT_OFF = 2
"""How often a token may be put off."""
TOGETHER = 1 / 2
"""The share of a step's tokens that goes deeper at once."""


def put_off(deeper: Flags, asks: Flags, again: Ints) -> bool:
    """Whether tokens that go deeper are put off to a later step, so that the layers above the exit
    read their weights once for several: where they are few, and none of them has waited long.

    deeper: which of the requests go deeper [R]. asks: of which a token is chosen [R]. again: how
    often each has been put off [R]; -1: it may not be.
    """
    some = again[deeper]
    few = len(some) < TOGETHER * int(asks.sum())
    return few and bool(((some >= 0) & (some < PUT_OFF)).all())


def slots_of(block_table: Ints, rows: Ints, positions: Ints, block_size: int) -> Ints:
    """The slots [T] of tokens.

    block_table: [R, N]. rows: the request [T] of each token. positions: its place [T].
    """
    blocks = block_table[rows, positions // block_size].astype(np.int64)
    found: Ints = blocks * block_size + positions % block_size
    return found


def first_waiting(
    level: NDArray[np.uint8], block_table: Ints, seq_lens: Ints, block_size: int, below: int
) -> Ints:
    """The first place [R] of each request whose slot is at a level less than `below`; the request's
    length where none is.

    level: of every slot [S]. seq_lens: tokens [R] of each request, those of this step included.
    """
    table = block_table[:, : -(-int(seq_lens.max()) // block_size)]
    waiting = (level.reshape(-1, block_size)[table] < below).reshape(len(table), -1)
    waiting &= np.arange(waiting.shape[1]) < seq_lens[:, None]
    return np.where(waiting.any(1), waiting.argmax(1), seq_lens)


class Ragged(NamedTuple):
    """Tokens of several requests, one request after the other.

    rows: the requests [G], of R. starts, ends: their first place, and that after their last [G].
    """

    rows: Ints
    starts: Ints
    ends: Ints

    @property
    def offsets(self) -> Ints:
        """Where each request's tokens begin in the call, and the number of all [G + 1]."""
        return np.concatenate([[0], (self.ends - self.starts).cumsum()]).astype(np.int64)

    def tokens(self) -> tuple[Ints, Ints]:
        """The request of each token [T], of R, and its place [T]."""
        lengths, offsets = self.ends - self.starts, self.offsets
        which = np.repeat(np.arange(len(lengths)), lengths)
        places = np.arange(len(which)) - offsets[which]
        return self.rows[which], places + self.starts[which]


def rounds(call: Ragged, most: int) -> Iterator[Ragged]:
    """The call in parts of at most so many tokens, in order: a request's later tokens attend to its
    earlier ones, whose keys are then there."""
    if int(call.offsets[-1]) <= most:
        yield call
        return
    parts: list[tuple[int, int, int]] = []
    room = most
    for row, start, end in zip(*(column.tolist() for column in call), strict=True):
        at = start
        while at < end:
            taken = min(room, end - at)
            parts.append((row, at, at + taken))
            at, room = at + taken, room - taken
            if room == 0:
                yield _ragged(parts)
                parts, room = [], most
    if parts:
        yield _ragged(parts)


def _ragged(parts: Sequence[tuple[int, int, int]]) -> Ragged:
    return Ragged(*(np.array(column, dtype=np.int64) for column in zip(*parts, strict=True)))
