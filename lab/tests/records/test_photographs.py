"""What records of photographs time are answers, each way opened by its name."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gguf_cases import adapter_of, inputs_of
from offramp_photo import exits_folder
from PIL import Image

from offramp.adapter.records import calibrations
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.save_and_load import read_config
from offramp.inputs.example import Example
from offramp.promises.conditions import Conditions, differences
from offramp_lab.experiments.factors import NAMED, Measured
from offramp_lab.records.photographs import end_to_end, opened, runtimes, trust
from offramp_lab.records.photographs.opened import PLAIN, TORCH, TOWER, Opened
from offramp_lab.records.photographs.told import speeds

NAME = "llava"
EXAMPLES = [Example(Image.new("RGB", (1, 1)), "", (), str(seed)) for seed in range(3)]


@pytest.fixture
def ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Opened:
    """Of a tiny model with two exits, in the photo model's place."""
    encoder: Any = SimpleNamespace(
        eos=None,  # tiny models never end
        prompts=lambda examples: inputs_of(NAME, int(examples[0].key)),
    )
    monkeypatch.setattr(runtimes, "FORMATS", ("f32",))
    monkeypatch.setattr(opened, "photo_exits", lambda *_: tmp_path)
    monkeypatch.setattr(
        opened,
        "load_photo",
        lambda *_: (adapter_of.__wrapped__(NAME).with_policy(ExitPolicy({2: 0.5})), encoder),
    )
    return Opened(None, tmp_path / "kept")


def taken(ways: Opened, names: Any) -> dict[Any, list[Any]]:
    with ways.stages.of_entries():
        return {name: [ways.answer(one, name, 8) for one in EXAMPLES] for name in names}


@pytest.mark.llama_cpp
def test_what_is_timed_is_the_whole_answer_and_ratios_are_of_its_tokens(ways: Opened) -> None:
    told = taken(ways, runtimes.names(ways))
    ids = {name: [ids for ids, _ in rows] for name, rows in told.items()}
    for mode in ("full", "lossless"):
        assert ids[PLAIN, mode, TOWER] == ids[runtimes.GENERATE]
    for rows in told.values():
        for _, stages in rows:
            assert all(seconds >= 0 for seconds in stages) and stages[-1] > 0
    measured = {name: Measured.of(rows, {}) for name, rows in told.items()}
    for entry in speeds(measured, runtimes.bases):
        name = tuple(entry[part] for part in NAMED)
        tokens = sum(map(len, ids[name]))
        seconds = sum(sum(stages[-2:]) for _, stages in told[name])  # of prompt and answer
        assert entry["cpu_tokens_per_second"] == pytest.approx(tokens / seconds)
        low, high = (entry["over_generate"][end] for end in ("low", "high"))
        assert 0 < low <= high and (low == high == 1) == (name == runtimes.GENERATE)


def test_modes_of_two_exits_are_answered_and_those_that_promise_it_as_full_depth(
    ways: Opened,
) -> None:
    names = [n for n in end_to_end.names(ways) if n[0] in (PLAIN, "generate")]
    names += [n for n in trust.names(ways) if n[0] == PLAIN and n not in names]
    found = {name: [ids for ids, _ in rows] for name, rows in taken(ways, names).items()}
    full = found["generate", "full", TORCH]
    for mode in ("full", "lossless"):
        assert found[PLAIN, mode, TOWER] == full
    assert found[PLAIN, opened.STATIC, TOWER] != full  # a random exit says something else
    assert all(len(answers) == len(EXAMPLES) for answers in found.values())


def test_a_photograph_of_a_cameras_size_is_made_once_and_opened_in_its_place(ways: Opened) -> None:
    opened_: list[Any] = []
    stages = ways.stages.take
    ways.stages.take = lambda encoder, example, write: (  # type: ignore[method-assign]
        opened_.append(example.image) or stages(encoder, example, write)
    )
    small, large, again = (
        ways.answer(EXAMPLES[0], (PLAIN, "full", tower), 8)[0]
        for tower in (TOWER, opened.LARGE, opened.LARGE)
    )
    assert small == large == again  # this encoder looks at the key alone
    assert opened_[0] is EXAMPLES[0].image and opened_[1] == opened_[2]
    with Image.open(opened_[1]) as file:
        assert file.format == "JPEG" and file.width * file.height == pytest.approx(12e6, rel=1e-3)


def test_thresholds_as_fast_as_lossless_are_found_between_those_measured() -> None:
    full, changed = [[1], [2]], [[1], [3]]

    def took(seconds: float) -> Any:
        return np.array([[1.0, 1.0], [seconds, seconds]])

    told = {
        "full": (took(4.0), full),
        "lossless": (took(3.0), full),
        "thresholds 0.5": (took(2.0), changed),
    }
    assert trust.even(told)["changed"] == pytest.approx(0.5 / 3)


@pytest.mark.parametrize("tower", [opened.TORCH, opened.TOWER, opened.ROUNDED])
@pytest.mark.parametrize("engine", ["torch", "llama.cpp f16", f"llama.cpp {opened.Q8}"])
def test_what_ships_is_promised_behind_every_tower_that_it_is_timed_with(
    engine: str, tower: str
) -> None:
    known = calibrations(read_config(exits_folder()))
    then = [each["conditions"] for each in known if each["conditions"]["engine"].startswith(engine)]
    of_backbone = ("dtype", "quantized", "engine", "kernels", "device", "parameters")
    here = Conditions({name: then[0][name] for name in of_backbone}, vision=tower)
    assert any(not differences(Conditions(each), here) for each in then)
