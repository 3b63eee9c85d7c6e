"""Laws of the first run: its report is complete, consistent and honest about what it measured."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from command_line import measure_briefly

from offramp.adapter.adapter import Adapter
from offramp.adapter.shipped import example_picture, load_tiny
from offramp.cli import demo as first_run
from offramp.cli.demo import DemoSizes, demo, table
from offramp.core.decoding.policy import policy_to_json
from offramp.data.scenes import world
from offramp.data.scenes.tasks import captions
from offramp.engines.loading import load, usual_prompt
from offramp.features.input_processor import InputProcessor
from offramp.report.sections import TITLES

pytestmark = pytest.mark.slow

SMALL = DemoSizes(train=24, calibration=8, drafts=1, quality=2, timed=1, rounds=1, steps=4)


@pytest.fixture(scope="module", params=["opt", "t5"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    (out / request.param).mkdir(parents=True)  # an earlier demo's, which this one replaces
    (out / request.param / "adapter.json").write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        measure_briefly(patch)
        patch.setitem(first_run.OPTIONS, "max_new_tokens", 8)
        made = demo(request.param, out, SMALL, target=0.5)
    written = json.loads((out / "report.json").read_text())
    assert written == json.loads(json.dumps(made))
    assert written == json.loads((out / f"report-{request.param}.json").read_text())
    return out


@pytest.fixture
def report(folder: Path) -> Any:
    return json.loads((folder / "report.json").read_text())


def test_the_report_has_every_figure(report: Any) -> None:
    assert report["layers"] == 12
    assert all(1 <= depth < 12 for depth in report["exits"])
    assert set(report["modes"]) == {"generate", "full", "early_exit", "lossless"}
    for mode in report["modes"].values():
        assert mode["tokens_per_second"] > 0
        assert mode["seconds_end_to_end"] >= mode["seconds_decode"] > 0
        assert set(mode["quality"]) == {"captions", "questions"}
    early = report["modes"]["early_exit"]
    assert set(early["quality_drop"]) == {"captions", "questions"}
    for figure in ("speedup_decode", "speedup_end_to_end", "speedup_vs_generate"):
        assert early[figure] > 0
        assert report["modes"]["lossless"][figure] > 0


def test_the_page_shows_answers_word_by_word(folder: Path, report: Any) -> None:
    page = (folder / "report.html").read_text()
    assert re.search("<h1>[^<]* 12 layers[^<]*; answers came [^<]* the same[.]</h1>", page)
    assert page.count('<article class="answer"') > 0 and page.count('<img src="data:image/png') > 0
    assert page.count('<span class="t"') > report["layers"]


def test_mean_depth_counts_every_token(report: Any) -> None:
    assert report["exits"][0] <= report["modes"]["early_exit"]["mean_depth"] <= report["layers"]


def test_our_full_depth_loop_writes_what_generate_writes(report: Any) -> None:
    assert report["full_equals_generate"]


def test_lossless_writes_what_full_depth_writes(report: Any) -> None:
    assert report["modes"]["lossless"]["identical"]


def test_quality_drop_is_relative_to_the_full_model(report: Any) -> None:
    full, early = report["modes"]["full"], report["modes"]["early_exit"]
    for name, drop in early["quality_drop"].items():
        if full["quality"][name]:
            assert early["quality"][name] == pytest.approx(full["quality"][name] * (1 - drop))


def test_the_table_says_what_the_report_says(report: Any) -> None:
    shown = table(report)
    assert f"{report['modes']['early_exit']['speedup_decode']:.2f}x" in shown
    for mode in report["modes"]:
        assert TITLES[mode] in shown


def test_a_photograph_is_answered_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the photo model; here by a tiny one, which needs no weights from elsewhere."""
    loaded = load("tiny-opt", engine="torch")
    monkeypatch.setattr(first_run, "load", lambda name, **how: loaded)
    picture = example_picture("tiny-opt")
    monkeypatch.setattr(first_run, "example_picture", lambda name: picture)
    lines = first_run.photograph(lambda token, depth, layers: f"{token.strip()}/{depth}")
    prompt = usual_prompt(loaded.adapter)
    for line, mode in zip(lines, ("full", "early_exit"), strict=True):
        title, seconds, words = TITLES[mode], *line.removeprefix(TITLES[mode]).split(" s  ")
        assert line.startswith(title) and float(seconds) > 0
        depths = {int(word.rpartition("/")[2]) for word in words.split(" ")}
        assert depths == {12} if mode == "full" else min(depths) < 12
        text = "".join(word.rpartition("/")[0] for word in words.split(" "))
        answer = loaded.answer(picture, prompt, mode=mode, max_new_tokens=loaded.longest)
        assert text.startswith(answer.replace(" ", ""))


def test_no_two_parts_of_the_demo_see_the_same_picture() -> None:
    seeds = {
        split: {world.scene(split, i).seed for i in range(50)}
        for split in ("train", "calibration", "test")
    }
    assert not seeds["train"] & seeds["calibration"]
    assert not (seeds["train"] | seeds["calibration"]) & seeds["test"]


def test_the_demo_leaves_a_usable_adapter(folder: Path, report: Any) -> None:
    kind = report["backbone"].removeprefix("tiny-")
    backbone, processor = load_tiny(kind)
    adapter = Adapter.load(folder / kind, backbone)
    assert policy_to_json(adapter.policy) == report["policy"]
    inputs = InputProcessor(backbone, processor).prompts(captions("test", 1).examples)
    assert adapter.generate(inputs, max_new_tokens=3).depths.shape == (1, 3)
