"""Captions and answers about photographs, from file to text, by stage; in end_to_end.json.

CPU milliseconds of the process: picture (the file and the processor), tower, entry (all else before
the decoder), prompt (up to the first token), decoding. Towers run in ONNX Runtime; what another
tower, number format or head is worth has ways of its own, so that each multiple comes in its
factors (`offramp_lab.experiments.factors`). A tower that rounds stands on both sides. Rivals:
Hugging Face's `generate`, and llama.cpp alone in four formats, fed as we feed it. Last, captions
eight at a time in the batch engine.
"""

from __future__ import annotations

from functools import partial
from itertools import chain
from typing import Any

from offramp_lab.experiments.factors import LOSSLESS, Name, entries_of
from offramp_lab.records.batched import Batched, answered
from offramp_lab.records.photographs import opened as way
from offramp_lab.records.photographs.opened import PLAIN, Q8, ROUNDED, TORCH, TOWER, Opened
from offramp_lab.records.photographs.told import Spec, Told, scored
from offramp_lab.records.record import Group, Record, Turns

PACKED = way.in_format(f"float32, {way.PREPACKED}")
RIVALS = (way.RIVAL, *(f"{way.ALONE}{formats}" for formats in ("iq4_nl", Q8, "q4_0")))
"""llama.cpp alone."""
ASKED = (way.FULL_DEPTH, way.STATIC, way.EARLY, way.THRESHOLDS, LOSSLESS)
"""Modes in which questions are answered."""
SLOTS = 8


def names(_: Opened) -> list[Name]:
    """The ways to caption a photograph."""
    every, few = (*way.MODES, way.SHORT), (way.FULL_DEPTH, way.EARLY, LOSSLESS)
    ours = {PLAIN: every, PACKED: few, Q8: every, "f16": few}
    return [
        *((rival, way.FULL_DEPTH, TOWER) for rival in RIVALS),
        (way.STOCK, way.FULL_DEPTH, TORCH),
        *((engine, mode, TOWER) for engine, modes in ours.items() for mode in modes),
        (way.RIVAL, way.FULL_DEPTH, ROUNDED),
        *((Q8, mode, ROUNDED) for mode in few),
    ]


def bases(name: Name) -> dict[str, Name]:
    """What a way is compared with: full depth of what decodes it, also with the same shortlist; and
    llama.cpp alone in the fastest format of equal CIDEr. Behind a tower that rounds, with the tower
    that does not, and with the same one."""
    own = name[0] if name[0] in (PACKED, Q8, "f16") else PLAIN
    same = {"fastest_rounded": (way.RIVAL, way.FULL_DEPTH, ROUNDED)}
    return {
        **(same if name[2] == ROUNDED else {}),
        "full": (own, way.FULL_DEPTH, TOWER),
        "full_shortlist": (own, way.SHORT, TOWER),
        "fastest": (way.RIVAL, way.FULL_DEPTH, TOWER),
    }


def figures(told: Told) -> dict[str, Any]:
    slots = together(told)
    return {
        "photographs": len(told.examples),
        "captioned": entries_of(told.captions, bases),
        "questioned": entries_of(told.questions, bases),
        "slots": SLOTS,
        "together": entries_of(slots | {**told.captions}, _single, [*slots]),
    }


def together(told: Told) -> dict[Name, Any]:
    """Captions by early exit in the batch engine, in PyTorch, in groups of `SLOTS`."""
    adapter = told.opened.adapter
    way_ = Batched(adapter.policy, adapter.exits)
    answer = partial(answered, adapter=adapter, encoder=told.encoder, way=way_, at_once=SLOTS)
    kept, groups = Turns(told.opened.work / "together.jsonl"), Group.all(told.examples, SLOTS)
    [rows] = kept.answers({way.EARLY: answer}, groups, f"{SLOTS} at once").values()
    took = [[one["ids"], [0, 0, 0, 0, one["spent"]]] for one in chain(*rows)]
    name = (f"batch of {SLOTS}", way.EARLY, TOWER)
    return scored({name: took}, "captions", told.encoder, told.examples)


def _single(name: Name) -> dict[str, Name]:
    return {"full": (PLAIN, way.FULL_DEPTH, TOWER), "single": (PLAIN, name[1], TOWER)}


def _asked(name: Name) -> bool:
    return name[0] in (PLAIN, Q8) and name[1] in ASKED and name[2] == TOWER


SPEC = Spec(Record("end_to_end", "photographs"), names, figures, 300, 100, _asked)
