"""Rows in slots, and the three calls that move them on. One thread's, and knows no queue.

Whatever runs when, each row's answer is what its request alone would get: which rows guess, park
or catch up together changes the order of work, not its outcome.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from offramp.engine.policy import ExitPolicy, GenerationOutput
from offramp.engine.slots.prompt import Prompt
from offramp.engine.slots.runner import SlotRunner, States
from offramp.models.backbone import Backbone
from offramp.models.exits import Exits, ExitSet
from offramp.serving.rows.choices import Chooser, Verdict
from offramp.serving.rows.row import Choice, Row
from offramp.serving.rows.rules import RowRules
from offramp.serving.schedule.scheduler import Tally, due


@dataclass(frozen=True)
class RowPolicy:
    """How one row uses the exits.

    thresholds: by depth, where its tokens may exit; empty: every token is the full model's. guess:
    whether it goes on from an exit's token until the deep layers have spoken.
    """

    thresholds: Mapping[int, float] = field(default_factory=dict)
    guess: bool = True

    @classmethod
    def of(cls, policy: ExitPolicy) -> RowPolicy:
        """The same in a batch."""
        exits = policy.lossless or bool(policy.thresholds)
        return cls({} if policy.lossless else policy.thresholds, guess=exits)

    @property
    def uses_exits(self) -> bool:
        return self.guess or bool(self.thresholds)

    def exits(self, depth: int, verdict: Verdict) -> bool:
        """Whether a token may exit at `depth` with what the exit there says."""
        threshold = self.thresholds.get(depth)
        if threshold is None or not verdict.open:
            return False
        return threshold == 0.0 or verdict.score >= _single(threshold)

    def shown(self, depth: int, verdict: Verdict) -> float:
        """The score to report of a token that exits: none where it exits whatever the score."""
        return float("nan") if self.thresholds[depth] == 0.0 else verdict.score


@dataclass(eq=False)
class Seat:
    """A row in its slot, with its rules and what it is to take next. error: why it failed."""

    row: Row
    rules: RowRules
    policy: RowPolicy
    owner: Any = None
    over: bool = False
    error: Exception | None = None


class SlotBatch:
    """Slots of a backbone with exits.

    policy: score, shortlist and gates of the exits, and with its thresholds and draft thresholds
    the depths that are in use. limit: tokens that a row may have, prompt and answer. longest:
    tokens that a row may have pending. guess_above: score from which a token is worth a guess.
    """

    def __init__(
        self,
        backbone: Backbone,
        exits: ExitSet | Exits | None,
        policy: ExitPolicy,
        *,
        slots: int = 8,
        limit: int = 1024,
        layout: str | None = None,
        longest: int = 64,
        guess_above: float = 0.0,
    ) -> None:
        exits = None if exits is None else ExitSet.of(exits)
        self.backbone, self.slots, self.longest = backbone, slots, longest
        self.guess_above = guess_above
        self._usual = RowPolicy(policy.thresholds)
        self.depths = policy.depths if exits else ()
        self.runner = SlotRunner(backbone, exits, self.depths, slots, limit, layout=layout)
        self.seats: list[Seat] = []
        self.chooser = Chooser(backbone, exits, policy, self.depths)
        self.tallies = {True: Tally(), False: Tally()}  # by whether a row's tokens may exit
        self._pending: Tensor | None = None  # states before the deep layers [slots, longest, D]

    # -- rows ----------------------------------------------------------------------------------

    @torch.inference_mode()
    def join(self, prompt: Prompt, rules: RowRules, policy: RowPolicy, owner: Any = None) -> Seat:
        """Seat a prompt that was read; its first token is there at once."""
        slot = len(self.seats)
        start = self.runner.load(slot, prompt.cache, prompt.positions, prompt.real)
        seat = Seat(Row(start, self._first(prompt, rules, policy)), rules, policy, owner)
        self.seats.append(seat)
        self._settle(seat)
        return seat

    @torch.inference_mode()
    def leave(self, seat: Seat) -> None:
        """Free a slot; the last row moves there, so that those in use stand at the front."""
        slot = self.seats.index(seat)
        last = self.seats.pop()
        if last is not seat:
            self.seats[slot] = last
            source = len(self.seats)
            self.runner.move(source, slot, last.row.start + last.row.fed)
            if self._pending is not None:
                self._pending[slot] = self._pending[source]

    def result(self, seat: Seat) -> GenerationOutput:
        """What `generate` would return for this row alone."""
        choices = seat.row.choices
        tokens = torch.tensor([seat.row.tokens], device=seat.rules.ids.device)
        return GenerationOutput(
            torch.cat([seat.rules.ids, tokens.to(seat.rules.ids)], 1),
            torch.tensor([[choice.depth for choice in choices]]),
            torch.tensor([[choice.score for choice in choices]]),
            self.backbone.depth,
        )

    @property
    def ready(self) -> int:
        """Rows whose next token can be fed."""
        return sum(seat.row.ready(self.longest) for seat in self.seats)

    def _first(self, prompt: Prompt, rules: RowRules, policy: RowPolicy) -> Choice:
        """The first token, which may be an exit's behind an encoder. Raise what its rules raise."""
        score = float("nan")
        for depth in self.depths if prompt.looks.exits else ():
            if depth not in policy.thresholds:
                continue
            verdict = _raised(self.chooser.verdicts(depth, prompt.looks, [(rules, [])])[0])
            if policy.exits(depth, verdict):
                return Choice(verdict.token, depth, policy.shown(depth, verdict))
            score = verdict.score if verdict.open else score
        return Choice(rules.choose(prompt.logits, []), self.backbone.depth, score)

    # -- calls ---------------------------------------------------------------------------------

    # Each returns how many tokens it was over.

    @torch.inference_mode()
    def shallow(self) -> int:
        """Feed the next token of every row that is ready up to the exit."""
        rows = [seat.row for seat in self.seats]
        ready = [row.ready(self.longest) for row in rows]
        states = self.runner.shallow(self._feed(rows), [row.column for row in rows])
        self._keep(states.entries[self.depths[0]], rows)
        for seat, verdict in zip(self.seats, self._verdicts(states, ready), strict=True):
            if verdict is None:
                seat.row.wait()
            elif isinstance(verdict, Exception):
                seat.error = verdict
            else:
                self._follow(seat, verdict)
                self._settle(seat)
        return len(rows)

    @torch.inference_mode()
    def deep(self, *, flush: bool = False) -> int:
        """Run what is pending of the rows whose turn it is (`due`) through the deep layers.

        flush: of all rows.
        """
        rows = [seat.row for seat in self.seats]
        takes = [row.pending > 0 for row in rows] if flush else due(rows, self.longest)
        chosen = [(slot, seat) for slot, seat in enumerate(self.seats) if takes[slot]]
        if not chosen:
            return 0
        assert self._pending is not None
        slots = [slot for slot, seat in chosen for _ in seat.row.columns]
        places = [n for _, seat in chosen for n in range(seat.row.pending)]
        columns = [column for _, seat in chosen for column in seat.row.columns]
        states = self.runner.deep(self._pending[slots, places], slots, columns)
        questions = [(seat, place) for _, seat in chosen for place in seat.row.questions]
        where, first = [], 0
        for _, seat in chosen:
            where += [first + place - 1 - seat.row.deep for place in seat.row.questions]
            first += seat.row.pending
        if where:
            places_asked = torch.tensor(where, device=states.final.device)
            self._answer(questions, states.picked(places_asked))
        for _, seat in chosen:
            seat.row.caught_up()
            if seat.error is None:
                self._settle(seat)
        return len(slots)

    @torch.inference_mode()
    def step(self) -> int:
        """Feed the next token of every row through all layers and look at the exits on the way.

        Nothing may be pending. Any row gets what a shallow and a deep call would give it.
        """
        rows = [seat.row for seat in self.seats]
        assert not any(row.pending or row.parked for row in rows)
        states = self.runner.step(self._feed(rows), [row.column for row in rows])
        looks = [seat.policy.uses_exits for seat in self.seats]
        for seat, verdict in zip(self.seats, self._verdicts(states, looks), strict=True):
            if isinstance(verdict, Verdict):
                self._follow(seat, verdict)
            else:
                seat.error = verdict
                seat.row.park(float("nan"))
        asked = [(slot, place) for slot, row in enumerate(rows) for place in row.questions]
        if asked:
            places = torch.tensor([slot for slot, _ in asked], device=states.final.device)
            questions = [(self.seats[slot], place) for slot, place in asked]
            self._answer(questions, states.picked(places))
        for seat in self.seats:
            seat.row.caught_up()
            if seat.error is None:
                self._settle(seat)
        return len(rows)

    @torch.inference_mode()
    def full(self) -> int:
        """Feed the next token of every row through all layers; nothing may be pending.

        No exit is looked at, so only rows whose tokens are all the full model's may be seated.
        """
        rows = [seat.row for seat in self.seats]
        assert not any(row.pending or row.parked for row in rows)
        exits = any(seat.policy.uses_exits for seat in self.seats)
        columns = [row.column for row in rows]
        states = self.runner.full(self._feed(rows), columns, exits=exits)
        asked = [(seat.rules, seat.row.tokens) for seat in self.seats]
        tokens = self.chooser.full(states.final, asked)
        for seat, token in zip(self.seats, tokens, strict=True):
            if isinstance(token, Exception):
                seat.error = token
                continue
            seat.row.passed(Choice(token, self.backbone.depth))
            self._settle(seat)
        return len(rows)

    def _feed(self, rows: Sequence[Row]) -> Tensor:
        return torch.tensor([row.feed for row in rows], device=self.backbone.device)

    def _keep(self, entries: Tensor, rows: Sequence[Row]) -> None:
        """Note the states that entered the exit; of rows that were not ready they are void."""
        if self._pending is None:
            self._pending = entries.new_zeros(self.slots, self.longest + 1, entries.shape[-1])
        places = [min(row.pending, self.longest) for row in rows]
        self._pending[list(range(len(rows))), places] = entries

    # -- what comes next -----------------------------------------------------------------------

    def _verdicts(
        self, states: States, looks: Sequence[bool]
    ) -> Sequence[Verdict | Exception | None]:
        """What the first exit says in the rows that it looks at."""
        asked = [
            (seat.rules, seat.row.tokens) if on else None
            for seat, on in zip(self.seats, looks, strict=True)
        ]
        return self.chooser.verdicts(self.depths[0], states, asked)

    def _follow(self, seat: Seat, verdict: Verdict) -> None:
        """Go on from what the first exit says of a fed token, if it may, or park."""
        row, policy, depth = seat.row, seat.policy, self.depths[0]
        tally = self.tallies[bool(policy.thresholds)]
        score = verdict.score if verdict.open else float("nan")
        if policy.exits(depth, verdict):
            tally.exited += 1
            row.say(Choice(verdict.token, depth, policy.shown(depth, verdict)))
        elif policy.guess and verdict.score >= self.guess_above:
            tally.guessed += 1
            row.guess(Choice(verdict.token, depth, score))
        else:
            tally.parked += policy.uses_exits
            row.park(score if depth in policy.thresholds else float("nan"))
            return
        row.held = bool(row.guesses) and seat.rules.would_end(len(row.choices), verdict.token)

    def _answer(self, questions: Sequence[tuple[Seat, int]], states: States) -> None:
        """Let the full model, or a deeper exit, fill the places that rows ask about."""
        logits = self.backbone.logits(states.final)
        largest = logits.argmax(-1).tolist()
        void: set[int] = set()  # rows whose later questions fell with a wrong guess
        for i, (seat, place) in enumerate(questions):
            if id(seat) in void:
                continue
            try:
                choice = self._deeper_exit(i, states, seat, place)
                if not isinstance(choice, Choice):
                    choice = self._full_choice(seat, place, largest[i], logits[i : i + 1], choice)
                guessed = place < len(seat.row.choices)
                score = seat.row.asked(place).score
                right = seat.row.answer(place, choice)
                if guessed:
                    self._count(seat, score, right)
            except Exception as error:  # of the row's own rules: its request alone fails
                seat.error, right = error, False
            if not right:
                void.add(id(seat))

    def _count(self, seat: Seat, score: float, right: bool) -> None:
        """Note whether a guess was right, and of a lossless row what would have become of its token
        by the batch's own thresholds."""
        exiting = bool(seat.policy.thresholds)
        self.tallies[exiting].rule(right)
        if not exiting and self._usual.thresholds:
            if self._usual.exits(self.depths[0], Verdict(-1, score, open=score == score)):
                self.tallies[True].exited += 1
            else:
                self.tallies[True].guessed += 1
                self.tallies[True].rule(right)

    def _deeper_exit(self, at: int, states: States, seat: Seat, place: int) -> Choice | float:
        """What an exit above the first lets exit at `place`; if none does, the last one's score."""
        policy, score = seat.policy, seat.row.asked(place).score
        for depth in self.depths[1:]:
            if depth not in policy.thresholds:
                continue
            state = states.picked(torch.tensor([at], device=states.final.device))
            question = (seat.rules, seat.row.tokens[:place])
            verdict = _raised(self.chooser.verdicts(depth, state, [question])[0])
            if policy.exits(depth, verdict):
                return Choice(verdict.token, depth, policy.shown(depth, verdict))
            score = verdict.score if verdict.open else score
        return score

    def _full_choice(
        self, seat: Seat, place: int, largest: int, logits: Tensor, score: float
    ) -> Choice:
        """The full model's token for `place`, out of its raw logits [1, V]."""
        rules, asked = seat.rules, seat.row.asked(place)
        token = largest if rules.plain else rules.choose(logits, seat.row.tokens[:place])
        if not seat.policy.thresholds and asked.token == token:
            return asked  # lossless: a draft that was right counts at the exit that wrote it
        return Choice(token, self.backbone.depth, score)

    def _settle(self, seat: Seat) -> None:
        """Give out what can no longer change, until the answer is over."""
        row = seat.row
        begin, fresh = row.settled, row.settle()
        tokens = row.tokens
        try:
            for n in range(begin + 1, begin + len(fresh) + 1):
                if seat.rules.emit(tokens[:n], row.choices[n - 1]):
                    row.end(n)
                    seat.over = True
                    return
        except (
            Exception
        ) as error:  # a streamer or criterion of the caller's: its request alone fails
            seat.error = error


def _raised(value: Any) -> Any:
    """`value`, raised if it is an error."""
    if isinstance(value, Exception):
        raise value
    return value


@cache
def _single(threshold: float) -> float:
    """A threshold in the scores' precision, in which it is compared."""
    return float(torch.tensor(threshold, dtype=torch.float32))
