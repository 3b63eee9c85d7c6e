"""Five layers of thirty: what confidence adds to a small static model; in five_layers.json.

In PyTorch, float32: full depth, also by way of the exit's shortlist; every token at the exit, which
is a static model of five layers; a student of five layers, as `examples.photo_vlm.student` left it
in the folder that --student names; and exits by their confidence, at thresholds that are promised
as much as what ships. Captions and questions.
"""

from __future__ import annotations

from typing import Any

from examples.photo_vlm.student import took

from offramp_lab.experiments.factors import Name, entries_of
from offramp_lab.records.photographs import opened as way
from offramp_lab.records.photographs.opened import PLAIN, TOWER
from offramp_lab.records.photographs.told import Spec, Told
from offramp_lab.records.record import Record

MODES = (way.FULL_DEPTH, way.STATIC, way.THRESHOLDS, way.SHORT, way.STUDENT)


def bases(name: Name) -> dict[str, Name]:
    return {"full": (PLAIN, way.FULL_DEPTH, TOWER)}


def figures(told: Told) -> dict[str, Any]:
    return {
        "photographs": len(told.examples),
        "questions": len(next(iter(told.questions.values())).tokens),
        "student": took(told.opened.student / "student.pt"),
        "captioned": entries_of(told.captions, bases),
        "questioned": entries_of(told.questions, bases),
    }


SPEC = Spec(
    Record("five_layers", "photographs"),
    lambda _: [(PLAIN, mode, TOWER) for mode in MODES],
    figures,
    photographs=200,
    questions=200,
)
