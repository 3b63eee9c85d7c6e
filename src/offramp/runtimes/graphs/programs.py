"""One row's decoder as programs over buffers: up to the exit, from the exit on, and all the way.

The token to feed, its column and how many states are pending are numbers on the device, which the
programs move on themselves. So the CPU only says which program comes next, and needs to know a
token no sooner than it wants to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from offramp.engine.exit_check import ExitScorer
from offramp.engine.policy import ExitPolicy
from offramp.engine.slots.layout import SlotCall
from offramp.engine.slots.prompt import Prompt
from offramp.engine.slots.runner import SlotRunner
from offramp.models.backbone import Backbone
from offramp.models.exits import ExitSet
from offramp.runtimes.graphs.recording import WARM_UPS, Mailbox, Program, Recorder

NARROWEST = 128
"""Columns that the smallest programs read; others read twice as many, and so on."""

Read = Callable[[], list[float]]


class RowPrograms:
    """Keys, values and pending states of one row, and the programs that work on them.

    depth: of the exit; None: there is none. limit: tokens of a prompt and its answer. most: states
    that may be pending, a power of two.

    column, pending: where the next token is fed, and how many states wait behind the exit, as the
    CPU knows it.
    """

    def __init__(
        self,
        backbone: Backbone,
        exits: ExitSet | None,
        policy: ExitPolicy,
        depth: int | None,
        limit: int,
        most: int,
    ) -> None:
        self.backbone, self.depth, self.limit, self.most = backbone, depth, limit, most
        depths = () if depth is None else (depth,)
        self._columns = limit + WARM_UPS + 1
        self.runner = SlotRunner(backbone, exits, depths, 1, self._columns, layout="flat")
        self.runner.cache.reserve(self._columns + 1)
        device = backbone.device
        self._scorer = None if depth is None else ExitScorer(backbone, policy, depths, exits)
        self._gate = None if exits is None or depth is None else exits.gates.get(depth)
        self._recorder = Recorder(device)
        self._programs: dict[tuple[str, int, int], Program] = {}
        self._letters, self._answers = Mailbox(3, device), Mailbox(most, device)
        numbers = torch.zeros(3, 1, dtype=torch.long, device=device)
        self._token, self._column, self._place = numbers
        self._numbers = numbers
        self._threshold, self._level = torch.ones(2, 1, device=device)
        self._states = torch.zeros(most, backbone.width, dtype=backbone.dtype, device=device)
        self._said = torch.zeros(3, dtype=torch.float64, device=device)
        self._full = torch.zeros(most, dtype=torch.float64, device=device)
        self.column = self.pending = 0

    # -- the row -------------------------------------------------------------------------------

    def load(self, prompt: Prompt, threshold: float, level: float) -> None:
        """Begin behind a prompt that was read. threshold: of the exit. level: of its gate."""
        self.column = self.runner.load(0, prompt.cache, prompt.positions, prompt.real)
        self._threshold.fill_(threshold)
        self._level.fill_(level)

    def go_on(self, token: int, column: int, pending: int = 0) -> None:
        """Feed `token` next, at `column`, with so many states pending before it."""
        for buffer, number in zip(self._numbers, (token, column, pending), strict=True):
            buffer.fill_(number)
        self.column, self.pending = column, pending

    # -- what runs -----------------------------------------------------------------------------

    def shallow(self) -> Read:
        """Feed the next token up to the exit, whose token is fed next.

        To be read: that token, whether the exit was confident (0 or 1), and its score, NaN where
        its gate was closed.
        """
        self._run("shallow", 1)
        self.column += 1
        self.pending += 1
        return self._letters.send(self._said)

    def full(self) -> Read:
        """Feed the next token through all layers; the token that follows, first of three numbers,
        is fed next. Nothing may be pending."""
        self._run("bare", 1)
        self.column += 1
        return self._letters.send(self._said)

    def deep(self) -> Read:
        """Run all that is pending through the layers above the exit; the full model's token behind
        the last of them is fed next. To be read: its tokens behind all of them, in order."""
        size = 1
        while size < self.pending:
            size *= 2
        self._run("deep", size)
        self.pending = 0
        return self._answers.send(self._full)

    def _run(self, kind: str, size: int) -> None:
        width = NARROWEST
        while width < self.column + 1:
            width *= 2
        key = kind, size, min(width, self._columns)
        if key not in self._programs:
            with self._kept():
                self._programs[key] = self._recorder.record(self._program(*key))
        self._programs[key]()

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """Try programs out on columns that no row has, and put back what they change."""
        if not self._recorder.records:
            yield
            return
        changed = (self._numbers, self._states, self._said, self._full)
        before = [buffer.clone() for buffer in changed]
        for buffer, number in zip(self._numbers, (0, self.limit, 1), strict=True):
            buffer.fill_(number)
        yield
        for buffer, value in zip(changed, before, strict=True):
            buffer.copy_(value)

    # -- programs ------------------------------------------------------------------------------

    def _program(self, kind: str, size: int, width: int) -> Program:
        if kind == "deep":
            return lambda: self._deep(size, width)
        one = torch.zeros(1, dtype=torch.long, device=self.backbone.device)
        call = SlotCall((1, 1), one, self._column, None, self._column[:, None], width)
        run = self._shallow if kind == "shallow" else self._bare
        return lambda: run(call)

    def _shallow(self, call: SlotCall) -> None:
        assert self.depth is not None and self._scorer is not None
        states = self.runner.run("shallow", call, self._token)
        entry = states.entries[self.depth]
        self._states.index_copy_(0, self._place, entry)
        exit, before = states.exits[self.depth], states.previous.get(self.depth)
        check = self._scorer(self.depth, exit, entry, before)
        score = check.score
        if self._gate is not None:
            score = torch.where(self._gate(entry) >= self._level, score, torch.nan)
        token = check.own_logits.argmax(-1)
        if self._scorer.shortlist is not None:
            token = self._scorer.shortlist[token]
        confident = score >= self._threshold
        self._said.copy_(torch.cat([token.double(), confident.double(), score.double()]))
        self._token.copy_(token)
        self._column.add_(1)
        self._place.add_(1)

    def _bare(self, call: SlotCall) -> None:
        final = self.runner.run("bare", call, self._token).final
        self._token.copy_(self.backbone.logits(final).argmax(-1))
        self._said[:1] = self._token
        self._column.add_(1)

    def _deep(self, size: int, width: int) -> None:
        """Where fewer than `size` states are pending the last one is repeated, which writes the
        same keys and values once more."""
        last = (self._place - 1).clamp(min=0)  # none is pending only when this is tried out
        picks = torch.arange(size, device=last.device).minimum(last)
        columns = self._column - self._place + picks
        call = SlotCall((1, size), picks * 0, columns, None, columns[None], width)
        final = self.runner.run("deep", call, self._states.index_select(0, picks)[None]).final
        tokens = self.backbone.logits(final).argmax(-1)
        self._full[:size] = tokens
        self._token.copy_(tokens.index_select(0, last))
        self._place.zero_()
