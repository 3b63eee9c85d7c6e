"""`offramp serve NAME --engine vllm`: what vLLM is started with, without vLLM."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import RunCommand
from other_python import python_with_vllm

import offramp_vllm.exports.serving as module
import offramp_vllm.exports.vllm as exports
from offramp.core.decoding.policy import ExitPolicy
from offramp.features.input_processor import COMPLETES
from offramp_vllm.adapter import read_exported


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """What the process would become: program, arguments and environment."""
    monkeypatch.setenv(module.PYTHON, str(python_with_vllm(tmp_path / "python")))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    begun: list[Any] = []
    monkeypatch.setattr(os, "execve", lambda *given: begun.append(given))
    return begun


def nothing(adapter: Any, out: Path, prompts: Any, **more: Any) -> None:
    """An export that takes no time."""
    out.mkdir(parents=True)
    (out / exports.VLLM).touch()


def settings_of(begun: list[Any]) -> dict[str, Any]:
    [(_, arguments, _)] = begun
    file = Path(arguments[arguments.index("--config") + 1])
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    return dict(json.loads(file.read_text()))


@pytest.mark.parametrize("before", ["a link", "a file that all may read"])
def test_keys_go_to_a_new_file_of_this_user(
    before: str, run: RunCommand, started: list[Any], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(exports, "export_vllm", nothing)
    (tmp_path / "keys").write_text("secret\n")
    asked = ("serve", "tiny-opt", "--engine", "vllm", "--api-keys", tmp_path / "keys")
    assert run(*asked)[0] == 0
    [(_, arguments, _)] = started
    file, other = Path(arguments[arguments.index("--config") + 1]), tmp_path / "other"
    other.write_text("the system's")
    if before == "a link":
        file.unlink()
        file.symlink_to(other)
    file.chmod(0o644)
    started.clear()
    assert run(*asked)[0] == 0
    assert settings_of(started)["api-key"] == ["secret"] and not file.is_symlink()
    assert other.read_text() == "the system's"


@pytest.mark.slow
def test_vllm_is_started_with_the_adapters_exits_and_drafts_by_them(
    run: RunCommand, started: list[Any]
) -> None:
    code, out, err = run("serve", "tiny-opt", "--engine", "vllm", "--port", "8123", "--json")
    assert code == 0, err
    assert json.loads(out) == {"model": "tiny-opt", "url": "http://127.0.0.1:8123/v1"}
    settings = settings_of(started)
    assert (settings["host"], settings["port"]) == ("127.0.0.1", 8123)
    assert (settings["dtype"], settings["max-model-len"]) == ("float32", 256)  # as many as it has
    assert json.loads(settings["speculative-config"])["model"] == "offramp_vllm.drafts.ExitDrafts"
    [exits] = json.loads(settings["additional-config"])["offramp"].values()
    assert read_exported(Path(exits)).depths == (2,)
    assert (Path(settings["model"]) / "config.json").is_file()
    assert "mode lossless" in err and "done once" in err


def test_early_exit_does_not_draft_and_a_second_start_writes_nothing(
    run: RunCommand, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exports, "export_vllm", nothing)
    asked = ("serve", "tiny-opt", "--engine", "vllm", "--mode", "early_exit", "--watch", "0.02")
    for turn in range(2):
        code, _, err = run(*asked)
        assert code == 0 and ("done once" in err) == (turn == 0), err
    settings = settings_of(started[1:])
    assert "speculative-config" not in settings
    assert json.loads(settings["additional-config"])["offramp"]["watch"] == 0.02


def test_modes_that_no_request_would_get_are_refused(
    run: RunCommand, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM would start, and answer requests that name no mode in another one."""
    code, _, err = run("serve", "tiny-opt", "--engine", "vllm", "--mode", "full")
    assert code == 1 and "--mode full" in err and len(err.strip().splitlines()) == 2

    def drafting(*given: Any, **more: Any) -> Any:
        opened = loaded(*given, **more)
        adapter = opened.adapter.with_policy(ExitPolicy(drafts={2: 0.1}, lossless=True))
        return replace(opened, adapter=adapter)

    loaded = module.loaded
    monkeypatch.setattr(module, "loaded", drafting)
    monkeypatch.setattr(exports, "export_vllm", nothing)
    code, _, err = run("serve", "tiny-opt", "--engine", "vllm", "--mode", "early_exit")
    assert code == 1 and "no thresholds" in err and not started
    assert run("serve", "tiny-opt", "--engine", "vllm")[0] == 0
    assert "speculative-config" in settings_of(started)


def test_a_template_that_the_checkpoint_lacks_is_handed_over(
    run: RunCommand, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def templated(*given: Any, **more: Any) -> Any:
        opened = loaded(*given, **more)
        opened.processor.chat_template = COMPLETES  # as the photo model's is when it is opened
        return opened

    monkeypatch.setattr(exports, "export_vllm", nothing)
    loaded = module.loaded
    monkeypatch.setattr(module, "loaded", templated)
    code, _, err = run("serve", "tiny-opt", "--engine", "vllm")
    assert code == 0, err
    settings = settings_of(started)
    assert Path(settings["chat-template"]).read_text() == COMPLETES
    assert settings["chat-template-content-format"] == "openai"  # images stand before the turns


def test_keys_are_in_no_list_of_processes(
    run: RunCommand, started: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(exports, "export_vllm", nothing)
    (tmp_path / "keys").write_text("one-secret\nanother-secret\n")
    code, out, err = run(
        "serve", "tiny-opt", "--engine", "vllm", "--api-keys", tmp_path / "keys", "--slots", "4"
    )
    assert code == 0, err
    assert "secret" not in out + err and "secret" not in str(started)
    settings = settings_of(started)
    assert settings["api-key"] == ["one-secret", "another-secret"]
    assert settings["max-num-seqs"] == 4


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--quantize", "int8"), "vLLM's server has no --quantize."),
        (("--threads", "2"), "vLLM's server has no --threads."),
        (("--allowed-hosts", "*"), "vLLM's server has no --allowed-hosts."),
    ],
)
def test_options_that_vllm_lacks_are_refused(
    run: RunCommand, started: list[Any], more: tuple[str, ...], says: str
) -> None:
    code, _, err = run("serve", "tiny-opt", "--engine", "vllm", *more)
    assert code == 1 and says in err and len(err.strip().splitlines()) == 2 and not started


def test_a_model_that_vllm_has_no_class_for_is_refused(run: RunCommand, started: list[Any]) -> None:
    code, _, err = run("serve", "tiny-t5", "--engine", "vllm")
    assert code == 1 and "vLLM has no class" in err and not started


@pytest.mark.parametrize(
    ("python", "says"),
    [
        ("", "vLLM is not installed here."),
        ("/nowhere/python", "/nowhere/python cannot be run: No such file"),
        ("/bin/false", "/bin/false has no vllm."),
    ],
)
def test_a_missing_vllm_is_said_before_a_model_loads(
    run: RunCommand, started: list[Any], monkeypatch: pytest.MonkeyPatch, python: str, says: str
) -> None:
    monkeypatch.setenv(module.PYTHON, python)
    monkeypatch.setattr(module, "MODULES", ("vllm_that_nobody_has", "offramp_vllm"))
    monkeypatch.setattr(module, "loaded", None)
    code, _, err = run("serve", "tiny-opt", "--engine", "vllm")
    said = says.replace("no vllm", "no vllm_that_nobody_has")
    assert code == 1 and said in err and len(err.strip().splitlines()) == 2 and not started


def test_it_answers_nowhere_else(run: RunCommand) -> None:
    code, _, err = run("generate", "tiny-opt", "--engine", "vllm", "--image", "x.png")
    assert code == 1 and "vllm answers in a server alone." in err and "offramp serve" in err
