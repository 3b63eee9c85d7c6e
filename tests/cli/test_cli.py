"""What the commands do and show; data goes to stdout. That a mistake is two lines is law 13."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import EVERY, TRAIN, RunCommand, assert_two_lines, parser_of

from offramp import cli
from offramp.adapter.adapter import Adapter
from offramp.adapter.shipped import load_tiny, tiny_exits
from offramp.calibration import draft_thresholds as drafts
from offramp.calibration.asked import Guarantee
from offramp.calibration.attempts import error_share
from offramp.common.folders import locked_folder
from offramp.core.errors import StorageError
from offramp.core.save_and_load import CONFIG
from offramp.data.scenes import language, world
from offramp.promises.verdict import NONE

SHORT = ("--max-new-tokens", 4)
LAX = ("--confidence", 0.5, *SHORT, "--target", 0.9)
QUICK = ("--confidence", 0.5, *SHORT, "--limit", 4)


def test_help_starts_with_what_to_type() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "offramp.cli", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert "offramp demo" in shown


@pytest.mark.parametrize("command", EVERY)
def test_every_command_is_there_and_its_help_shows_it_at_work(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"example:\n  {parser_of(command).prog} {command}")


@pytest.mark.slow
def test_training_tells_its_agreement_by_depth_on_stdout(
    run: RunCommand, photos: Path, tmp_path: Path
) -> None:
    code, out, _ = run(
        "train", *TRAIN, "--json", "--data", photos / "rows.jsonl", "--out", tmp_path / "x"
    )
    assert code == 0
    told = json.loads(out)
    assert all(0 <= share <= 1 for share in told["agreement"].values())


def test_generate_as_json_tells_the_depth_of_every_token(
    run: RunCommand, trained: Path, photos: Path
) -> None:
    arguments = ("generate", "--adapter", trained, "--image", photos / "0.png", photos / "1.png")
    code, out, _ = run(*arguments, "--threshold", 0.5, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [row["image"] for row in rows] == [str(photos / "0.png"), str(photos / "1.png")]
    for row in rows:
        assert {step["depth"] for step in row["steps"]} <= {2, 5, row["layers"]}
        depths = [step["depth"] for step in row["steps"]]
        assert row["mean_depth"] == pytest.approx(sum(depths) / len(depths))


def test_full_mode_runs_every_layer(run: RunCommand, trained: Path, photos: Path) -> None:
    arguments = ("generate", "--adapter", trained, "--image", photos / "0.png", "--json")
    _, out, _ = run(*arguments, "--mode", "full", "--threshold", 0)
    row = json.loads(out)
    assert {step["depth"] for step in row["steps"]} == {row["layers"]}


def test_lossless_mode_answers_as_full_mode_does(
    run: RunCommand, trained: Path, photos: Path
) -> None:
    arguments = ("generate", "--adapter", trained, "--image", photos / "0.png", "--json")
    _, full, _ = run(*arguments, "--mode", "full")
    _, lossless, _ = run(*arguments, "--mode", "lossless", "--threshold", 0.3)
    assert json.loads(lossless)["answer"] == json.loads(full)["answer"]
    assert json.loads(lossless)["mean_depth"] < json.loads(full)["mean_depth"]


def test_drafts_are_chosen_stored_and_drafted_by(
    run: RunCommand, adapter: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = drafts.Drafting({5: 0.0}, 1.7)
    monkeypatch.setattr(drafts, "draft_speeds", lambda *_, **__: [fast])
    data = ("--data", photos / "rows.jsonl")
    code, out, _ = run("calibrate", adapter, "--lossless", *data)
    assert code == 0 and "0 at depth 5" in out and "1.70x" in out
    shown = ("generate", "--adapter", adapter, "--image", photos / "0.png", "--json")
    row = json.loads(run(*shown, "--mode", "lossless")[1])
    assert 5 in {step["depth"] for step in row["steps"]}
    asked = json.loads(run(*shown, "--mode", "lossless", "--threshold", 1.0)[1])
    assert 5 not in {step["depth"] for step in asked["steps"]}  # what is asked for counts


def test_drafts_that_do_not_pay_are_not_stored(
    run: RunCommand, adapter: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drafts, "draft_speeds", lambda *_, **__: [drafts.Drafting({5: 0.0}, 0.9)])
    before = (adapter / "adapter.json").read_bytes()
    code, out, _ = run("calibrate", adapter, "--lossless", "--data", photos / "rows.jsonl")
    assert code == 0 and "are left as they are" in out
    assert (adapter / "adapter.json").read_bytes() == before


@pytest.mark.slow
def test_inspecting_a_backbone_proposes_depths_it_has(run: RunCommand) -> None:
    code, out, _ = run("inspect", "tiny-t5", "--json")
    assert json.loads(out)["decoding"]["lossless"] == "exact"
    found = json.loads(out)
    assert code == 0
    for depths in found["proposed_depths"].values():
        assert all(1 <= depth < found["layers"] for depth in depths)


def test_inspecting_an_adapter_shows_where_it_comes_from(run: RunCommand, trained: Path) -> None:
    code, out, _ = run("inspect", trained, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["depths"] == [2, 5]
    assert found["provenance"]["seed"] == 0


def test_a_finished_run_resumes_to_the_same_adapter(
    run: RunCommand, adapter: Path, photos: Path
) -> None:
    before = (adapter / "exits.safetensors").read_bytes()
    data = photos / "rows.jsonl"
    code, _, _ = run(
        "train", *TRAIN, "--data", data, "--depths", "2,5", "--out", adapter, "--resume"
    )
    assert code == 0
    assert (adapter / "exits.safetensors").read_bytes() == before


@pytest.mark.slow
def test_thresholds_need_no_labels_where_the_risk_reads_none(
    run: RunCommand, adapter: Path, unlabelled: Path
) -> None:
    asked = ("calibrate", "--adapter", adapter, "--data", unlabelled, "--json")
    code, out, _ = run(*asked, *LAX)
    assert code == 0 and json.loads(out)["policy"]["thresholds"]
    assert_two_lines(run(*asked, "--risk", "rouge_l_drop"), "answer")


@pytest.mark.slow
def test_calibrate_stores_its_promise_in_the_adapter(
    run: RunCommand, adapter: Path, held_out: Path
) -> None:
    asked = ("calibrate", "--adapter", adapter, "--data", held_out, "--json")
    code, out, _ = run(*asked, *LAX, "--risk", "rouge_l_drop")
    told, stored = json.loads(out), json.loads((adapter / CONFIG).read_text())
    assert code == 0
    assert told["policy"]["thresholds"] and told["risk"] == "rouge_l_drop"
    assert stored["calibration"] == told and stored["policy"] == told["policy"]
    assert stored["policy"]["exit_in_prefill"]


def test_calibrate_tests_the_thresholds_that_are_named_and_no_others(
    run: RunCommand, adapter: Path, held_out: Path
) -> None:
    asked = ("calibrate", "--adapter", adapter, "--data", held_out, "--json")
    code, out, _ = run(*asked, *LAX, "--thresholds", 0.9, 0.4)
    told = json.loads(out)
    tested = {each for point in told["path"] for each in point["thresholds"].values()}
    assert code == 0 and tested == {0.9, 0.4}
    code, _, err = run(*asked, "--thresholds", 2)
    assert code == 2 and "--thresholds" in err


@pytest.mark.slow
def test_calibrate_stores_a_threshold_of_first_tokens(
    run: RunCommand, adapter: Path, held_out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(*_: object) -> dict[str, list[float]]:  # thresholds are the fastest way
        return {"full": [2.0], "lossless": [2.0], "thresholds": [1.0]}

    monkeypatch.setattr("offramp.calibration.ways._seconds", seconds)
    asked = ("calibrate", "--adapter", adapter, "--data", held_out, "--json")
    code, out, _ = run(*asked, *LAX, "--first-threshold", "auto")
    told, stored = json.loads(out), json.loads((adapter / CONFIG).read_text())
    assert code == 0 and told["policy"]["first"]
    assert stored["policy"] == told["policy"]
    assert told["conditions"]["first"] == told["policy"]["first"]
    code, _, err = run(*asked, "--first-threshold", "soon")
    assert code == 2 and "soon" in err


@pytest.mark.slow
def test_a_calibration_is_stored_before_it_is_shown_and_shown_where_it_cannot_be(
    run: RunCommand, adapter: Path, held_out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It took long to find: neither a full disk nor a closed pipe loses it."""
    asked = ("calibrate", "--adapter", adapter, "--data", held_out, *QUICK, "--target")

    def full(*_: object, **__: object) -> None:
        raise StorageError("There is no room.", "Make some.")

    with monkeypatch.context() as patch:
        patch.setattr("offramp.cli.commands.calibrate.show_result", full)
        assert run(*asked, 0.9)[0] == 1
    assert json.loads((adapter / CONFIG).read_text())["calibration"]["target"] == 0.9
    monkeypatch.setattr("offramp.adapter.adapter.Adapter.save", full)
    code, out, err = run(*asked, 0.8, "--write")
    assert code == 1 and "no room" in err and json.loads(out)["target"] == 0.8


@pytest.mark.parametrize("more", [(), ("--lossless",)])
def test_an_adapter_is_changed_by_one_command_at_a_time(
    more: tuple[str, ...], run: RunCommand, adapter: Path, held_out: Path
) -> None:
    """What one reads at its start is what it writes over at its end."""
    asked = ("calibrate", "--adapter", adapter, "--data", held_out, "--json", *more)
    with locked_folder(adapter / "training"):  # as training holds it
        assert_two_lines(run(*asked), "Another run", str(adapter))
    assert not (adapter / "attempts.json").exists()


@pytest.mark.slow
def test_official_questions_with_a_blank_among_ten_answers_are_calibrated_on(
    run: RunCommand, adapter: Path, tmp_path: Path
) -> None:
    questions, annotations = [], []
    for image in range(3):
        scene = world.scene("test", image)
        world.render(scene).save(tmp_path / f"{image:012d}.jpg")
        for place, (question, answer) in enumerate(language.questions(scene, 2)):
            named = {"question_id": 2 * image + place, "image_id": image}
            questions.append({**named, "question": question.partition(": ")[2] or question})
            answers = [{"answer": text} for text in [answer] * 9 + [""]]
            annotations.append({**named, "answers": answers})
    for name, rows in (("questions", questions), ("annotations", annotations)):
        (tmp_path / f"v2_{name}.json").write_text(json.dumps({name: rows}))
    files = (tmp_path / "v2_questions.json", tmp_path / "v2_annotations.json")
    asked = ("calibrate", "--adapter", adapter, "--data", *files, "--images", tmp_path, "--json")
    code, out, err = run(*asked, "--risk", "vqa_accuracy_drop", *QUICK, "--target", 0.9)
    assert code == 0, err
    assert json.loads(out)["answers"] > 0


@pytest.mark.slow
def test_a_copy_is_no_first_attempt_on_the_same_images(
    run: RunCommand, adapter: Path, held_out: Path, tmp_path: Path
) -> None:
    """Whether it passes or not, and wherever it is written."""
    asked = ("calibrate", "--adapter", adapter, "--data", held_out, "--json")
    for number, target in enumerate((0.9, 0.8), 1):
        lax = (*LAX, "--target", target, "--out", tmp_path / f"copy {number}")
        code, out, _ = run(*asked, *lax)
        found = json.loads(out)
        assert code == 0 and found["attempt"] == number and found["unit"] == "image"
        assert (tmp_path / f"copy {number}").is_dir() == (not found["reason"])


@pytest.mark.slow
def test_exits_that_are_trained_again_share_the_errors_of_those_before(
    run: RunCommand, adapter: Path, held_out: Path, tmp_path: Path
) -> None:
    """Attempts are of images: other weights in another folder, which know of none, make the next
    one."""
    other = Adapter.from_pretrained(load_tiny("opt")[0], adapter)
    with torch.no_grad():
        for parameter in other.exits.modules.parameters():
            parameter.mul_(1.01)
    other.save(tmp_path / "again")
    for number, folder in enumerate((adapter, tmp_path / "again"), 1):
        asked = ("calibrate", folder, "--data", held_out, *SHORT, "--target", 0.9, "--json")
        found = json.loads(run(*asked)[1])
        handed = 0.0 if number == 1 else found["whole"] * error_share(1)  # as both pass, or fail
        assert found["attempt"] == number
        assert found["level"] == pytest.approx(Guarantee(0.9).level(number, handed))


@pytest.mark.slow
def test_calibrate_takes_a_choice_and_a_unit(
    run: RunCommand, adapter: Path, held_out: Path
) -> None:
    asked = (
        "calibrate",
        "--adapter",
        adapter,
        "--data",
        held_out,
        *SHORT,
        "--json",
        "--target",
        0.9,
    )
    code, out, _ = run(*asked, "--of", 4, "--unit", "answer")
    found = json.loads(out)
    assert code == 0
    assert (found["unit"], found["candidates"]) == ("answer", 4)
    assert found["level"] == pytest.approx(1 - 0.05 * 0.8 / 4)


def test_generate_says_whether_its_answer_is_guaranteed(
    run: RunCommand, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shipped = str(tiny_exits("opt"))
    asked = ("generate", "--adapter", shipped, "--image", photos / "0.png", "--max-new-tokens")

    def said(*more: str, longest: int = 20) -> str:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert run(*asked, longest, *more)[0] == 0
        return caplog.text

    told = said()
    assert "Promised: at most 0.75% differ, with 95% confidence. More: offramp inspect" in told
    for more, words in {
        ("--dtype", "bfloat16"): "precision bfloat16 where float32",
        ("--prompt", "Describe it."): "a prompt unlike",
        ("--threshold", "0.1"): "thresholds 2: 0.1 where 2: 0.8",
        ("--temperature", "0.7"): "sampled where greedy",
    }.items():
        found = said(*more)
        assert NONE in found and words in found and "Promised" not in found
    assert "up to 150 tokens where up to 48" in said(longest=150)


@pytest.mark.slow
def test_calibrate_tells_how_many_answers_would_be_needed(
    run: RunCommand, adapter: Path, held_out: Path
) -> None:
    code, out, _ = run(
        "calibrate", "--adapter", adapter, "--data", held_out, *SHORT, "--score", "margin"
    )
    assert code == 0
    assert "Nothing is guaranteed" in out and " images" in out
    assert json.loads((adapter / CONFIG).read_text())["policy"]["thresholds"] == {}


@pytest.mark.slow
def test_calibrate_that_can_guarantee_nothing_leaves_the_thresholds(
    run: RunCommand, adapter: Path, held_out: Path
) -> None:
    def policy() -> dict[str, object]:
        found: dict[str, object] = json.loads((adapter / CONFIG).read_text())["policy"]
        return found

    asked = ("calibrate", "--adapter", adapter, "--data", held_out)
    assert run(*asked, *LAX)[0] == 0
    before = policy()
    assert before["thresholds"]
    code, out, _ = run(*asked, *SHORT, "--target", 0.001)
    assert code == 0 and "no attempt is spent" in out and policy() == before
    assert [a["number"] for a in json.loads((adapter / "attempts.json").read_text())] == [1]
    assert run(*asked, *SHORT, "--target", 0.001, "--write")[0] == 0 and not policy()["thresholds"]
