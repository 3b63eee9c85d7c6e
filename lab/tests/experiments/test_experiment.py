"""Methods take turns, a record is written in one way, and what was found is not asked for again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from offramp.core.storage import read_json
from offramp.evaluation.timing import in_turn
from offramp_lab.experiments.experiment import same, spent
from offramp_lab.records import record as module
from offramp_lab.records.record import Kept, Record

Method = Callable[[int], int]


def noting(calls: list[tuple[str, int]], name: str) -> Method:
    def method(given: int) -> int:
        calls.append((name, given))
        return len(name) * given

    return method


def test_all_answer_an_input_before_the_next_one_in_an_order_that_is_drawn_anew() -> None:
    calls: list[tuple[str, int]] = []
    methods = {name: noting(calls, name) for name in ("a", "bb", "ccc")}
    found = in_turn(methods, [1, 2, 3, 4], rounds=3, warm=1)
    assert calls[:3] == [("a", 1), ("bb", 1), ("ccc", 1)]  # which does not count
    turns = [calls[i : i + 3] for i in range(3, len(calls), 3)]
    assert [{given for _, given in turn} for turn in turns] == [{1}, {2}, {3}, {4}] * 3
    assert all({name for name, _ in turn} == set(methods) for turn in turns)
    assert len({tuple(name for name, _ in turn) for turn in turns}) > 2
    assert found == {name: [[len(name) * i for i in range(1, 5)]] * 3 for name in methods}


def test_what_a_method_takes_is_of_the_cpu() -> None:
    found, seconds = spent(lambda n: sum(range(n)))(100_000)
    assert found == sum(range(100_000)) and 0 < seconds < 10


def test_answers_are_the_same_by_their_tokens() -> None:
    class Answer:
        ids = (1, 2)

    assert same([(1, 2), (3,)], [Answer(), (4,)]) == 1
    with pytest.raises(ValueError, match="shorter"):
        same([(1,)], [])


def test_a_record_is_put_together_from_the_parts_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RECORDS", "RUNS"):
        monkeypatch.setattr(module, name, tmp_path / name)
    asked: list[str] = []

    def made(name: str) -> Callable[[], list[str]]:
        return lambda: asked.append(name) or [name]  # type: ignore[func-returns-value]

    record, parts = Record("some"), {name: made(name) for name in ("one", "two", "three")}
    record.parts(parts, ["two"])
    assert list(record.read()) == ["two", "origins", "provenance"]
    record.parts(parts, ["one"])
    found = read_json(record.path)
    assert asked == ["two", "one"] and list(found) == ["one", "two", "origins", "provenance"]
    assert found["provenance"]["command"] == "offramp_lab.records.some"
    for file in (tmp_path / "RUNS" / "some").iterdir():  # as in another checkout
        file.unlink()
    record.parts(parts, ["three"])
    assert list(record.read()) == ["one", "two", "three", "origins", "provenance"]


def test_a_first_finding_stays(tmp_path: Path) -> None:
    Kept(tmp_path / "0.jsonl").keep("a", [1])
    kept = Kept(tmp_path / "0.jsonl")
    assert "a" in kept and "b" not in kept
    kept.keep("a", [2])
    kept.keep("b", None)
    assert Kept(tmp_path / "0.jsonl").found == {"a": [1], "b": None}
