"""Dialogues about one photograph, and long answers to prompts of many; in dialogues.json.

`python -m offramp_lab.records.photographs.dialogues` needs photographs, the packages onnxruntime
and llama-cpp-python, and the questions that `python -m examples.photo_vlm.asked` makes. All ways
answer a dialogue, or a long prompt, before the next one, in an order of its own. One thread;
seconds are of the CPU, taken while another core was in use; the photographs chose nothing. What was
answered is kept in runs/photographs.

"dialogues": `photo-chat` is asked as `offramp chat` asks, each way behind its own answers. Every
turn opens the file; the tower's output is kept between turns, and so are the keys and values of the
prompt before. "same" is the share of turns whose answer is full depth's; "after_reading_over_full"
leaves out what the photograph's reading took: file, processor and tower.

"long": `photo`, which was trained on one photograph and 30 tokens, captions `MANY` of them in
exactly `LONG` tokens: none may end the answer before, at full depth too, by Hugging Face's
`min_new_tokens`, which every engine follows. Such text is forced and repeats itself: behind its
caption full depth says full stops or marks of a chat, and the exit other words. So how often drafts
are right tells nothing of long texts that a model means. Trust takes nothing where tokens are
forbidden.
"""

from __future__ import annotations

import random
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from examples.photo_vlm.asked import FILE, Asked, dialogue, read_asked

from offramp.engines.loading import usual_length, usual_prompt
from offramp.evaluation.timing import generate_fn
from offramp.features.input_processor import turn_of
from offramp.features.prefix_cache import PrefixCache
from offramp.features.vision_cache import VisionCache
from offramp.inputs.example import Example
from offramp_lab.experiments.experiment import identical, times
from offramp_lab.experiments.factors import LOSSLESS, STAGES, Measured, Name, entries_of
from offramp_lab.places import RUNS
from offramp_lab.records.photographs import opened as way
from offramp_lab.records.photographs.opened import PLAIN, Q8, TOWER, Opened
from offramp_lab.records.record import Group, Record, Turns
from offramp_lab.records.subjects import halves, text_of

RECORD = Record("dialogues", "offramp_lab.records.photographs.dialogues")
LONG_MODES = (way.FULL_DEPTH, LOSSLESS, way.THRESHOLDS)
MODES = (way.FULL_DEPTH, LOSSLESS, way.EARLY, "trust 0")
"""Of dialogues."""
TURNS, MOST = 5, 64
"""Questions of a dialogue, and tokens of an answer where no calibration says how many."""
MANY, LONG, CONTEXT = 22, 120, 1024
"""Photographs of a long prompt, tokens of its answer, and of both, at most."""
AFTER_READING = STAGES[2:]
Told = Mapping[Name, Sequence[Any]]


@dataclass(frozen=True)
class Talk:
    """A photograph, and what is asked of it, a turn each."""

    example: Example
    questions: Sequence[str]

    @property
    def key(self) -> str:
        return self.example.key


def talks(rows: Sequence[Asked], examples: Sequence[Example]) -> list[Talk]:
    """The dialogues about these photographs that have `TURNS` turns as they are drawn."""
    images, drawn = {example.group: example for example in examples}, list[Talk]()
    for row in rows:
        rounds = dialogue(row.questions, (), random.Random(f"talk:{row.image}"))
        if row.image in images and len(rounds) == TURNS:
            drawn.append(Talk(images[row.image], [text for text, _ in rounds]))
    return drawn


def names(modes: Sequence[str]) -> list[Name]:
    return [(engine, mode, TOWER) for engine in (PLAIN, Q8) for mode in modes]


def bases(name: Name) -> dict[str, Name]:
    return {"full": (name[0], way.FULL_DEPTH, name[2])}


def writes(opened: Opened, name: Name, most: int, **options: Any) -> Any:
    """What writes answers of a way, of up to `most` tokens."""
    engine, mode, tower = name
    adapter, _ = opened.loaded(PLAIN, tower)
    model = adapter if engine == PLAIN else opened.llama(adapter, engine, "exits", tower)
    options |= {"max_new_tokens": most, "do_sample": False}
    return generate_fn(model.generate, policy=way.policy_of(adapter, mode), **options)


def talked(talk: Talk, name: Name, opened: Opened) -> dict[str, Any]:
    """ids and CPU seconds by stage of each turn, and tokens of the whole dialogue."""
    kept: dict[str, Any] = {"vision_cache": VisionCache(), "prefix_cache": PrefixCache(1)}
    encoder, turns, told = opened.encoder, list[dict[str, Any]](), list[Any]()
    write = writes(opened, name, usual_length(opened.adapter, MOST), **kept)

    def read() -> Any:
        picture = talk.example.open_image(encoder.smallest_side)
        return encoder.of_text(encoder.conversation_text(turns), [picture])

    for question in talk.questions:
        if told:
            turns.append(turn_of("assistant", text_of(encoder, told[-1][0])))
        turns.append(turn_of("user", question, sees=not told))
        told.append(opened.stages.taken(read, write))
    return {"turns": told, "tokens": read()["input_ids"].shape[1] + len(told[-1][0])}


def written(group: Group, name: Name, opened: Opened) -> list[Any]:
    """Ids of a forced answer to a prompt of photographs, and CPU seconds of each of `STAGES`."""
    encoder, some = opened.encoder, group.examples
    text = encoder.placed(usual_prompt(opened.adapter), len(some))
    return opened.stages.taken(
        lambda: encoder.of_text(text, [e.open_image(encoder.smallest_side) for e in some]),
        writes(opened, name, LONG, min_new_tokens=LONG),
    )


def of_dialogues(told: Told) -> list[dict[str, Any]]:
    """An entry for each way; a dialogue is what others have an answer for. told: as `talked`."""
    ids = {name: [[ids for ids, _ in one["turns"]] for one in own] for name, own in told.items()}
    measured = {}
    for name, own in told.items():
        full, lengths = ids[bases(name)["full"]], [sum(map(len, turns)) for turns in ids[name]]
        scores: dict[str, Any] = {
            "same": [identical(*both).mean() for both in zip(ids[name], full, strict=True)],
            "answer_tokens": [length / TURNS for length in lengths],
            "dialogue_tokens": [one["tokens"] for one in own],
        }
        seconds = np.array([np.sum([took for _, took in one["turns"]], 0) for one in own])
        measured[name] = Measured(lengths, 1e3 * seconds, scores, ids[name])
    entries = entries_of(measured, bases)
    for entry, (name, took) in zip(entries, measured.items(), strict=True):
        mine, base = (one.rates(AFTER_READING) for one in (took, measured[bases(name)["full"]]))
        entry["after_reading_milliseconds"] = float(1e3 * mine[1].mean())
        entry["after_reading_over_full"] = times(mine, base)
    return entries


def dialogues(arguments: Namespace) -> dict[str, Any]:
    opened = Opened(None, RUNS / "photographs", model="photo-chat")
    rows = [row for row in read_asked(arguments.asked) if row.half == 1]
    some = talks(rows, halves(arguments.data)[1])[: arguments.talks]
    ways = {name: partial(talked, name=name, opened=opened) for name in names(MODES)}
    with opened.stages.of_entries():
        told = Turns(opened.work / "dialogues.jsonl").answers(ways, some, "dialogues")
    return {"photographs": len(some), "turns": TURNS, "entries": of_dialogues(told)}


def long(arguments: Namespace) -> dict[str, Any]:
    opened = Opened(None, RUNS / "photographs", context=CONTEXT)
    measuring = halves(arguments.data)[1]
    some = Group.all(measuring[: len(measuring) // MANY * MANY], MANY)[: arguments.prompts]
    ways = {name: partial(written, name=name, opened=opened) for name in names(LONG_MODES)}
    with opened.stages.of_entries():
        told = Turns(opened.work / "long.jsonl").answers(ways, some, "long")
    return {
        "prompts": len(some),
        "photographs_each": MANY,
        "visual_tokens": MANY * opened.adapter.backbone.model.config.image_seq_length,
        "answer_tokens": LONG,
        "entries": entries_of({n: Measured.of(rows, {}) for n, rows in told.items()}, bases),
    }


def main() -> None:
    made, asked = {"dialogues": dialogues, "long": long}, RUNS / "photo_vlm" / FILE
    RECORD.run(__doc__, made, data=True, asked=asked, talks=110, prompts=22)


if __name__ == "__main__":
    main()
