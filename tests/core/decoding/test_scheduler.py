"""Laws of the schedule: which call is next, as the sequences stand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from offramp.core.decoding.scheduler import Load, Schedule, due
from offramp.core.errors import InputError


def load(**more):
    usual = {"ready": 4, "idle": 0, "oldest": 0, "waits": True}
    return Load(**{**usual, **more})


@pytest.mark.parametrize(
    ("rows", "patience", "call"),
    [
        (load(), 3, "feed"),
        (load(oldest=3), 3, "deep"),
        (load(ready=2, idle=2), 3, "deep"),
        (load(ready=0, idle=1), 3, "deep"),
        (load(), 0, "deep"),  # synchronous
        (load(waits=False), 0, "feed"),
    ],
)
def test_the_deep_layers_run_when_somebody_waited_long_enough(rows, patience, call):
    assert Schedule(patience, idle=2).next_call(rows) == call


@pytest.mark.parametrize(("patience", "idle"), [(-1, 2), (3, 0)])
def test_a_schedule_that_never_runs_is_refused(patience, idle):
    with pytest.raises(InputError, match="never runs"):
        Schedule(patience, idle)


@pytest.mark.parametrize(
    ("pending", "waits", "taken"),
    [
        ([4, 2, 1], [False] * 3, [4, 2]),
        ([3, 2, 1], [False] * 3, []),
        ([3, 2, 1], [False, False, True], [1]),
        ([4, 2, 1], [False, False, True], [4, 2, 1]),
    ],
)
def test_a_deep_call_takes_who_waits_and_once_one_is_full_who_is_half_full(
    pending: list[int], waits: list[bool], taken: list[int]
) -> None:
    def row(columns: int, waiting: bool) -> Any:
        return SimpleNamespace(waits=waiting, columns=columns, pending=lambda _: columns)

    rows = [row(*each) for each in zip(pending, waits, strict=True)]
    assert [it.columns for it in due(rows, 4)] == taken
    assert [it.waits for it in due(rows, None)] == [True] * sum(waits)
