"""A chain of segments: tokens go in at the bottom and exit at an exit or at the end.

The state of a token that exits stays pending before the next segment. The first that must go
deeper takes along all that are pending there, in one call. So each segment gets every token once,
in order, and its keys and values are what they would be without exits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from offramp.runtimes.llama_cpp.native.tap import States
from offramp.runtimes.llama_cpp.prompt import Prompt
from offramp.runtimes.llama_cpp.segment import Segment

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class CallSizes:
    """How many tokens a call may hold, from `least` to `most`, and come out bit by bit the same.

    Some matrix kernels sum in another order for one row than for several: `least` is then 2, and a
    single token is fed twice, the second time to be forgotten.

    seconds: of the CPU in calls, by their tokens, without logits; none: the fewest calls are best.
    """

    least: int = 1
    most: int = 1
    seconds: Mapping[int, float] = field(default_factory=dict)

    def cut(self, tokens: int) -> list[int]:
        """How many each of the calls holds that take the least time together."""
        whole, rest = divmod(tokens, self.most)
        return [self.most] * whole + self._cuts[rest]

    @cached_property
    def _cuts(self) -> list[list[int]]:
        """By number of tokens, less than `most`."""
        cuts, totals = [list[int]()], [0.0]
        for tokens in range(1, self.most):
            totals.append(math.inf)
            cuts.append([])
            for first in range(1, tokens + 1):
                total = self._seconds(first) + totals[tokens - first]
                if total <= totals[-1]:
                    totals[-1], cuts[-1] = total, [first, *cuts[tokens - first]]
        return cuts

    def _seconds(self, tokens: int) -> float:
        if not self.seconds:
            return 1.0
        known = sorted(self.seconds)
        return float(np.interp(max(tokens, self.least), known, [self.seconds[n] for n in known]))


class Decide(Protocol):
    """Whether a token exits at an exit."""

    def __call__(self, exit: int, state: Array, logits: Array) -> bool:
        """exit: its place in the chain, from 0. state: [D], enters it. logits: [S], it gives."""
        ...


class SegmentChain:
    """The segments of one decoder, and the states pending before each."""

    def __init__(self, segments: Sequence[Segment], sizes: CallSizes) -> None:
        """sizes: of calls above the first exit, where tokens share a call. Below it none do.

        A prompt goes in as many rows at a time as a segment reads, whatever follows it.
        """
        self.segments = segments
        self.sizes = sizes
        self.exact = True
        self._prompt: Prompt | None = None
        self._waiting: list[list[States]] = []
        self.reset()

    def reset(
        self,
        unused: Sequence[int] = (),
        *,
        exact: bool = True,
        prompt: Prompt | None = None,
    ) -> None:
        """Forget everything.

        prompt: whose states will be run first; None: one of plain text. unused: exits, by place,
        that are not run from here on. exact: a token comes out bit by bit the same whoever waited
        with it; else one that goes on alone is not fed twice, and may round otherwise.
        """
        self.exact = exact
        self._prompt = prompt
        for place, segment in enumerate(self.segments):
            segment.begin(prompt)
            if segment.tap is not None:
                segment.tap.stop = place in unused
        self._waiting = [[] for _ in self.segments]

    @property
    def waits(self) -> bool:
        """Whether any token is pending at an exit."""
        return any(self._waiting)

    def run(self, states: States, decide: Decide | None = None) -> int:
        """Run tokens [n, D] that stay together, the last of them looked at by `decide`.

        Returns the place of the exit where they exited, or the number of exits where they did not;
        the logits then are the last segment's.
        """
        last = len(self.segments) - 1
        for place in range(last):
            self._waiting[place].append(states)
            states, logits = self._through(place, 1)
            if decide is not None and decide(place, states[-1], logits[-1]):
                self._waiting[place + 1].append(states)
                return place
        self._waiting[last].append(states)
        return last

    def finish(self, outputs: int) -> Array:
        """Take all pending tokens to the end; logits [outputs, V] of the last of them."""
        last = len(self.segments) - 1
        for place in range(1, last):
            if self._waiting[place]:
                self.advance(place, 0)
        logits = []
        left = sum(len(states) for states in self._waiting[last])
        for rows, ahead in self._calls(last):
            left -= len(rows)
            wanted = min(len(rows), max(0, outputs - left))
            logits.append(self._feed(last, rows, wanted, ahead).copy())
        return np.concatenate(logits)

    def advance(self, place: int, outputs: int, new: States | None = None) -> tuple[States, Array]:
        """Run what is pending before the exit at `place` up to and through it, where it waits on.

        new: states [m, D] behind what is pending. Returns the states [n, D] that entered the exit,
        and logits [outputs, S] of the last.
        """
        if new is not None:
            self._waiting[place].append(new)
        states, logits = self._through(place, outputs)
        self._waiting[place + 1].append(states)
        return states, logits

    @property
    def tokens(self) -> int:
        """How many ran through the first segment, the prompt's among them."""
        return self.segments[0].length

    def crop(self, rows: int) -> None:
        """Forget the last `rows` tokens, pending or not."""
        left = self.tokens - rows
        for segment, waiting in zip(self.segments, self._waiting, strict=True):
            segment.crop(max(0, segment.length - left))
            pending = sum(map(len, waiting)) - (left - segment.length)
            while pending > 0:
                last = waiting.pop()
                if len(last) > pending:
                    waiting.append(last[: len(last) - pending])
                pending -= len(last)

    def _through(self, place: int, outputs: int) -> tuple[States, Array]:
        """Run segment `place` over what is pending before it: states, and logits of the last."""
        segment = self.segments[place]
        assert segment.tap is not None
        calls = list(self._calls(place))
        if len(calls) == 1:
            rows, ahead = calls[0]
            made = self._feed(place, rows, outputs, ahead)
            return segment.tapped()[: len(rows)].copy(), made
        states, logits = [], []
        left = sum(len(rows) for rows, _ in calls)
        for rows, ahead in calls:
            left -= len(rows)
            wanted = min(len(rows), max(0, outputs - left))
            logits.append(self._feed(place, rows, wanted, ahead))
            states.append(segment.tapped()[: len(rows)].copy())
            if left and wanted:  # the next call overwrites them
                logits[-1] = logits[-1].copy()
        return np.concatenate(states), np.concatenate(logits)

    def _feed(self, place: int, rows: States, outputs: int, ahead: bool) -> Array:
        """Logits [outputs, V] of the last rows, a view. ahead: the rows see each other."""
        segment = self.segments[place]
        idle = self.sizes.least - len(rows) if place and self.exact else 0
        if idle > 0:
            rows = np.concatenate([rows, np.repeat(rows[-1:], idle, 0)])
        segment.feed(rows, outputs, max(0, idle), ahead=ahead)
        return segment.logits(outputs)

    def _calls(self, place: int) -> Iterator[tuple[States, bool]]:
        """What is pending before segment `place`, in calls of a length that depends on no exit,
        and whether the rows of a call see each other."""
        waiting, self._waiting[place] = self._waiting[place], []
        few = list[States]()
        for states in waiting:
            text = states
            if len(states) > 1 and not self.segments[place].length and not few:
                prompt = self._prompt or Prompt(states)
                for start, stop, ahead in prompt.calls(self.segments[place].at_once):
                    yield states[start:stop], ahead
                text = states[len(prompt.states) :]  # what waited with it below
            if len(text):
                few.append(text)
        if few:
            rows = np.concatenate(few) if len(few) > 1 else few[0]
            for count in self.sizes.cut(len(rows)):
                yield rows[:count], False
                rows = rows[count:]
