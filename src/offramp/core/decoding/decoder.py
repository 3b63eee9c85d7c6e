"""The decoding loop: every token of every engine is written here.

Early exit: *feed* the next token of each sequence through the layers below the first exit; the exit
is confident and the token is written, or the sequence waits; *deep* runs what is pending of all
that wait, segment by segment, and asks the next exits, at last the LM head. *Full* depth: the next
token of each through all layers. Drafts: rounds of draft, then take or verify.

A token, once written, is final. Whatever runs when, each sequence gets what it would get alone:
which ones wait together changes the order of work, not its outcome.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import Any

from offramp.core.decoding.drafting import Draft, DraftBudget, Drafter
from offramp.core.decoding.executor import Executor, Span, too_long
from offramp.core.decoding.reader import Heads, PrefillBackend, Query, TokenSampler
from offramp.core.decoding.rule import VERIFIED, ExitRule, ExitVerdict
from offramp.core.decoding.scheduler import AT_ONCE, Call, Load, Schedule, Tally, due
from offramp.core.decoding.sequence import NAN, Sequence, Token
from offramp.core.errors import InputError

AHEAD = 32
"""Tokens that an executor feeds by itself, at most."""


@dataclass(eq=False)
class Decoder:
    """The sequences of one model, and the loop that writes their tokens. Used by one thread.

    layers: depth L of the full model. executor: runs the layers. heads: ask exits and the LM head.
    drafter: writes drafts; None: nothing is drafted. schedule: when the deep layers run. longest:
    pending columns of a sequence, at most; None: any number. sequences: those that are being
    written. tally: counts of what the exits did.
    """

    layers: int
    executor: Executor
    heads: Heads
    drafter: Drafter | None = None
    schedule: Schedule = AT_ONCE
    longest: int | None = None
    sequences: list[Sequence] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)

    # -- sequences ---------------------------------------------------------------------------

    def read(
        self,
        reader: PrefillBackend,
        prepared: Any,
        samplers: Many[TokenSampler],
        rule: ExitRule,
        *,
        later: bool = False,
    ) -> tuple[Any, list[Token | None]]:
        """Read a prompt of one or more rows, and choose each row's first token: a draft where the
        prompt waits to be verified, None where the token is written later.

        later: whether the first token may be drafted after this call, or written by `begin`.
        """
        opening = rule.opening
        said: list[Token | None] = [None] * len(samplers)
        scores = [NAN] * len(samplers)
        queries = [Query(sampler, opening, ()) for sampler in samplers]

        def decide(depth: int, output: Any) -> bool:
            asked = [
                query if token is None else None for query, token in zip(queries, said, strict=True)
            ]
            for row, verdict in enumerate(self.heads.verdicts(depth, output, asked)):
                if isinstance(verdict, Exception):
                    raise verdict
                if verdict is not None:
                    scores[row] = verdict.score
                    if opening.exits(depth, verdict):
                        said[row] = Token(verdict.token, depth, verdict.score)
            return None not in said

        drafter = self.drafter if rule.drafts else None
        prompt = reader.read(
            prepared,
            use_exits=rule.uses_exits,
            decide=decide if opening.thresholds else None,
            asks=frozenset(opening.thresholds),
            keep=None if drafter is None else drafter.keeps,
            waits=self.executor.opens,
            enters=later and rule.exiting and self.executor.opens,
        )
        if prompt.logits is not None:
            word = self.heads.of_logits(prompt.logits)
            for row, query in enumerate(queries):
                if said[row] is None or rule.drafts:
                    said[row] = Token(word(row, query), self.layers, scores[row])
        return prompt, said

    def join(
        self,
        prompt: Any,
        row: int,
        sampler: TokenSampler,
        rule: ExitRule,
        first: Token | None,
        owner: Any = None,
    ) -> Sequence:
        """Add a row of a prompt as a sequence; a first token that is known is given out at once.

        Raises:
            InputError: lossless mode, of a model whose states hold the whole text.
        """
        loaded = self.executor.load(prompt, row)
        if rule.drafts and not self.executor.allow_crops(loaded.handle):
            self.executor.release(loaded.handle)
            raise InputError(
                "Lossless decoding takes drafts back, and this model's recurrent states cannot be.",
                "Use a policy with lossless=False.",
            )
        sequence = Sequence.of(sampler, rule, loaded, owner)
        self.sequences.append(sequence)
        if rule.drafts and prompt.logits is None:
            sequence.opened = first
        elif first is not None:
            self._write(sequence, first)
        return sequence

    def leave(self, sequence: Sequence) -> None:
        """Forget a sequence; the last sequence takes its place, as in the executor's slots."""
        last = self.sequences.pop()
        if last is not sequence:
            self.sequences[self.sequences.index(sequence)] = last
        with self.heads.computing():
            self.executor.release(sequence.handle)

    # -- the loop ----------------------------------------------------------------------------

    def begin(self) -> None:
        """Run together, up to the first exit, all prompts that wait before the first layer."""
        rows = [row for row in self.sequences if row.ran[0] < row.start and row.active]
        if rows:
            with self.heads.computing():
                self._run(0, rows)

    def finish(self) -> None:
        """Write until every sequence is over. Raise the error of the first sequence that failed."""
        with self.heads.computing():
            while self.goes_on():
                self._make(self.next_call())

    def goes_on(self) -> bool:
        """Release finished sequences; return True if any goes on. Raise the error of a failed
        one."""
        for sequence in [*self.sequences]:
            if not sequence.active:
                self.leave(sequence)
                if sequence.error is not None:
                    raise sequence.error
        return bool(self.sequences)

    def next_call(self) -> Call:
        """Return the call that the schedule wants next."""
        rows = [row for row in self.sequences if row.rule.exiting and row.active]
        if not rows:
            return "full"
        if len(rows) == 1 and self.schedule.patience == 0:
            return "feed" if rows[0].ready(self.longest) else "deep"
        return self.schedule.next_call(Load.of(rows, self.longest))

    def make(self, call: Call) -> int:
        """Make a call, and return the number of tokens that ran."""
        with self.heads.computing():
            return self._make(call)

    def _make(self, call: Call) -> int:
        active = [row for row in self.sequences if row.active]
        exiting = [row for row in active if row.rule.exiting]
        if call == "deep":
            return self._deep(exiting)
        count = self._feed(exiting) if exiting else 0
        if len(exiting) == len(active):
            return count
        drafting = [row for row in active if row.rule.drafts]
        if drafting:
            assert self.drafter is not None
            count += self._round(self.drafter, drafting)
        plain = [row for row in active if not row.rule.uses_exits]
        return count + self._full(plain) if plain else count

    def _feed(self, rows: list[Sequence]) -> int:
        """Feed the next token of sequences that are ready up to the first exit."""
        ready = [row.ready(self.longest) for row in rows]
        for row, on in zip(rows, ready, strict=True):
            row.waited += not on
        if self.executor.rows == 1:  # else all go along: what is void is written again
            rows = [row for row, on in zip(rows, ready, strict=True) if on]
            ready = [True] * len(rows)
        if not rows:
            return 0
        depth = self.executor.depths[0]
        if self.executor.feed_on is not None and self._foresees(depth):
            return self._feed_on(depth, rows[0])
        queries = [
            row.query if on and depth in row.rule.thresholds else None
            for row, on in zip(rows, ready, strict=True)
        ]
        output = self.executor.feed(
            [row.handle for row in rows],
            [row.next_id for row in rows],
            [row.ran[0] for row in rows],
            needs_exit=any([query is not None for query in queries]),
        )
        verdicts = self.heads.verdicts(depth, output, queries)
        for row, on, verdict in zip(rows, ready, verdicts, strict=True):
            if on:
                row.ran[0] += 1
                exited = self._exits(row, depth, verdict)
                self.tally.exited += exited
                self.tally.waited += verdict is not None and not exited
        return len(rows)

    def _foresees(self, depth: int) -> bool:
        """Return True if the executor may feed what the exit at `depth` says: to one sequence, of
        which nobody is told before it ends, and which no criterion of its own ends."""
        row, *others = self.sequences
        alone = not others and self.longest is None
        return alone and row.sampler.foreseen and depth in row.rule.thresholds

    def _feed_on(self, depth: int, row: Sequence) -> int:
        """Feed the next token of a sequence and all that the exit is confident of, in one call; the
        exit's verdicts are looked at afterwards."""
        most = AHEAD
        while most > 1 and row.sampler.would_end(len(row.ids) + most - 1, -1):
            most -= 1
        budget = DraftBudget(most, row.rule.single[depth], row.sampler.ends)
        assert self.executor.feed_on is not None
        made = self.executor.feed_on(row.handle, row.next_id, budget)
        fed = row.ran[0] + len(made)
        for token, output in made:
            [verdict] = self.heads.verdicts(depth, output, [row.query])
            row.ran[0] += 1
            exited = self._exits(row, depth, verdict)
            self.tally.exited += exited
            self.tally.waited += verdict is not None and not exited
            if not exited or not row.active or row.next_id != token:
                break
        if row.ran[0] < fed:  # to rounding it was not confident
            self.executor.crop(row.handle, row.ran[0])
        return len(made)

    def _exits(self, row: Sequence, depth: int, verdict: ExitVerdict | Exception | None) -> bool:
        """Write the exit's token where the exit is confident enough; return True if it was."""
        if isinstance(verdict, Exception):
            row.error = verdict
        elif verdict is not None:
            if row.now.exits(depth, verdict):
                self._write(row, Token(verdict.token, depth, verdict.score))
                return True
            row.score = verdict.score
        return False

    def _deep(self, rows: list[Sequence]) -> int:
        """Run what is pending above the first exit, of the sequences whose turn it is: as far as
        their next token is not said."""
        rows, count = due(rows, self.longest), 0
        for row in rows:
            row.waited = 0
        for segment in range(1, len(self.executor.depths) + 1):
            here = [
                row
                for row in rows
                if row.pending(segment) > 0 and (segment == 1 or (row.waits and row.active))
            ]
            if here:
                count += self._run(segment, here)
        return count

    def _run(self, segment: int, rows: list[Sequence]) -> int:
        """Run a segment over what is pending before it of each sequence, and ask what stands at its
        end for the next token of those that wait."""
        last = segment == len(self.executor.depths)
        depth = self.layers if last else self.executor.depths[segment]
        spans, asked, asking, count = list[Span](), list[int](), list[Sequence](), 0
        for row in rows:
            end = row.ran[segment - 1] if segment else row.start
            span = Span(row.handle, row.ran[segment], end)
            spans.append(span)
            count += span.end - span.first
            if (row.waits or not segment) and (last or depth in row.now.thresholds):
                asked.append(count - 1)  # of the column that was fed last
                asking.append(row)
        output = self.executor.run(segment, spans, asked)
        for row, span in zip(rows, spans, strict=True):
            row.ran[segment] = span.end
        if last and asking:
            self._say(asking, output)
        elif asking:
            queries = [row.query for row in asking]
            verdicts = self.heads.verdicts(depth, output, queries)
            for row, verdict in zip(asking, verdicts, strict=True):
                self._exits(row, depth, verdict)
        return count

    def _full(self, rows: list[Sequence]) -> int:
        """Feed the next token of sequences, of which nothing is pending, through all layers."""
        handles, columns = [row.handle for row in rows], [row.ran[0] for row in rows]
        output = self.executor.full(handles, [row.next_id for row in rows], columns)
        for row in rows:
            row.ran = [column + 1 for column in row.ran]
        self._say(rows, output)
        return len(rows)

    def _say(self, rows: list[Sequence], output: Any) -> None:
        """Write what the full model says next in each sequence."""
        word = self.heads.words(output)
        for place, row in enumerate(rows):
            try:
                token = word(place, row.query)
            except Exception as error:  # of the row's own rules: its request alone fails
                row.error = error
                continue
            self._write(row, Token(token, self.layers, row.score))

    # -- a round of drafts ---------------------------------------------------------------------

    def _round(self, drafter: Drafter, rows: Many[Sequence]) -> int:
        """Draft on from the newest token of each sequence. Take the drafts that are trusted; verify
        all others in one call, and keep those that are the full model's own tokens. The deep layers
        of a prompt that waits for them run in the same call."""
        share = self._share(len(rows))
        made = drafter.draft(rows, [self._budget(row, drafter.depth, share) for row in rows])
        both = zip(rows, made, strict=True)
        left = [(row, draft) for row, draft in both if not self._take(row, draft, drafter.depth)]
        if not left:
            return 0
        word = self.heads.words(drafter.verify(*zip(*left, strict=True)))
        count = 0
        for row, (fed, said, _) in left:
            kept, verified = 0, len(fed) + (not row.ids)
            for place in range(verified):
                if not row.active:
                    break
                try:
                    token = word(count + place, row.query)
                except Exception as error:  # of the row's own rules: its request alone fails
                    row.error = error
                    break
                right = place < len(said) and said[place] == token
                # A first token counts as the full model's, and by trust what was verified.
                drafted = right and row.ids and row.rule.trust == VERIFIED
                self._write(row, Token(token, drafter.depth if drafted else self.layers))
                kept += right
                if not right:
                    break
            self._accept(row, len(said), kept)
            count += verified
        return count

    def _take(self, row: Sequence, draft: Draft, depth: int) -> bool:
        """Write drafts that end an answer, and are trusted; return True if they were. What else
        than the largest logit chooses tokens, or ends answers, is between full model and row."""
        said, sampler = draft.said, row.sampler
        if row.rule.trust == VERIFIED or not (said and sampler.free and sampler.ends(said[-1])):
            return False
        row.offers.append((draft.product, (*row.ids, *said)))
        taken = row.rule.takes(draft.product)
        for token in said if taken and row.active else ():
            self._write(row, Token(token, depth, draft.product))
        return taken

    def _accept(self, row: Sequence, drafted: int, kept: int) -> None:
        """Forget what was drafted beyond the tokens that stand."""
        verified = row.start + len(row.ids) - 1
        row.ran = [verified] * len(row.ran)
        self.executor.crop(row.handle, verified)
        most = row.rule.max_drafts
        row.rounds.append((min(drafted, most), min(kept, most)))
        self.tally.drafted += min(drafted, most)
        self.tally.accepted += min(kept, most)

    def _share(self, rows: int) -> int | None:
        """Return how many drafts of each of several sequences a verifying call has free rows for;
        None: as many as their rules allow."""
        free = self.executor.free_rows
        return None if free is None or rows == 1 else max(0, free // rows - 1)

    def _budget(self, row: Sequence, depth: int, share: int | None) -> DraftBudget:
        """Return the most tokens that a round may draft before the answer reaches its longest.
        share: of the free rows; what a trust may take unverified needs none."""
        most = row.rule.max_drafts
        if share is not None and row.rule.trust == VERIFIED:
            most = min(most, share)
        if self.executor.positions is not None:
            most = min(most, self.executor.positions - row.ran[0] - 1)
        while most > 0 and row.sampler.would_end(len(row.ids) + most, -1):
            most -= 1
        return DraftBudget(max(0, most), row.rule.thresholds[depth], row.sampler.ends)

    # -- tokens ----------------------------------------------------------------------------------

    def _write(self, row: Sequence, token: Token) -> None:
        """Append the next token of a sequence and give it out."""
        row.write(token)
        try:
            row.over = row.sampler.emit(row.ids, len(row.ids) - 1, token.depth, token.score)
            limit = self.executor.positions
            if limit is not None and not row.over and row.start + len(row.ids) > limit:
                row.error = too_long(limit)
        except Exception as error:  # of whoever is told, or a criterion: its request alone fails
            row.error = error
