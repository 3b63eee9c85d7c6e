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

from offramp.engine.slots.prompt import PromptReader
from offramp.errors import InputError
from offramp.serving.rows.row import Row
from offramp.serving.rows.rules import RowRules
from offramp.serving.rows.slot_batch import RowPolicy, Seat, SlotBatch

TOKENS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
"""Tokens of a call for which costs are measured."""

IN_A_ROW = {"shallow": 4}
"""Calls between two of another kind, where there are several."""

Table = tuple[tuple[int, float], ...]
"""(tokens, seconds), ascending."""


@dataclass(frozen=True)
class CallCosts:
    """Seconds of the calls, by tokens.

    slots, context: rows at once, and columns in their slots, when they were measured. shallow: a
    token of each of n rows up to the exit, its look and the choice included. deep: n pending states
    through the layers above. head: the LM head and the choice over n questions of a deep call.
    full: a token of each of n rows through everything. read: a prompt.
    """

    slots: int
    context: int
    shallow: Table
    deep: Table
    head: Table
    full: Table
    read: float

    @classmethod
    def median(cls, found: Sequence[CallCosts]) -> CallCosts:
        """Of the same calls, measured several times."""
        shallow, deep, head, full = (
            tuple((sizes[0][0], median(s for _, s in sizes)) for sizes in zip(*tables, strict=True))
            for tables in zip(
                *((one.shallow, one.deep, one.head, one.full) for one in found), strict=True
            )
        )
        first, read = found[0], median(one.read for one in found)
        return cls(first.slots, first.context, shallow, deep, head, full, read)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> CallCosts:
        """The costs that `to_json` wrote. Raise `InputError` where it did not."""
        try:
            shallow, deep, head, full = (
                tuple((int(n), float(s)) for n, s in value[name])
                for name in ("shallow", "deep", "head", "full")
            )
            slots, context, read = value["slots"], value["context"], value["read"]
            return cls(int(slots), int(context), shallow, deep, head, full, float(read))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"These are no call costs ({type(error).__name__}: {error}).",
                "Give what CallCosts.to_json wrote.",
            ) from error


def seconds(table: Table, tokens: float) -> float:
    """What a call over so many tokens takes: linear between those measured, and beyond."""
    n, s = zip(*table, strict=True)
    slope = max(0.0, (s[-1] - s[-2]) / (n[-1] - n[-2])) if len(n) > 1 else 0.0
    return float(np.interp(tokens, n, s) + slope * max(0.0, tokens - n[-1]))


def measure_calls(
    batch: SlotBatch,
    reader: PromptReader,
    inputs: Mapping[str, Any],
    *,
    repeats: int = 5,
    most: int = TOKENS[-1],
    answer: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> CallCosts:
    """Time the calls of an empty batch after the prompt `inputs` in every slot; medians.

    most: tokens of the largest deep call. answer: tokens that stand between the prompt and a call.
    clock: returns seconds.

    Raises:
        InputError: a batch with rows in it or without exits, or fewer than one repeat.
    """
    if batch.seats or not batch.depths or repeats < 1:
        raise InputError(
            f"Costs cannot be measured with {len(batch.seats)} rows seated, exits at "
            f"{list(batch.depths)} and {repeats} repeats.",
            "Use an empty batch with exits, and repeat at least once.",
        )
    timer = _Timer(batch, repeats, answer, clock)
    read = timer.read(reader, inputs)
    wide = [n for n in TOKENS if n <= most]
    narrow = sorted({n for n in TOKENS if n < batch.slots} | {batch.slots})
    try:
        tables = timer.tables({"shallow": narrow, "deep": wide, "head": wide, "full": narrow})
    finally:
        batch.seats.clear()
    return CallCosts(slots=batch.slots, context=timer.context, read=read, **tables)


def _rising(seconds: Sequence[float]) -> list[float]:
    return np.maximum.accumulate(seconds).tolist()  # type: ignore[no-any-return]


class _Timer:
    """Makes calls as a batch makes them, on rows that stay where they are.

    context: columns before them.
    """

    def __init__(
        self, batch: SlotBatch, repeats: int, answer: int, clock: Callable[[], float]
    ) -> None:
        self._batch, self._repeats, self._answer, self._clock = batch, repeats, answer, clock
        self._seats: list[Seat] = []
        self.context = 0
        self._sync: Callable[[], None] = (
            torch.cuda.synchronize if batch.backbone.device.type == "cuda" else lambda: None
        )

    def read(self, reader: PromptReader, inputs: Mapping[str, Any]) -> float:
        """Fill all slots; seconds of a prompt."""
        took = []
        options = {"max_new_tokens": TOKENS[-1], "do_sample": False}
        for _ in range(self._batch.slots):
            begin = self._now()
            prompt = reader.read(inputs, options, use_exits=True)
            self._batch.join(prompt, RowRules(prompt), RowPolicy())
            took.append(self._now() - begin)
        self._seats = list(self._batch.seats)
        self.context = self._seats[0].row.start + self._answer
        return median(took)

    def tables(self, sizes: Mapping[str, Sequence[int]]) -> dict[str, Table]:
        """Seconds of each kind of call for each of its sizes; a larger call is never cheaper.

        Kinds take turns, and shallow calls come several in a row, as in an engine: each finds the
        processor's cache as the others leave it.
        """
        took: dict[tuple[str, int], list[float]] = {(k, n): [] for k in sizes for n in sizes[k]}
        with torch.inference_mode():
            for turn in range(self._repeats + 1):
                for kind, n in random.Random(turn).sample(list(took), len(took)):
                    call, times = getattr(self, kind), IN_A_ROW.get(kind, 1)
                    begin = self._now()
                    for _ in range(times):
                        call(n)
                    if turn:  # the first one warms up
                        took[kind, n].append((self._now() - begin) / times)
        return {
            kind: tuple(zip(of, _rising([median(took[kind, n]) for n in of]), strict=True))
            for kind, of in sizes.items()
        }

    def shallow(self, rows: int) -> None:
        self._sit(rows, RowPolicy())
        self._batch.shallow()

    def full(self, rows: int) -> None:
        self._sit(rows, RowPolicy(guess=False))
        self._batch.full()

    def _sit(self, rows: int, policy: RowPolicy) -> None:
        """Let the first `rows` rows alone be there, with nothing pending."""
        self._batch.seats[:] = self._seats[:rows]
        for seat in self._batch.seats:
            seat.row, seat.policy = Row(self.context, seat.row.choices[0]), policy

    def deep(self, tokens: int) -> None:
        rows = min(tokens, self._batch.slots)
        shares = [tokens // rows + (row < tokens % rows) for row in range(rows)]
        slots = [row for row, share in enumerate(shares) for _ in range(share)]
        columns = [self.context + n for share in shares for n in range(share)]
        float(self._batch.runner.deep(self._states(tokens), slots, columns).final[0, 0])

    def head(self, tokens: int) -> None:
        self._batch.backbone.logits(self._states(tokens)).argmax(-1).tolist()

    def _now(self) -> float:
        self._sync()
        return self._clock()

    def _states(self, tokens: int) -> torch.Tensor:
        backbone = self._batch.backbone
        return torch.ones(tokens, backbone.width, dtype=backbone.dtype, device=backbone.device)
