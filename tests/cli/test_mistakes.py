"""Mistakes that ended in a traceback or in the wrong words, each in two lines that help."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from command_line import TRAIN, RunCommand, assert_two_lines
from PIL import Image

from offramp.adapter.adapter import Adapter
from offramp.adapter.shipped import tiny_exits
from offramp.cli.command_line import COMMANDS, RENAMED, _plain_warnings
from offramp.core.engine.attached import NO_THRESHOLDS
from offramp.core.models.exits import Exits

EXITS = tiny_exits("opt")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("offramp.adapter.shipped.load_named", load)


def generate(run: RunCommand, image: Path, *more: Any) -> Any:
    return run("generate", "--adapter", EXITS, "--image", image, "--max-new-tokens", 2, *more)


@pytest.mark.parametrize(
    "words",
    [
        ("--temperature", "inf"),
        ("--temperature", "nan"),
        ("--temperature", "1e-320"),
        ("--temperature", "1e-39"),
        ("--temperature", "1e9"),
        ("--temperature", "-1"),
        ("--temperature", "0"),
        ("--temperature", "1e400"),
        ("--top-p", "inf"),
        ("--top-p", "1e-320"),
        ("--top-k", str(2**40)),
        ("--seed", "9223372036854775807"),
        ("--seed", str(2**32)),
        ("--seed", "1_0x"),
        ("--max-new-tokens", str(2**40)),
        ("--threshold", "inf"),
        ("--device", "meta"),
        ("--device", ""),
        ("--device", "cuda:99"),
        ("--device", "cpu:x"),
        ("--device", "nowhere"),
        ("--backbone", ""),
        ("--backbone", " "),
        ("--threads", "1000000"),
    ],
)
def test_odd_values_are_two_lines(words: tuple[str, str], image: Path, run: RunCommand) -> None:
    assert_two_lines(generate(run, image, *words))


def test_the_largest_values_that_are_taken_work(image: Path, run: RunCommand) -> None:
    for words in (
        ("--seed", 2**32 - 1, "--temperature", 1),
        ("--temperature", 100),
        ("--temperature", 1e-4),
        ("--top-k", 2**31 - 1),
        ("--top-p", 1e-4),
    ):
        code, _, err = generate(run, image, *words)
        assert code == 0, (words, err)


@pytest.mark.parametrize("command", ["train", "eval", "inspect", "serve", "calibrate"])
def test_an_empty_name_is_said_to_be_empty(
    command: str, held_out: Path, run: RunCommand, tmp_path: Path
) -> None:
    data = ("--data", held_out, "--out", tmp_path / "x")
    asked: dict[str, tuple[Any, ...]] = {
        "train": ("--backbone", "", *data),
        "eval": ("--backbone", "", "--task", "captions", *data),
        "inspect": ("",),
        "serve": (EXITS, "--backbone", "", "--port", 0),  # any that is free
        "calibrate": ("--adapter", EXITS, "--backbone", "", *data),
    }
    assert_two_lines(run(command, *asked[command]), "empty")


# -- standard input --------------------------------------------------------------------------------


def interactive(image: Path, stdin: Any, **more: Any) -> subprocess.CompletedProcess[str]:
    words = ["chat", str(EXITS), "--image", str(image), "--max-new-tokens", "2"]
    return subprocess.run(
        [sys.executable, "-m", "offramp.cli", *words],
        stdin=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        **more,
    )


def test_standard_input_that_is_none_is_two_lines(
    image: Path, run: RunCommand, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    closed = io.StringIO()
    closed.close()
    latin = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8")
    for stdin in (None, closed, latin):
        monkeypatch.setattr("sys.stdin", stdin)
        code, _, err = run("chat", EXITS, "--image", image)
        assert code == 1 and "Traceback" not in err
        assert err.rstrip("\n").count("\n") >= 1 and "stdin" in err
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        done = interactive(image, folder)
    finally:
        os.close(folder)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "stdin" in done.stderr


# -- names and folders -----------------------------------------------------------------------------


def test_a_file_name_that_is_not_utf_8_is_a_file_name(
    image: Path, run: RunCommand, tmp_path: Path
) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.png"))
    odd.write_bytes(image.read_bytes())
    for more in ((), ("--json",)):
        code, out, err = generate(run, odd, *more)
        assert code == 0, err
        if more:
            assert "udcff" in out.lower() and json.loads(out)["image"]
    gone = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff gone.png"))
    assert_two_lines(generate(run, gone), "does not exist")


def test_a_removed_working_folder_is_two_lines(
    image: Path, run: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    assert_two_lines(generate(run, image), "working folder")
    assert_two_lines(run("train", "--backbone", "tiny-opt", "--data", "a", "--out", "b"), "cd ~")


@pytest.mark.parametrize("name", ["photo", "tiny-opt"])
def test_nothing_to_answer_about_is_found_before_the_model_is_loaded(
    run: RunCommand, no_model: None, name: str
) -> None:
    assert_two_lines(run("generate", name), "neither an image", "--image FILE, or --prompt")


def test_an_image_that_cannot_be_read_is_found_before_the_model_is_loaded(
    image: Path, run: RunCommand, tmp_path: Path, no_model: None
) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "cut.png").write_bytes(image.read_bytes()[:50])
    os.mkfifo(tmp_path / "pipe.png")
    assert_two_lines(generate(run, tmp_path / "nope.jpg"), "nope.jpg does not exist")
    assert_two_lines(generate(run, tmp_path / "folder.png"), "folder.png holds no images")
    assert_two_lines(generate(run, tmp_path / "pipe.png"), "pipe.png is not a file")
    assert_two_lines(generate(run, tmp_path / "cut.png"), "cut.png is not a readable image")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"image": "nope.jpg", "captions": ["a"]}) + "\n")
    commands: dict[str, tuple[Any, ...]] = {
        "train": ("--backbone", "tiny-opt"),
        "calibrate": ("--adapter", EXITS),
        "eval": ("--adapter", EXITS, "--task", "captions"),
    }
    for command, what in commands.items():
        found = run(command, *what, "--data", rows, "--out", tmp_path / command)
        assert_two_lines(found, "nope.jpg, which does not exist")


# -- data ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff\xe0",
        b"GIF89a",
        b"PK\x03\x04",
        b"%PDF-1.4",
        b"GGUF",
        b"PAR1",
        b"\x1f\x8b\x08",
        b'{"image": "a\x00"}',
    ],
)
def test_a_file_that_is_no_text_is_called_what_it_is(
    content: bytes, run: RunCommand, tmp_path: Path
) -> None:
    for name in ("x.png", "x.jsonl", "x"):
        (tmp_path / name).write_bytes(content + bytes(100))
        found = run(
            "train", "--backbone", "tiny-opt", "--data", tmp_path / name, "--out", tmp_path / "out"
        )
        assert_two_lines(found, "not rows of data", "folder that holds the images")


def test_folders_with_the_names_of_images_are_none(
    image: Path, run: RunCommand, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    (folder / "x.png").mkdir(parents=True)
    os.mkfifo(folder / "pipe.jpg")
    asked = ("eval", "--adapter", EXITS, "--task", "captions", "--out", tmp_path / "out", "--data")
    assert_two_lines(run(*asked, folder), "should hold images")
    (folder / "x.png" / "a.png").write_bytes(image.read_bytes())
    found = run(*asked, folder)
    assert_two_lines(found, "has no answer")
    for option in ("--regime", "--risk"):
        assert option not in found[2]  # which eval does not have


def test_a_remedy_names_options_that_the_command_has(
    image: Path, run: RunCommand, tmp_path: Path
) -> None:
    out = ("--data", image.parent, "--out", tmp_path / "out")
    found = run("train", "--backbone", "tiny-opt", "--regime", "supervised", *out)
    assert_two_lines(found, "--regime unsupervised")
    found = run("calibrate", "--adapter", EXITS, "--risk", "exact_match_drop", *out)
    assert_two_lines(found, "--risk disagreement")
    assert "--regime" not in found[2]


def test_a_remedy_names_a_depth_that_there_is(opt: Any, batch: Any) -> None:
    adapter = Adapter(opt, Exits(opt, (2,)))
    with pytest.warns(UserWarning, match=r"ExitPolicy\(\{2: 0.95\}\)"):
        adapter.generate(**batch("blip2-opt", 1), max_new_tokens=1, do_sample=False)
    assert "%d" in NO_THRESHOLDS


def test_a_warning_of_ours_is_a_line_and_others_are_as_they_were(
    run: RunCommand, image: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = warnings.showwarning
    assert generate(run, image, "--quantize", "int8")[0] == 0
    (said,) = [r.getMessage() for r in caplog.records if "calibrate again" in r.getMessage()]
    assert said.startswith(str(EXITS)) and "UserWarning" not in said and "\n" not in said
    assert warnings.showwarning is before
    with pytest.warns(UserWarning, match="of theirs"), _plain_warnings():
        warnings.warn_explicit("of theirs", UserWarning, "/site-packages/torch/__init__.py", 1)
    assert "of theirs" not in caplog.text


# -- quiet -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_quiet_is_quiet(image: Path) -> None:
    """In a process of its own: bars of libraries are drawn where they are imported."""
    words = ["generate", "--adapter", str(EXITS), "--image", str(image), "--max-new-tokens", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "offramp.cli", *words, "--quiet"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout and done.stderr == ""


@pytest.mark.parametrize("command", ["calibrate", "eval", "train", "verify"])
def test_a_folder_of_images_that_is_not_there_is_said(
    command: str, adapter: Path, held_out: Path, run: RunCommand, tmp_path: Path
) -> None:
    """With rows that name their images too, for which it was not looked at."""
    named = {"verify": (adapter,), "train": TRAIN}.get(command, ("--adapter", adapter))
    more = ("--task", "captions") if command == "eval" else ()
    found = run(
        command,
        *named,
        *more,
        "--data",
        held_out,
        "--images",
        tmp_path / "no",
        "--out",
        tmp_path / "out",
    )
    assert_two_lines(found, "no folder of images")


@pytest.mark.slow
def test_names_that_are_no_utf_8_are_names(
    adapter: Path, held_out: Path, photos: Path, run: RunCommand, tmp_path: Path
) -> None:
    odd = tmp_path / "\udcff"
    odd.mkdir()
    data = Path(shutil.copy(held_out, odd / "\udcff.jsonl"))
    for image in held_out.parent.glob("*.png"):
        shutil.copy(image, odd)
    (odd / "0.png").rename(odd / "\udcff.png")
    data.write_text(data.read_text().replace('"0.png"', '"\\udcff.png"'))
    page = odd / "\udcff.html"
    code, _, err = run("report", adapter, "--data", data, "--out", page)
    assert code == 0, err
    assert b"</html>" in page.read_bytes()
    image, prompt = odd / "\udcff.png", ("--prompt", "a", "--max-new-tokens", 2)
    code, _, err = run("generate", "--adapter", adapter, "--image", image, *prompt)
    assert code == 0, err
    short = ("--limit", 3, "--max-new-tokens", 2)
    code, _, err = run("calibrate", adapter, "--lossless", "--data", data, *short)
    assert code == 0 or len(err[err.index("error: ") :].splitlines()) == 2, err


@pytest.mark.parametrize("command", RENAMED)
def test_an_earlier_name_of_a_command_says_todays(command: str, run: RunCommand) -> None:
    assert command not in COMMANDS
    assert_two_lines(run(command, "exits", "--data", "a"), f"offramp {command}", RENAMED[command])


def test_options_of_a_guarantee_do_not_go_with_lossless_answers(
    run: RunCommand, adapter: Path, held_out: Path
) -> None:
    asked = ("calibrate", adapter, "--data", held_out, "--lossless", "--first-threshold", "auto")
    assert_two_lines(run(*asked), "--first-threshold", "--lossless")
