"""Laws of what commands print: ten lines at most, then the command that comes next."""

from __future__ import annotations

import html
import json
import logging
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from command_line import RunCommand, assert_two_lines, parser_of

from offramp.calibration import draft_thresholds
from offramp.calibration.asked import Guarantee
from offramp.cli.commands import calibrate
from offramp.cli.commands.eval import summary
from offramp.cli.options import ASKED, LOADED, asked_again, one_again
from offramp.cli.output import few
from offramp.core.decoding.policy import DRAFT
from offramp.data.scenes import world
from offramp.inputs.example import Example


def next_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The commands that the last line names, each of which has the options it is given."""
    (said,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("next: ")]
    commands = [line.partition(": ")[2].partition("   (")[0] for line in said.splitlines()]
    for command in commands:
        program, name, *words = shlex.split(command)
        if program == "offramp":
            actions = list(parser_of(name).loaded())
            known = {flag for action in actions for flag in action.option_strings}
            assert not [w for w in words if w.startswith("--") and w not in known]
    return commands


def test_inspect_names_training_with_a_depth_it_proposes(
    run: RunCommand, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        code, out, _ = run("inspect", "tiny-opt", "--json")
    depth = json.loads(out)["proposed_depths"]["1"][0]
    assert code == 0 and f"--depths {depth}" in next_of(caplog)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adapter", "tiny-opt"])
def test_inspect_is_ten_lines_and_the_rest_is_json(
    run: RunCommand, trained: Path, name: str
) -> None:
    named = trained if name == "adapter" else name
    code, out, _ = run("inspect", named)
    lines = out.rstrip("\n").splitlines()
    own = 0 if name == "adapter" else 3  # a model that ships has exits of its own
    assert code == 0 and len(lines) == 10 + own and "{" not in out
    assert lines[1 if own else 2].startswith("thresholds: ") and "guarantee: " in out
    if own:
        assert lines[2].startswith("guarantee: with 95% confidence: the mean over images")
    assert len(json.loads(run("inspect", named, "--json")[1])) >= 10


@pytest.mark.parametrize("name", ["adapter", "tiny-opt"])
@pytest.mark.parametrize("option", ["--limit 3", "--depths 4", "--batch-size 1"])
def test_inspect_refuses_what_is_of_data_without_any(
    run: RunCommand, trained: Path, name: str, option: str
) -> None:
    named = trained if name == "adapter" else name
    flag, value = option.split()
    assert_two_lines(run("inspect", named, flag, value), flag, "--data")


def test_long_lists_end_with_how_many_more_there_are() -> None:
    assert few(["a", "b", "c"], 3) == ["a", "b", "c"]
    assert few(["a", "b", "c", "d"], 3) == ["a", "b", "... and 2 more, with --json"]


@pytest.mark.parametrize(
    ("words", "names", "again"),
    [
        (
            "generate a --prompt 'is it?' --engine packed",
            (*LOADED, *ASKED),
            " --engine packed --prompt 'is it?'",
        ),
        (
            "calibrate a --data b c --max-new-tokens 40 --device=cpu",
            ("data", *LOADED, *ASKED),
            " --data b c --device cpu --max-new-tokens 40",
        ),
        ("calibrate a --data b --gguf f --shrink-on-load", LOADED, " --gguf f --shrink-on-load"),
        ("train m --data b --out c", (*LOADED, *ASKED), ""),
    ],
)
def test_options_that_were_given_are_given_again(
    words: str, names: tuple[str, ...], again: str
) -> None:
    command, *more = shlex.split(words)
    given = parser_of(command).parse_args([command, *more])
    assert asked_again(given, *names) == again


def test_a_template_is_not_asked_of_one_image() -> None:
    words = ["calibrate", "a", "--data", "b", "--dtype", "float32", "--prompt"]
    one = [one_again(parser_of("calibrate").parse_args([*words, p])) for p in ("{question}", "is")]
    assert one == [f" --dtype float32 --image dog.jpg{more}" for more in ("", " --prompt is")]


@pytest.mark.parametrize(("speed", "thresholds"), [(1.7, {}), (0.9, {5: 0.5}), (0.9, {})])
def test_drafts_that_do_not_pay_are_not_advised(
    speed: float,
    thresholds: dict[int, float],
    run: RunCommand,
    adapter: Path,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    found = draft_thresholds.Drafting({5: 0.0}, speed)
    monkeypatch.setattr(draft_thresholds, "draft_speeds", lambda *_, **__: [found])
    config = json.loads((adapter / "adapter.json").read_text(encoding="utf-8"))
    config["policy"]["thresholds"] = thresholds
    config.pop("digest")
    (adapter / "adapter.json").write_text(json.dumps(config), encoding="utf-8")
    data = ("--data", photos / "rows.jsonl", "--max-new-tokens", 4)
    with caplog.at_level(logging.INFO):
        assert run("calibrate", "--lossless", adapter, *data)[0] == 0
    (after,) = next_of(caplog)
    assert ("--mode lossless" in after) is (speed > 1)
    wanted = "calibrate" if speed < 1 and not thresholds else "generate"
    assert after.startswith(f"offramp {wanted} {adapter} ") and "--max-new-tokens 4" in after


def test_calibrate_says_what_an_attempt_is_worth_before_it_is_made(
    caplog: pytest.LogCaptureFixture,
) -> None:
    examples = [Example.of_text(str(n), key=str(n)) for n in range(500)]

    def said(n: int, target: float) -> str:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            calibrate._say_worth(examples[:n], {"target": target})
        return caplog.text

    least = Guarantee(0.05).images_needed() or 0
    assert "60 images, or groups of them, cannot guarantee 0.01, however" in said(60, 0.01)
    assert f"at best {1 - (0.85 * 0.04) ** (1 / 60):.3g}" in caplog.text
    none, few, many = (
        int(re.findall(r"(\d+)% of the target", said(n, 0.05))[0]) for n in (least, 150, 500)
    )
    assert 0 <= none < few < many < 100


@pytest.mark.slow
def test_a_forecast_is_five_lines_and_a_page_and_names_training_at_its_best_depth(
    run: RunCommand, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photos, page = tmp_path / "photos", tmp_path / "forecast.html"
    photos.mkdir()
    for number in range(16):
        world.render(world.scene("train", number)).save(photos / f"{number}.png")
    asked = ("inspect", "tiny-opt", "--data", photos, "--max-new-tokens", 8)
    with caplog.at_level(logging.INFO):
        code, out, _ = run(*asked, "--out", page)
    verdict, *lines = out.rstrip("\n").splitlines()
    assert code == 0 and len(lines) <= 4
    assert verdict.startswith("Exits would pay: decoding ") and "at depth " in verdict
    opened, trained = next_of(caplog)
    assert opened == f"open {page}"
    assert (
        trained.startswith(f"offramp train tiny-opt --data {photos} ") and " --depths " in trained
    )
    assert "--max-new-tokens 8" in trained  # what was asked is asked again
    code, out, _ = run(*asked, "--depths", "3", "--json")
    found = json.loads(out)
    assert found["best"] == 3 and found["depths"][0]["settled"].keys() == {"0.9", "0.95", "0.98"}
    assert "Exits would pay" in html.unescape(page.read_text())
    shown = found["answers"]
    assert len(shown) == 3 and all(len(one["ids"]) == len(one["depths"]) for one in shown)
    assert {depth for one in shown for depth in one["depths"]} <= {3, 12}
    told = tmp_path / "forecast.json"
    told.write_text(out)
    again = tmp_path / "again.html"
    assert run("report", told, "--data", photos, "--out", again)[0] == 0
    assert again.read_text().count("data:image/png") == 3 == page.read_text().count("data:image")
    mine = tmp_path / "mine.html"
    mine.write_text("my notes")
    assert_two_lines(run(*asked, "--out", mine), "mine.html", "--overwrite")
    assert mine.read_text() == "my notes"


def test_what_does_not_go_with_the_question_is_said_in_two_lines(
    run: RunCommand, adapter: Path
) -> None:
    assert_two_lines(run("inspect", adapter, "--data", "photos"), "an adapter", "--data")


def test_eval_is_ten_lines_and_the_rest_is_json(
    run: RunCommand, adapter: Path, held_out: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = (
        "eval",
        "--adapter",
        adapter,
        "--task",
        "captions",
        "--data",
        held_out,
        "--limit",
        3,
        "--threshold",
        0.5,
        "--max-new-tokens",
        6,
        "--out",
        tmp_path / "run",
    )
    with caplog.at_level(logging.INFO):
        code, out, _ = run(*asked)
    lines = out.rstrip("\n").splitlines()
    assert code == 0 and len(lines) <= 10
    assert "captions: 3 examples" in lines[0] and "mean depth" in out
    assert "same answers as the full model: " in out and "[" in out
    assert lines[-1].endswith("result.json") and "{" not in out
    assert next_of(caplog) == [f"offramp report {tmp_path / 'run'} --out report.html"]


def test_a_figure_without_an_interval_and_an_answer_without_tokens_are_said() -> None:
    figure = {"value": 0.25, "low": None, "high": None}
    mode = {"metrics": {"accuracy": figure}, "mean_depth": None, "layers": 12, "latency": None}
    result: dict[str, Any] = {"task": "vqa", "n": 1, "missing": 2, "modes": {"full": mode}}
    text = summary(result, Path("run/result.json"))
    assert "2 without an answer" in text and "no tokens" in text and "accuracy: 0.25\n" in text


def test_trained_exits_draft_losslessly_out_of_the_box(
    run: RunCommand, adapter: Path, photos: Path
) -> None:
    policy = json.loads((adapter / "adapter.json").read_text(encoding="utf-8"))["policy"]
    assert policy["thresholds"] == {} and policy["drafts"] == {"2": DRAFT, "5": DRAFT}
    asked = (
        "generate",
        "--adapter",
        adapter,
        "--image",
        photos / "0.png",
        "--json",
        "--max-new-tokens",
        12,
    )
    (_, drafted, _), (_, full, _) = run(*asked, "--mode", "lossless"), run(*asked, "--mode", "full")
    drafted, full = json.loads(drafted), json.loads(full)
    words = [[step["id"] for step in found["steps"]] for found in (drafted, full)]
    assert words[0] == words[1]
    assert min(step["depth"] for step in drafted["steps"]) < drafted["layers"]
