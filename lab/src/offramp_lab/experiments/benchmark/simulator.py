"""What a batch engine would do, call by call, from measured costs and assumed rates.

The loop is the engine's own (`Decoder`), over an executor that runs nothing and counts seconds:
only what the exits say is told. So what is predicted is the very order of calls that
runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offramp.engine.decoding.decoder import Decoder
from offramp.engine.decoding.executor import Loaded, Span
from offramp.engine.decoding.reader import Looks
from offramp.engine.decoding.rule import ExitRule
from offramp.engine.decoding.scheduler import Schedule
from offramp.engine.decoding.sequence import Token
from offramp.engine.exit_check import ExitOutput
from offramp_lab.experiments.benchmark.scripted_reader import Says, ToldReader
from offramp_lab.experiments.benchmark.unit_costs import CallCosts, seconds

EXIT, LAYERS = 1, 2
"""Depths: all that matters is which is deeper."""


@dataclass(frozen=True)
class Run:
    """What was measured or predicted. tokens_per_second: decoded ones (all but the first of each
    answer) by the seconds of decoding calls. gaps: seconds between a row's tokens, prompts of
    others included."""

    tokens_per_second: float
    gaps: Sequence[float]


@dataclass(eq=False)
class _Answer:
    """Stands where a sampler stands: says when the answer is over, and notes its tokens' times.

    clock: returns seconds.
    """

    clock: Callable[[], float]
    length: int
    times: list[float] = field(default_factory=list)

    def would_end(self, tokens: int, last: int) -> bool:
        return tokens >= self.length

    def emit(self, ids: Sequence[int], place: int, depth: int, score: float) -> bool:
        self.times.append(self.clock())
        return len(self.times) >= self.length


class _Costed:
    """An executor that counts the seconds of its calls and runs nothing. now: seconds so far."""

    depths: tuple[int, ...] = (EXIT,)
    rows: int | None = None
    positions: int | None = None

    def __init__(self, costs: CallCosts) -> None:
        self.costs, self.now = costs, 0.0
        self._handles = 0

    def load(self, prompt: Any, row: int) -> Loaded:
        self._handles += 1
        return Loaded(self._handles, 1, (1, 1))

    def feed(
        self, handles: Sequence[int], ids: Sequence[int], columns: Sequence[int], looks: Looks
    ) -> ExitOutput:
        self.now += seconds(self.costs.feed, len(handles))
        return ExitOutput(torch.empty(0), None)

    def run(
        self, segment: int, spans: Sequence[Span], asked: Sequence[int], looks: Looks
    ) -> Tensor:
        self.now += seconds(self.costs.deep, sum(span.end - span.first for span in spans))
        if asked:
            self.now += seconds(self.costs.head, len(asked))
        return torch.zeros(len(asked), 1)

    def full(
        self, handles: Sequence[int], ids: Sequence[int], columns: Sequence[int], *, exits: bool
    ) -> Tensor:
        raise NotImplementedError("every simulated request uses exits")

    def allow_crops(self, handle: int) -> bool:
        return True

    def crop(self, handle: int, column: int) -> None:
        pass

    def release(self, handle: int) -> None:
        pass

    def close(self) -> None:
        pass


class _Simulation:
    """says, lengths: of the exits and the answers, whose end is the end of the requests. A round is
    prompts into free slots, then one call."""

    def __init__(
        self,
        costs: CallCosts,
        schedule: Schedule,
        says: Says,
        lengths: Sequence[int],
        *,
        guess: bool,
        slots: int,
        longest: int | None,
    ) -> None:
        self.slots = slots
        self._executor = _Costed(costs)
        self.decoder = Decoder(
            LAYERS, self._executor, ToldReader(says), schedule=schedule, longest=longest
        )
        self._rule = ExitRule({EXIT: 0.5}, guesses={EXIT: 0.0} if guess else None)
        self.queue = deque(lengths)
        self.decoding, self.tokens = 0.0, 0
        self.gaps: list[float] = []

    @property
    def running(self) -> int:
        """Answers under way."""
        return len(self.decoder.sequences)

    def step(self) -> None:
        """A round."""
        while self.queue and self.running < self.slots:
            self._read(self.queue.popleft())
        self._collect()
        if not self.running:
            return
        begin, before = self._executor.now, self.decoder.settled
        self.decoder.make(self.decoder.next_call())
        self.decoding += self._executor.now - begin
        self.tokens += self.decoder.settled - before
        self._collect()

    def _read(self, length: int) -> None:
        """Read the next prompt, which gives the first token."""
        self._executor.now += self._executor.costs.read
        answer: Any = _Answer(lambda: self._executor.now, length)
        prompt: Any = None
        self.decoder.join(prompt, 0, answer, self._rule, Token(0, LAYERS), answer)

    def _collect(self) -> None:
        for sequence in [s for s in self.decoder.sequences if s.over]:
            self.decoder.leave(sequence)
            self.gaps += [b - a for a, b in pairwise(sequence.owner.times)]


def replay(
    costs: CallCosts,
    says: Says,
    lengths: Sequence[int],
    schedule: Schedule,
    *,
    guess: bool,
    slots: int,
    longest: int = 64,
) -> Run:
    """What answers of such lengths would take, of which all that the exits say is known; counted
    from when all slots are taken until no request waits. Rows are numbered as exits first see them.
    """
    run = _Simulation(costs, schedule, says, lengths, guess=guess, slots=slots, longest=longest)
    while run.running < slots:
        run.step()
    tokens, decoding = run.tokens, run.decoding
    while run.queue:
        run.step()
    return Run((run.tokens - tokens) / (run.decoding - decoding), run.gaps)


def decoding_seconds(
    costs: CallCosts, says: Says, lengths: Sequence[int], schedule: Schedule
) -> float:
    """Seconds of decoding answers of such lengths that begin together and park where they do not
    exit, as the rows of one batch."""
    slots = len(lengths)
    run = _Simulation(costs, schedule, says, lengths, guess=False, slots=slots, longest=None)
    while run.queue or run.running:
        run.step()
    return run.decoding


def full_depth(costs: CallCosts, slots: int) -> float:
    """Tokens a second of a batch of `slots` rows at full depth, without exits."""
    return slots / seconds(costs.full, slots)


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """p50, p95, p99; NaN of nothing."""
    if not len(values):
        return (float("nan"),) * 3
    p50, p95, p99 = np.quantile(np.asarray(values), [0.5, 0.95, 0.99]).tolist()
    return p50, p95, p99
