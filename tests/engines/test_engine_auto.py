"""Laws of `engine="auto"`: the fastest way that keeps the answers, measured once where it pays."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from offramp.adapter.shipped import example_picture
from offramp.core.errors import InputError
from offramp.engines import AUTO, auto, loading
from offramp.engines.auto import Timed, Way, fastest
from offramp.engines.loading import load
from offramp.features.vision_engine import IN_BF16

HERE: dict[str, Any] = {
    "dtype": "float32",
    "quantized": "",
    "engine": "torch",
    "kernels": "plain",
    "vision": "torch",
    "device": "cpu",
    "parameters": "as loaded",
}
IN_LLAMA = {**HERE, "engine": "llama.cpp f16, exits f16, head f16", "kernels": None}
PLAIN = Timed("torch", "torch", 1.0, 0.13, HERE)
PACKED = Timed("packed", "onnxruntime", 1.5, 0.08, {**HERE, "kernels": "prepacked"})
LLAMA = Timed("llama.cpp", "onnxruntime", 3.0, 0.03, IN_LLAMA)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What was measured, of a cache folder of its own; tiny models are large enough."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(auto, "SMALLEST", 0)
    monkeypatch.setattr(auto, "_files", lambda *_: tmp_path / "gguf")
    names: list[str] = []

    def timed(load: Any, way: Way, expected: Any) -> tuple[Timed, Any]:
        names.append(way.engine)
        assert AUTO not in way
        found = {"torch": PLAIN, "packed": PACKED, "llama.cpp": LLAMA}
        if way.engine not in found:
            raise InputError("It cannot be compiled.", "Wait.")
        return replace(found[way.engine], vision=way.vision), [[1]]

    monkeypatch.setattr(auto, "_timed", timed)
    return names


OPEN = Way(AUTO, AUTO)


def settle(name: str, asked: Way = OPEN, *, together: bool = False, **how: Any) -> Way:
    """The way by which `load` opens a model, which is not opened."""
    ways: list[Way] = []

    def noted(found: Any, way: Way, *sizes: Any, **more: Any) -> Any:
        ways.append(way)
        return SimpleNamespace(adapter=SimpleNamespace(of_format=None))

    engine, vision, gguf = asked
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "_open", noted)
        sequences = 2 if together else 1
        load(name, engine=engine, vision=vision, gguf=gguf, sequences=sequences, **how)
    return ways[-1]


# -- which way -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "way"), [(1, PLAIN), (30, PACKED), (1000, LLAMA), (None, LLAMA)]
)
def test_the_least_seconds_of_loading_and_answering_decide(answers: int | None, way: Timed) -> None:
    assert fastest([PLAIN, PACKED, LLAMA], (), answers) is way


def test_a_way_whose_answers_are_others_is_never_taken() -> None:
    assert fastest([PLAIN, replace(LLAMA, why="some are others")], ()) is PLAIN


def test_a_promise_keeps_to_ways_under_its_conditions() -> None:
    in_torch, in_llama = ({"conditions": way.conditions} for way in (PLAIN, LLAMA))
    ways = [PLAIN, PACKED, LLAMA]
    assert fastest(ways, [in_torch]) is PACKED
    assert fastest(ways, [in_llama], 1) is LLAMA
    assert fastest(ways, [in_torch, in_llama]) is LLAMA
    assert fastest(ways, [{"conditions": {**HERE, "dtype": "bfloat16"}}]) is LLAMA  # none holds


def test_a_tower_that_rounds_is_taken_where_a_calibration_holds_for_it() -> None:
    """Or where it was asked for, as it is the first way's then."""
    rounded = replace(
        LLAMA, vision=IN_BF16, answer=0.01, conditions={**IN_LLAMA, "vision": IN_BF16}
    )
    in_llama, in_both = ({"conditions": way.conditions} for way in (LLAMA, rounded))
    assert fastest([PLAIN, LLAMA, rounded], []) is LLAMA
    assert fastest([PLAIN, LLAMA, rounded], [in_llama]) is LLAMA
    assert fastest([PLAIN, LLAMA, rounded], [in_llama, in_both]) is rounded
    assert fastest([replace(PLAIN, vision=IN_BF16), rounded], []) is rounded


def test_towers_that_round_are_measured_where_they_were_calibrated(
    measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not where another tower was asked for."""

    def counted(asked: Way) -> list[int]:
        measured.clear()
        settle("tiny-opt", asked)
        return [measured.count(name) for name in ("packed", "llama.cpp")]

    assert counted(OPEN) == [1, 1]
    then = {"conditions": {**IN_LLAMA, "vision": IN_BF16}}
    monkeypatch.setattr(auto, "calibrations", lambda config: [then])
    assert counted(OPEN) == [2, 2]  # what was found before it was calibrated is not taken
    assert counted(Way(AUTO, "torch")) == [1, 1]


# -- when it is measured ---------------------------------------------------------------------------


def test_it_is_measured_once_and_remembered(
    measured: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "offramp"):
        first = settle("tiny-opt")
    assert measured[0] == "torch" and measured.count("packed") == 1
    said = [record.message for record in caplog.records if record.message.startswith("engine: ")]
    assert len(said) == 1 and "130" in said[0]
    count = len(measured)
    assert settle("tiny-opt") == first
    assert settle("tiny-opt", answers=1) == Way("torch")  # what is known is used at once
    assert len(measured) == count


def test_what_was_measured_is_shown_and_forgotten_by_a_command(
    measured: list[str], run: Any
) -> None:
    settle("tiny-opt")
    shown = json.loads(run("env", "--json")[1])["engines"]
    assert len(shown) == 1 and "CPU ms an answer" in shown[0]
    assert json.loads(run("env", "forget", "--json")[1])["engines"] == []
    count = len(measured)
    settle("tiny-opt")
    assert len(measured) > count


def test_a_command_measures_what_it_would_load(
    measured: list[str], run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "FEW", 0)
    monkeypatch.setattr(auto, "fastest", lambda ways, *_: ways[0])
    picture = example_picture("tiny-opt")
    code, out, err = run("generate", "tiny-opt", "--image", picture, "--prompt", "Caption:")
    assert (code, bool(out)) == (0, True), err
    assert measured[0] == "torch" and "packed" in measured


@pytest.mark.parametrize("threads", [None, 2])
def test_what_is_timed_is_opened_as_what_answers(
    threads: int | None, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same road, sizes and threads: the law of `auto`."""
    calls: list[Any] = []
    real = loading._open

    def noted(found: Any, way: Way, *sizes: Any, **more: Any) -> Any:
        calls.append((way, sizes, more))
        return real(found, Way("torch"), *sizes, **more)

    def timed(opened: Any, way: Way, expected: Any) -> tuple[Timed, Any]:
        opened(way)
        found = {"torch": PLAIN, "packed": PACKED}.get(way.engine)
        return (found or replace(PLAIN, why="slow")), [[1]]

    monkeypatch.setattr(loading, "_open", noted)
    monkeypatch.setattr(auto, "_timed", timed)
    load("tiny-opt", threads=threads)
    *trials, (way, sizes, more) = calls
    assert way.engine == "packed" and {each[0].engine for each in trials} > {"torch", "packed"}
    assert all(each[1:] == (sizes, more) for each in trials)


def test_few_answers_are_written_by_pytorch_and_nothing_is_measured(measured: list[str]) -> None:
    assert settle("tiny-opt", answers=auto.FEW - 1) == Way("torch")
    assert not measured
    settle("tiny-opt", answers=auto.FEW)
    assert measured


def test_a_damaged_record_is_measured_again(measured: list[str], tmp_path: Path) -> None:
    first = settle("tiny-opt")
    [file] = (tmp_path / "offramp" / "engines").iterdir()
    for text in ("{", "[]", '{"ways": []}', '{"ways": [{"engine": "torch"}]}'):
        file.write_text(text)
        count = len(measured)
        assert settle("tiny-opt") == first
        assert len(measured) > count


def test_where_nothing_can_be_kept_it_is_measured_each_time(
    measured: list[str], tmp_path: Path
) -> None:
    (tmp_path / "offramp").write_text("no folder")
    first = settle("tiny-opt")
    assert settle("tiny-opt") == first and measured.count("packed") == 2


def test_without_a_home_pytorch_answers(
    measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless(name: str) -> Path:
        raise RuntimeError("HOME is no absolute path")

    monkeypatch.setattr(auto, "cache_folder", homeless)
    assert settle("tiny-opt") == Way("torch") and not measured


def test_another_machine_version_or_model_is_measured_by_itself(
    measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settle("tiny-opt")
    for change in ("processor", "version_of"):
        count = len(measured)
        with monkeypatch.context() as patch:
            patch.setattr(f"offramp.engines.auto.{change}", lambda *_: "another")
            settle("tiny-opt")
        assert len(measured) > count
    for other in ({"dtype": "bfloat16"}, {"threads": 3}):
        count = len(measured)
        settle("tiny-opt", **other)
        assert len(measured) > count


def test_what_was_found_is_shown_by_a_command(measured: list[str], run: Any) -> None:
    settle("tiny-opt", threads=3)
    code, out, err = run("env", "--json")
    assert code == 0, err
    [line] = json.loads(out)["engines"]
    assert line.startswith("offramp/tiny-opt, threads 3: llama.cpp in f16") and "130" in line


def test_several_at_a_time_are_not_compiled(measured: list[str]) -> None:
    settle("tiny-opt", together=True)
    assert "compiled" not in measured


@pytest.mark.parametrize("how", [{"quantize": "int8"}, {"device": "cuda"}], ids=str)
def test_elsewhere_pytorch_answers(measured: list[str], how: dict[str, str]) -> None:
    assert settle("tiny-opt", **how) == Way("torch")
    assert not measured


def test_tiny_and_large_models_and_such_without_exits_stay_in_pytorch(
    measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert settle("tiny-t5") == Way("torch")
    monkeypatch.setattr(auto, "LARGEST", 1)
    assert settle("tiny-opt") == Way("torch")
    monkeypatch.undo()
    assert settle("tiny-opt") == Way("torch")
    assert not measured


@pytest.mark.parametrize(
    ("asked", "way"),
    [
        (("packed",), Way("packed")),
        (("packed", "onnxruntime"), Way("packed", "onnxruntime")),
        ((AUTO, AUTO, "folder"), Way("llama.cpp", gguf="folder")),
    ],
)
def test_what_is_named_is_taken(measured: list[str], asked: tuple[str, ...], way: Way) -> None:
    assert settle("tiny-opt", Way(*asked)) == way
    assert not measured


# -- for once without fakes ------------------------------------------------------------------------


@pytest.mark.slow
def test_answers_are_those_of_pytorch(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    monkeypatch.setattr(auto, "SMALLEST", 0)
    monkeypatch.setattr(auto, "_tower", lambda vision: "torch")
    picture = example_picture("tiny-opt")
    plain = load("tiny-opt", engine="torch").answer(picture, "Caption:", max_new_tokens=8)
    chosen = load("tiny-opt", sequences=2)
    assert chosen.answer(picture, "Caption:", max_new_tokens=8) == plain
    [file] = (own_cache / "engines").iterdir()
    found = auto._read(file)
    assert found is not None
    ways = found.ways
    assert [way.engine for way in ways] == ["torch", "packed", "llama.cpp"]
    assert all(way.why or way.answer > 0 for way in ways)


@pytest.mark.slow
@pytest.mark.llama_cpp
def test_files_that_were_cut_off_are_written_again(own_cache: Path) -> None:
    """Nobody asked for them by name, so nobody is told to export them."""

    def ready(way: Way) -> Any:
        return load("tiny-opt", engine=way.engine, vision=way.vision, gguf=way.gguf)

    folder = auto._files(ready, "model")
    for name in ("segment-1.gguf", "digests.json"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
        assert auto._files(ready, "model") == folder
        assert (folder / name).read_bytes() == whole
    assert ready(Way("llama.cpp", gguf=folder)).answer(example_picture("tiny-opt"), "Caption:")


def test_threads_are_measured_by_themselves(
    measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settle("tiny-opt")
    count, threads = len(measured), torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    settle("tiny-opt")
    assert len(measured) > count


@pytest.mark.slow
def test_a_way_with_another_answer_is_found_out() -> None:
    loaded = load("tiny-opt", engine="torch")
    found, told = auto._tried(loaded, "torch", 0.0, None)
    assert not found.why and found.answer > 0
    assert not auto._tried(loaded, "torch", 0.0, told)[0].why
    assert "others than PyTorch's" in auto._tried(loaded, "torch", 0.0, [*told[:-1], [7]])[0].why
