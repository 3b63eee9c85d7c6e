"""What a record is: a JSON file in lab/records that a command rewrites, whole or in parts, with its
origin beside it; and what such commands are asked for."""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from offramp.common.jsonl_log import JsonlLog
from offramp.common.provenance import provenance
from offramp.core.storage import read_json, write_json
from offramp.inputs.example import Example
from offramp_lab.experiments.experiment import bar
from offramp_lab.places import PHOTOGRAPHS, RECORDS, RUNS

Made = Callable[[argparse.Namespace], Any]
"""Figures, of the arguments of a command."""


@dataclass(frozen=True)
class Record:
    """name: of the file. command: what writes it, a script or a module of `offramp_lab.records`, if
    that is not called so."""

    name: str
    command: str = ""

    @property
    def path(self) -> Path:
        return RECORDS / f"{self.name}.json"

    @property
    def work(self) -> Path:
        """What its command keeps is there."""
        return RUNS / self.name

    def run(self, doc: str | None, made: Made | Mapping[str, Made], **options: Any) -> None:
        """Be the command: ask for the options (`asked`), measure, and write.

        made: all figures of the record by name; or what makes each of its parts, of which --parts
        then names some.
        """
        if not isinstance(made, Mapping):
            self.write(made(asked(doc, **options)))
            return
        arguments = asked(doc, **options, parts=Some(made))
        parts = {name: partial(part, arguments) for name, part in made.items()}
        self.parts(parts, arguments.parts)

    def read(self) -> dict[str, Any]:
        """What is there, if anything is."""
        found: dict[str, Any] = read_json(self.path) if self.path.is_file() else {}
        return found

    def origin(self) -> dict[str, Any]:
        """What ran, when and on what machine."""
        by = self.command or self.name
        found = provenance(0, by if "." in by else f"offramp_lab.records.{by}", None)
        return {**found, "generation": generation(found["processor"])}

    def write(self, figures: Mapping[str, Any]) -> None:
        """All of it, with its origin."""
        write_json(self.path, {**figures, "provenance": self.origin()})

    def add(self, figures: Mapping[str, Any]) -> None:
        """Put figures beside those that are there, or in their places."""
        self.write({**self.read(), **figures})

    def parts(self, made: Mapping[str, Callable[[], Any]], asked: Sequence[str]) -> None:
        """Measure the parts that are asked for, keep each in runs/, and put the record together
        from those that are there and, of others, what it has. "origins" in it: when, and on what
        machine, each part was measured."""
        files = {name: self.work / f"{name}.json" for name in made}
        for name in asked:
            write_json(files[name], made[name]())
        before = self.read()
        origins = {name: _told(before["provenance"]) for name in made if name in before}
        origins |= before.get("origins", {}) | dict.fromkeys(asked, _told(self.origin()))
        found = before | {n: read_json(f) for n, f in files.items() if f.is_file()}
        self.write({**{name: found[name] for name in made if name in found}, "origins": origins})


def _told(origin: Mapping[str, Any]) -> dict[str, Any]:
    return {name: origin[name] for name in ("date", "generation")}


def generation(processor: str) -> str:
    """AMD's name of a processor's generation, by what its provenance says; else that."""
    told = re.search(r"family (\d+), model (\d+)", processor)
    family, model = map(int, told.groups()) if told else (0, 0)
    if family == 25:
        return "Zen 4" if 16 <= model < 32 or model >= 96 else "Zen 3"
    return {23: "Zen 2", 26: "Zen 5"}.get(family, processor)


class Some(tuple[Any, ...]):
    """Of these some can be asked for; all, if none is named."""


def asked(
    doc: str | None,
    *,
    photo: bool = False,
    data: bool = False,
    more: Callable[[argparse.ArgumentParser], object] = lambda _: None,
    **options: Any,
) -> argparse.Namespace:
    """The arguments of a command; torch then runs in one thread.

    photo: whether it is of the photo model, whose exits may be others. data: whether it reads
    photographs without that model. options: others, by name, with their defaults: a number, text or
    a path, several of them, `Some`, False for what is on once it is named, `Path` for one that must
    be named, or None for one that need not be. more: adds what else there is.
    """
    parser = argparse.ArgumentParser(description=doc)
    if photo:
        parser.add_argument("--adapter", type=Path, metavar="FOLDER", help="its exits")
    if photo or data:
        options |= {"data": PHOTOGRAPHS}
    for name, default in options.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **_option(default))
    more(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    return arguments


def _option(default: Any) -> dict[str, Any]:
    """What argparse is told of an option."""
    if default is False:
        return {"action": "store_true"}
    if default is None or default is Path:
        return {"type": Path, "required": default is Path}
    how = {"type": type(default), "default": default, "help": "default: %(default)s"}
    if isinstance(default, tuple):
        how |= {"type": type(default[0]), "nargs": "+"}
    if isinstance(default, Some):
        how["choices"] = default
    return how


def words(command: str, *given: object) -> list[str]:
    """The words of a command line. given: what stands in the places of its {}, a word each."""
    left = iter(map(str, given))
    return [next(left) if word == "{}" else word for word in command.split()]


@dataclass(frozen=True)
class Group:
    """Examples that are answered at once."""

    examples: Sequence[Example]

    @property
    def key(self) -> str:
        """A longer last group of another run has another."""
        return f"{len(self.examples)} {self.examples[0].key}"

    @classmethod
    def all(cls, examples: Sequence[Example], size: int) -> list[Group]:
        return [cls(examples[at : at + size]) for at in range(0, len(examples), size)]


class Kept:
    """What was found, as JSON has it, by key; in a file, so that it is not asked for again."""

    def __init__(self, file: Path) -> None:
        rows = JsonlLog.read(file) if file.is_file() else []
        self.found = {row["key"]: row["found"] for row in rows}
        self._log = JsonlLog(file)

    def __contains__(self, key: str) -> bool:
        return key in self.found

    def keep(self, key: str, found: Any) -> None:
        if key not in self.found:
            self.found[key] = found
            self._log.append({"key": key, "found": found})


class Turns:
    """What ways made of examples: an example is answered by all that are asked of it, in an order
    that is drawn, before the next one. Kept in a file, so that a run that was cut off goes on."""

    def __init__(self, file: Path) -> None:
        self._found: dict[str, list[dict[str, Any]]] = {}
        for row in JsonlLog.read(file) if file.is_file() else ():
            self._found.setdefault(row["key"], []).append(row["found"])
        self._log, self._warm = JsonlLog(file), set[Any]()

    def take(
        self, ways: Mapping[Any, Callable[[Any], Any]], example: Any, first: Sequence[Any]
    ) -> None:
        """Ask all ways, unless a turn of this example had them.

        ways: by name, or by a tuple of what sets them apart. first: what a way is tried on before
        it counts: code and tables are made then.
        """
        if self._turn(example.key, ways) is not None:
            return
        for name in [name for name in ways if name not in self._warm]:
            for one in first:
                ways[name](one)
            self._warm.add(name)
        order = random.Random(example.key).sample([*ways], len(ways))
        taken = {_key(name): ways[name](example) for name in order}
        self._found.setdefault(example.key, []).append(taken)
        self._log.append({"key": example.key, "found": taken})

    def told(self, names: Iterable[Any], examples: Sequence[Any]) -> dict[Any, list[Any]]:
        """By name, what it made of each example in the last turn that had all of them."""
        names = [*names]
        turns = [self._turn(example.key, names) for example in examples]
        return {name: [turn[_key(name)] for turn in turns if turn] for name in names}

    def answers(
        self, ways: Mapping[Any, Callable[[Any], Any]], examples: Sequence[Any], title: str
    ) -> dict[Any, list[Any]]:
        """What all ways make of all examples."""
        for example in bar(title)(examples):
            self.take(ways, example, examples[:1])
        return self.told(ways, examples)

    def _turn(self, key: str, names: Iterable[Any]) -> dict[str, Any] | None:
        wanted = {_key(name) for name in names}
        turns = reversed(self._found.get(key, ()))
        return next((turn for turn in turns if wanted <= turn.keys()), None)


def _key(name: Any) -> str:
    return name if isinstance(name, str) else " | ".join(name)
