"""`--config`: each value is what its option takes, as if it were typed, or refused."""

from __future__ import annotations

import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from command_line import RunCommand, assert_two_lines, parser_of

from offramp.core.errors import OfframpError
from offramp.serving.monitor.watch_config import WatchConfig

NEEDED = ("--backbone", "tiny-opt", "--data", "a", "--out", "b")


def read(tmp_path: Path, text: str | bytes, command: str = "train", *words: str) -> Any:
    file = tmp_path / "run.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    words = words or (NEEDED if command == "train" else ("tiny-opt",))
    return parser_of(command).parse_args([command, *words, "--config", str(file)])


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("prompt: a b", "prompt", "a b"),
        ('prompt: "3"', "prompt", "3"),
        ("prompt: 'null'", "prompt", "null"),
        ('prompt: "true"', "prompt", "true"),
        ("prompt: 2020-01-01", "prompt", "2020-01-01"),
        ("prompt: 1:30", "prompt", "1:30"),
        ("prompt: yes", "prompt", "yes"),
        ("prompt: 3", "prompt", "3"),
        ("prompt: true", "prompt", "true"),
        ("revision: 0123", "revision", "0123"),
        ("steps: &a 3", "steps", 3),
        ("prompt: '--steps'", "prompt", "--steps"),
        ('"prompt": "-x"', "prompt", "-x"),
        ("prompt: |\n  two\n  lines\n", "prompt", "two\nlines\n"),
        ("steps: 7", "steps", 7),
        ("steps: '7'", "steps", 7),
        ("learning_rate: 1e-4", "learning_rate", 1e-4),
        ("shortlist: null", "shortlist", None),
        ("shortlist: ~", "shortlist", None),
        ("shortlist: 0", "shortlist", 0),
        ("depths: 2,5", "depths", (2, 5)),
        ("depths: [2, 5]", "depths", (2, 5)),
        ("depths:\n- 2\n- 5\n", "depths", (2, 5)),
        ("depths: 3", "depths", (3,)),
        ("losses: {l1: 0.5}", "losses", {"l1": 0.5}),
        ("overwrite: True", "overwrite", True),
        ("overwrite: false", "overwrite", False),
        ("", "steps", 1000),
        ("# nothing\n", "steps", 1000),
        ("---\n", "steps", 1000),
        ("\ufeffsteps: 7", "steps", 7),
        ("data: [a, b]", "data", ["a", "b"]),
    ],
)
def test_values_are_what_their_option_takes(
    text: str, name: str, value: Any, tmp_path: Path
) -> None:
    needed = [w for w in NEEDED if name != "data" or w not in ("--data", "a")]
    found = getattr(read(tmp_path, text, "train", *needed), name)
    assert found == value or (name == "steps" and value == 1000 and found > 0)


@pytest.mark.parametrize(
    "text",
    [
        "prompt: null",
        "prompt: ~",
        "prompt:",
        "prompt: !x y",
        "steps: null",
        "steps: true",
        "steps: [1, 2]",
        "steps: {a: 1}",
        "steps: 1.5",
        "steps: .inf",
        "steps: .nan",
        "learning_rate: x",
        "depths: [[2], 5]",
        "depths: [{a: 1}]",
        "depths: [null]",
        "depths: [true]",
        "losses: {l1: [1]}",
        "steps: 1\nsteps: 2",
        "batch_size: 1\nbatch-size: 2",
        "losses: {l1: 1, l1: 2}",
        "a: &a [x]\nb: *a",
        "steps: *a",
        "<<: {steps: 3}",
        "? [a]\n: 3",
        "- 1",
        "x",
        "steps: 1\n---\nsteps: 2",
        "config: x",
        "help: true",
        "overwrite: 1",
        "overwrite: yes",
        "overwrite: null",
        "quiet: no",
        "steps: 3: 4",
        "a: [",
        "\tsteps: 3",
        "seed: -1",
        b"steps: \xff",
        "steps: 3".encode("utf-16"),
        b"steps: \x00",
        "[" * 100_000,
        "{" * 100_000,
        "a: " * 10_000,
        "steps: " + "9" * 100_000,
        "s" * 100_000 + ": 1",
    ],
)
def test_everything_else_is_refused(text: str | bytes, tmp_path: Path, run: RunCommand) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    begun = time.process_time()
    found = run("train", *NEEDED, "--config", file)
    assert_two_lines(found)
    assert len(found[2]) < 6000
    assert time.process_time() - begun < 10


def test_a_file_that_grows_is_never_built(tmp_path: Path, run: RunCommand) -> None:
    """Anchors that double, a megabyte of names, and more than is read."""
    lines = ["a: &a0 [x]"] + [f"b{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
    for text in ("\n".join(lines), "steps: 3\n" * 100_000, "x" * (2**20 + 1), "- x\n" * 200_000):
        file = tmp_path / "run.yaml"
        file.write_text(text)
        begun = time.process_time()
        assert_two_lines(run("train", *NEEDED, "--config", file))
        assert time.process_time() - begun < 10


def test_a_list_does_not_take_what_stands_behind_it(tmp_path: Path) -> None:
    found = read(tmp_path, "image_domains: [a.org, b.org]\nqueue: 5\n", "serve")
    assert (found.name, found.image_domains, found.queue) == ("tiny-opt", ["a.org", "b.org"], 5)
    found = read(
        tmp_path, "image_domains: [a.org]", "serve", "tiny-opt", "--image-domains", "c.org"
    )
    assert found.image_domains == ["c.org"]
    found = read(tmp_path, "allowed_hosts: ['*']\nshrink_on_load: true\nquiet: true", "serve")
    assert (found.allowed_hosts, found.shrink_on_load, found.quiet) == (["*"], True, True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("watch: {share: 0.05, action: warn}\nimage_limits: {count: 2}", ()),
        ("watch: 0.5", ("--watch", "0.05,action=warn", "--image-limits=count=2")),
    ],
)
def test_settings_of_one_thing_are_one_option(
    tmp_path: Path, text: str, words: tuple[str, ...]
) -> None:
    found = read(tmp_path, text, "serve", "tiny-opt", *words)
    assert found.watch == {"share": 0.05, "action": "warn"} and found.image_limits == {"count": 2}


def test_every_setting_of_the_watch_that_has_a_help_can_be_typed(tmp_path: Path) -> None:
    numbers = dict.fromkeys(("share", "level", "slack", "deadline"), "0.5")
    files = dict.fromkeys(("keep", "state", "frequencies"), "x")
    given = {**numbers, **files, "action": "warn"}
    assert set(given) == {field.name for field in fields(WatchConfig) if field.metadata}
    words = ",".join(f"{name}={value}" for name, value in given.items())
    found = read(tmp_path, "queue: 5", "serve", "tiny-opt", "--watch", words)
    assert {name: str(value) for name, value in found.watch.items()} == given


def test_what_is_typed_wins_over_every_kind(tmp_path: Path) -> None:
    text = "overwrite: true\nlosses: {l2: 1}\ndepths: [2]\nprompt: x\nshortlist: 3"
    words = (
        *NEEDED,
        "--losses",
        "cosine=2",
        "--depths",
        "5",
        "--prompt",
        "y",
        "--shortlist",
        "none",
    )
    found = read(tmp_path, text, "train", *words)
    assert (found.overwrite, found.losses, found.depths) == (True, {"cosine": 2.0}, (5,))
    assert (found.prompt, found.shortlist) == ("y", None)


def test_all_of_the_vocabulary_can_be_asked_for(tmp_path: Path) -> None:
    assert read(tmp_path, "", "train", *NEEDED, "--shortlist", "0").shortlist == 0


@pytest.mark.parametrize("word", ["--conf", "--step", "--bat", "--back", "--qui", "--no-cond"])
def test_abbreviations_are_not_taken(word: str, run: RunCommand, tmp_path: Path) -> None:
    assert_two_lines(run("train", *NEEDED, word, tmp_path / "run.yaml"), word, "not known")


def test_what_stands_behind_two_dashes_is_no_option(tmp_path: Path) -> None:
    with pytest.raises(OfframpError, match="not known"):
        parser_of("train").parse_args(["train", *NEEDED, "--", "--config", "gone.yaml"])
