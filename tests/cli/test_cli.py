"""Laws of the command line: data on stdout, and two lines for every user's mistake."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from offramp import cli
from offramp.calibration import draft_thresholds as drafts
from offramp.research.scenes import world
from offramp.save_and_load import CONFIG

RunCommand = Any


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> RunCommand:
    """Run the command line; returns (exit code, stdout, stderr)."""

    def command(*arguments: Any) -> tuple[int, str, str]:
        code = cli.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return command


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures with a JSONL of captions."""
    folder = tmp_path_factory.mktemp("photos")
    rows = []
    for index in range(12):
        scene = world.scene("train", index)
        world.render(scene).save(folder / f"{index}.png")
        rows.append({"image": f"{index}.png", "captions": [world.caption(scene)]})
    write_rows(folder / "rows.jsonl", rows)
    return folder


TRAIN = ("--backbone", "tiny-opt", "--steps", 4, "--evaluate-every", 2, "--batch-size", 4)


@pytest.fixture(scope="session")
def trained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter trained by the command line for a few steps."""
    out = tmp_path_factory.mktemp("adapter") / "exits"
    data = photos / "rows.jsonl"
    arguments = ["train", *TRAIN, "--data", data, "--depths", "2,5", "--out", out]
    assert cli.main([str(a) for a in arguments]) == 0
    return out


@pytest.fixture
def adapter(trained: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy that a test may damage."""
    yield Path(shutil.copytree(trained, tmp_path / "exits"))


def assert_two_lines(result: tuple[int, str, str], *words: str) -> None:
    code, out, err = result
    lines = err[err.index("error: ") :].rstrip("\n").split("\n")
    assert code == 1
    assert out == ""
    assert len(lines) == 2, lines
    assert "Traceback" not in err
    for word in words:
        assert word in err


def test_help_starts_with_what_to_type() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "offramp.cli", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert "offramp demo" in shown


@pytest.mark.parametrize("command", [c.__name__.rpartition(".")[2] for c in cli.COMMANDS])
def test_every_command_is_there_and_its_help_shows_it_at_work(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"example:\n  offramp {command}" in capsys.readouterr().out


def test_training_tells_its_agreement_by_depth_on_stdout(
    run: RunCommand, photos: Path, tmp_path: Path
) -> None:
    code, out, _ = run("train", *TRAIN, "--data", photos / "rows.jsonl", "--out", tmp_path / "x")
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
    code, out, _ = run("draft", "--adapter", adapter, *data)
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
    code, out, _ = run("draft", "--adapter", adapter, "--data", photos / "rows.jsonl")
    assert code == 0 and "nothing was written" in out
    assert (adapter / "adapter.json").read_bytes() == before


def test_a_race_of_no_rounds_is_refused(run: RunCommand, adapter: Path, photos: Path) -> None:
    arguments = ("draft", "--adapter", adapter, "--data", photos / "rows.jsonl", "--rounds", 0)
    assert_two_lines(run(*arguments), "0 rounds")


def test_generate_without_json_shows_each_word_with_its_depth(
    run: RunCommand, trained: Path, photos: Path
) -> None:
    arguments = ("generate", "--adapter", trained, "--image", photos / "0.png")
    _, out, _ = run(*arguments, "--threshold", 0)
    words = out.split(": ", 1)[1].split()
    assert all(word.rsplit("/", 1)[1].isdigit() for word in words)


def test_inspecting_a_backbone_proposes_depths_it_has(run: RunCommand) -> None:
    code, out, _ = run("inspect", "tiny-t5", "--json")
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


def test_under_accelerate_launch_two_processes_train_one_adapter(
    photos: Path, tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    # `--multi_gpu` means several processes; on a CPU they talk through gloo.
    launch = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port]
    ours = ["-m", "offramp.cli", "train", *TRAIN, "--data", photos / "rows.jsonl"]
    ours += ["--out", tmp_path / "exits", "--validation-fraction", "0.25"]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *launch, *map(str, ours)],
        check=False,
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["adapter"] == str(tmp_path / "exits")
    assert (tmp_path / "exits" / CONFIG).is_file()


@pytest.fixture(scope="session")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with captions that `trained` has not seen."""
    folder = tmp_path_factory.mktemp("held_out")
    rows = []
    for index in range(12):
        scene = world.scene("calibration", index)
        world.render(scene).save(folder / f"{index}.png")
        rows.append({"image": f"{index}.png", "captions": [world.caption(scene)]})
    return write_rows(folder / "rows.jsonl", rows)


@pytest.fixture(scope="session")
def unlabelled(held_out: Path) -> Path:
    """The same pictures, alone."""
    rows = [json.loads(line) for line in held_out.read_text(encoding="utf-8").splitlines()]
    return write_rows(held_out.with_name("alone.jsonl"), [{"image": r["image"]} for r in rows])


def test_thresholds_need_no_labels_where_the_risk_reads_none(
    run: RunCommand, adapter: Path, unlabelled: Path
) -> None:
    asked = ("calibrate", "--adapter", adapter, "--data", unlabelled, "--json")
    code, out, _ = run(*asked, "--target", 0.9, "--confidence", 0.5)
    assert code == 0 and json.loads(out)["policy"]["thresholds"]
    assert_two_lines(run(*asked, "--risk", "rouge_l_drop"), "answer")


def test_an_analysis_needs_no_labels(run: RunCommand, unlabelled: Path, tmp_path: Path) -> None:
    code, out, _ = run("analyse", "--backbone", "tiny-opt", "--data", unlabelled, "--decode-depths",
                       "2", "--out", tmp_path)  # fmt: skip
    assert code == 0 and "accuracy" not in json.loads(out)["teacher_forced"]["lens"]


@pytest.mark.parametrize("command", ["train", "analyse", "calibrate"])
def test_two_jsonl_files_are_refused_rather_than_one_left_out(
    run: RunCommand, command: str, adapter: Path, held_out: Path, unlabelled: Path, tmp_path: Path
) -> None:
    what = ("--backbone", "tiny-opt") if command == "train" else ("--adapter", adapter)
    assert_two_lines(
        run(command, *what, "--data", held_out, unlabelled, "--out", tmp_path), "2 files"
    )


def test_calibrate_stores_its_promise_in_the_adapter(
    run: RunCommand, adapter: Path, held_out: Path
) -> None:
    asked = ("calibrate", "--adapter", adapter, "--data", held_out, "--json", "--exit-in-prefill")
    code, out, _ = run(*asked, "--target", 0.9, "--confidence", 0.5, "--risk", "rouge_l_drop")
    told, stored = json.loads(out), json.loads((adapter / CONFIG).read_text())
    assert code == 0
    assert told["policy"]["thresholds"] and told["risk"] == "rouge_l_drop"
    assert stored["calibration"] == told and stored["policy"] == told["policy"]
    assert stored["policy"]["exit_in_prefill"]


def test_calibrate_tells_how_many_answers_would_be_needed(
    run: RunCommand, adapter: Path, held_out: Path
) -> None:
    code, out, _ = run("calibrate", "--adapter", adapter, "--data", held_out, "--score", "margin")
    assert code == 0
    assert "Nothing is promised" in out and " answers" in out
    assert json.loads((adapter / CONFIG).read_text())["policy"]["thresholds"] == {}


# -- bad input -----------------------------------------------------------------------------------


def train_on(run: RunCommand, data: Path, out: Path, *more: Any) -> tuple[int, str, str]:
    return run("train", *TRAIN, "--data", data, "--out", out, *more)  # type: ignore[no-any-return]


def test_a_corrupt_image_is_named(run: RunCommand, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    data = write_rows(tmp_path / "rows.jsonl", [{"image": "bad.png", "captions": ["a"]}] * 2)
    assert_two_lines(train_on(run, data, tmp_path / "out"), "bad.png")


def test_a_truncated_image_is_named(run: RunCommand, photos: Path, tmp_path: Path) -> None:
    whole = (photos / "0.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    data = write_rows(tmp_path / "rows.jsonl", [{"image": "cut.png", "captions": ["a"]}] * 2)
    assert_two_lines(train_on(run, data, tmp_path / "out"), "cut.png")


def test_a_missing_image_is_named(run: RunCommand, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"image": "gone.png", "captions": ["a"]}])
    assert_two_lines(train_on(run, data, tmp_path / "out"), "gone.png")


def test_a_missing_data_file_is_named(run: RunCommand, tmp_path: Path) -> None:
    assert_two_lines(train_on(run, tmp_path / "none.jsonl", tmp_path / "out"), "none.jsonl")


def test_a_row_without_an_answer_is_refused_where_labels_are_needed(
    run: RunCommand, photos: Path, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"image": str(photos / "0.png")}])
    found = train_on(run, data, tmp_path / "out", "--regime", "supervised")
    assert_two_lines(found, "rows.jsonl", "1")


def test_an_empty_data_set_is_refused(run: RunCommand, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("")
    assert_two_lines(train_on(run, tmp_path / "rows.jsonl", tmp_path / "out"), "rows.jsonl")


@pytest.mark.parametrize("depths", ["0", "12", "3,3", "99"])
def test_depths_that_do_not_fit_are_refused(
    run: RunCommand, photos: Path, tmp_path: Path, depths: str
) -> None:
    found = train_on(run, photos / "rows.jsonl", tmp_path / "out", "--depths", depths)
    assert_two_lines(found, "depth")


def test_a_training_option_out_of_range_is_refused(
    run: RunCommand, photos: Path, tmp_path: Path
) -> None:
    found = train_on(run, photos / "rows.jsonl", tmp_path / "out", "--temperature", 0)
    assert_two_lines(found, "temperature")


def generate_with(run: RunCommand, adapter: Path, photos: Path, *more: Any) -> tuple[int, str, str]:
    return run("generate", "--adapter", adapter, "--image", photos / "0.png", *more)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--risk", "disagrees", "disagreement"),
        ("--method", "upper", "upper_bound"),
        ("--target", 1.5, "between 0 and 1"),
        ("--confidence", "nan", "between 0 and 1"),
        ("--score", "max_prob", "max_probability"),
    ],
)
def test_a_calibration_option_that_cannot_be_used_is_refused(
    run: RunCommand, trained: Path, held_out: Path, option: str, value: Any, words: str
) -> None:
    found = run("calibrate", "--adapter", trained, "--data", held_out, option, value)
    assert_two_lines(found, words)


def test_calibrating_on_training_pictures_is_refused(
    run: RunCommand, trained: Path, photos: Path
) -> None:
    found = run("calibrate", "--adapter", trained, "--data", photos / "rows.jsonl")
    assert_two_lines(found, "12 of 12 pictures", "training")


def test_evaluating_on_training_pictures_is_refused(
    run: RunCommand, trained: Path, photos: Path, tmp_path: Path
) -> None:
    asked = ("eval", "--task", "captions", "--adapter", trained, "--out", tmp_path / "run")
    assert_two_lines(run(*asked, "--data", photos / "rows.jsonl"), "--allow-seen")


def test_an_adapter_of_another_backbone_is_refused(
    run: RunCommand, adapter: Path, photos: Path
) -> None:
    assert_two_lines(generate_with(run, adapter, photos, "--backbone", "tiny-t5"), "tiny-opt")


def test_an_adapter_of_another_format_is_refused(
    run: RunCommand, adapter: Path, photos: Path
) -> None:
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**config, "format": 99}))
    assert_two_lines(generate_with(run, adapter, photos), "99")


def test_a_folder_without_an_adapter_is_refused(
    run: RunCommand, tmp_path: Path, photos: Path
) -> None:
    assert_two_lines(generate_with(run, tmp_path, photos), "adapter")


@pytest.mark.parametrize("threshold", ["-0.1", "1.5", "nan"])
def test_a_threshold_out_of_range_is_refused(
    run: RunCommand, trained: Path, photos: Path, threshold: str
) -> None:
    found = generate_with(run, trained, photos, f"--threshold={threshold}")
    assert_two_lines(found, "0", "1")


def test_an_unknown_score_lists_the_known_ones(
    run: RunCommand, trained: Path, photos: Path
) -> None:
    found = generate_with(run, trained, photos, "--score", "max_prob")
    assert_two_lines(found, "max_probability")


def test_an_unknown_backbone_is_refused(run: RunCommand, tmp_path: Path) -> None:
    assert_two_lines(run("inspect", tmp_path / "nowhere"), "nowhere")


def test_a_missing_picture_to_answer_about_is_named(
    run: RunCommand, trained: Path, tmp_path: Path
) -> None:
    found = run("generate", "--adapter", trained, "--image", tmp_path / "gone.jpg")
    assert_two_lines(found, "gone.jpg")


def test_a_prompt_without_its_image_is_refused(run: RunCommand, trained: Path) -> None:
    found = run("generate", "--adapter", trained, "--prompt", "Question: what is it? Answer:")
    assert_two_lines(found, "--image")
