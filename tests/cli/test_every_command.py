"""What every command takes and how its help reads."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
from command_line import EVERY, TRAIN, RunCommand, assert_two_lines
from command_line import parser_of as program_parser

import offramp
from offramp.cli.command_line import _without_pytorch, build_parser, offramp_program
from offramp.cli.commands.env import optional_packages
from offramp.cli.commands.train import GROUPS, NOT_SAID
from offramp.cli.parser import Parser
from offramp.core.missing import install_command
from offramp.training.config import OBJECTIVES, TrainConfig
from offramp_llama_cpp.command_line import SLICED


@cache
def parser_of(command: str) -> Parser:
    parser = program_parser(command)
    list(parser.loaded())
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    found: Parser = commands.choices[command]
    return found


def actions() -> Iterator[tuple[str, argparse.Action]]:
    for command in EVERY:
        yield from ((command, action) for action in parser_of(command)._actions)


def test_the_server_tells_its_options_without_loading_pytorch() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import atexit, sys; from offramp.cli import main; "
            "atexit.register(lambda: print('torch' in sys.modules)); main(['serve', '--help-all'])",
        ],
        check=False,
        capture_output=True,
        text=True,
    )
    assert "--watch" in done.stdout and done.stdout.splitlines()[-1] == "False"


def test_offramp_alone_shows_its_help(run: RunCommand) -> None:
    code, out, err = run()
    assert (code, err) == (0, "") and "offramp caption dog.jpg" in out and "--version" in out


@pytest.mark.parametrize("command", EVERY)
def test_every_command_takes_the_same(command: str) -> None:
    known = parser_of(command)._option_string_actions
    assert {"--quiet", "--config", "--help"} <= set(known)
    assert ("--json" in known) is (command not in ("completion", "chat"))


MOST = 80
"""Options by name, over all commands."""


def test_there_are_few_options() -> None:
    assert len({flag for _, action in actions() for flag in action.option_strings[-1:]}) <= MOST


@pytest.mark.parametrize("command", EVERY)
def test_an_option_with_a_value_says_what_holds_without_it(command: str) -> None:
    fresh = parser_of.__wrapped__(command)  # a file of options makes others optional
    silent = [
        action.option_strings[-1]
        for action in fresh._actions
        if action.option_strings
        and action.nargs != 0
        and not action.required
        and action.help != argparse.SUPPRESS
        and "default" not in (action.help or "")
    ]
    assert not silent


@pytest.mark.parametrize("command", EVERY)
def test_no_list_of_options_is_long(command: str) -> None:
    for group in parser_of(command)._action_groups:
        assert len(group._group_actions) <= 10, group.title


def test_every_field_of_a_training_run_is_in_one_group() -> None:
    groups = (*GROUPS.values(), OBJECTIVES, NOT_SAID)
    grouped = [name for names in groups for name in names]
    assert sorted(grouped) == sorted(field.name for field in fields(TrainConfig))


@pytest.mark.parametrize("command", EVERY)
def test_help_shows_what_is_usual_and_the_rest_where_it_is_asked_for(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = parser_of(command)
    options = [
        action
        for action in parser.loaded()
        if action.option_strings and action.help != argparse.SUPPRESS
    ]
    every, needed = (
        {next(o for o in action.option_strings if o.startswith("--")) for action in some}
        for some in (options, [action for action in options if action.required])
    )

    def shown(*words: str) -> set[str]:
        with pytest.raises(SystemExit):
            parser.parse_args(words)
        return set(re.findall(r"^  (?:-\w, )*(--[\w-]+)", capsys.readouterr().out, re.MULTILINE))

    usual = shown("--help")
    assert len(usual) <= 12 and needed <= usual <= every
    if usual != every:
        assert "--help-all" in usual and every == shown("--help-all")


def test_help_names_every_choice() -> None:
    for command, action in actions():
        help = getattr(action, "shown", None) or action.help or ""
        for choice in action.choices or () if help != argparse.SUPPRESS else ():
            assert str(choice) in help, (command, action.dest, choice)


@pytest.mark.parametrize("command", ["train", "export"])
@pytest.mark.parametrize("spelling", [["3,6"], ["3", "6"], ["3", "6,8"]])
def test_a_list_of_depths_is_spelt_one_way_and_taken_in_two(
    command: str, spelling: list[str]
) -> None:
    action = parser_of(command)._option_string_actions["--depths"]
    assert action.metavar == "N,N"
    alone = Parser()
    alone._add_action(action)
    depths = getattr(alone.parse_args(["--depths", *spelling]), action.dest)
    assert depths == tuple(int(n) for word in spelling for n in word.split(","))


@pytest.mark.parametrize("name", ["opt", "tiny-opt", "offramp/tiny-opt"])
def test_a_tiny_model_has_one_name_and_the_old_one(name: str) -> None:
    assert parser_of("demo").parse_args(["--backbone", name]).backbone == "tiny-opt"


# -- --config -----------------------------------------------------------------------------------


def parsed(tmp_path: Path, text: str, *words: str) -> argparse.Namespace:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    needed = ["--backbone", "tiny-opt", "--data", "a", "--out", "b"]
    return parser_of("train").parse_args([*needed, "--config", str(file), *words])


def test_a_file_gives_options_and_the_command_line_wins(tmp_path: Path) -> None:
    text = (
        "steps: 7\nbatch_size: 4\ndepths: [2, 5]\noverwrite: true\n"
        "resume: false\nshortlist: null\nlosses: {l1: 0.5}\nlimit: 3\nlearning-rate: 1.0e-4\n"
    )
    found = parsed(tmp_path, text, "--steps", "9")
    assert (found.steps, found.batch_size, found.depths) == (9, 4, (2, 5))
    assert (found.overwrite, found.resume) == (True, False)
    assert (found.shortlist, found.losses, found.learning_rate) == (None, {"l1": 0.5}, 1e-4)


def test_a_file_may_give_what_is_required(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("backbone: tiny-opt\ndata: [a.jsonl]\nout: x\n")
    found = parser_of("train").parse_args([f"--config={file}"])
    assert (found.backbone, found.data, found.out) == ("tiny-opt", ["a.jsonl"], Path("x"))


def test_an_unknown_option_in_a_file_is_answered_with_the_nearest(
    run: RunCommand, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text("stpes: 3\n")
    assert_two_lines(run("train", "--config", tmp_path / "run.yaml"), "stpes", "'steps'")


# -- output -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_results_are_text_for_people_and_json_where_asked(
    run: RunCommand, photos: Path, tmp_path: Path
) -> None:
    asked = ("train", *TRAIN, "--data", photos)  # a folder of images, and of one JSONL
    code, text, _ = run(*asked, "--out", tmp_path / "a")
    _, shown, _ = run(*asked, "--out", tmp_path / "b", "--json")
    told = json.loads(shown)
    assert code == 0 and "agreement:" in text and "{" not in text
    assert all(f"{depth}: {share:.4g}" in text for depth, share in told["agreement"].items())


@pytest.mark.slow
def test_quiet_leaves_results_and_errors() -> None:
    def stderr(*words: str) -> str:
        return subprocess.run(
            [sys.executable, "-m", "offramp.cli", *words],
            capture_output=True,
            text=True,
            check=False,
        ).stderr

    missing = ("calibrate", "--adapter", "gone", "--data", "gone.jsonl")
    assert "A guarantee of 0.01 by image needs" in stderr(*missing)
    quiet = stderr(*missing, "--quiet")
    assert quiet.startswith("error: ") and len(quiet.splitlines()) == 2


def test_other_packages_tell_of_warnings_alone_and_draw_no_bars_into_a_file(
    run: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "0")
    names = ("onnxscript.optimizer", "onnx_ir.passes", "offramp.core.engine")
    root = logging.getLogger().level
    try:
        assert run("env")[0] == 0
        told = [logging.getLogger(name).isEnabledFor(logging.INFO) for name in names]
        assert told == [False, False, True]
        assert logging.getLogger("onnxscript").isEnabledFor(logging.WARNING)
        assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"
    finally:
        logging.getLogger().setLevel(root)


def test_env_tells_versions_devices_and_what_is_missing(run: RunCommand) -> None:
    import torch

    code, out, _ = run("env", "--json")
    found = json.loads(out)
    assert code == 0 and found["packages"]["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads() and "cpu" in found["devices"]


def test_a_package_that_is_not_installed_comes_with_its_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "packaging", None)  # not everywhere there without PyTorch
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    needs = ["numpy>=1", "nowhere-to-be-found>=1; extra == 'eval'", "ruff; extra == 'dev'"]
    monkeypatch.setattr("importlib.metadata.requires", lambda _: needs)
    expected = {"nowhere-to-be-found": f"not installed: {install_command('eval')}"}
    assert optional_packages() == expected


OTHERS = {
    "--additional-config",
    "--force-reinstall",
    "--no-deps",
    "--dest",
    "--porcelain",
    "--error-unmatch",
    "--no",
    "--untracked-files",
    "--model",
    "--gen",
    "--merge",
    "--model-draft",
    "--outfile",
    "--spec-type",
    "--speculative-config",
    "--target-model-dir",
}
"""Options of pip, git, harnesses, llama.cpp and vLLM; and how a flag that is off begins."""


def test_every_option_that_the_source_names_is_one() -> None:
    programs = (offramp_program(), _without_pytorch(SLICED))
    known = {o for one in programs for a in build_parser(one).loaded() for o in a.option_strings}
    named = {
        word
        for file in Path(offramp.__file__).parent.rglob("*.py")
        for word in re.findall(r"(?<![\w-])--[a-z]+(?:-[a-z]+)*", file.read_text("utf-8"))
    }
    assert sorted(named - known - OTHERS) == []


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_commands_options_and_names(shell: str, run: RunCommand) -> None:
    pytest.importorskip("shtab")
    code, out, _ = run("completion", shell)
    assert code == 0
    assert all(word in out for word in ("calibrate", "--threshold", "max_probability", "lossless"))


def test_the_completion_for_bash_is_a_script_that_bash_reads(run: RunCommand) -> None:
    pytest.importorskip("shtab")
    script = run("completion", "bash")[1]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
