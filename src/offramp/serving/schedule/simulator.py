"""What a batch engine would do, call by call, from measured costs and assumed rates.

The rows and the schedule are the engine's own (`Row`, `Schedule`): only what the exits say is
drawn, and the seconds are looked up. So what is predicted is the very order of calls that runs.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

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


@dataclass
class _Answer:
    row: Row
    length: int
    submitted: float
    times: list[float] = field(default_factory=list)


class _Simulation:
    def __init__(
        self,
        costs: CallCosts,
        schedule: Schedule,
        work: Workload,
        slots: int,
        longest: int,
        seed: int,
    ) -> None:
        self.costs, self.schedule, self.work = costs, schedule, work
        self.slots, self.longest, self.draw = slots, longest, random.Random(seed)
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
        while len(self.answers) < self.slots and (self.work.arrivals is None or self.queue):
            submitted = self.queue.popleft() if self.queue else self.now
            self.now += self.costs.read
            answer = _Answer(Row(0, Choice(0, 0)), self.draw.randint(*self.work.lengths), submitted)
            self.answers.append(answer)
            self.firsts.append(self.now - submitted)
            self._settle(answer)
            if self.work.arrivals is not None:
                break  # one prompt a round
        if not self.answers:
            self.now = max(self.now, self.next_arrival)
            return
        load = Load.of([answer.row for answer in self.answers], self.longest)
        took = self._shallow() if self.schedule.next_call(load) == "shallow" else self._deep()
        self.now += took
        self.decoding += took
        self.tokens += sum(self._settle(answer) for answer in list(self.answers))

    def _arrive(self) -> None:
        if self.work.arrivals is None:
            return
        while self.next_arrival <= self.now:
            self.queue.append(self.next_arrival)
            self.next_arrival += self.draw.expovariate(self.work.arrivals)

    def _shallow(self) -> float:
        for answer in self.answers:
            row = answer.row
            if not row.ready(self.longest):
                row.wait()
            elif self.draw.random() < self.work.exit_rate:
                row.say(Choice(0, 0))
            elif self.work.guess:
                row.guess(Choice(int(self.draw.random() >= self.work.right), 0))
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
    run = _Simulation(costs, schedule or Schedule.of(slots), work, slots, longest, seed)
    while run.tokens < tokens:
        run.step()
    return Prediction(run.tokens / run.decoding, quantiles(run.gaps), quantiles(run.firsts))


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
