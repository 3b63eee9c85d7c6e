"""A bar on a terminal; elsewhere a line every tenth of a long job, and nothing of a short one."""

from __future__ import annotations

import logging

import pytest

from offramp.common import progress as module
from offramp.common.progress import duration, progress, progress_bar


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(module, "_on_a_terminal", lambda: False)
    caplog.set_level(logging.INFO)
    return caplog.messages


def test_a_long_job_tells_every_tenth(
    lines: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "LONG", 0.0)
    assert list(progress(range(40), "work")) == list(range(40))
    told = [m for m in caplog.messages if not m.startswith("work: 0 of 40")]
    assert [int(m.split()[1]) for m in told] == [4, 8, 12, 16, 20, 24, 28, 32, 36, 40]
    assert all("of 40 after" in m and "left" in m for m in told)


def test_a_job_within_a_job_tells_lines_alone(
    lines: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "LONG", 0.0)
    for _ in progress(range(2), "outer"):
        list(progress(range(3), "inner"))
    assert all("after" in m and "\x1b" not in m for m in caplog.messages)


def test_steps_that_the_caller_counts_are_told_too(
    lines: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "LONG", 0.0)
    with progress_bar("train", total=20, done=10) as bar:
        for _ in range(10):
            bar.set_postfix(best="0.9", refresh=False)
            bar.update()
    numbers = [int(m.split()[1]) for m in caplog.messages]
    assert numbers[-1] == 20 and len(set(numbers)) <= 6


def test_a_short_job_and_a_quiet_one_tell_nothing(
    lines: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert sum(progress(range(10), "work")) == 45
    monkeypatch.setattr(module, "LONG", 0.0)
    assert sum(progress(range(10), "work", tell=False)) == 45
    logging.getLogger("offramp").setLevel(logging.WARNING)
    try:
        assert sum(progress(range(10), "work")) == 45
    finally:
        logging.getLogger("offramp").setLevel(logging.NOTSET)
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "1 second"), (40, "40 seconds"), (200, "3 minutes"), (9000, "2 hours")],
)
def test_a_duration_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words
