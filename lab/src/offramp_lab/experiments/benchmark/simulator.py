"""What a batch engine would do, call by call, from measured costs and assumed rates.

The rows and the schedule are the engine's own (`Row`, `Schedule`): only what the exits say is
drawn, or told, and the seconds are looked up. So what is predicted is the very order of calls that
runs.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from offramp.errors import InputError
from offramp.serving.rows.row import Choice, Row
from offramp.serving.schedule.scheduler import Load, Schedule, due
from offramp.serving.schedule.unit_costs import CallCosts, seconds


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


Says = Callable[[str, int, int], bool]
"""Whether the token of a row at a place in its answer exits ("exit"), or is right ("right")."""


@dataclass(eq=False)
class _Answer:
    row: Row
    length: int
    submitted: float
    number: int | None = None
    times: list[float] = field(default_factory=list)


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
        longest: int,
    ) -> None:
        self.costs, self.schedule, self.says, self.guess = costs, schedule, says, guess
        self.slots, self.longest, self.arrivals = slots, longest, arrivals
        self._lengths = lengths
        self._next = next(lengths, None)
        self._looked = 0
        self.now = self.decoding = 0.0
        self.answers: list[_Answer] = []
        self.queue: deque[float] = deque()
        self.next_arrival = 0.0
        self.tokens = 0
        self.gaps: list[float] = []
        self.firsts: list[float] = []

    def step(self) -> None:
        """A round: prompts into free slots, then one call."""
        self._arrive()
        while self.waits and len(self.answers) < self.slots:
            assert self._next is not None
            submitted = self.queue.popleft() if self.queue else self.now
            self.now += self.costs.read
            answer = _Answer(Row(0, Choice(0, 0)), self._next, submitted)
            self._next = next(self._lengths, None)
            self.answers.append(answer)
            self.firsts.append(self.now - submitted)
            self._settle(answer)
            if self.arrivals is not None:
                break  # one prompt a round
        if not self.answers:
            self.now = max(self.now, self.next_arrival)
            return
        load = Load.of([answer.row for answer in self.answers], self.longest)
        took = self._shallow() if self.schedule.next_call(load) == "shallow" else self._deep()
        self.now += took
        self.decoding += took
        self.tokens += sum(self._settle(answer) for answer in list(self.answers))

    @property
    def waits(self) -> bool:
        """Whether a request is there that has no slot."""
        return self._next is not None and (self.arrivals is None or bool(self.queue))

    def _arrive(self) -> None:
        if self.arrivals is None:
            return
        while self.next_arrival <= self.now:
            self.queue.append(self.next_arrival)
            self.next_arrival += self.arrivals()

    def _shallow(self) -> float:
        for answer in self.answers:
            row = answer.row
            if not row.ready(self.longest):
                row.wait()
                continue
            if answer.number is None:
                answer.number, self._looked = self._looked, self._looked + 1
            place = len(row.choices)
            if self.says("exit", answer.number, place):
                row.say(Choice(0, 0))
            elif self.guess:
                row.guess(Choice(int(not self.says("right", answer.number, place)), 0))
            else:
                row.park(0.0)
            row.held = bool(row.guesses) and len(row.choices) >= answer.length
        return seconds(self.costs.shallow, len(self.answers))

    def _deep(self) -> float:
        states = questions = 0
        takes = due([answer.row for answer in self.answers], self.longest)
        for answer, taken in zip(self.answers, takes, strict=True):
            row = answer.row
            if not taken:
                continue
            states += row.pending
            questions += len(row.questions)
            for place in row.questions:
                if not row.answer(place, Choice(0, 0)):
                    break
            row.caught_up()
        head = seconds(self.costs.head, questions) if questions else 0.0
        return seconds(self.costs.deep, states) + head

    def prediction(self, tokens: int = 0, decoding: float = 0.0) -> Prediction:
        """Of what went by since so many tokens and seconds of decoding."""
        speed = (self.tokens - tokens) / (self.decoding - decoding)
        return Prediction(speed, quantiles(self.gaps), quantiles(self.firsts))

    def _settle(self, answer: _Answer) -> int:
        """Give out what is settled of an answer; how many tokens."""
        fresh = min(len(answer.row.settle()), answer.length - len(answer.times))
        answer.times += [self.now] * fresh
        if len(answer.times) >= answer.length:
            self.answers.remove(answer)
            self.gaps += np.diff(answer.times).tolist()
        return fresh


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
    while len(run.answers) < slots:
        run.step()
    tokens, decoding = run.tokens, run.decoding
    while run.waits:
        run.step()
    return run.prediction(tokens, decoding)


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
