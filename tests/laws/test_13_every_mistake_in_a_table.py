"""Law 13, by table: every command with every mistake that its options and its files can have.

Each case runs in this process and must end with exit code 1 or 2 and two lines on stderr, without a
traceback, with nothing on stdout, and with all files as they were.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from command_line import EVERY, parser_of

from offramp import cli
from offramp.adapter import shipped
from offramp.data.scenes import world

LONG, SURROGATE = "x" * 300, os.fsdecode(b"\xff\xfe")
VALUES = ("", "x", "-1", "nan", "1e999", "9" * 40, LONG, SURROGATE, "0.5.5", "1,,2")
"""Values that most options cannot take; those that one can are left out of its cases."""
SPELT = ("--adapter", "--backbone", "--data", "--out", "--json")
"""Options that are also misspelt, which the parser refuses in one place."""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good and bad files of every kind that commands read."""
    root = tmp_path_factory.mktemp("files")
    world.render(world.scene("test", 0)).save(root / "good.png")
    (root / "not-an-image.png").write_bytes(b"not an image")
    (root / "cut.png").write_bytes((root / "good.png").read_bytes()[:60])
    row = json.dumps({"image": "good.png", "captions": ["a red square"]}) + "\n"
    texts = {
        "good.jsonl": row,
        "empty.jsonl": "",
        "deep.jsonl": "[" * 100_000,
        "list.jsonl": "[1]\n",
        "broken.jsonl": '{"image": ',
        "no-image.jsonl": "{}\n",
        "lost.jsonl": '{"image": "gone.png"}\n',
        "both.jsonl": json.dumps({"image": "good.png", "captions": ["a"], "question": "b"}),
        "numbers.jsonl": '{"image": 3}\n',
        "long.jsonl": json.dumps({"image": LONG}),
        "half.jsonl": '{"image": "good.png", "captions": [3]}\n',
        "bad-image.jsonl": row.replace("good.png", "not-an-image.png"),
        "endless.jsonl": row[:-2] + f', "prompt": "{LONG * 9}"}}',
        "surrogate.jsonl": row[:-2] + ', "prompt": "\\ud800"}',
        "empty.json": "",
        "deep.json": "[" * 100_000,
        "list.json": "[]",
        "other.json": '{"a": 1}',
        "list.yaml": "- 1",
        "broken.yaml": "a: [",
        "unknown.yaml": "sptes: 3",
        "text.yaml": "hello",
        "quiet.yaml": "quiet: 3",
        "deep.yaml": "[" * 500,
    }
    for name, text in texts.items():
        (root / name).write_text(text)
    (root / "latin.jsonl").write_bytes('{"image": "h\xe4.png"}\n'.encode("latin-1"))
    os.mkfifo(root / "pipe")
    (root / "folder").mkdir()
    _adapters(root)
    _backbones(root)
    return root


def _adapters(root: Path) -> None:
    good = Path(shutil.copytree(shipped.tiny_exits("opt"), root / "adapter"))
    text = (good / "adapter.json").read_text()
    damaged = {
        "cut": text[: len(text) // 2],
        "deep": "[" * 100_000,
        "list": "[]",
        "empty": "",
        "format": text.replace('"format": 1', '"format": 99'),
        "nothing": "{}",
        "depths": text.replace('"depths": [', '"depths": [99, '),
    }
    for name, content in damaged.items():
        folder = Path(shutil.copytree(good, root / f"adapter-{name}"))
        (folder / "adapter.json").write_text(content)
    flipped = Path(shutil.copytree(good, root / "adapter-flipped")) / "exits.safetensors"
    content = bytearray(flipped.read_bytes())
    content[:8] = b"\xff" * 8
    flipped.write_bytes(content)


def _backbones(root: Path) -> None:
    config = (shipped.tiny_folder("opt") / "config.json").read_text()
    for name, content in {
        "broken": "{",
        "deep": "[" * 100_000,
        "other": '{"model_type": "bert"}',
    }.items():
        (root / f"backbone-{name}").mkdir()
        (root / f"backbone-{name}" / "config.json").write_text(content)
    folder = root / "backbone-pickled"
    folder.mkdir()
    (folder / "config.json").write_text(config)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(print))


def base(command: str, tree: Path, out: Path) -> dict[str, list[str]]:
    """A command line of a command that is right, by option; "": the word without one."""
    adapter, data = [str(tree / "adapter")], [str(tree / "good.jsonl")]
    model = {"--backbone": ["tiny-opt"]}
    given = {
        "train": {**model, "--data": data, "--steps": ["1"]},
        "calibrate": {"--adapter": adapter, "--data": data},
        "sweep": {"--adapter": adapter, "--data": data},
        "generate": {"--adapter": adapter, "--image": [str(tree / "good.png")]},
        "chat": {"--adapter": adapter, "--image": [str(tree / "good.png")]},
        "caption": {"": [str(tree / "good.png")], "--model": adapter},
        "serve": {"": adapter},
        "eval": {"--adapter": adapter, "--task": ["captions"], "--data": data},
        "export": {"--adapter": adapter, "--gguf": ["q8_0"]},
        "report": {"": adapter},
        "demo": {},
        "inspect": {"": adapter},
        "verify": {"": adapter, "--data": data},
        "env": {},
        "completion": {"": ["bash"]},
    }[command]
    silent = ("caption", "chat", "generate", "serve", "inspect", "env", "completion")
    return given if command in silent else {**given, "--out": [str(out)]}


def options_of(command: str) -> list[argparse.Action]:
    with pytest.raises(SystemExit):
        parser_of(command).parse_args([command, "--help"])  # makes its options
    parser = parser_of(command)
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    chosen = commands.choices[command]
    if chosen.late is not None:
        chosen.late(chosen)
    return [action for action in chosen._actions if action.option_strings]


def cannot_take(action: argparse.Action, value: str) -> bool:
    """Whether an option refuses a value by itself."""
    if action.choices is not None:
        return value not in action.choices
    if action.type in (None, Path, float):
        return False
    try:
        action.type(value)  # type: ignore[operator]
    except (argparse.ArgumentTypeError, ValueError):
        return True
    return False


FLOATS = {"--target": ("0", "1", "-1", "nan", "inf"), "--confidence": ("0", "1", "nan", "2")}
TRAINING = {
    "--learning-rate": ("0", "-1", "nan"),
    "--depths": ("0", "12", "99", "3,3", "1,x"),
    "--shortlist": ("1", "999999"),
    "--losses": ("nothing=1", "l1", "l1=x", "l1=-1", "distillation=-1", "cross_entropy=nan"),
}
ADAPTERS = (
    "gone",
    "folder",
    "good.png",
    "pipe",
    LONG,
    SURROGATE,
    "",
    "adapter-cut",
    "adapter-deep",
    "adapter-list",
    "adapter-empty",
    "adapter-format",
    "adapter-nothing",
    "adapter-depths",
    "adapter-flipped",
)
BACKBONES = (
    "gone",
    "folder",
    "pipe",
    "good.png",
    LONG,
    SURROGATE,
    "backbone-broken",
    "backbone-deep",
    "backbone-other",
    "backbone-pickled",
)
DATA = (
    "gone.jsonl",
    "folder",
    "pipe",
    "good.png",
    LONG,
    SURROGATE,
    "",
    "empty.jsonl",
    "deep.jsonl",
    "list.jsonl",
    "broken.jsonl",
    "no-image.jsonl",
    "lost.jsonl",
    "both.jsonl",
    "numbers.jsonl",
    "long.jsonl",
    "half.jsonl",
    "latin.jsonl",
    "empty.json",
    "deep.json",
    "list.json",
    "other.json",
)
IMAGES = (
    "gone.png",
    "folder",
    "pipe",
    "not-an-image.png",
    "cut.png",
    LONG,
    SURROGATE,
    "empty.jsonl",
)
CONFIGS = (
    "gone.yaml",
    "folder",
    "pipe",
    "list.yaml",
    "broken.yaml",
    "unknown.yaml",
    "text.yaml",
    "quiet.yaml",
    "deep.yaml",
    "good.png",
    "",
    SURROGATE,
)
OUTS = ("good.jsonl/below", "good.jsonl/below/that", LONG, f"new/{LONG}", "pipe/below")
DEVICES = ("foo", "cuda:99", "", "cpu:x", LONG, SURROGATE)


def files_of(tree: Path, names: tuple[str, ...]) -> list[str]:
    return [str(tree / name) if name else "" for name in names]


def own_cases(command: str, tree: Path) -> Iterator[tuple[str, str]]:
    """(option, value) of a command that argparse takes and the command refuses."""
    named = {a.option_strings[-1] for a in options_of(command)}
    tables: dict[str, list[str]] = {"--adapter": files_of(tree, ADAPTERS)}
    tables["--backbone"] = files_of(tree, BACKBONES)
    tables["--data"] = files_of(tree, DATA)
    tables["--image"] = files_of(tree, IMAGES)
    tables["--device"] = list(DEVICES)
    tables["--config"] = files_of(tree, CONFIGS)
    if command == "generate":
        tables |= {"--temperature": ["0", "-1", "nan"], "--top-p": ["0"], "--prompt": [SURROGATE]}
    if command == "train":
        tables["--data"] += files_of(tree, ("endless.jsonl", "surrogate.jsonl"))
    outs = (*OUTS, "folder" if command in ("report", "sweep", "verify") else "good.png")
    tables["--out"] = files_of(tree, outs)
    tables["--revision"] = ["main"] if "--backbone" in named or command == "inspect" else []
    if command == "calibrate":
        tables |= {n: list(v) for n, v in FLOATS.items()}
    if command == "train":
        tables |= {n: list(v) for n, v in TRAINING.items()}
    for option, values in tables.items():
        yield from ((option, value) for value in values if option in named)
    if command == "inspect":
        yield from (("", value) for value in files_of(tree, BACKBONES))
        damaged = [name for name in ADAPTERS if name.startswith("adapter-")][:-2]
        yield from (("", value) for value in files_of(tree, tuple(damaged)))
    if command == "serve":
        yield from (("", value) for value in files_of(tree, ADAPTERS))
        yield from (
            ("--api-keys", value) for value in files_of(tree, ("gone", "folder", "good.png"))
        )
        yield from (("--image-folder", value) for value in files_of(tree, ("gone", "good.png")))
        yield from (("--port", "65536"),)
        yield from (("--watch", value) for value in ("level=0", "slack", "share=2", "level=x"))
    if command == "report":
        runs = ("gone", "folder", "good.png", "pipe", LONG, SURROGATE, "adapter-deep", "other.json")
        yield from (("", value) for value in files_of(tree, runs))


def cases(command: str, tree: Path, out: Path) -> Iterator[list[str]]:
    """Wrong command lines of a command."""
    given = base(command, tree, out)

    def line(**changed: list[str]) -> list[str]:
        words = [command]
        for option, values in {**given, **changed}.items():
            words += [option, *values] if option else values
        return words

    for action in options_of(command):
        option = action.option_strings[-1]
        if option == "--help":
            continue
        if action.nargs != 0 and not isinstance(action, argparse.BooleanOptionalAction):
            if action.nargs not in ("*", "?"):
                yield [*line(), option]  # without its value
            # Names are looked up in a list whatever they are; numbers are parsed in many ways.
            for value in VALUES if action.choices is None else ("", LONG, SURROGATE):
                if cannot_take(action, value):
                    yield (
                        line(**{option: [f"{value}"]})
                        if value[:1] != "-"
                        else [*line(), f"{option}={value}"]
                    )
        if action.required:
            yield [command, *(w for o, v in given.items() if o != option for w in (o, *v))]
        if option in SPELT:
            yield [*line(), f"{option}x", "1"]
    yield [*line(), "--nonsense"]
    yield (
        [*line(), "one-word-too-many"] if command not in ("report", "generate") else [*line(), "-q"]
    )
    for option, value in own_cases(command, tree):
        yield line(**{option: [value]})


def snapshot(tree: Path) -> dict[str, tuple[int, int]]:
    """Sizes and times of files; of folders their names alone, for a try whether one may be written
    to changes its time."""
    found = [(path, path.lstat()) for path in sorted(tree.rglob("*"))]
    return {
        str(path): (0, 0) if path.is_dir() else (stat.st_size, stat.st_mtime_ns)
        for path, stat in found
    }


@pytest.mark.slow
@pytest.mark.parametrize("command", EVERY)
def test_every_mistake_is_two_lines(
    command: str,
    tree: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shipped, "load_tiny", cache(shipped.load_tiny))
    before, wrong = snapshot(tree), []
    for number, words in enumerate(cases(command, tree, tmp_path / "out")):
        capsys.readouterr()
        try:
            code: Any = cli.main(words)
        except BaseException as error:
            code = repr(error)
        out, err = capsys.readouterr()
        lines = err[err.rfind("error: ") :].rstrip("\n").split("\n") if "error: " in err else []
        held = code in (1, 2) and len(lines) == 2 and not out and "Traceback" not in err
        if not held or snapshot(tree) != before or (tmp_path / "out").exists():
            wrong.append(
                f"{number}: {' '.join(words)[:300]!r}: {code}, {out[-200:]!r}, {err[-400:]!r}"
            )
            before = snapshot(tree)
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert not wrong, "\n".join([f"{len(wrong)} wrong:", *wrong[:40]])


def test_the_table_has_at_least_four_hundred_cases(tree: Path, tmp_path: Path) -> None:
    total = {command: len(list(cases(command, tree, tmp_path))) for command in EVERY}
    assert sum(total.values()) >= 400 and min(total.values()) >= 10, total
