"""Tables and figures in Markdown pages: what stands between two comments comes from the records.

A page holds `<!-- table: NAME -->` and `<!-- /table -->` on lines of their own, and in its
sentences `<!-- figure: NAME -->1.23<!-- /figure -->`, never where a line starts: that would begin a
block of HTML. The sentences are the page's own.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from offramp.core.storage import read_json
from offramp.report.table import Table
from offramp_lab.places import RECORDS, ROOT

ELSEWHERE = {
    "talk-card": ROOT / "photo-model" / "offramp_photo" / "chat" / "card.json",
    "talk-adapter": ROOT / "photo-model" / "offramp_photo" / "chat" / "exits" / "adapter.json",
    "photo-card": ROOT / "photo-model" / "offramp_photo" / "card.json",
    "photo-adapter": ROOT / "photo-model" / "offramp_photo" / "exits" / "adapter.json",
}
"""Records that lie beside what they are about."""

KINDS = ("opt", "t5")
"""The tiny models, in the order of the columns."""

Value = Mapping[str, Any]
Make = Callable[[], str]
MakeTable = Callable[[], Table]
_BLOCK = re.compile(r"<!-- table: (\S+) -->\n.*?<!-- /table -->", re.DOTALL)
_FIGURE = re.compile(r"<!-- figure: (\S+) -->[^<]*<!-- /figure -->")


@cache
def record(name: str) -> Any:
    """A committed record by its name; read once, so do not change it."""
    return read_json(ELSEWHERE.get(name, RECORDS / f"{name}.json"))


def by(entries: Iterable[Value], *names: str) -> dict[Any, Value]:
    """Entries by what they have under one name, or by a tuple of several."""
    if len(names) == 1:
        return {entry[names[0]]: entry for entry in entries}
    return {tuple(entry[name] for name in names): entry for entry in entries}


def fill(page: str, tables: Mapping[str, MakeTable], figures: Mapping[str, Make]) -> str:
    """The page with its tables and figures as the records have them.

    A figure is one of `figures`, or a place in a record and a format (`_formatted`), as
    `calibrated/opt/0/n_test:,`. `engine=q8_0&mode=early_exit` is the first entry of a list that has
    both; a mark has "_" for spaces. Raise `ValueError` where a mark is not read as one.
    """

    def block(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- table: {name} -->\n\n{tables[name]().markdown()}\n<!-- /table -->"

    def figure(match: re.Match[str]) -> str:
        name = match[1]
        text = figures[name]() if name in figures else _at(name)
        return f"<!-- figure: {name} -->{text}<!-- /figure -->"

    for mark, pattern in (("<!-- table:", _BLOCK), ("<!-- figure:", _FIGURE)):
        if page.count(mark) != len(pattern.findall(page)):
            raise ValueError(
                f"A mark that begins with {mark!r} is written in a way that is not read"
            )
    return _FIGURE.sub(figure, _BLOCK.sub(block, page))


def _at(place: str) -> str:
    """What stands at a place in a record, formatted."""
    path, _, form = place.partition(":")
    name, *keys = path.split("/")
    value = record(name)
    for key in keys:
        value = _part(value, key)
    return _formatted(value, form)


def _part(value: Any, key: str) -> Any:
    """Of a list an entry by its place or by what it has; else what has this name."""
    if "=" in key:
        wanted = [pair.split("=") for pair in key.split("&")]
        return next(e for e in value if all(_marked(e[of]) == text for of, text in wanted))
    if isinstance(value, list):
        return value[int(key)]
    return {_marked(name): found for name, found in value.items()}[key]


def _marked(said: object) -> str:
    return str(said).replace(" ", "_")


def _formatted(value: Any, form: str) -> str:
    """By a format of Python's; seconds by "minutes"; a value with its ends by "~" and a format."""
    if form == "minutes":
        return f"{value / 60:.0f}"
    return with_ends(value, form[1:]) if form.startswith("~") else format(value, form)


# -- numbers --------------------------------------------------------------------------------------


def bold(text: str) -> str:
    return f"**{text}**"


def tiny(kind: str) -> str:
    return f"tiny {kind.upper()}"


def level(drop: str | float) -> str:
    """A drop of quality: "0.5%"."""
    return f"{100 * float(drop):g}%"


def times_with_range(ratio: Value) -> str:
    """Of a record's times, low and high: "2.25 [2.12, 2.37]"."""
    return with_ends(ratio, ".2f")


def multiple(ratio: Value) -> str:
    """The same as "2.25x [2.12, 2.37]"."""
    return with_ends(ratio, ".2f", "x")


def with_ends(found: Value, form: str, unit: str = "") -> str:
    """The same of any value that a record has with its low and its high end."""
    value, *ends = found.values()
    return with_range(format(value, form) + unit, ends, form)


def with_range(value: str, ends: Sequence[float] | None, form: str) -> str:
    """ "+2.3% [-4.8%, +9.2%]"; the value alone where it has no interval."""
    if not ends:
        return value
    low, high = ends
    return f"{value} [{low:{form}}, {high:{form}}]"
