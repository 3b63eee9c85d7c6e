"""Laws of answering many examples: each once, all of them, however often it was cut off."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from fakes import Blip2FakeProcessor, examples

from offramp.adapter.adapter import Adapter
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.decoding.scheduler import Schedule
from offramp.core.errors import DataError, InputError
from offramp.features.input_processor import InputProcessor
from offramp.serving.batch_engine import BatchEngine
from offramp.serving.engine_config import EngineConfig
from offramp.serving.offline import write_answers

NAME = "blip2-opt"


@pytest.fixture
def engine(backbone, exits):
    adapter = Adapter(backbone(NAME), exits(NAME), ExitPolicy({2: 0.05}))
    processor = InputProcessor(adapter.backbone, Blip2FakeProcessor(NAME))
    config = EngineConfig(slots=2, limit=64, schedule=Schedule.of(2))
    with BatchEngine(adapter, processor, config) as running:
        yield running


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_examples_are_taken_as_places_are_free(engine):
    taken = []

    def endless():
        for example in examples(1000):
            taken.append(example.key)
            yield example

    found = engine.map(endless(), ahead=3, max_new_tokens=3)
    done = [next(found)[0].key for _ in range(5)]
    assert len(set(done)) == 5
    assert len(taken) <= 5 + 3
    found.close()
    assert engine.drain(timeout=60)


def test_a_run_goes_on_from_what_an_earlier_one_wrote(engine, tmp_path):
    out, some = tmp_path / "answers.jsonl", examples(5)
    first = write_answers(engine, some[:3], out, max_new_tokens=4)
    assert (first.answered, first.skipped, first.failed) == (3, 0, 0)
    with out.open("a") as file:
        file.write('{"key": "e3", "ans')  # cut off in mid-line
    again = write_answers(engine, some, out, max_new_tokens=4)
    assert (again.answered, again.skipped, again.failed) == (2, 3, 0)
    assert sorted(row["key"] for row in lines(out)) == [e.key for e in some]
    for row, example in zip(sorted(lines(out), key=lambda r: r["key"]), some, strict=True):
        alone = engine.submit(example, max_new_tokens=4).result().output
        assert row["answer"] == engine.processor.texts(alone.new_tokens)[0]
        assert row["tokens"] == 4


def test_what_failed_is_noted_and_asked_again(engine, tmp_path):
    out, some = tmp_path / "answers.jsonl", examples(3)
    file = tmp_path / "late.png"
    late = replace(some[1], image=file)
    first = write_answers(engine, [some[0], late, some[2]], out, max_new_tokens=3)
    assert (first.answered, first.failed) == (2, 1)
    assert [row["key"] for row in lines(out) if "error" in row] == [late.key]
    some[1].image.save(file)
    again = write_answers(engine, [some[0], late, some[2]], out, max_new_tokens=3)
    assert (again.answered, again.skipped, again.failed) == (1, 2, 0)


def test_two_examples_of_one_key_and_files_of_something_else_are_refused(engine, tmp_path):
    one = examples(1)[0]
    with pytest.raises(InputError, match="key"):
        write_answers(engine, [one, one], tmp_path / "new.jsonl", max_new_tokens=3)
    (tmp_path / "other.jsonl").write_text('{"loss": 1}\n')
    with pytest.raises(DataError, match="no answers"):
        write_answers(engine, [one], tmp_path / "other.jsonl", max_new_tokens=3)
