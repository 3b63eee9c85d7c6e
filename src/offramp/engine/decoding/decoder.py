"""The decoding loop: every token of every engine is written here.

Sequences are moved on by three kinds of call to an executor. *Feed*: the next token of each,
through the layers below the first exit, which says what follows. *Deep*: what waits above the
exits, segment by segment, as far as a question goes: deeper exits are asked, at last the full
model, and what they say stands. *Full*: the next token of each through all layers, no exit looked
at.

Whatever runs when, each sequence gets what it would get alone: which ones guess, park or catch up
together changes the order of work, not its outcome.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import replace
from itertools import compress
from typing import Any, cast

from offramp.engine.decoding.executor import (
    DraftingExecutor,
    DraftRoom,
    Executor,
    Span,
    too_long,
)
from offramp.engine.decoding.pace import DraftPace, Turn
from offramp.engine.decoding.reader import Question, Reader, ReadsPrompts, TokenSampler
from offramp.engine.decoding.rule import ExitRule, Verdict
from offramp.engine.decoding.scheduler import AT_ONCE, Call, Load, Schedule, Tally, due
from offramp.engine.decoding.sequence import NAN, Asked, Sequence, Token
from offramp.engine.policy import Pruning
from offramp.errors import InputError


class Decoder:
    """Sequences of one model, and the loop that moves them on. One thread's.

    layers: depth L of the full model. executor: runs the layers. reader: asks exits and the LM
    head. schedule: when the deep layers run. longest: columns of a sequence that may wait before
    them; None: any number. pace: whether the drafts of lossless answers pay; None: they are made
    in any case. settled: tokens of all sequences so far that can no longer change.
    """

    def __init__(
        self,
        layers: int,
        executor: Executor,
        reader: Reader,
        *,
        schedule: Schedule = AT_ONCE,
        longest: int | None = None,
        pace: DraftPace | None = None,
    ) -> None:
        self.executor, self.reader, self.pace = executor, reader, pace
        self.schedule, self.longest = schedule, longest
        self.depths, self.layers = executor.depths, layers
        self.sequences: list[Sequence] = []
        self.tallies = {True: Tally(), False: Tally()}  # by whether a token may be an exit's
        self.settled = 0  # tokens
        self._turn: tuple[float, int, Turn, bool] | None = None  # when it began, tokens by then
        self._calls: set[tuple[str, int]] = set()  # of the turn, and over how many tokens each

    # -- sequences ---------------------------------------------------------------------------

    def read(
        self,
        reader: ReadsPrompts,
        prepared: Any,
        samplers: Many[TokenSampler],
        rule: ExitRule,
    ) -> tuple[Any, list[Token | Asked]]:
        """Read a prompt of one or more rows, and choose each row's first token. Where visual tokens
        stay behind at an exit and it does not say it, layers above do once the row has joined.

        Raises:
            InputError: visual tokens are to stay behind, and the executor cannot.
        """
        opening = rule.opening
        more: dict[str, Any] = {}
        if rule.pruning is not None:
            more["pruning"] = self._checked(rule.pruning)
        firsts: list[Token | None] = [None] * len(samplers)
        scores = [NAN] * len(samplers)
        questions = [Question(sampler, opening, ()) for sampler in samplers]

        def decide(depth: int, output: Any) -> bool:
            if depth not in opening.thresholds or all(said is not None for said in firsts):
                return False
            asked = [
                question if said is None else None
                for question, said in zip(questions, firsts, strict=True)
            ]
            for row, verdict in enumerate(self.reader.verdicts(depth, output, asked)):
                if isinstance(verdict, Exception):
                    raise verdict
                if verdict is None:
                    continue
                if verdict.open:
                    scores[row] = opening.shown(depth, verdict)
                if opening.exits(depth, verdict):
                    firsts[row] = Token(verdict.token, depth, scores[row])
            return all(said is not None for said in firsts)

        prompt = reader.read(
            prepared,
            use_exits=rule.uses_exits,
            decide=decide if opening.exiting else None,
            looks=self.reader.looks(questions),
            keep=rule.ahead,
            **more,
        )
        open_ = [row for row, said in enumerate(firsts) if said is None]
        if open_ and prompt.logits is not None:
            word = self.reader.of_logits(prompt.logits)
            for row in open_:
                firsts[row] = Token(word(row, questions[row]), self.layers, scores[row])
        return prompt, [
            Asked(None, score=score) if said is None else said
            for said, score in zip(firsts, scores, strict=True)
        ]

    def _checked(self, pruning: Pruning) -> Pruning:
        if not getattr(self.executor, "prunes", False):
            raise InputError(
                f"The policy lets {pruning.keep:g} of the visual tokens go on {pruning.where}, and "
                "what runs the layers here cannot leave any behind.",
                "Use a policy with visual_keep=1, or PyTorch, where layers run in slots.",
            )
        return pruning

    def join(
        self,
        prompt: Any,
        row: int,
        sampler: TokenSampler,
        rule: ExitRule,
        first: Token | Asked,
        owner: Any = None,
    ) -> Sequence:
        """Take a row of a prompt over; its first token, if it is said, is given out at once.

        Raises:
            InputError: lossless, of a model whose states hold the whole text.
        """
        loaded = self.executor.load(prompt, row)
        if (rule.lossless or rule.guesses) and not self.executor.allow_crops(loaded.handle):
            if rule.lossless:
                self.executor.release(loaded.handle)
                raise InputError(
                    "Lossless decoding takes drafts back, and this model's recurrent states "
                    "cannot be.",
                    "Use a policy with lossless=False.",
                )
            rule = replace(rule, guesses=None)
        sequence = Sequence(sampler, rule, *loaded, first=first, layers=self.layers, owner=owner)
        self.sequences.append(sequence)
        self._turn = None  # its prompt was read meanwhile
        self._settle(sequence)
        return sequence

    def leave(self, sequence: Sequence) -> None:
        """Forget a sequence; the last one takes its place, as in the executor's slots."""
        place = self.sequences.index(sequence)
        last = self.sequences.pop()
        if last is not sequence:
            self.sequences[place] = last
        if not self.sequences:
            self._end_turn()
        with self.reader.computing():
            self.executor.release(sequence.handle)

    # -- the loop ----------------------------------------------------------------------------

    def finish(self) -> None:
        """Write until every sequence is over. Raise the error of the first that has one."""
        with self.reader.computing():
            while self.goes_on():
                self._make(self.next_call())

    def goes_on(self) -> bool:
        """Release the sequences that are over; whether any is not. Raise the error of one."""
        for sequence in [*self.sequences]:
            if sequence.over or sequence.error is not None:
                self.leave(sequence)
                if sequence.error is not None:
                    raise sequence.error
        return bool(self.sequences)

    def next_call(self) -> Call:
        """What the schedule asks for."""
        rows = self.sequences
        if self.pace is not None:
            self._take_turn(self.pace)
        if not any([row.rule.thresholds and row.drafts for row in rows]):
            return "flush" if any([row.ran[0] != row.ran[-1] for row in rows]) else "full"
        if len(rows) == 1 and self.schedule.patience == 0 and self.longest is None:
            return "feed" if rows[0].ready(None) else "deep"  # nobody waits for it to stop drafting
        return self.schedule.next_call(Load.of(rows, self.longest))

    def _take_turn(self, pace: DraftPace) -> None:
        """Where lossless answers have nothing in question: whether they are drafted on."""
        rows = self.sequences
        for row in rows:
            if row.asked or row.ran[0] != row.ran[-1] or not row.rule.lossless:
                return
        self._end_turn()
        turn = Turn(len(rows), first=not any(row.fed for row in rows))
        drafts = pace.drafts(turn)
        for row in rows:
            row.drafts = drafts
            row.undrafted += not drafts
        self._turn, self._calls = (pace.clock(), self.settled, turn, drafts), set()

    def _end_turn(self) -> None:
        """Note what a turn took."""
        if self._turn is not None and self.pace is not None:
            (began, before, turn, drafted), self._turn = self._turn, None
            took = self.pace.clock() - began
            settled = self.settled - before
            self.pace.note(turn, settled, took, drafted=drafted, calls=self._calls)

    def make(self, call: Call) -> int:
        """Make a call; how many tokens it was over."""
        with self.reader.computing():
            return self._make(call)

    def _make(self, call: Call) -> int:
        if call == "feed":
            count = self.feed()
        elif call == "full":
            count = self.full(self.sequences)
        else:
            count = self.deep(flush=call == "flush")
        self._calls.add((call, count))
        return count

    def feed(self) -> int:
        """Feed the next token of every sequence that is ready up to the first exit. Those whose
        exit drafts on make a round of their own: they never wait."""
        rows = self.sequences
        if len(rows) == 1 and rows[0].rule.thresholds and rows[0].ready(self.longest):
            self._feed_one(rows[0])
            return 1
        count, rows = self._ahead(rows)
        if self.executor.rows == 1:  # each by itself
            for row in rows:
                row.waited += not row.ready(self.longest)
            self.full([row for row in rows if not row.rule.thresholds])
            rows = [row for row in rows if row.rule.thresholds and row.ready(self.longest)]
        ready = [row.ready(self.longest) for row in rows]
        depth = self.depths[0]
        asked = [
            self._question(row, row.ids[: row.fed + 1])
            if on and depth in row.rule.thresholds
            else None
            for row, on in zip(rows, ready, strict=True)
        ]
        # In one call those that are not ready go along: what they write is void, and slots stay in
        # order.
        if not rows:
            return count
        output = self.executor.feed(
            [row.handle for row in rows],
            [row.feed for row in rows],
            [row.ran[0] for row in rows],
            self.reader.looks(asked),
        )
        verdicts = self.reader.verdicts(depth, output, asked)
        for row, on, verdict in zip(rows, ready, verdicts, strict=True):
            if not on:
                row.waited += 1
            elif isinstance(verdict, Exception):
                row.error = verdict
            else:
                self._follow(row, depth, verdict)
                self._settle(row)
        return count + len(rows)

    def _feed_one(self, row: Sequence) -> None:
        """The same of the only one, with fewer lists: between two tokens the weights went through
        the processor's caches, so what stands here is read from memory anew."""
        asked, depth = row.alone, self.depths[0]
        if asked is None:
            asks = depth in row.rule.thresholds
            asked = row.alone = [self._question(row, row.ids) if asks else None]
        looks = self.reader.looks(asked)
        output = self.executor.feed([row.handle], [row.ids[-1]], [row.ran[0]], looks)
        verdict = self.reader.verdicts(depth, output, asked)[0]
        if isinstance(verdict, Exception):
            row.error = verdict
            return
        self._follow(row, depth, verdict)
        self._settle(row)

    def _follow(self, row: Sequence, depth: int, verdict: Verdict | None) -> None:
        """Go on from what the first exit says of a fed token, if it may, or park."""
        rule = row.rule
        tally = self.tallies[rule.exiting]
        if verdict is None:
            row.question(None)
            return
        score = rule.shown(depth, verdict)
        if rule.exits(depth, verdict):
            tally.exited += 1
            token = Token(verdict.token, depth, score)
            if not rule.lossless:
                row.say(token)
                if row.asked:
                    row.held = row.sampler.would_end(len(row.tokens), verdict.token)
                return
            row.question(token, drafted=True, score=score)
        elif rule.guesses_at(depth, verdict) and not self._crowded(row):
            tally.guessed += 1
            row.question(Token(verdict.token, self.layers, score), score=score)
        else:
            tally.parked += 1
            row.question(None, score=score)
            return
        crowded = rule.lossless and rule.most is not None and len(row.asked) > rule.most
        row.held = crowded or row.sampler.would_end(len(row.tokens), verdict.token)

    def _crowded(self, row: Sequence) -> bool:
        return row.rule.most is not None and len(row.asked) >= row.rule.most

    def deep(self, *, flush: bool = False) -> int:
        """Run what waits above the first exit: of the sequences whose turn it is, as far as their
        questions go. flush: all that waits of all, through all layers."""
        rows = self.sequences
        takes = [True] * len(rows) if flush else due(rows, self.longest)
        chosen = [row for row, on in zip(rows, takes, strict=True) if on]
        count = 0
        for segment in range(1, len(self.depths) + 1):
            here = [row for row in chosen if row.pending(segment) > 0]
            if segment > 1 and not flush:
                here = [row for row in here if self._asks_beyond(row, segment)]
            if here:
                count += self._run(segment, here)
        for row in chosen:
            if not row.asked:
                row.caught_up()
            if row.error is None:
                self._settle(row)
        return count

    def _asks_beyond(self, row: Sequence, segment: int) -> bool:
        """Whether a question of the sequence waits before a segment."""
        first, end = row.ran[segment], row.ran[segment - 1]
        return row.error is None and bool(row.places(first, end))

    def _run(self, segment: int, rows: list[Sequence]) -> int:
        """Run a segment over all that waits before it of each sequence, and answer questions."""
        spans, asked, questions, count = [], [], [], 0
        last = segment == len(self.depths)
        for row in rows:
            span = Span(row.handle, row.ran[segment], row.ran[segment - 1])
            for place in row.places(span.first, span.end):
                if last or self._is_asked(row, place, self.depths[segment]):
                    asked.append(count + row.start + place - 1 - span.first)
                    questions.append((row, place))
            spans.append(span)
            count += span.end - span.first
        puts = [self._question(row, row.ids[:place], place) for row, place in questions]
        output = self.executor.run(segment, spans, asked, self.reader.looks(puts))
        for row, span in zip(rows, spans, strict=True):
            row.ran[segment] = span.end
        if last:
            self._answer(questions, puts, output)
        elif questions:
            self._ask(self.depths[segment], questions, puts, output)
        return count

    def _is_asked(self, row: Sequence, place: int, depth: int) -> bool:
        return depth in row.rule_at(place).thresholds and not row.asked[place].drafted

    def _ask(
        self,
        depth: int,
        questions: list[tuple[Sequence, int]],
        puts: list[Question],
        output: Any,
    ) -> None:
        """Let a deeper exit say, of the places that it is asked about, what is to stand there."""
        void: set[int] = set()
        verdicts = self.reader.verdicts(depth, output, puts)
        for (row, place), verdict in zip(questions, verdicts, strict=True):
            if id(row) in void or place not in row.asked:
                continue
            right = True
            if isinstance(verdict, Exception):
                row.error, right = verdict, False
            elif verdict is not None and verdict.open:
                rule = row.rule_at(place)
                score = rule.shown(depth, verdict)
                if rule.exits(depth, verdict):
                    token = Token(verdict.token, depth, score)
                    if rule.lossless:
                        right = row.draft(place, token)
                    else:
                        right = self._give(row, place, token)
                else:
                    row.looked(place, score)
            if not right:
                void.add(id(row))
                self.executor.crop(row.handle, row.ran[0])

    def _answer(
        self, questions: list[tuple[Sequence, int]], puts: list[Question], final: Any
    ) -> None:
        """Let the full model fill the places that sequences ask about."""
        if not questions:
            return
        word = self.reader.words(final)
        void: set[int] = set()  # sequences whose later questions fell with a wrong token
        drafts: dict[int, list[int]] = {}  # of a lossless sequence, how many, and how many right
        for row, place in questions:
            if row.rule.lossless:
                count, most = drafts.setdefault(id(row), [0, 0]), row.rule.most
                count[0] += row.asked[place].drafted and (most is None or count[0] < most)
        for i, ((row, place), question) in enumerate(zip(questions, puts, strict=True)):
            if id(row) in void:
                continue
            asked = row.asked[place]
            try:
                token = Token(word(i, question), self.layers, asked.score)
                if asked.drafted and asked.said is not None and asked.said.token == token.token:
                    token = asked.said  # a draft that was right counts at the exit that said it
                    if row.rule.lossless:
                        tally = drafts[id(row)]
                        tally[1] = min(tally[0], tally[1] + 1)
                right = self._give(row, place, token)
            except Exception as error:  # of the row's own rules: its request alone fails
                row.error, right = error, False
            if not right:
                void.add(id(row))
                self.executor.crop(row.handle, row.ran[0])
        for row in {id(row): row for row, _ in questions}.values():
            if row.rule.lossless:
                drafted, accepted = drafts[id(row)]
                row.rounds.append((drafted, accepted))

    def _give(self, row: Sequence, place: int, token: Token) -> bool:
        """The last word on a place in question; whether what stood there was right."""
        guessed = row.asked[place].said is not None
        right = row.answer(place, token)
        if guessed:
            self.tallies[row.rule.exiting].rule(right)
        return right

    def full(self, rows: list[Sequence]) -> int:
        """Feed the next token of sequences through all layers; nothing may wait. Where an exit
        drafts on from its own state, its drafts go along.

        No exit is looked at, so the tokens must be the full model's.
        """
        count, rows = self._ahead(rows)
        if not rows:
            return count
        fed = [(row.handle, row.ids[-1], row.ran[0]) for row in rows]
        exits = any([row.rule.uses_exits for row in rows])
        final = self.executor.full(*map(list, zip(*fed, strict=True)), exits=exits)
        word = self.reader.words(final)
        for place, row in enumerate(rows):
            try:
                row.passed(Token(word(place, self._question(row, row.ids)), self.layers))
            except Exception as error:  # of the row's own rules: its request alone fails
                row.error = error
                continue
            self._settle(row)
        return count + len(rows)

    def _ahead(self, rows: list[Sequence]) -> tuple[int, list[Sequence]]:
        """Make a round of those whose exit drafts on; over how many tokens, and the others."""
        drafting = [row.rule.ahead is not None and row.drafts for row in rows]
        if not any(drafting):
            return 0, rows
        others = [row for row, drafts in zip(rows, drafting, strict=True) if not drafts]
        return self._rounds([*compress(rows, drafting)]), others

    def _rounds(self, rows: list[Sequence]) -> int:
        """Draft on from the last verified token of each sequence, and verify all in one call."""
        handles, columns = [row.handle for row in rows], [row.ran[0] for row in rows]
        newest = [row.ids[-1] for row in rows]
        executor = cast(DraftingExecutor, self.executor)
        drafts = executor.draft(handles, newest, columns, [*map(self._room, rows)])
        # Behind an end token nothing is asked.
        fed = [
            [token, *(draft[:-1] if draft and row.ends_with(draft[-1]) else draft)]
            for row, token, draft in zip(rows, newest, drafts, strict=True)
        ]
        word = self.reader.words(executor.verify(handles, fed, columns))
        first = 0
        for row, tokens, draft in zip(rows, fed, drafts, strict=True):
            kept = 0
            try:
                for at in range(first, first + len(tokens)):
                    token = word(at, self._question(row, row.ids))
                    right = kept < len(draft) and draft[kept] == token
                    row.passed(Token(token, row.rule.ahead or 0 if right else self.layers))
                    kept += right
                    if not right:
                        break
            except Exception as error:  # of the row's own rules: its request alone fails
                row.error = error
            self.executor.crop(row.handle, row.ran[0])
            row.rounds.append((len(draft), kept))
            first += len(tokens)
            self._settle(row)
        return first

    def _room(self, row: Sequence) -> DraftRoom:
        """What drafts a sequence may have before it is as long as it may be."""
        room = row.rule.most or 0
        if self.executor.positions is not None:
            room = min(room, self.executor.positions - row.ran[0] - 1)
        while room > 0 and row.sampler.would_end(len(row.tokens) + room, -1):
            room -= 1
        return DraftRoom(max(0, room), row.rule.sure, row.ends_with)

    def _question(self, row: Sequence, before: list[int], place: int = 1) -> Question:
        return Question(row.sampler, row.rule_at(place), before)

    def _settle(self, row: Sequence) -> None:
        """Give out what can no longer change, until the answer is over."""
        try:
            for place in row.settle():
                token = row.tokens[place]
                self.settled += 1
                if row.sampler.emit(row.ids, place, token.depth, token.score):
                    row.end(place + 1)
                    return
            limit = self.executor.positions
            if limit is not None and row.ran[0] >= limit and row.ready(None):
                row.error = too_long(limit)
        except Exception as error:  # of whoever is told, or a criterion: its request alone fails
            row.error = error
