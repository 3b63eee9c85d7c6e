"""`offramp generate`: sampling, streaming, several prompts, text alone, colours."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path

import pytest
from adapters import trained as adapter_of
from command_line import RunCommand, assert_two_lines
from smolvlm import save_smolvlm

from offramp.cli.commands import generate
from offramp.models.backbone import Backbone
from offramp.models.shipped import example_picture, tiny_exits
from offramp.storage import read_json

NAMES = ("--temperature", 3.0)


def asked(adapter: Path, photos: Path, *more: object) -> tuple[object, ...]:
    return ("generate", "--adapter", adapter, "--image", photos / "0.png", "--threshold", 0.5,
            "--max-new-tokens", 8, *more)  # fmt: skip


def test_a_seed_draws_the_same_and_another_seed_something_else(
    run: RunCommand, trained: Path, photos: Path
) -> None:
    def answer(*more: object) -> str:
        code, out, _ = run(*asked(trained, photos, "--json", *more))
        assert code == 0
        found: str = json.loads(out)["answer"]
        return found

    warm = [answer(*NAMES, "--seed", seed) for seed in (1, 1, 2)]
    assert warm[0] == warm[1] != warm[2]
    assert answer(*NAMES, "--top-k", 1) == answer()
    assert answer("--top-p", 0.001) == answer()


def test_streaming_prints_the_answer_as_text(run: RunCommand, trained: Path, photos: Path) -> None:
    whole = json.loads(run(*asked(trained, photos, "--json"))[1])["answer"]
    code, out, _ = run(*asked(trained, photos, "--stream"))
    assert code == 0 and out.strip() == whole
    assert_two_lines(run(*asked(trained, photos, "--stream", "--json")), "--stream", "--json")


def test_prompts_are_read_until_an_empty_line(
    run: RunCommand, trained: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = "Question: how many objects? Answer:\nCaption:\n\nCaption:\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(prompts))
    code, out, _ = run(*asked(trained, photos, "--interactive", "--json"))
    answers = [json.loads(line)["answer"] for line in out.splitlines()]
    assert code == 0 and len(answers) == 2 and answers[0] != answers[1]
    two = ("--image", photos / "0.png", photos / "1.png")
    assert_two_lines(run("generate", "--adapter", trained, *two, "--interactive"), "one image")


def test_a_prompt_without_an_image_is_answered_where_the_model_does(
    run: RunCommand, trained: Path, tmp_path: Path
) -> None:
    save_smolvlm(tmp_path / "model")
    backbone = Backbone.from_pretrained(tmp_path / "model")
    adapter_of(backbone, judged=False).save_pretrained(tmp_path / "exits")
    words = ("--prompt", "What is this?", "--max-new-tokens", 4, "--json")
    code, out, _ = run("generate", "--adapter", tmp_path / "exits", *words)
    row = json.loads(out)
    assert code == 0 and row["image"] is None and len(row["steps"]) == 4
    assert_two_lines(run("generate", "--adapter", trained, *words), "without its image", "--image")


@pytest.mark.parametrize(("variable", "painted"), [(None, True), ("", True), ("1", False)])
def test_no_color_is_heeded(
    variable: str | None, painted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    if variable is not None:
        monkeypatch.setenv("NO_COLOR", variable)
    monkeypatch.setattr("sys.stdout", type("Terminal", (), {"isatty": lambda _: True})())
    assert generate._in_color() is painted


def test_the_longest_answer_is_what_was_calibrated(
    run: RunCommand, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_exits("opt")
    known = read_json(folder / "adapter.json")["calibration"]["conditions"]["longest"]

    def said(*more: object) -> str:
        caplog.clear()
        picture = example_picture("offramp/tiny-opt")
        with caplog.at_level(logging.INFO):
            assert run("generate", "--adapter", folder, "--image", picture, *more)[0] == 0
        return caplog.text

    assert "guaranteed with" in (told := said()) and "not guaranteed" not in told
    assert f"up to {known + 1} tokens where up to {known}" in said("--max-new-tokens", known + 1)
