"""What the calls of a batch engine take on this machine, by how many tokens they are over."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np
import torch

from offramp.engine.decoding.executor import Span
from offramp.engine.decoding.prompt import PromptReader
from offramp.engine.decoding.rule import NO_EXITS, ExitRule
from offramp.engine.decoding.sampler import Sampler
from offramp.engine.decoding.sequence import Sequence as DecodedSequence
from offramp.engine.policy import ExitPolicy
from offramp.errors import InputError
from offramp.models.backbone import Backbone
from offramp.models.exits import ExitSet
from offramp.serving.core import EngineCore
from offramp.serving.engine_config import EngineConfig

TOKENS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
"""Tokens of a call for which costs are measured."""

IN_A_ROW = 4
"""Calls that feed between two of another kind."""

Table = tuple[tuple[int, float], ...]
"""(tokens, seconds), ascending."""


@dataclass(frozen=True)
class CallCosts:
    """Seconds of the calls, by tokens.

    slots, context: rows at once, and columns in their slots, when they were measured. feed: a
    token of each of n rows up to the exit, its look and the choice included. deep: n pending states
    through the layers above. head: the LM head and the choice over n questions of a deep call.
    full: a token of each of n rows through everything. read: a prompt.
    """

    slots: int
    context: int
    feed: Table
    deep: Table
    head: Table
    full: Table
    read: float

    @classmethod
    def median(cls, found: Sequence[CallCosts]) -> CallCosts:
        """Of the same calls, measured several times."""
        feed, deep, head, full = (
            tuple((sizes[0][0], median(s for _, s in sizes)) for sizes in zip(*tables, strict=True))
            for tables in zip(
                *((one.feed, one.deep, one.head, one.full) for one in found), strict=True
            )
        )
        first, read = found[0], median(one.read for one in found)
        return cls(first.slots, first.context, feed, deep, head, full, read)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def seconds(table: Table, tokens: float) -> float:
    """What a call over so many tokens takes: linear between those measured, and beyond."""
    n, s = zip(*table, strict=True)
    slope = max(0.0, (s[-1] - s[-2]) / (n[-1] - n[-2])) if len(n) > 1 else 0.0
    return float(np.interp(tokens, n, s) + slope * max(0.0, tokens - n[-1]))


def engine_policy(exits: ExitSet) -> ExitPolicy:
    """Of every run: one exit, and first tokens of the full model, as the simulator has them."""
    shortlist = exits.shortlist is not None
    return ExitPolicy({exits.depths[0]: 0.5}, shortlist=shortlist, exit_in_prefill=False)


def measure_calls(
    backbone: Backbone,
    exits: ExitSet,
    inputs: Mapping[str, Any],
    config: EngineConfig,
    *,
    answer: int = 0,
    repeats: int = 2,
    most: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> CallCosts:
    """Time the calls of an engine of that kind, the prompt `inputs` in every slot; medians.

    answer: tokens that stand between the prompt and a call. repeats: of each call. most: tokens of
    the largest deep call; None: eight for each slot, from 8 to 64. clock: returns seconds.

    Raises:
        InputError: a model whose states cannot be taken back.
    """
    slots = config.slots
    most = most or max(8, min(TOKENS[-1], 8 * slots))
    wide = [n for n in TOKENS if n <= most]
    narrow = sorted({n for n in TOKENS if n < slots} | {slots})
    timer = _Timer(backbone, exits, config, clock)
    read = timer.read(inputs, slots, answer)
    sizes = {"feed": narrow, "deep": wide, "head": wide, "full": narrow}
    return CallCosts(slots, timer.context, read=read, **timer.tables(sizes, repeats))


class _Endless(Sampler):
    """Of answers that no end token ends."""

    def would_end(self, tokens: int, last: int) -> bool:
        return self.most is not None and tokens >= self.most


class _Timer:
    """Makes calls as a decoder makes them, on sequences that stay where they are.

    context: columns before them.
    """

    def __init__(
        self,
        backbone: Backbone,
        exits: ExitSet,
        config: EngineConfig,
        clock: Callable[[], float],
    ) -> None:
        core = EngineCore(backbone, exits, engine_policy(exits), config)
        self._backbone, self._decoder, self._clock = backbone, core.decoder, clock
        self._reader = PromptReader(backbone, exits, core.depths)
        self._executor = self._decoder.executor
        self._kept: list[DecodedSequence] = []
        self._rule = ExitRule(
            dict.fromkeys(core.depths, 0.5), guesses=dict.fromkeys(core.depths, 0.0), first={}
        )
        self.context = 0
        self._sync: Callable[[], None] = (
            torch.cuda.synchronize if backbone.device.type == "cuda" else lambda: None
        )

    def read(self, inputs: Mapping[str, Any], slots: int, answer: int) -> float:
        """Fill all slots, and write `answer` tokens behind the prompts; seconds of a prompt."""
        took, decoder, reader = [], self._decoder, self._reader
        options = {"max_new_tokens": answer + 2 * TOKENS[-1], "do_sample": False}
        for _ in range(slots):
            begin = self._now()
            prepared = reader.prepare(inputs, options)
            sampler = _Endless(prepared)
            prompt, [first] = decoder.read(reader, prepared, [sampler], self._rule)
            with torch.inference_mode():
                self._kept.append(decoder.join(prompt, 0, sampler, self._rule, first))
            took.append(self._now() - begin)
        if self._kept[0].rule.guesses is None:
            raise InputError(
                "Costs are measured of calls that are made again and again, and this model's "
                "recurrent states cannot be taken back.",
                "Measure its speed whole: offramp-lab bench without --batch-engine.",
            )
        for _ in range(answer):
            decoder.make("full")
        self.context = self._kept[0].ran[0]
        return median(took)

    def tables(self, sizes: Mapping[str, Sequence[int]], repeats: int) -> dict[str, Table]:
        """Seconds of each kind of call for each of its sizes; a larger call is never cheaper.

        Kinds take turns, and calls that feed come several in a row, as in an engine: each finds the
        processor's cache as the others leave it.
        """
        took: dict[tuple[str, int], list[float]] = {(k, n): [] for k in sizes for n in sizes[k]}
        with torch.inference_mode():
            for turn in range(repeats + 1):
                for kind, n in random.Random(turn).sample(list(took), len(took)):
                    seconds = getattr(self, kind)(n)
                    if turn:  # the first one warms up
                        took[kind, n].append(seconds)
        tables: dict[str, Table] = {}
        for kind, of in sizes.items():
            rising = np.maximum.accumulate([median(took[kind, n]) for n in of])
            tables[kind] = tuple(zip(of, rising.tolist(), strict=True))
        return tables

    def feed(self, rows: int) -> float:
        """Seconds of feeding a token of each of so many sequences."""
        self._sit(rows, self._rule)
        begin = self._now()
        for _ in range(IN_A_ROW):
            self._decoder.feed()
        took = (self._now() - begin) / IN_A_ROW
        self._decoder.deep(flush=True)  # nothing is left waiting
        return took

    def full(self, rows: int) -> float:
        """The same through all layers, without exits."""
        # A stack's caches grow together; what slots do not write is written again.
        self._sit(rows, self._rule if self._executor.rows == 1 else NO_EXITS)
        begin = self._now()
        self._decoder.full(self._decoder.sequences)
        return self._now() - begin

    def deep(self, tokens: int) -> float:
        """Seconds of the layers above the first exit over so many tokens that wait."""
        rows = min(tokens, len(self._kept))
        shares = [tokens // rows + (row < tokens % rows) for row in range(rows)]
        sitting = self._sit(rows, self._rule)
        for n in range(shares[0]):
            self._decoder.sequences[:] = [
                one for one, share in zip(sitting, shares, strict=True) if share > n
            ]
            self._decoder.feed()
        spans = [Span(one.handle, self.context, one.ran[0]) for one in sitting]
        looks = self._decoder.reader.looks(())
        last = len(self._decoder.depths)
        begin = self._now()
        for segment in range(1, last):
            self._executor.run(segment, spans, (), looks)
        final = self._executor.run(last, spans, range(tokens), looks)
        assert isinstance(final, torch.Tensor)
        float(final[0, 0])
        return self._now() - begin

    def head(self, tokens: int) -> float:
        """Seconds of the LM head and the choice over so many tokens."""
        backbone = self._backbone
        states = torch.ones(tokens, backbone.width, dtype=backbone.dtype, device=backbone.device)
        begin = self._now()
        backbone.logits(states).argmax(-1).tolist()
        return self._now() - begin

    def _sit(self, rows: int, rule: ExitRule) -> list[DecodedSequence]:
        """Let the first `rows` sequences alone be there, with nothing behind the context."""
        sitting = []
        for kept in self._kept[:rows]:
            self._executor.crop(kept.handle, self.context)
            ran, first = [self.context] * len(kept.ran), kept.tokens[0]
            sequence = DecodedSequence(
                kept.sampler, rule, kept.handle, self.context, ran, first, kept.layers
            )
            sequence.settle()  # the first token was given out
            sitting.append(sequence)
        self._decoder.sequences[:] = sitting
        return sitting

    def _now(self) -> float:
        self._sync()
        return self._clock()
