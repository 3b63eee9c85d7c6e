"""`offramp export --to speculators`: from prompts to a folder that other engines read."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from command_line import RunCommand
from smolvlm import save_smolvlm


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_smolvlm(folder)
    return folder


def asked(model: Path, photos: Path, out: Path) -> tuple[object, ...]:
    return (
        "export",
        "--to",
        "speculators",
        "--backbone",
        model,
        "--data",
        photos / "rows.jsonl",
        "--steps",
        4,
        "--max-new-tokens",
        6,
        "--out",
        out,
    )


def test_prompts_become_a_drafter(
    run: RunCommand, photos: Path, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "drafter"
    code, said, err = run(*asked(model, photos, out), "--json")
    assert code == 0, err
    told = json.loads(said)
    assert told["drafter"] == str(out) and told["tokens_a_round"] >= 1 and told["acceptance"]
    assert {f.name for f in out.iterdir()} >= {"config.json", "model.safetensors", "README.md"}
    config = json.loads((out / "config.json").read_text())
    assert config["speculators_config"]["verifier"]["name_or_path"] == str(model)


def test_what_comes_next_is_an_engine(
    run: RunCommand, photos: Path, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    code, said, err = run(*asked(model, photos, tmp_path / "drafter"))
    assert code == 0 and "tokens a round" in said, err
    assert "next: vllm serve" in caplog.text and "eagle3" in caplog.text


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (("--to", "speculators", "--backbone", "tiny-opt"), "learns from the model's answers"),
        (("--to", "speculators", "--gguf", "q8_0"), "--gguf does not go with --to speculators"),
        (("--to", "speculators", "--vision", "q8_0"), "--vision does not go with --to speculators"),
        (("--backbone", "tiny-opt"), "in a number format"),
        (("--adapter", "tiny-opt"), "in a number format"),
    ],
)
def test_what_does_not_go_together_is_said(
    run: RunCommand, tmp_path: Path, more: tuple[str, ...], problem: str
) -> None:
    code, _, err = run("export", *more, "--out", tmp_path / "out")
    assert code == 1 and problem in err and not (tmp_path / "out").exists()


def test_a_models_own_files_are_not_replaced(
    run: RunCommand, photos: Path, model: Path, tmp_path: Path
) -> None:
    before = (model / "model.safetensors").read_bytes()
    code, _, err = run(*asked(model, photos, model))
    assert code == 1 and "something else than a drafter" in err
    assert (model / "model.safetensors").read_bytes() == before
    for more in ((), (), ("--overwrite",)):  # what this command wrote is its own
        code, _, err = run(*asked(model, photos, tmp_path / "drafter"), *more)
        assert code == 0, err


def test_a_model_that_no_engine_drafts_for_is_refused(
    run: RunCommand, photos: Path, tmp_path: Path
) -> None:
    words = asked(Path("tiny-opt"), photos, tmp_path / "out")
    code, _, err = run(*words)
    assert code == 1 and "not rotary" in err
