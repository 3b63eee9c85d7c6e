"""Command lines that nobody wrote: a command that works, one or two of whose options are given odd
values. Options, and which take values, are asked of the parser."""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from command_line import TRAIN, parser_of

from offramp.cli.command_line import COMMANDS


@dataclass(frozen=True)
class Places:
    """What a command line may name. adapter: a copy that may be damaged. empty: for what is
    written."""

    adapter: Path
    photos: Path
    held_out: Path
    empty: Path

    @property
    def working(self) -> dict[str, list[str]]:
        """By command, arguments with which it works, and soon ends; `--out` is in `empty`."""
        out, adapter = str(self.empty / "out"), str(self.adapter)
        data, image = str(self.held_out), str(self.photos / "0.png")
        some = ["--data", data, "--limit", "2"]
        short = ["--max-new-tokens", "2"]
        return {
            "train": [*map(str, TRAIN), "--data", str(self.photos / "rows.jsonl"), "--out", out],
            "calibrate": ["--adapter", adapter, *some, *short, "--out", out],
            "sweep": [adapter, *some, *short, "--out", out],
            "verify": [adapter, *some, *short, "--quick", "--slots", "1", "--out", out],
            "generate": ["--adapter", adapter, "--image", image, "--prompt", "a", *short],
            "caption": [image, "--model", adapter, *short],
            "serve": [adapter, "--port", "0"],
            "eval": ["--adapter", adapter, "--task", "captions", *some, *short, "--out", out],
            "export": ["--adapter", adapter, "--gguf", "f32", "--out", out],
            "report": [adapter, "--out", out],
            "inspect": ["tiny-opt"],
            "env": [],
            "completion": ["bash"],
        }

    @property
    def odd(self) -> list[str]:
        """Values, some of them of files; none leads out of the test's own folders, as a value may
        be where something is written."""
        return [
            "",
            " ",
            ".",
            "-",
            "--",
            "x" * 5000,
            "x/" * 2500,
            "\udcff",
            "a\x00b",
            "\n",
            "\u202e",
            "é",
            "none",
            "true",
            "auto",
            "all",
            "nan",
            "inf",
            "1e999",
            "-1",
            "0",
            "00",
            "1",
            "2",
            "1,2",
            "1,,2",
            ",",
            "0.5",
            "9" * 5000,
            str(2**31),
            str(2**63),
            "=",
            "a=b",
            "{}",
            "[]",
            "null",
            "tiny-opt",
            "photo",
            str(self.empty),
            str(self.adapter),
            str(self.photos / "0.png"),
            str(self.held_out),
            *(str(self.strange / name) for name in STRANGE),
        ]

    @property
    def strange(self) -> Path:
        return self.photos / "strange"


STRANGE = (
    "pipe",
    "none",
    "empty.json",
    "binary",
    "list.json",
    "nested.json",
    "\udcff.jsonl",
    "folder",
    "loop",
    "pipe.jsonl",
    "pipe.png",
    "unreadable",
    "rows.jsonl",
    "adapter",
)


def make_strange(folder: Path) -> None:
    """Files and folders that no command wants."""
    folder.mkdir(exist_ok=True)
    for name in ("pipe", "pipe.jsonl", "pipe.png"):
        os.mkfifo(folder / name)
    (folder / "empty.json").touch()
    (folder / "binary").write_bytes(bytes(range(256)) * 20)
    (folder / "list.json").write_text("[1, 2]")
    (folder / "nested.json").write_text("[" * 100_000)
    (folder / "\udcff.jsonl").write_text('{"image": "0.png"}\n')
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to("loop")
    (folder / "unreadable").touch(mode=0o000)
    rows = ['{"image": "pipe.png", "captions": ["a"]}', '{"image": "\\udcff", "captions": ["a"]}']
    (folder / "rows.jsonl").write_text("\n".join(rows))
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter.json").write_text("{}")


FUZZED = [name for name in COMMANDS if name not in ("demo", "chat")]
"""Without what trains, whatever it is told, and what waits for lines."""


@cache
def options_of(command: str) -> Sequence[argparse.Action]:
    parser = parser_of(command)
    list(parser.loaded())
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return [a for a in commands.choices[command]._actions if a.dest != "help"]


def drawn(draw: random.Random, places: Places) -> list[str]:
    """A command line, of which one or two options are odd."""
    command = draw.choice(FUZZED)
    words = [command, *places.working[command]]
    options = options_of(command)
    for action in draw.sample(options, min(draw.choice((1, 1, 2)), len(options))):
        values = [] if action.nargs == 0 else [value_of(action, draw, places)]
        if action.nargs in ("+", "*") and draw.random() < 0.2:
            values.append(value_of(action, draw, places))
        if not action.option_strings:
            words = [command, *values, *words[2:]]
        elif values and draw.random() < 0.5:
            words.append(f"{draw.choice(action.option_strings)}={values[0]}")
        else:
            words += [draw.choice(action.option_strings), *values]
    return words


def value_of(action: argparse.Action, draw: random.Random, places: Places) -> str:
    known: list[Any] = [*(action.choices or ())]
    return str(draw.choice(known if known and draw.random() < 0.3 else places.odd))
