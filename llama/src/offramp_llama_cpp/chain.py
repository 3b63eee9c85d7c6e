"""A chain of segments: tokens go in at the bottom and exit at an exit or at the end.

The state of a token that exits stays pending before the next segment. The first that must go
deeper takes along all that are pending there, in one call. So each segment gets every token once,
in order, and its keys and values are what they would be without exits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from offramp.core.decoding.drafting import DraftBudget
from offramp_llama_cpp.graphs import Array
from offramp_llama_cpp.native.drafts import FeedLoop
from offramp_llama_cpp.native.tap import States
from offramp_llama_cpp.prompt import Prompt
from offramp_llama_cpp.segment import Part, Segment


@dataclass(frozen=True)
class CallSizes:
    """The number of tokens that a call may hold, from `least` to `most`, and come out bit by bit
    the same.

    Some matrix kernels sum in another order for one row than for several: `least` is then 2, and a
    single token is fed twice, the second time to be forgotten.

    seconds: of the CPU in calls, by their tokens, without logits; none: the fewest calls are best.
    shared: whether rows of several sequences come out of a call as they do alone. first: as `most`,
    of text in the first segment, where a single token is never fed twice.
    """

    least: int = 1
    most: int = 1
    seconds: Mapping[int, float] = field(default_factory=dict)
    shared: bool = True
    first: int = 1

    @property
    def free(self) -> int | None:
        """The most tokens, of those timed, whose call takes at most 1.75 times as long as the
        shortest; None: sequences share no call, or none was timed."""
        if not (self.shared and self.seconds):
            return None
        least = min(self.seconds.values())
        return max(tokens for tokens, took in self.seconds.items() if took <= 1.75 * least)

    def cut(self, tokens: int) -> list[int]:
        """Return the sizes of the calls that take the least time together."""
        whole, rest = divmod(tokens, self.most)
        return [self.most] * whole + self._cuts[rest]

    def cut_first(self, tokens: int) -> list[int]:
        """The same in the first segment."""
        whole, rest = divmod(tokens, self.first)
        return [self.first] * whole + [rest] * bool(rest)

    @cached_property
    def _cuts(self) -> list[list[int]]:
        """The cuts of a number of tokens below `most`."""
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


_NOTHING: States = np.zeros((0, 0), dtype=np.float32)


Decide = Callable[[int, Array, Array], bool]
"""Whether a token exits at an exit: by its place in the chain, from 0, the state [D] that enters it
and the logits [S] that it gives."""


class SegmentChain:
    """The segments of one decoder, and the states of each sequence pending before each.

    slot: of a sequence, where there are several.
    """

    def __init__(self, segments: Sequence[Segment], sizes: CallSizes) -> None:
        """sizes: of calls where tokens share one: above the first exit, or with other sequences'.

        A prompt goes in as many rows at a time as a segment reads, unless it is short, and shares
        a call with what waits after it.
        """
        self.segments = segments
        self.sizes = sizes
        self.exact = True
        self.slots: int = segments[0].sequences
        self._prompts: list[Prompt | None] = [None] * self.slots
        self._unused: list[frozenset[int]] = [frozenset()] * self.slots
        self._waiting: list[list[list[States]]] = [[] for _ in range(self.slots)]
        for slot in range(self.slots):
            self.reset(slot=slot)

    def reset(
        self,
        unused: Sequence[int] = (),
        *,
        exact: bool = True,
        prompt: Prompt | None = None,
        slot: int = 0,
        kept: int = 0,
    ) -> None:
        """Forget a sequence, but for its first `kept` tokens.

        prompt: whose states will be run first, after those that are kept, of which `shared` knows;
        None: one of plain text. unused: exits, by place, that are not run from here on. exact: a
        token comes out bit by bit the same whoever waited with it; else one that goes on alone is
        not fed twice, and may round otherwise.
        """
        self.exact = exact
        self._prompts[slot], self._unused[slot] = prompt, frozenset(unused)
        if kept:
            self.crop(self.tokens(slot) - kept, slot)
        else:
            self._waiting[slot] = [[] for _ in self.segments]
        for place, segment in enumerate(self.segments):
            segment.begin(prompt, slot, kept)
            if segment.tap is not None:
                segment.tap.stop = place in unused

    def shared(self, prompt: Prompt, unused: Sequence[int] = (), slot: int = 0) -> int:
        """Return the number of a prompt's first tokens that the sequence has already run, so that
        they need not run again.

        It is 0 if an exit that will be used was not run for them, or if an error cut the last
        answer off and tokens were lost.
        """
        before = self._prompts[slot]
        if before is None or not self._unused[slot].issubset(unused):
            return 0
        lengths = [segment.length_of(slot) for segment in self.segments]
        pending = [sum(map(len, waiting)) for waiting in self._waiting[slot]]
        came = [ran + wait for ran, wait in zip(lengths, pending, strict=True)]
        if came[1:] != lengths[:-1] or came[0] < len(before.states):
            return 0
        return prompt.common(before)

    def waits(self, slot: int = 0) -> bool:
        """Return True if any token is pending at an exit."""
        return any(self._waiting[slot])

    def run(self, states: States, decide: Decide | None = None, slot: int = 0) -> int:
        """Run tokens [n, D] that stay together, the last of them looked at by `decide`.

        Returns the place of the exit where they exited, or the number of exits where they did not;
        the logits then are the last segment's.
        """
        last, waiting = len(self.segments) - 1, self._waiting[slot]
        for place in range(last):
            waiting[place].append(states)
            states, logits = self._through(place, int(decide is not None), slot)
            if decide is not None and decide(place, states[-1], logits[-1]):
                waiting[place + 1].append(states)
                return place
        waiting[last].append(states)
        return last

    def finish(self, outputs: int, slot: int = 0) -> Array:
        """Run all pending tokens to the end. Return the logits [outputs, V] of the last ones, which
        the next run of the last segment overwrites."""
        last, waiting = len(self.segments) - 1, self._waiting[slot]
        for place in range(1, last):
            if waiting[place]:
                self.advance(place, 0, slot=slot)
        return self._through(last, outputs, slot)[1]

    def advance(
        self, place: int, outputs: int, new: States | None = None, slot: int = 0
    ) -> tuple[States, Array]:
        """Run what is pending before the exit at `place` up to and through it, where it waits on.

        new: states [m, D] after what is pending. Returns the states [n, D] that entered the exit,
        and logits [outputs, S] of the last.
        """
        if new is not None:
            self._waiting[slot][place].append(new)
        states, logits = self._through(place, outputs, slot)
        self._waiting[slot][place + 1].append(states)
        return states, logits

    def go_on(
        self, loop: FeedLoop, token: int, budget: DraftBudget, slot: int = 0
    ) -> tuple[list[int], States, Array]:
        """`advance` a token through the first exit, and then each that the exit says, within a
        budget: what it says, the states that entered it and its logits, of each token fed."""
        said, logits = self.segments[0].feed_on(loop, token, *budget, slot)
        states = self.segments[0].tapped()
        self._waiting[slot][1].append(states)
        return said, states, logits

    def together(
        self, place: int, outputs: Mapping[int, int], new: Mapping[int, States] | None = None
    ) -> dict[int, tuple[States, Array]]:
        """`advance` several sequences, in calls that they share as far as that changes no bit; at
        the last place, to the end.

        outputs: by slot. new: the same. Returns states and logits by slot; after the last segment
        there are no states.
        """
        for slot, states in (new or {}).items():
            self._waiting[slot][place].append(states)
        made: dict[int, tuple[States, Array]] = {}
        for group in self._groups(place, sorted(outputs)):
            if len(group) > 1:
                made |= self._share(place, group, outputs)
            else:
                [slot] = group
                states, logits = self._through(place, outputs[slot], slot)
                # The next group's call overwrites them.
                made[slot] = states, logits if len(outputs) == 1 else logits.copy()
        if place < len(self.segments) - 1:
            for slot, (states, _) in made.items():
                self._waiting[slot][place + 1].append(states)
        return made

    def _groups(self, place: int, slots: Sequence[int]) -> list[list[int]]:
        """Which sequences share calls: a prompt is read alone, and the slots between are filled."""
        groups = list[list[int]]()
        open_ = list[int]()
        for slot in slots:
            prompt = self._prompts[slot]
            if not self.segments[place].length_of(slot) and prompt is not None:
                groups.append([slot])
            elif self.sizes.shared and open_ and slot - open_[0] < self.sizes.most:
                open_.append(slot)
            else:
                open_ = [slot]
                groups.append(open_)
        return groups

    def _share(
        self, place: int, group: Sequence[int], outputs: Mapping[int, int]
    ) -> dict[int, tuple[States, Array]]:
        """Run segment `place` over what is pending before it of neighbouring sequences."""
        segment, slots = self.segments[place], range(group[0], group[-1] + 1)
        queues = {slot: np.concatenate(self._waiting[slot][place]) for slot in group}
        for slot in group:
            self._waiting[slot][place] = []
        longest = max(map(len, queues.values()))
        each = max(1, self.sizes.most // len(slots))
        filler = queues[group[0]][:1]
        states: dict[int, list[States]] = {slot: [] for slot in group}
        logits: dict[int, list[Array]] = {slot: [] for slot in group}
        for start in range(0, longest, each):
            count = min(each, longest - start)
            parts = list[Part]()
            for slot in slots:
                queue = queues.get(slot, filler[:0])
                rows = queue[start : start + count]
                left = len(queue) - start - len(rows)
                wanted = min(len(rows), max(0, outputs.get(slot, 0) - left))
                idle = count - len(rows)
                if idle:
                    rows = np.concatenate([rows, np.repeat(filler, idle, 0)])
                parts.append(Part(slot, rows, wanted, idle))
            segment.feed_together(parts)
            tapped = None if segment.tap is None else segment.tapped()
            made = segment.logits(sum(part.outputs for part in parts)).copy()
            for at, part in enumerate(parts):
                own, made = made[: part.outputs], made[part.outputs :]
                if part.slot in logits:
                    logits[part.slot].append(own)
                    if tapped is not None:
                        states[part.slot].append(tapped[at * count : (at + 1) * count - part.idle])
        return {
            slot: (
                np.concatenate(states[slot]) if states[slot] else _NOTHING,
                np.concatenate(logits[slot]),
            )
            for slot in group
        }

    def tokens(self, slot: int = 0) -> int:
        """Return the number of tokens that ran through the first segment, the prompt's included."""
        return self.segments[0].length_of(slot)

    def crop(self, rows: int, slot: int = 0) -> None:
        """Forget the last `rows` tokens, pending or not."""
        left = self.tokens(slot) - rows
        for segment, waiting in zip(self.segments, self._waiting[slot], strict=True):
            length = segment.length_of(slot)
            segment.crop(max(0, length - left), slot)
            pending = sum(map(len, waiting)) - (left - segment.length_of(slot))
            while pending > 0:
                last = waiting.pop()
                if len(last) > pending:
                    waiting.append(last[: len(last) - pending])
                pending -= len(last)

    def _through(self, place: int, outputs: int, slot: int) -> tuple[States, Array]:
        """Run segment `place` over what is pending before it: states, of the last segment none, and
        logits of the last rows, a view where one call was enough."""
        segment, calls = self.segments[place], list(self._calls(place, slot))
        states, logits = [], []
        left = sum(len(rows) for rows, _ in calls)
        for rows, ahead in calls:
            left -= len(rows)
            made = self._feed(place, rows, min(len(rows), max(0, outputs - left)), ahead, slot)
            logits.append(made.copy() if left else made)  # the next call overwrites them
            states.append(_NOTHING if segment.tap is None else segment.tapped()[: len(rows)])
        if len(calls) == 1:
            return states[0], logits[0]
        return np.concatenate(states), np.concatenate(logits)

    def _feed(self, place: int, rows: States, outputs: int, ahead: bool, slot: int) -> Array:
        """Logits [outputs, V] of the last rows, a view. ahead: the rows see each other."""
        segment = self.segments[place]
        idle = self.sizes.least - len(rows) if place and self.exact else 0
        if idle > 0:
            rows = np.concatenate([rows, np.repeat(rows[-1:], idle, 0)])
        segment.feed(rows, outputs, max(0, idle), ahead=ahead, slot=slot)
        return segment.logits(outputs)

    def _calls(self, place: int, slot: int) -> Iterator[tuple[States, bool]]:
        """What is pending before segment `place`, in calls of a length that depends on no exit,
        and whether the rows of a call see each other."""
        pending, segment = self._waiting[slot], self.segments[place]
        waiting, pending[place] = pending[place], []
        few, rows, first = list[States](), sum(map(len, waiting)), not segment.length_of(slot)
        for states in waiting:
            text, is_prompt, first = states, first and len(states) > 1, False
            prompt = self._prompts[slot] or Prompt(states)
            if is_prompt and not self._is_few(place, prompt, rows):
                for start, stop, ahead in prompt.calls(segment.at_once):
                    if start < len(states):  # else it came later, after what was kept
                        yield states[start:stop], ahead
                text = states[len(prompt.states) :]  # what waited with it below
            if len(text):
                few.append(text)
        if few:
            text = np.concatenate(few) if len(few) > 1 else few[0]
            sizes = self.sizes
            for count in sizes.cut(len(text)) if place else sizes.cut_first(len(text)):
                yield text[:count], False
                text = text[count:]

    def _is_few(self, place: int, prompt: Prompt, rows: int) -> bool:
        """Return True if a prompt and the tokens that wait after it, `rows` in all, go as one."""
        return bool(place) and not prompt.ahead and len(prompt.states) < rows <= self.sizes.most
