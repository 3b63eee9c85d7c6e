"""Laws of what records share: how their commands are asked, and how answers are kept."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from offramp.inputs.example import Example
from offramp_lab.records import record as module
from offramp_lab.records.record import Record, Some, Turns, asked


def given(monkeypatch: pytest.MonkeyPatch, *words: str, **options: Any) -> Any:
    monkeypatch.setattr(sys, "argv", ["record", *words])
    return asked("What is measured.", **options)


def test_an_option_takes_what_its_default_is(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {
        "rounds": 3,
        "load": 1.5,
        "shape": "opt",
        "sizes": (1, 2),
        "parts": Some("ab"),
        "no_compile": False,
        "out": Path("a.json"),
        "careful": None,
    }
    assert vars(given(monkeypatch, **options)) == options
    words = ["--rounds", "5", "--load", "2", "--shape", "t5", "--sizes", "4", "--parts", "b"]
    words += ["--no-compile", "--out", "b.json", "--careful", "exits"]
    told = vars(given(monkeypatch, *words, **options))
    assert told == {
        "rounds": 5,
        "load": 2.0,
        "shape": "t5",
        "sizes": [4],
        "parts": ["b"],
        "no_compile": True,
        "out": Path("b.json"),
        "careful": Path("exits"),
    }


def test_only_what_there_is_can_be_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        given(monkeypatch, "--parts", "c", parts=Some("ab"))
    assert "invalid choice: 'c'" in capsys.readouterr().err


def test_a_record_of_parts_makes_all_of_them_unless_some_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("RECORDS", "RUNS"):
        monkeypatch.setattr(module, name, tmp_path / name)
    made: list[tuple[str, int]] = []

    def part(name: str) -> Any:
        return lambda given: (made.append((name, given.rounds)), {"of": name})[1]

    parts, record = {name: part(name) for name in ("one", "two")}, Record("some")
    for words in ([], ["--parts", "two", "--rounds", "5"]):
        monkeypatch.setattr(sys, "argv", ["record", *words])
        record.run("What is measured.", parts, rounds=3)
    assert made == [("one", 3), ("two", 3), ("two", 5)]
    found = {"one": {"of": "one"}, "two": {"of": "two"}}
    assert found.items() <= record.read().items()


def test_a_part_tells_when_and_where_it_was_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On another machine, the others stay as the first one measured them."""
    for name in ("RECORDS", "RUNS"):
        monkeypatch.setattr(module, name, tmp_path / name)
    record = Record("some")
    parts = {name: partial(dict, of=name) for name in ("one", "two", "three")}
    for machine, some in ("Zen 4", ["one", "two"]), ("Zen 5", ["two", "three"]):
        monkeypatch.setattr(module, "generation", lambda _, machine=machine: machine)
        record.parts(parts, some)
    told = {name: origin["generation"] for name, origin in record.read()["origins"].items()}
    assert told == {"one": "Zen 4", "two": "Zen 5", "three": "Zen 5"}


def test_a_path_may_have_to_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert given(monkeypatch, "--file", "a", file=Path).file == Path("a")
    with pytest.raises(SystemExit):
        given(monkeypatch, file=Path)


def test_what_every_way_made_of_an_example_is_not_made_again(tmp_path: Path) -> None:
    examples = [Example(Image.new("RGB", (1, 1)), "", (), key) for key in "abc"]
    asked_for: list[tuple[str, str]] = []

    def way(name: str) -> Any:
        return lambda e: (asked_for.append((name, e.key)), name + e.key)[1]

    ways = {("one", "full"): way("1"), ("two", "full"): way("2")}
    first = Turns(tmp_path / "kept.jsonl").answers(ways, examples[:2], "")
    assert first == {("one", "full"): ["1a", "1b"], ("two", "full"): ["2a", "2b"]}
    asked_for.clear()
    again = dict(reversed(ways.items()))  # by name, in whatever order they come
    told = Turns(tmp_path / "kept.jsonl").answers(again, examples, "")
    assert told == {("two", "full"): ["2a", "2b", "2c"], ("one", "full"): ["1a", "1b", "1c"]}
    assert sorted(asked_for) == [("1", "a"), ("1", "c"), ("2", "a"), ("2", "c")]


def test_ways_that_came_later_take_a_turn_with_those_that_they_stand_beside(tmp_path: Path) -> None:
    example, turns = Example(Image.new("RGB", (1, 1)), "", (), "a"), Turns(tmp_path / "a.jsonl")
    numbers = iter(range(100))
    ways = {name: lambda _: next(numbers) for name in ("full", "early", "late")}
    some = {name: ways[name] for name in ("full", "early")}
    turns.take(some, example, ())
    first = turns.told(some, [example])
    turns.take({name: ways[name] for name in ("full", "late")}, example, ())
    turns.take(some, example, ())  # it is there
    assert turns.told(some, [example]) == first
    beside = turns.told(("full", "late"), [example])
    assert {*beside["full"], *beside["late"]} == {2, 3} and next(numbers) == 4
    assert Turns(tmp_path / "a.jsonl").told(("full", "late"), [example]) == beside
