"""Language models by the commands that a user types: prompts made of patterns and things, each
command a process of its own, and the model that it leaves."""

from __future__ import annotations

import itertools
import json
import os
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from offramp_photo.build import load_language
from transformers import AutoTokenizer

from offramp.adapter.adapter import Adapter
from offramp.common.folders import cache_folder
from offramp.core.models.backbone import Backbone
from offramp.core.storage import read_json, write_atomic
from offramp.features.input_processor import InputProcessor
from offramp_lab.records.record import Kept, words

WORDS: dict[str, list[str]] = read_json(Path(__file__).with_name("text_prompts.json"))
THINGS = WORDS["things"]
Parts = Mapping[str, tuple[Sequence[str], int]]
"""By use: which things, and how many of the prompts."""


def prompts_of(
    things: Sequence[str], count: int, patterns: Sequence[str] = WORDS["patterns"]
) -> list[str]:
    """Some of what the patterns make of the things, by chance."""
    made = [pattern.format(thing) for thing, pattern in itertools.product(things, patterns)]
    return random.Random(0).sample(made, count)


def written(
    work: Path, parts: Parts, patterns: Sequence[str] = WORDS["patterns"]
) -> dict[str, list[str]]:
    """The prompts by use, each in a file."""
    prompts = {name: prompts_of(*part, patterns) for name, part in parts.items()}
    for name, lines in prompts.items():
        write_atomic(work / f"{name}.txt", "\n".join(lines) + "\n")
    return prompts


def write_model(file: Path, out: Path) -> None:
    """The model of a GGUF file and its tokenizer as a folder, unless it is there."""
    if out.exists():
        return
    lm, tokenizer = load_language(file)
    template = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    tokenizer.chat_template = template.chat_template
    plain = type(lm)(lm.config).to(lm.dtype)  # what came quantised is not saved
    plain.load_state_dict(lm.state_dict())
    plain.save_pretrained(out)
    tokenizer.save_pretrained(out)


def loaded(work: Path) -> tuple[Adapter, InputProcessor]:
    """The model in float32 with the exits that were trained, and its encoder."""
    backbone = Backbone.from_pretrained(work / "model", dtype=torch.float32)
    encoder = InputProcessor(backbone, AutoTokenizer.from_pretrained(work / "model"))
    return Adapter.load(work / "exits", backbone), encoder


class Walk:
    """Commands whose files lie in a folder. What one took and said is kept there, and it is not run
    again. read: other folders that they name."""

    def __init__(self, work: Path, *read: Path) -> None:
        self._steps = Kept(work / "steps.jsonl")
        self._folders = (work, cache_folder("photo"), *read)

    def step(self, name: str, arguments: Sequence[str]) -> dict[str, Any]:
        """A command of the product. name: begins with it."""
        typed = ["offramp", name.partition(" ")[0], *arguments]
        return self._step(name, [sys.executable, "-m", "offramp.cli"], typed)

    def converted(
        self, name: str, converter: Path, model: Path, out: Path, more: Sequence[str] = ()
    ) -> dict[str, Any]:
        """A model's folder as a file in q8_0, by llama.cpp's converter."""
        typed = [converter.name, *words("{} --outfile {} --outtype q8_0", model, out), *more]
        return self._step(name, [sys.executable, str(converter)], typed)

    def _step(self, name: str, program: Sequence[str], typed: Sequence[str]) -> dict[str, Any]:
        """A process's CPU and wall seconds, its largest memory, and what it said."""
        if name not in self._steps:
            start, command = time.perf_counter(), [*program, *typed[1:]]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout is not None
                said = self._as_typed(process.stdout.read())
                _, status, used = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
            told = {
                "command": shlex.join(map(self._as_typed, typed)),
                "code": process.returncode,
                "cpu_seconds": used.ru_utime + used.ru_stime,
                "seconds": time.perf_counter() - start,
                "peak_megabytes": used.ru_maxrss / 1000,
                "said": json.loads(said) if "--json" in typed else said.strip(),
            }
            assert told["code"] == 0, told["command"]
            print(told["command"], told["code"], told["cpu_seconds"])
            self._steps.keep(name, told)
        found: dict[str, Any] = self._steps.found[name]
        return found

    def _as_typed(self, word: str) -> str:
        """A word as it is in these folders."""
        for folder in self._folders:
            word = word.replace(f"{folder}/", "")
        return word
