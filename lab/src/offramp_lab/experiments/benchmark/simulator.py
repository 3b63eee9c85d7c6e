"""What a batch engine would do, call by call, from measured costs and assumed rates.

The loop is the engine's own (`Decoder`), over an executor that runs nothing and counts seconds:
only what the exits say is drawn, or told. So what is predicted is the very order of calls that
runs.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
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
from offramp.errors import InputError
from offramp_lab.experiments.benchmark.scripted_reader import Says, ToldReader
from offramp_lab.experiments.benchmark.unit_costs import CallCosts, seconds

EXIT, LAYERS = 1, 2
"""Depths: all that matters is which is deeper."""


@dataclass(frozen=True)
class Workload:
    """What is asked, and how the exits do on it.

    exit_rate: share of tokens that exit; 0 where every token is verified (lossless). right: share
    of the others, guessed, that the full model agrees with. lengths: tokens of an answer, from and
    to. arrivals: requests a second; None: there are always more than slots.

    Raises:
        InputError: shares outside [0, 1], lengths or arrivals below what can be.
    """

    exit_rate: float
    right: float = 0.7
    lengths: tuple[int, int] = (40, 80)
    arrivals: float | None = None
    guess: bool = True

    def __post_init__(self) -> None:
        shares = 0.0 <= self.exit_rate <= 1.0 and 0.0 <= self.right <= 1.0
        lengths = 1 <= self.lengths[0] <= self.lengths[1]
        if not shares or not lengths or (self.arrivals is not None and self.arrivals <= 0):
            raise InputError(
                f"{self} cannot be: shares are in [0, 1], lengths ascend from 1.",
                "Correct the numbers.",
            )


@dataclass(frozen=True)
class Prediction:
    """tokens_per_second: decoded ones (all but the first of each answer) by the seconds of decoding
    calls. gaps: quantiles (p50, p95, p99) of the seconds between a row's tokens, prompts of others
    included; first: of the seconds to the first token."""

    tokens_per_second: float
    gaps: tuple[float, float, float]
    first: tuple[float, float, float]


@dataclass(eq=False)
class _Answer:
    """Stands where a sampler stands: says when the answer is over, and notes its tokens' times.

    clock: returns seconds. submitted: when it was asked for.
    """

    clock: Callable[[], float]
    length: int
    submitted: float
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

    def trial(
        self, handles: Sequence[int], ids: Sequence[int], columns: Sequence[int]
    ) -> Tensor | None:
        return None

    def allow_crops(self, handle: int) -> bool:
        return True

    def crop(self, handle: int, column: int) -> None:
        pass

    def release(self, handle: int) -> None:
        pass

    def close(self) -> None:
        pass


class _Simulation:
    """says, lengths: of the exits and the answers, whose end is the end of the requests. arrivals:
    seconds from one to the next; None: there are always more."""

    def __init__(
        self,
        costs: CallCosts,
        schedule: Schedule,
        says: Says,
        lengths: Iterator[int],
        arrivals: Callable[[], float] | None = None,
        *,
        guess: bool,
        slots: int,
        longest: int | None,
    ) -> None:
        self.slots, self.arrivals = slots, arrivals
        self._executor = _Costed(costs)
        self.decoder = Decoder(
            LAYERS, self._executor, ToldReader(says), schedule=schedule, longest=longest
        )
        self._rule = ExitRule({EXIT: 0.5}, guesses={EXIT: 0.0} if guess else None)
        self._lengths = lengths
        self._next = next(lengths, None)
        self.decoding = self.next_arrival = 0.0
        self.queue: deque[float] = deque()
        self.tokens = 0
        self.gaps: list[float] = []
        self.firsts: list[float] = []

    @property
    def now(self) -> float:
        return self._executor.now

    @property
    def waits(self) -> bool:
        """Whether a request is there that has no slot."""
        return self._next is not None and (self.arrivals is None or bool(self.queue))

    @property
    def running(self) -> int:
        """Answers under way."""
        return len(self.decoder.sequences)

    def step(self) -> None:
        """A round: prompts into free slots, then one call."""
        self._arrive()
        while self.waits and self.running < self.slots:
            self._read()
            if self.arrivals is not None:
                break  # one prompt a round
        self._collect()
        if not self.running:
            self._executor.now = max(self.now, self.next_arrival)
            return
        begin = self.now
        self.decoder.make(self.decoder.next_call())
        self.decoding += self.now - begin
        self.tokens += len(self.decoder.fresh())
        self._collect()

    def _arrive(self) -> None:
        if self.arrivals is None:
            return
        while self.next_arrival <= self.now:
            self.queue.append(self.next_arrival)
            self.next_arrival += self.arrivals()

    def _read(self) -> None:
        """Read the next prompt, which gives the first token."""
        assert self._next is not None
        submitted = self.queue.popleft() if self.queue else self.now
        self._executor.now += self._executor.costs.read
        answer: Any = _Answer(lambda: self.now, self._next, submitted)
        self._next = next(self._lengths, None)
        prompt: Any = None
        self.decoder.join(prompt, 0, answer, self._rule, Token(0, LAYERS), answer)
        self.decoder.fresh()  # it is the prompt's, not of decoding
        self.firsts.append(self.now - submitted)

    def _collect(self) -> None:
        for sequence in [s for s in self.decoder.sequences if s.over]:
            self.decoder.leave(sequence)
            self.gaps += [b - a for a, b in pairwise(sequence.owner.times)]

    def prediction(self, tokens: int = 0, decoding: float = 0.0) -> Prediction:
        """Of what went by since so many tokens and seconds of decoding."""
        speed = (self.tokens - tokens) / (self.decoding - decoding)
        return Prediction(speed, quantiles(self.gaps), quantiles(self.firsts))


def simulate(
    costs: CallCosts,
    work: Workload,
    schedule: Schedule | None = None,
    *,
    slots: int | None = None,
    longest: int = 64,
    tokens: int = 3000,
    seed: int = 0,
) -> Prediction:
    """Run until `tokens` tokens were decoded. slots: those of `costs`, if not said."""
    slots = costs.slots if slots is None else slots
    draw = random.Random(seed)
    rates = {"exit": work.exit_rate, "right": work.right}
    arrivals = None if work.arrivals is None else partial(draw.expovariate, work.arrivals)
    run = _Simulation(
        costs,
        schedule or Schedule.of(slots),
        lambda kind, _row, _place: draw.random() < rates[kind],
        iter(partial(draw.randint, *work.lengths), 0),
        arrivals,
        guess=work.guess,
        slots=slots,
        longest=longest,
    )
    while run.tokens < tokens:
        run.step()
    return run.prediction()


def replay(
    costs: CallCosts,
    says: Says,
    lengths: Sequence[int],
    schedule: Schedule,
    *,
    guess: bool,
    slots: int,
    longest: int = 64,
) -> Prediction:
    """What answers of such lengths would take, of which all that the exits say is known; counted
    from when all slots are taken until no request waits. Rows are numbered as exits first see them.
    """
    run = _Simulation(
        costs, schedule, says, iter(lengths), guess=guess, slots=slots, longest=longest
    )
    while run.running < slots:
        run.step()
    tokens, decoding = run.tokens, run.decoding
    while run.waits:
        run.step()
    return run.prediction(tokens, decoding)


def decoding_seconds(
    costs: CallCosts, says: Says, lengths: Sequence[int], schedule: Schedule
) -> float:
    """Seconds of decoding answers of such lengths that begin together and park where they do not
    exit, as the rows of one batch."""
    slots = len(lengths)
    run = _Simulation(costs, schedule, says, iter(lengths), guess=False, slots=slots, longest=None)
    while run.waits or run.running:
        run.step()
    return run.decoding


def full_depth(costs: CallCosts, slots: int | None = None) -> float:
    """Tokens a second of a batch of `slots` rows at full depth, without exits."""
    slots = costs.slots if slots is None else slots
    return slots / seconds(costs.full, slots)


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """p50, p95, p99; NaN of nothing."""
    if not len(values):
        return (float("nan"),) * 3
    p50, p95, p99 = np.quantile(np.asarray(values), [0.5, 0.95, 0.99]).tolist()
    return p50, p95, p99
