"""The report: one HTML file of what the other commands measured.

What it takes are their own files: an adapter's folder, a run of `offramp eval`, a demo's report. A
section appears when something was given that it can show, and the end of the page names what was
not.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from offramp.core.errors import DataError, InputError, OfframpError
from offramp.core.storage import read_json
from offramp.data.item import Item
from offramp.evaluation.run_log import ROWS, Done, read_rows
from offramp.inputs.example import Example
from offramp.report import headline, sections
from offramp.report.gallery import foretold, gallery
from offramp.report.html import document, render

log = logging.getLogger(__name__)

KINDS: dict[str, tuple[str, ...]] = {
    "adapter": ("depths", "policy", "backbone"),
    "demo": ("modes", "full_equals_generate"),
    "eval": ("modes", "task", "settings"),
    "forecast": ("verdict", "planned", "depths"),
}
"""What can be shown, and the keys that it is recognised by."""

MAKERS = {
    "adapter": "offramp train, then offramp calibrate",
    "demo": "offramp demo",
    "eval": "offramp eval",
    "forecast": "offramp inspect NAME --data photos --json",
}

HEADLINES = {
    "demo": headline.demo,
    "eval": headline.evaluated,
    "forecast": headline.forecast,
    "adapter": headline.adapter,
}
"""What a page opens with: the first of these that it holds."""

FILES = ("adapter.json", "result.json", "report.json")
"""What is looked for in a folder."""


@dataclass(frozen=True)
class Source:
    """One result.

    kind: of `KINDS`. name: of its model or run. done: a run's answers, if they are there.
    """

    kind: str
    name: str
    value: Mapping[str, Any]
    done: Done = field(default_factory=dict)


Show = Callable[[Source], Markup]


@contextmanager
def _of_our_form() -> Iterator[None]:
    """Whatever is missing or odd in a stranger's JSON is said in words."""
    try:
        yield
    except OfframpError:
        raise
    except Exception as error:  # of values of any kind, formatted and drawn
        raise DataError(
            f"A result cannot be shown: {type(error).__name__}: {error}.",
            "Name folders and files as this version of offramp wrote them.",
        ) from error


@_of_our_form()
def read_sources(paths: Iterable[str | Path]) -> list[Source]:
    """Read the results in folders and JSON files; a file may hold several, by name.

    Raises:
        InputError: a path holds nothing that can be shown.
        DataError, StorageError: a file is damaged or cannot be read.
    """
    sources: list[Source] = []
    for path in map(Path, paths):
        # Not Path.is_file, which raises on names that are too long.
        files = [path / name for name in FILES if os.path.isfile(path / name)]
        found = files if os.path.isdir(path) else [path]
        in_path = [s for file in found for s in _in_file(file)]
        if not in_path:
            raise InputError(
                f"{path} holds nothing that a report can show.",
                f"Give folders with {', '.join(FILES)}, or such files themselves.",
            )
        sources += in_path
    return sources


def _in_file(file: Path) -> list[Source]:
    value = read_json(file)
    if not isinstance(value, dict):
        return []
    if kind := _kind(value):
        rows = file.parent / ROWS
        done = read_rows(rows)[1] if kind == "eval" and rows.is_file() else {}
        return [
            of_forecast(value)
            if kind == "forecast"
            else Source(kind, _name(kind, value, file.parent.name), value, done)
        ]
    parts = [(name, part, _kind(part)) for name, part in value.items() if isinstance(part, dict)]
    shared = {"provenance": value["provenance"]} if "provenance" in value else {}
    return [
        Source(kind, _name(kind, part, f"tiny-{name}"), {**shared, **part})
        for name, part, kind in parts
        if kind
    ]


def of_forecast(value: Mapping[str, Any]) -> Source:
    """Return a forecast as a source, with the answers that it shows."""
    done = {("early_exit", str(row["key"])): {**row, "answer": ""} for row in value["answers"]}
    return Source("forecast", _name("forecast", value, ""), value, done)


def _kind(value: Mapping[str, Any]) -> str | None:
    return next((k for k, keys in KINDS.items() if all(key in value for key in keys)), None)


def _name(kind: str, value: Mapping[str, Any], otherwise: str) -> str:
    """The backbone without its owner, and the task or kind of the result."""
    settings = value["settings"] if kind == "eval" else value
    backbone = settings.get("backbone", otherwise)
    name = str(backbone["name"] if isinstance(backbone, Mapping) else backbone)
    name = name.rstrip("/").rsplit("/", 1)[-1] if name else otherwise
    return f"{name}, {value['task'] if kind == 'eval' else kind}"


@_of_our_form()
def report(
    sources: Sequence[Source],
    items: Sequence[Item | Example] = (),
    *,
    title: str = "",
    tokenizer_of: Callable[[str], Any] | None = None,
) -> str:
    """Return the page as HTML.

    items: the data of the runs, with images, prompts and references; those with another question
    than a run's are not shown with it. title: default: "Early exits on" the backbones.
    tokenizer_of: returns the tokenizer of a backbone's name, or None; default: from this machine.

    Raises:
        DataError: a result has not the form that this version of offramp writes.
    """
    known = {item.key: item if isinstance(item, Item) else Item(item) for item in items}
    answers = partial(_answers, items=known, tokenizer_of=tokenizer_of or local_tokenizer)
    shown, missing = [], []
    for name, heads, shows in _plan(answers):
        bodies = []
        for source in sources:
            if html := _shown(shows[source.kind], source) if source.kind in shows else "":
                heading = Markup("<h3>{}</h3>\n").format(source.name) if len(sources) > 1 else ""
                bodies.append(heading + html)
        if bodies:
            shown.append((name, heads, Markup("\n").join(bodies)))
        else:
            missing.append((heads, " or ".join(MAKERS[kind] for kind in shows)))
    if where := sections.origins([(s.name, s.value) for s in sources]):
        shown.append(("origin", "Machine and versions", where))
    backbones = dict.fromkeys(s.name.split(", ")[0] for s in sources)
    title = title or f"Early exits on {' and '.join(backbones)}"
    return document(title=title, sections=shown, missing=missing, sentence=_sentence(sources))


def _sentence(sources: Sequence[Source]) -> Markup:
    """What the page opens with; it names its result where there are several alike."""
    for kind in HEADLINES:
        alike = [source for source in sources if source.kind == kind]
        for source in alike:
            if said := _shown(_opening, source):
                return said if len(alike) == 1 else escape(f"{source.name}: ") + said
    return headline.NOTHING


def _plan(answers: Show) -> list[tuple[str, str, dict[str, Show]]]:
    """The sections in order: id, title, and by kind of result what shows it."""

    def of(show: Callable[[Mapping[str, Any]], Markup]) -> Show:
        return lambda source: show(source.value)

    return [
        (
            "answers",
            "Answers, word by word",
            {"eval": answers, "demo": answers, "forecast": answers},
        ),
        ("key", "Key figures", dict.fromkeys(HEADLINES, _figures)),
        (
            "exits",
            "Where tokens exit",
            {"eval": of(sections.histogram), "forecast": of(sections.forecast)},
        ),
        ("calibration", "Calibration", {"adapter": of(sections.calibration)}),
        (
            "figures",
            "All figures",
            {
                "eval": of(sections.measured_eval),
                "demo": of(sections.measured_demo),
                "forecast": of(sections.foretold),
            },
        ),
    ]


def _opening(source: Source) -> Markup:
    return HEADLINES[source.kind](source.value)[0].strip()


def _figures(source: Source) -> Markup:
    return render("key", entries=HEADLINES[source.kind](source.value)[1])


def _shown(show: Show, source: Source) -> Markup:
    try:
        return show(source)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DataError(
            f"The {source.kind} result of {source.name} has not the form that a report reads "
            f"({type(error).__name__}: {error}).",
            f"Write it again with this version: {MAKERS[source.kind]}.",
        ) from error


def _answers(
    source: Source, items: Mapping[str, Item], tokenizer_of: Callable[[str], Any]
) -> Markup:
    if source.kind == "demo" and not source.done:
        return Markup("")
    settings = source.value["settings"] if source.kind == "eval" else source.value
    tokenizer = tokenizer_of(settings["backbone"]) if source.done else None
    show = foretold if source.kind == "forecast" else gallery
    return show(source.done, settings["layers"], _asked(source, items), tokenizer)


def _asked(source: Source, items: Mapping[str, Item]) -> dict[str, Example]:
    """The examples that a run answered, by key."""
    rows = {key: row for (_, key), row in source.done.items() if key in items}
    digests = {key: row.get("prompt_digest") for key, row in rows.items()}  # a demo's has none
    asked = {k: items[k].example for k, d in digests.items() if d in (None, items[k].digest())}
    if others := len(digests) - len(asked):
        log.warning(
            "%s: %d of %d examples ask something else than the run did and are not shown; give the "
            "run's data, and its --prompt.",
            source.name,
            others,
            len(digests),
        )
    return asked


def local_tokenizer(name: str) -> Any:
    """Return a backbone's tokenizer, if it is on this machine; None if not."""
    from transformers import AutoTokenizer

    from offramp.adapter.shipped import TINY, short_name, tiny_folder

    kind = short_name(name)
    place = str(tiny_folder(kind)) if kind in TINY else name
    try:
        return AutoTokenizer.from_pretrained(place, local_files_only=True)
    except (OSError, ValueError):
        return None
