"""Whether exits pay, and how long the deep layers had best wait: asked again as answers go by.

An engine times its calls as it makes them. The simulator is given what they took, and what the
exits did lately. Where full depth is faster, rows run there: lossless ones by full calls, which
change no token, rows whose tokens may exit by synchronous steps, and requests that name no mode are
answered losslessly. Now and then the other way is tried for a few calls, which move the rows on
too, to learn what it takes by now; what the exits would do is seen in every 32nd call.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace

from offramp.serving.schedule.learned_costs import LearnedCosts, nearest
from offramp.serving.schedule.scheduler import Call, Load, Schedule, Tally
from offramp.serving.schedule.simulator import Workload, simulate
from offramp.serving.schedule.unit_costs import seconds

SHARE = 0.01
"""Of the time that trials may take, and reviews: each its first time at once."""
LOOK = 32
"""At full depth the exits are looked at in one call of so many."""
WARM = 8
"""Calls over about as many rows before full depth is tried with them."""
TRIED = 2
"""Calls in a trial at full depth, or deep ones in a trial of the exits."""
EVERY = 64
"""Calls to the next review, if no trial ends before; each time as many more, to 8 times."""
ENOUGH = 48
"""Tokens that exits must have looked at before they are judged."""
_REMEMBERED = 1000
_SIMULATED = 1000
_LONGEST_PATIENCE = 16
BETTER = 1.03
"""How much faster than the present schedule another must seem: a simulation is not exact."""


class Pace:
    """Says which call comes next.

    schedule: of shallow and deep calls, which then stays, exits being taken to pay; None: what is
    found best. tallies: by whether tokens may exit (else lossless). share: of the layers that stand
    below the exit. clock: returns seconds.

    exits_pay: whether a request that names no mode had best use the engine's own thresholds.
    """

    def __init__(
        self,
        schedule: Schedule | None,
        tallies: Mapping[bool, Tally],
        *,
        slots: int,
        longest: int,
        share: float = 0.25,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.schedule = schedule or Schedule.of(slots)
        self.exits_pay = True
        self.costs = LearnedCosts()
        self._fixed, self._tallies = schedule is not None, tallies
        self._longest, self._share, self._clock = longest, share, clock
        self._full = {True: False, False: False}  # whether full depth is faster, as in tallies
        self._lengths: deque[int] = deque(maxlen=2 * slots)  # of the last answers
        self._trial: list[Call] | None = None  # what was called in it so far
        self._caught_up = False  # little is pending: a trial begins without any
        self._rows = 1.0  # lately
        self._alike = 0  # calls over about as many rows
        self._looked = self._since = 0  # calls since exits were looked at, and since the review
        self._reviews = 0
        self._total = self._tried = self._reviewed = 0.0  # seconds

    def full(self, *, exiting: bool) -> bool:
        """Whether rows whose tokens may exit, or lossless ones, are faster at full depth."""
        return self._full[exiting]

    def next_call(self, load: Load, *, exits: bool, exiting: bool) -> Call:
        """The next call. exits: whether a row uses exits; exiting: whether a row's tokens may."""
        if not exits:
            return "flush" if load.pending else "full"
        if self._fixed:
            return self.schedule.next_call(load)
        if self._trial is None and self._caught_up and self._tries(exiting):
            self._trial = []
        if self._full[exiting] == (self._trial is not None):
            return self.schedule.next_call(load)
        if load.pending:
            return "flush"
        return "step" if exiting or self._looked >= LOOK else "full"

    def note(self, call: Call, tokens: int, took: float) -> None:
        """A call over `tokens` tokens took so many seconds; think again, if it is time."""
        self.costs.note("deep" if call == "flush" else call, max(1, tokens), took)
        self._total += took
        self._since += 1
        self._looked = self._looked + 1 if call == "full" else 0
        self._caught_up = call != "shallow"
        if call not in ("deep", "flush"):
            self._follow(tokens)
        if self._trial is not None:
            self._tried += took
            self._trial.append(call)
            if not self._over(self._trial):
                return
            self._trial, self._since = None, 8 * EVERY
        due = self._since >= EVERY * min(8, 1 + self._reviews)
        if due and not self._fixed and self._reviewed <= SHARE * self._total:
            self._review()

    def answered(self, tokens: int) -> None:
        """An answer of so many tokens is over: at its end a row waits for the deep layers."""
        self._lengths.append(max(1, tokens))

    def _follow(self, rows: int) -> None:
        """Mind how many rows there are lately."""
        if nearest(rows) != nearest(max(1, round(self._rows))):
            self._alike, self._rows = 0, rows
        self._alike += 1
        self._rows += (rows - self._rows) / 16

    def _tries(self, exiting: bool) -> bool:
        """Whether to try what is not done now: full depth, or the exits."""
        at_full = self.costs.table("step" if exiting else "full")
        if not at_full and not self._full[exiting]:
            return self._alike >= WARM
        other = self.costs.table("deep") if self._full[exiting] else at_full
        price = TRIED * max((long for _, long in other), default=0.0)
        return self._tried > 0 and self._tried + price <= SHARE * self._total

    def _over(self, trial: list[Call]) -> bool:
        at_full = sum(call in ("step", "full") for call in trial)
        return at_full >= TRIED or trial.count("deep") >= TRIED or len(trial) >= LOOK

    def _review(self) -> None:
        seen = {exiting: t for exiting, t in self._tallies.items() if t.tokens >= ENOUGH}
        if not seen or not (self.costs.table("shallow") and self.costs.table("deep")):
            return
        begin, self._since = self._clock(), 0
        self._reviews += 1
        rows = max(1, round(self._rows))
        at_full = self._at_full_depth(rows)
        for exiting, tally in seen.items():
            if exiting not in at_full:
                continue
            now, *others = self._candidates(rows)
            best, speed = now, self._speed(tally, now, rows)
            for other in others:
                found = self._speed(tally, other, rows)
                if found > BETTER * speed:
                    best, speed = other, found
            self._full[exiting] = speed < at_full[exiting]
            if exiting:
                self.exits_pay = speed >= at_full[False]
            if exiting or True not in seen:
                self.schedule = best
            if tally.tokens > _REMEMBERED:
                tally.fade()
        self._reviewed += self._clock() - begin

    def _at_full_depth(self, rows: int) -> dict[bool, float]:
        """Tokens a second by synchronous steps (True) and by full calls, as far as it is known.

        A step is a full call and a look at the exit. Of a look and the layers below it a shallow
        call is made, so a full call need not be tried to tell what it takes, but for the LM head.
        """
        took = {
            exiting: seconds(table, rows)
            for exiting, kind in ((True, "step"), (False, "full"))
            if (table := self.costs.table(kind))
        }
        if took.keys() == {True}:
            shallow, below = seconds(self.costs.table("shallow"), rows), self._share
            look = (shallow - below * took[True]) / (1 - below)
            took[False] = took[True] - max(0.0, look)
        return {exiting: rows / long for exiting, long in took.items()}

    def _candidates(self, rows: int) -> list[Schedule]:
        """The present schedule first, and others."""
        now, idle = self.schedule.patience, max(1, rows // 2)
        waits = (now, now // 2, min(_LONGEST_PATIENCE, max(1, 2 * now)))
        return [replace(self.schedule, patience=wait, idle=idle) for wait in waits]

    def _speed(self, tally: Tally, schedule: Schedule, rows: int) -> float:
        rate = tally.exited / tally.tokens
        right = tally.right / tally.ruled if tally.ruled else 0.0
        lengths = (min(self._lengths), max(self._lengths)) if self._lengths else (20, 60)
        work = Workload(rate, right, lengths, guess=tally.guessed >= tally.parked)
        simulated = simulate(
            self.costs.calls(rows), work, schedule, longest=self._longest, tokens=_SIMULATED
        )
        return simulated.tokens_per_second
