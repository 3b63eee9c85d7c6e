"""Laws of calls over slots without the stack's own code: every bit as with it."""

from __future__ import annotations

import families
import pytest
import torch
from families import NAMES, one_row

from offramp.engine.slots import lean as tables
from offramp.engine.slots.prompt import PromptReader
from offramp.engine.slots.runner import SlotRunner
from offramp.models.backbone import Backbone

DTYPE = torch.bfloat16
ROWS = 3
LONGER = (0, 4, 1)
"""Columns that each row is ahead of its prompt."""


def prepared(whole, parts, inputs, name):
    """A runner with rows in its slots, and where each writes next."""
    runner = SlotRunner(whole, parts, parts.depths, ROWS, 128)
    reader = PromptReader(whole, parts, parts.depths)
    columns = []
    for slot, ahead in enumerate(LONGER):
        options = {"max_new_tokens": 9, "do_sample": False}
        prompt = reader.read(one_row(name, inputs, slot), options, use_exits=True)
        columns.append(runner.load(slot, prompt.cache, prompt.positions, prompt.real) + ahead)
    return runner, columns


@torch.inference_mode()
def made(runner, columns):
    """What calls of all kinds compute, one after the other."""
    tokens = torch.arange(ROWS) + families.FIRST_WORD
    shallow = runner.shallow(tokens, columns)
    more = runner.shallow(tokens, [column + 1 for column in columns])
    first = runner.split
    states = torch.stack([shallow.entries[first], more.entries[first]], 1).flatten(0, 1)
    places = [(slot, columns[slot] + n) for slot in range(ROWS) for n in range(2)]
    deep = runner.deep(states, *zip(*places, strict=True))
    some = runner.deep(states[2:3], [1], [columns[1]])
    after = [column + 2 for column in columns]
    full, bare = runner.full(tokens, after), runner.full(tokens, after, exits=False)
    step, one = runner.step(tokens, after), runner.full(tokens[:1], after[:1])
    found = [s.final for s in (deep, some, full, bare, step, one)]
    for s in (shallow, more, deep, step):
        found += [part[depth] for part in (s.entries, s.exits, s.previous) for depth in part]
    return found


@pytest.fixture
def both(backbone, exits, batch, monkeypatch):
    """Of a family: what all calls compute through its stack, and then `later` columns on, and the
    runner that is to do the same without."""

    def run(name, later=()):
        given = (backbone(name, DTYPE), exits(name, DTYPE), batch(name, 4, DTYPE), name)
        monkeypatch.setattr(given[0], "lean_decoding", False)
        runner, columns = prepared(*given)
        places = [[column + more for column in columns] for more in (0, *later)]
        theirs = [made(runner, at) for at in places]
        monkeypatch.setattr(given[0], "lean_decoding", True)
        return theirs, prepared(*given)[0], places

    return run


def same(theirs, runner, places):
    ours = [made(runner, at) for at in places]
    return all(
        len(a) == len(b) and all(map(torch.equal, a, b)) for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("name", NAMES)
def test_all_calls_are_the_stacks_and_it_is_asked_once(name, both, monkeypatch):
    theirs, runner, places = both(name)
    assert same(theirs, runner, places)
    monkeypatch.setattr(runner.intercepted, "stack", None)
    assert same(theirs, runner, places)


@pytest.mark.parametrize("name", ["blip2-t5", "gemma3", "paligemma2", "qwen2.5-vl"])
def test_tables_grow_with_the_slots(name, both):
    assert same(*both(name, [20, 70]))


def test_what_is_made_otherwise_is_left_to_the_stack(both, monkeypatch):
    monkeypatch.setattr(tables, "_gathered", lambda rows, *_: rows)
    theirs, runner, places = both("llava")
    assert same(theirs, runner, places)
    monkeypatch.setattr(runner, "_by_layers", None)
    assert same(theirs, runner, places)


def test_rotary_tables_that_depend_on_the_longest_row_are_left_to_the_stack(exits, batch):
    model = families.build("llava")
    text = model.model.language_model
    text.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    text.config.max_position_embeddings = 32
    text.rotary_emb = type(text.rotary_emb)(text.config)
    whole, made = Backbone(model), []
    for on in (False, True):
        whole.lean_decoding = on
        runner, columns = prepared(whole, exits("llava"), batch("llava", 4), "llava")
        with torch.inference_mode():
            for more in (0, 30):
                at = [column + more for column in columns]
                made.append(runner.full(torch.full((ROWS,), families.FIRST_WORD), at).final)
    assert torch.equal(made[0], made[2]) and torch.equal(made[1], made[3])
