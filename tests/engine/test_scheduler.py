"""Laws of the schedule: which call is next, as the sequences stand."""

from __future__ import annotations

import pytest

from offramp.engine.decoding.scheduler import Load, Schedule
from offramp.errors import InputError


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
