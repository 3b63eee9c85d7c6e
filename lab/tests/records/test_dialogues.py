"""A dialogue is a way's own; a long answer ends where it is told to, in each engine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from examples.photo_vlm.asked import Asked, Question
from gguf_cases import adapter_of, drafting, inputs_of
from PIL import Image

from offramp.features.prefix_cache import PrefixCache
from offramp.inputs.example import Example
from offramp_lab.records.photographs import dialogues, opened
from offramp_lab.records.photographs.opened import PLAIN, TOWER, Opened
from offramp_lab.records.record import Group

NAME, F32 = "llava", "f32"
QUESTIONS = ("who", "where", "what", "when", "why")


def about(name: str) -> Example:
    return Example(Image.new("RGB", (1, 1)), "", (), name, name)


EXAMPLES = [about("0"), about("1")]


def said(turns: Any) -> str:
    return " ".join(part["text"] for turn in turns for part in turn["content"][-1:])


def of_text(text: str, images: Any) -> dict[str, Any]:
    """A picture, and a token for each word."""
    inputs = inputs_of(NAME)
    words = torch.tensor([[8 + sum(map(ord, word)) % 64 for word in text.split()]])
    ids = torch.cat([inputs["input_ids"], words], 1)
    return {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture
def ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Opened:
    """Of a tiny model whose exits draft, in the places of both photo models."""
    encoder = SimpleNamespace(
        smallest_side=None,
        conversation_text=said,
        of_text=of_text,
        placed=lambda prompt, images: f"{prompt} {images}",
        texts=lambda ids: [" ".join(map(str, row)) for row in ids.tolist()],
    )
    adapter = drafting(adapter_of.__wrapped__(NAME))
    monkeypatch.setattr(opened, "photo_exits", lambda *_: tmp_path)
    monkeypatch.setattr(opened, "load_photo", lambda *_: (adapter, encoder))
    monkeypatch.setattr(dialogues, "Q8", F32)
    monkeypatch.setattr(dialogues, "MOST", 3)
    monkeypatch.setattr(dialogues, "LONG", 9)
    return Opened(None, tmp_path / "kept", model="photo-chat", context=128)


@pytest.mark.llama_cpp
def test_each_turn_stands_behind_the_ways_own_answers(
    ways: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, caches = list[str](), list[PrefixCache]()
    monkeypatch.setattr(
        ways.encoder, "conversation_text", lambda turns: prompts.append(said(turns)) or said(turns)
    )
    monkeypatch.setattr(
        dialogues, "PrefixCache", lambda count: caches.append(PrefixCache(count)) or caches[-1]
    )
    told: dict[Any, list[Any]] = {}
    with ways.stages.of_entries():
        for name in dialogues.names(dialogues.MODES):
            for example in EXAMPLES:
                del prompts[:]
                one = dialogues.talked(dialogues.Talk(example, QUESTIONS), name, ways)
                told.setdefault(name, []).append(one)
                answers = [" ".join(map(str, ids)) for ids, _ in one["turns"]]
                pairs = zip(QUESTIONS, answers, strict=True)
                whole = " ".join(word for both in pairs for word in both)
                assert whole == f"{prompts[-1]} {answers[-1]}"
                assert one["tokens"] == len(inputs_of(NAME)["input_ids"][0]) + len(whole.split())
    assert caches and all(cache.reused > cache.run for cache in caches)
    entries = {(e["engine"], e["mode"]): e for e in dialogues.of_dialogues(told)}
    assert {engine for engine, _ in entries} == {PLAIN, F32}
    for (engine, mode), entry in entries.items():
        exact = mode in ("full", "lossless")
        assert entry["same"]["value"] == 1 if exact else 0 <= entry["same"]["value"] <= 1
        assert entry["answer_tokens"]["value"] == 3  # tiny models never end
        ratio = entry["after_reading_over_full"]
        assert ratio["low"] <= ratio["times"] <= ratio["high"]
        assert entry["as_full"] == len(EXAMPLES) or not exact, engine


@pytest.mark.llama_cpp
def test_no_way_ends_a_long_answer_before_its_time(ways: Opened) -> None:
    group = Group(EXAMPLES)

    def answers(ends: int | None) -> dict[Any, list[int]]:
        ways.adapter.backbone.model.generation_config.eos_token_id = ends
        names = dialogues.names(dialogues.LONG_MODES)
        return {name: dialogues.written(group, name, ways)[0] for name in names}

    with ways.stages.of_entries():
        ends = dialogues.written(group, (PLAIN, "full", TOWER), ways)[0][4]
        found = answers(ends)
    for (engine, mode, tower), ids in found.items():
        assert len(ids) == dialogues.LONG and ends not in ids
        assert mode != "lossless" or ids == found[engine, "full", tower]


def test_dialogues_are_those_of_five_turns_about_the_photographs_that_are_asked_for() -> None:
    kinds = ("who", "where", "doing", "worn", "held", "colour", "count")
    questions = tuple(Question(kind, f"{kind}?", "it", ("it",)) for kind in kinds)
    rows = [Asked(str(n), 1, questions) for n in range(40)]
    found = dialogues.talks(rows, [*EXAMPLES, about("30")])
    assert {talk.key for talk in found} <= {"0", "1", "30"}
    every = dialogues.talks(rows, [about(row.image) for row in rows])
    assert 0 < len(every) < len(rows)
    assert all(len(talk.questions) == dialogues.TURNS for talk in every)
    assert all(talk.questions[0] in ("who?", "who") for talk in every)
