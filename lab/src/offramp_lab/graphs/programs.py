"""One row's decoder as programs over buffers: up to the first exit, from an exit on, all the way.

The token to feed and its column are numbers on the device, which the programs move on themselves.
So the CPU only says which program comes next, and may begin a token that it does not know yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from offramp.core.decoding.confidence import FEATURE_SCORES
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.decoding.scores import SCORES
from offramp.core.engine.heads import ExitCheck, ExitScorer
from offramp.core.executors.segments import ExitOutput
from offramp.core.executors.slots.cache import SlotCall
from offramp.core.executors.slots.executor import SlotExecutor
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import ExitSet
from offramp_lab.graphs.recording import WARM_UPS, Mailbox, Program, Recorder

NARROWEST = 128
"""Columns that the smallest programs read; others read twice as many, and so on."""

MOST = 16
"""Columns that one program runs above an exit, at most; a power of two."""

FULL = -1
"""In a segment's place: all layers."""


class Said(NamedTuple):
    """The tokens that a program says after n tokens. tokens: the largest logits'. scores: of an
    exit."""

    tokens: list[int]
    scores: list[float]


Read = Callable[[], Said]


class RowPrograms:
    """Keys, values and states of one row, and the programs that work on them.

    policy: depths, score and shortlist of the exits. limit: tokens of a prompt and its answer.

    slots: holds the row, in its only slot. reads: whether the programs compute the score; else it
    is for whoever reads `states`.
    """

    def __init__(self, backbone: Backbone, exits: ExitSet, policy: ExitPolicy, limit: int) -> None:
        self.backbone: Backbone = backbone
        self.depths: tuple[int, ...] = policy.depths
        self.limit: int = limit
        self._columns = limit + WARM_UPS + 1
        self._watches = policy.score in FEATURE_SCORES
        self.slots: SlotExecutor = SlotExecutor(
            backbone, exits, self.depths, limit=self._columns, needs_previous_state=self._watches
        )
        self.slots.cache.reserve(self._columns + 1)
        self.reads: bool = policy.score in SCORES
        self._bounds = (0, *self.depths, backbone.depth)
        self._scorer = ExitScorer(backbone, policy, exits) if self.depths else None
        device = backbone.device
        self._recorder = Recorder(device)
        self._programs: dict[tuple[int, int, int], Program] = {}
        self._letters = Mailbox(2 * MOST, device)
        self._numbers = torch.zeros(4, 1, dtype=torch.long, device=device)
        self._token, self._column, self._from, self._to = self._numbers.unbind()
        self._said = torch.zeros(2, MOST, dtype=torch.float64, device=device)
        size = (backbone.width,)
        kind: dict[str, Any] = {"dtype": backbone.dtype, "device": device}
        self._entries = [torch.zeros(self._columns, *size, **kind) for _ in self.depths]
        self._out, self._previous = (torch.zeros(MOST, *size, **kind) for _ in range(2))

    # -- what runs -----------------------------------------------------------------------------

    def aim(self, token: int, column: int) -> None:
        """Have the next program but those above an exit feed `token` at `column`."""
        self._token.fill_(token)
        self._column.fill_(column)

    def feed(self, segment: int, column: int) -> Read:
        """Feed the token that was aimed at, at `column`, up to the first exit (segment 0), or to
        the end (`FULL`); then what it says is aimed at, one column further."""
        self._run(segment, 1, column + 1)
        return self._read(1)

    def deep(self, segment: int, first: int, end: int) -> Read:
        """Run what waits before a segment at columns from `first` up to, and without, `end`: at
        most `MOST`. Behind the last layer, what is said of the last is aimed at."""
        size = 1
        while size < end - first:
            size *= 2
        self._from.fill_(first)
        self._to.fill_(end - 1)
        self._run(segment, size, end)
        return self._read(end - first)

    def states(self, segment: int, first: int, end: int) -> ExitOutput | Tensor:
        """Return what the last call made of these columns, until the next: of the exit after a
        segment, or final-normed states [n, D]."""
        out = self._out[: end - first]
        if segment in (FULL, len(self.depths)):
            return out
        previous = self._previous[: end - first] if self._watches else None
        return ExitOutput(self._entries[segment][first:end], out, previous)

    def _read(self, rows: int) -> Read:
        letter = self._letters.send(self._said.flatten())

        def read() -> Said:
            numbers = letter()
            tokens, scores = (numbers[i * MOST : i * MOST + rows] for i in range(2))
            return Said([*map(int, tokens)], scores)

        return read

    def _run(self, segment: int, size: int, end: int) -> None:
        width = NARROWEST
        while width < end:
            width *= 2
        key = segment, size, min(width, self._columns)
        if key not in self._programs:
            with self._kept():
                self._programs[key] = self._recorder.record(self._program(*key))
        self._programs[key]()

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """Try programs out on columns that no row has, and put back the numbers they change."""
        if not self._recorder.records:
            yield
            return
        before = self._numbers.clone()
        self.aim(0, self.limit)
        self._from.fill_(self.limit)
        self._to.fill_(self.limit)
        yield
        self._numbers.copy_(before)

    # -- programs ------------------------------------------------------------------------------

    def _program(self, segment: int, size: int, width: int) -> Program:
        if segment > 0:
            return lambda: self._deep(segment, size, width)
        one = torch.zeros(1, dtype=torch.long, device=self.backbone.device)
        call = SlotCall((1, 1), one, self._column, None, self._column[:, None], width)
        return lambda: self._feed(segment, call)

    def _feed(self, segment: int, call: SlotCall) -> None:
        tokens = self._through(segment, call, self._token, self._column)
        self._token.copy_(tokens)
        self._column.add_(1)

    def _deep(self, segment: int, size: int, width: int) -> None:
        """Where fewer than `size` states wait the last one is repeated, which writes the same keys
        and values once more."""
        columns = (self._from + torch.arange(size, device=self._to.device)).minimum(self._to)
        call = SlotCall((1, size), columns * 0, columns, None, columns[None], width)
        states = self._entries[segment - 1].index_select(0, columns)[None]
        tokens = self._through(segment, call, states, columns)
        if segment == len(self.depths):
            self._token.copy_(tokens.index_select(0, self._to - self._from))
            self._column.copy_(self._to + 1)

    def _through(self, segment: int, call: SlotCall, inputs: Tensor, columns: Tensor) -> Tensor:
        """A segment; keeps what it makes of the columns [n], and returns the tokens it says."""
        bounds = self._bounds
        start, end = (0, bounds[-1]) if segment == FULL else bounds[segment : segment + 2]
        output = self.slots.run_layers(range(start, end), call, inputs)
        if isinstance(output, Tensor):
            self._out[: len(output)] = output
            tokens: Tensor = self.backbone.logits(output).argmax(-1)
            self._said[0, : len(tokens)] = tokens
            return tokens
        self._entries[segment].index_copy_(0, columns, output.entry)
        return self._exit(self.depths[segment], output)

    def _exit(self, depth: int, output: ExitOutput) -> Tensor:
        """Keep what an exit makes of tokens, and say what they are followed by."""
        assert self._scorer is not None and output.state is not None
        rows = len(output.state)
        self._out[:rows] = output.state
        if output.previous is not None:
            self._previous[:rows] = output.previous
        if not self.reads:
            return self._token
        check = ExitCheck(self._scorer, depth, output.state, output.entry, output.previous)
        tokens: Tensor = check.own_logits.argmax(-1)
        if self._scorer.shortlist is not None:
            tokens = self._scorer.shortlist[tokens]
        self._said[0, :rows] = tokens
        self._said[1, :rows] = check.score
        return tokens
