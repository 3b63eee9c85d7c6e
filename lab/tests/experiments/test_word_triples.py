"""Drafts out of a table of answers: what mostly follows; the full model's answers all the same."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

from offramp.adapter import Adapter
from offramp.engine.generate import generate
from offramp.engine.policy import ExitPolicy
from offramp.models.exits import Exits
from offramp_lab.experiments.word_triples import DraftTable, table_generate
from offramp_lab.records.drafts import answered, summary, ways_in_llama_cpp, ways_of

GREEDY = {"max_new_tokens": 12, "do_sample": False}


def test_the_longest_context_that_was_seen_often_says_what_follows() -> None:
    table = DraftTable.of([[1, 2, 3, 4]] * 3 + [[9, 3, 5]] * 4 + [[7, 8]] * 2)
    assert table.draft([1, 2], 4) == [3, 4]  # (1, 2, 3) before (3,), behind which 5 comes oftener
    assert table.draft([9], 4) == [3, 5] and table.draft([9], 1) == [3]
    assert table.draft([7], 4) == []  # seen twice
    assert table.draft([3], 4, sure=0.9) == []


def test_a_table_drafts_the_full_models_answer(backbone, batch) -> None:
    whole, inputs = backbone("llava"), batch("llava", 1)
    full = generate(whole, inputs, **GREEDY)
    answer = full.new_tokens[0].tolist()
    right = table_generate(whole, DraftTable.of([answer] * 3), inputs, **GREEDY)
    wrong = table_generate(whole, DraftTable.of([answer[::-1]] * 3), inputs, **GREEDY)
    for made in (right, wrong):
        assert torch.equal(made.sequences, full.sequences)
    assert sum(kept for _, kept in right.rounds) > 0


def test_a_summary_counts_places_behind_right_ones_and_pairs_photographs() -> None:
    def row(scale: float) -> dict[str, dict[str, object]]:
        ids = [1, 2, 3, 4, 5]
        return {
            "full": {"ids": ids, "seconds": 2 * scale, "rounds": []},
            "drafting, 3": {"ids": ids, "seconds": scale, "rounds": [[3, 2], [1, 0]]},
        }

    rows = [row(1.0), row(5.0), row(0.1)]
    full, ours = summary({way: [each[way] for each in rows] for way in rows[0]})
    assert full["times"] == 1.0 and "acceptance" not in full
    assert ours["identical"] == 3
    assert abs(ours["times"] - 2) < 1e-9 and abs(ours["low"] - 2) < 1e-9  # pairs stay together
    assert ours["acceptance"] == [0.5, 1.0, 0.0] and ours["tokens_a_round"] == 2.0
    assert ours["first_draft"] == 1.0


@pytest.fixture
def adapter(backbone) -> Adapter:
    whole = backbone("llava")
    exits = Exits(whole, (2,), kind="drafting").requires_grad_(False)
    return Adapter(whole, exits, ExitPolicy({2: 0.1}, drafts={2: 0.05}))


def test_all_ways_of_the_record_write_the_full_models_answer(adapter, batch) -> None:
    inputs = batch("llava", 1)
    full = generate(adapter.backbone, inputs, **GREEDY).new_tokens[0].tolist()
    taken = {
        name: answered(way, inputs)
        for name, way in ways_of(adapter, DraftTable.of([full] * 3)).items()
    }
    assert set(taken) > {"full", "table", "exit, as stored", "drafting, 4"}
    assert all(one["ids"] == taken["full"]["ids"] for one in taken.values())
    assert all(entry["identical"] == 1 for entry in summary({n: [one] for n, one in taken.items()}))


@pytest.mark.llama_cpp
def test_so_do_those_inside_llama_cpp(adapter, batch, tmp_path) -> None:
    inputs = batch("llava", 1)
    full = generate(adapter.backbone, inputs, **GREEDY).new_tokens[0].tolist()
    with ExitStack() as stack:
        table = DraftTable.of([full] * 3)
        ways = ways_in_llama_cpp(adapter, table, "f32", tmp_path, stack)
        taken = {name: answered(way, inputs) for name, way in ways.items()}
    expected = taken["full"]["ids"]
    assert len(taken) == 8 and all(one["ids"] == expected for one in taken.values())
    assert sum(kept for _, kept in taken["table"]["rounds"]) > 0
