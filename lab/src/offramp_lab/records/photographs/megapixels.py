"""Captions of photographs of a camera's size, from file to text, in q8_0; in megapixels.json.

The held-out photographs enlarged to 12 megapixels, as JPEG files. Opening them is part of every
way, whole or shrunk on load, and so it is of llama.cpp's fastest. CPU milliseconds, by stage.
"as_whole" in it: captions of full depth that are the same either way.
"""

from __future__ import annotations

from typing import Any

from offramp_lab.experiments.experiment import same
from offramp_lab.experiments.factors import LOSSLESS, Name, entries_of
from offramp_lab.records.photographs.opened import (
    EARLY,
    FULL_DEPTH,
    LARGE,
    Q8,
    RIVAL,
    SHRUNK,
    Opened,
)
from offramp_lab.records.photographs.told import Spec, Told
from offramp_lab.records.record import Record

WAYS = ((RIVAL, FULL_DEPTH), (Q8, FULL_DEPTH), (Q8, EARLY), (Q8, LOSSLESS))


def names(_: Opened) -> list[Name]:
    return [(*way, opening) for opening in (LARGE, SHRUNK) for way in WAYS]


def bases(name: Name) -> dict[str, Name]:
    """What a way is compared with: full depth, and llama.cpp alone, which opens the file whole, or
    as this way does."""
    return {
        "full": (Q8, FULL_DEPTH, name[2]),
        "fastest": (RIVAL, FULL_DEPTH, LARGE),
        "fastest_as_opened": (RIVAL, FULL_DEPTH, name[2]),
    }


def figures(told: Told) -> dict[str, Any]:
    whole, shrunk = (told.captions[Q8, FULL_DEPTH, opening] for opening in (LARGE, SHRUNK))
    return {
        "photographs": len(told.examples),
        "captioned": entries_of(told.captions, bases),
        "as_whole": same(shrunk.answers, whole.answers),
    }


SPEC = Spec(Record("megapixels", "photographs"), names, figures, photographs=100)
