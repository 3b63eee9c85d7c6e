"""Whether exits pay, and how long the deep layers had best wait: asked again as answers go by.

An engine times its calls as it makes them. The simulator is given what they took, and what the
exits did lately. Where full depth is faster, rows run there: lossless ones by full calls, which
change no token, rows whose tokens may exit by synchronous steps, and requests that name no mode are
answered losslessly. Now and then the other way is tried for a few calls, all of which move the rows
on, to learn what it takes by now; what the exits would do is seen in every 32nd call.
"""

from __future__ import annotations

import time
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
TRIAL: tuple[Call, ...] = ("step", "full", "step", "full")
EVERY = 64
"""Calls to the next review, if no trial ends before; each time as many more, to 8 times."""
ENOUGH = 48
"""Tokens that exits must have looked at before they are judged."""
_REMEMBERED = 1000
_SIMULATED = 500
_LONGEST_PATIENCE = 16
_AS: dict[Call, str] = {"flush": "deep", "rehearse": "full"}


class Pace:
    """Says which call comes next.

    schedule: of shallow and deep calls, which then stays, exits being taken to pay; None: what is
    found best. tallies: by whether tokens may exit (else lossless). clock: returns seconds.

    exits_pay: whether a request that names no mode had best use the engine's own thresholds.
    """

    def __init__(
        self,
        schedule: Schedule | None,
        tallies: Mapping[bool, Tally],
        *,
        slots: int,
        longest: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.schedule = schedule or Schedule.of(slots)
        self.exits_pay = True
        self.costs = LearnedCosts()
        self._fixed, self._tallies = schedule is not None, tallies
        self._longest, self._clock = longest, clock
        self._full = {True: False, False: False}  # whether full depth is faster, as in tallies
        self._trial: list[Call] | None = None  # what was called in it so far
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
        if self._trial is None and self._tries(load.rows, exiting):
            self._trial = []
        if self._full[exiting] == (self._trial is not None):
            return self.schedule.next_call(load)
        if load.pending:
            return "flush"
        if self._trial is not None:
            wanted = TRIAL[sum(call != "flush" for call in self._trial)]
            return "rehearse" if exiting and wanted == "full" else wanted
        return "step" if exiting or self._looked >= LOOK else "full"

    def note(self, call: Call, tokens: int, took: float) -> None:
        """A call over `tokens` tokens took so many seconds; think again, if it is time."""
        self.costs.note(_AS.get(call, call), max(1, tokens), took)
        self._total += took
        self._since += 1
        self._looked = self._looked + 1 if call == "full" else 0
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

    def _follow(self, rows: int) -> None:
        """Mind how many rows there are lately."""
        if nearest(rows) != nearest(max(1, round(self._rows))):
            self._alike, self._rows = 0, rows
        self._alike += 1
        self._rows += (rows - self._rows) / 16

    def _tries(self, rows: int, exiting: bool) -> bool:
        """Whether to try what is not done now: full depth, or the exits."""
        new = not (self.costs.knows("full", rows) and self.costs.knows("step", rows))
        if new and not self._full[exiting] and self._alike >= WARM:
            return True
        return 0 < self._tried <= SHARE * self._total

    def _over(self, trial: list[Call]) -> bool:
        at_full = sum(call in TRIAL or call == "rehearse" for call in trial)
        return at_full >= len(TRIAL) or trial.count("deep") >= 2 or len(trial) >= LOOK

    def _review(self) -> None:
        seen = {exiting: t for exiting, t in self._tallies.items() if t.tokens >= ENOUGH}
        if not seen or not self.costs.complete:
            return
        begin, self._since = self._clock(), 0
        self._reviews += 1
        rows = max(1, round(self._rows))
        full, step = (rows / seconds(self.costs.table(kind), rows) for kind in ("full", "step"))
        for exiting, tally in seen.items():
            speeds = {s: self._speed(tally, s, rows) for s in self._candidates(rows)}
            best = max(speeds, key=speeds.__getitem__)
            self._full[exiting] = speeds[best] < (step if exiting else full)
            if exiting:
                self.exits_pay = speeds[best] >= full
            if exiting or True not in seen:
                self.schedule = best
            if tally.tokens > _REMEMBERED:
                tally.fade()
        self._reviewed += self._clock() - begin

    def _candidates(self, rows: int) -> list[Schedule]:
        now = self.schedule.patience
        waits = {now // 2, now, min(_LONGEST_PATIENCE, max(1, 2 * now))}
        idle = max(1, rows // 2)
        return [replace(self.schedule, patience=wait, idle=idle) for wait in sorted(waits)]

    def _speed(self, tally: Tally, schedule: Schedule, rows: int) -> float:
        rate = tally.exited / tally.tokens
        right = tally.right / tally.ruled if tally.ruled else 0.0
        work = Workload(rate, right, (20, 60), guess=tally.guessed >= tally.parked)
        simulated = simulate(
            self.costs.calls(rows), work, schedule, longest=self._longest, tokens=_SIMULATED
        )
        return simulated.tokens_per_second
