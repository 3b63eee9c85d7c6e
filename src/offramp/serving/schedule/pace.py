"""Whether exits pay, and how long the deep layers had best wait: asked again as answers go by.

The simulator is given the measured costs and what the exits did lately. Where it finds full depth
faster, requests that name no mode are answered at full depth, and lossless rows run there, which
changes no token; one in `PROBE` still uses the exits, to learn when that changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from offramp.serving.schedule.scheduler import Schedule, Tally
from offramp.serving.schedule.simulator import Workload, full_depth, simulate
from offramp.serving.schedule.unit_costs import CallCosts

PROBE = 16
EVERY = 4000
"""Tokens between two reviews."""
ENOUGH = 200
"""Tokens that exits must have looked at before they are judged."""
_SIMULATED = 800
_LONGEST_PATIENCE = 16


class Pace:
    """Reviews the exits of an engine. tallies: by whether tokens may exit (else lossless).

    costs: None: exits are taken to pay, and the schedule stays as it is.
    """

    def __init__(
        self,
        costs: CallCosts | None,
        schedule: Schedule,
        tallies: Mapping[bool, Tally],
        *,
        slots: int,
        longest: int,
        fixed: bool,
    ) -> None:
        self.schedule = schedule
        self.costs, self._tallies, self._fixed = costs, tallies, fixed
        self._sizes = {"slots": slots, "longest": longest}
        self._pays = {True: True, False: True}
        self._requests = self._reviewed = 0

    def pays(self, exiting: bool) -> bool:
        """Whether exits pay for rows whose tokens may exit, or for lossless ones."""
        return self._pays[exiting]

    def admits(self) -> bool:
        """Whether the next request that names no mode is to use the exits."""
        self._requests += 1
        return self._pays[True] or self._requests % PROBE == 0

    def full(self, tokens: int) -> bool:
        """Whether lossless rows run at full depth now, `tokens` having been written so far."""
        return not self._pays[False] and tokens // EVERY % PROBE != 0

    def review(self, tokens: int) -> None:
        """Judge anew, once enough was written since the last time."""
        if self.costs is None or tokens - self._reviewed < EVERY:
            return
        self._reviewed = tokens
        full = full_depth(self.costs, self._sizes["slots"])
        seen = {exiting: t for exiting, t in self._tallies.items() if t.tokens >= ENOUGH}
        for exiting, tally in seen.items():
            best = max(self._candidates(), key=lambda schedule: self._speed(tally, schedule))
            self._pays[exiting] = self._speed(tally, best) >= full
            if exiting or True not in seen:
                self.schedule = best
            tally.fade()

    def _candidates(self) -> list[Schedule]:
        if self._fixed:
            return [self.schedule]
        waits = {max(1, self.schedule.patience // 2), self.schedule.patience}
        waits.add(min(_LONGEST_PATIENCE, 2 * self.schedule.patience))
        return [replace(self.schedule, patience=patience) for patience in sorted(waits)]

    def _speed(self, tally: Tally, schedule: Schedule) -> float:
        assert self.costs is not None
        rate = tally.exited / tally.tokens
        right = tally.right / tally.ruled if tally.ruled else 0.0
        work = Workload(rate, right, (20, 60), guess=tally.guessed > tally.parked)
        slots, longest = self._sizes["slots"], self._sizes["longest"]
        simulated = simulate(
            self.costs, work, schedule, slots=slots, longest=longest, tokens=_SIMULATED
        )
        return simulated.tokens_per_second
