"""Law 14: whatever joins, leaves, is guessed or cancelled beside it, a row gets what it gets alone.

Rows of all modes share a batch, joined and moved on in an order that is drawn; each is held against
`generate` on its own: tokens, depths, scores, and the logits that its tokens came from.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from families import NAMES, one_row

from offramp.engine.generate import generate
from offramp.engine.policy import ExitPolicy, first_token_may_exit
from offramp.engine.slots.layout import LAYOUTS
from offramp.engine.slots.prompt import PromptReader
from offramp.models.exits import EXIT_KINDS, ExitKind, Exits, copy_layer, first
from offramp.serving.rows.rules import RowRules
from offramp.serving.rows.slot_batch import RowPolicy, SlotBatch

ROWS = 4
NEW = (10, 6, 9, 11)
EXACT = 1e-4


class LogitsWarper:
    """Notes the raw logits of each place in the answer; of one that is asked again, the last.

    Called a warper because those shape sampling only: exits are not asked about them.
    """

    def __init__(self) -> None:
        self.by_length: dict[int, torch.Tensor] = {}

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        self.by_length[ids.shape[1]] = logits[0].clone()
        return logits


@dataclass
class Asked:
    """A request: its prompt and options, how it uses the exits, and what it gets alone."""

    inputs: dict[str, Any]
    options: dict[str, Any]
    policy: RowPolicy
    alone: Any = None
    logits: Any = None


def thresholds(whole: Any, exits: Any, inputs: Any) -> dict[int, float]:
    """Such that about half of the tokens exit at the first depth, and some at the second."""
    looked = ExitPolicy({exits.depths[0]: 1.0})
    made = generate(whole, inputs, exits=exits, policy=looked, max_new_tokens=9, do_sample=False)
    scores = made.scores[0, 1:].sort().values
    middle = float(scores[3] + scores[4]) / 2  # between two scores: none ties
    return dict.fromkeys(exits.depths, middle)


def requests(name: str, whole: Any, exits: Any, inputs: Any, **more: Any) -> list[Asked]:
    """One of each mode: early exit with guesses, full, lossless, early exit that parks."""
    rows = [one_row(name, inputs, row) for row in range(ROWS)]
    at = thresholds(whole, exits, rows[0])
    policies = (RowPolicy(at), RowPolicy(guess=False), RowPolicy(), RowPolicy(at, guess=False))
    asked = []
    for row, (given, policy, new) in enumerate(zip(rows, policies, NEW, strict=True)):
        options = {"max_new_tokens": new, "do_sample": False, **more}
        seen = LogitsWarper()
        torch.manual_seed(row)  # matters where tokens are sampled
        alone = generate(
            whole,
            given,
            exits=exits,
            policy=ExitPolicy(policy.thresholds),
            logits_processor=[seen],
            **options,
        )
        asked.append(Asked(given, options, policy, alone, seen))
    return asked


def serve(
    whole: Any,
    exits: Any,
    asked: list[Asked],
    *,
    slots: int,
    seed: int,
    noted: int | None = None,
    **settings: Any,
) -> tuple[dict[int, Any], dict[int, LogitsWarper]]:
    """Answer all in a batch, in an order drawn from `seed`; one of them is taken out once.

    noted: every other request notes its logits, from this one on. Odd seeds read prompts in chunks.
    """
    draw = random.Random(seed)
    policy = ExitPolicy(dict.fromkeys(exits.depths, 0.5))
    batch = SlotBatch(whole, exits, policy, slots=slots, limit=64, **settings)
    early = first_token_may_exit(whole, policy)
    chunk = 3 if seed % 2 else None
    reader = PromptReader(whole, exits, exits.depths, first_may_exit=early, chunk=chunk)
    queue, done, notes = list(range(len(asked))), {}, {}
    draw.shuffle(queue)
    cancelled = False

    def join(number: int) -> None:
        request = asked[number]
        extra = {}
        if noted is not None and number % 2 == noted:
            notes[number] = LogitsWarper()
            extra = {"logits_processor": [notes[number]]}
        prompt = reader.read(request.inputs, {**request.options, **extra}, use_exits=True)
        batch.join(prompt, RowRules(prompt, seed=number), request.policy, number)

    while queue or batch.seats:
        if queue and len(batch.seats) < slots and draw.random() < 0.5:
            join(queue.pop())
        elif batch.ready and draw.random() < 0.7:
            batch.shallow()
        else:
            batch.deep()
        if not cancelled and len(batch.seats) == slots and draw.random() < 0.3:
            queue.append(batch.seats[0].owner)
            batch.leave(batch.seats[0])
            cancelled = True
        for seat in list(batch.seats):
            assert seat.error is None
            if seat.over:
                done[seat.owner] = batch.result(seat)
                batch.leave(seat)
    return done, notes


def check(asked: list[Asked], done: dict[int, Any], scores: bool = True) -> None:
    for number, request in enumerate(asked):
        alone, ours = request.alone, done[number]
        assert torch.equal(ours.sequences, alone.sequences), number
        if request.policy.thresholds or not request.policy.guess:
            assert torch.equal(ours.depths, alone.depths), number
        if request.policy.thresholds and scores:
            torch.testing.assert_close(
                ours.scores, alone.scores.double().float(), atol=EXACT, rtol=0, equal_nan=True
            )


@pytest.mark.parametrize("name", NAMES)
def test_a_row_in_a_batch_gets_what_it_gets_alone(name, backbone, exits, batch):
    whole, some = backbone(name), exits(name)
    asked = requests(name, whole, some, batch(name, ROWS))
    packs = whole.text_config._attn_implementation == "sdpa"
    number = NAMES.index(name)
    for noted, layout in enumerate((LAYOUTS[number % 2], "packed" if packs else "padded")):
        seed = 2 * number + noted
        settings = {"layout": layout, "longest": 5}
        done, notes = serve(whole, some, asked, slots=3, seed=seed, noted=noted, **settings)
        check(asked, done)
        for number, seen in notes.items():
            for length, logits in asked[number].logits.by_length.items():
                torch.testing.assert_close(seen.by_length[length], logits, atol=EXACT, rtol=0)


class TwoLayers(torch.nn.ModuleList):
    """An exit of two layers, each with keys and values of its own."""

    def forward(self, hidden: torch.Tensor, *args: Any, **kw: Any) -> torch.Tensor:
        for layer in self:
            hidden = first(layer(hidden, *args, **kw))
        return hidden


@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5"])
def test_an_exit_of_several_layers_keeps_all_its_keys(name, backbone, batch, monkeypatch):
    kind = ExitKind(
        lambda whole, depth, own: TwoLayers(copy_layer(whole.layers[depth], e) for e in own), 2
    )
    monkeypatch.setitem(EXIT_KINDS, "two_layers", kind)
    whole = backbone(name)
    torch.manual_seed(0)
    exits = Exits(whole, (2, 4), kind="two_layers").requires_grad_(False)
    asked = requests(name, whole, exits, batch(name, ROWS))
    done, _ = serve(whole, exits, asked, slots=3, seed=0)
    check(asked, done)


@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5"])
@pytest.mark.parametrize("seed", range(2))
def test_sampled_rows_get_the_tokens_of_their_seed(name, seed, backbone, exits, batch):
    """Guessed or not: lossless rows get the full model's sample of that seed, token for token."""
    whole, some = backbone(name), exits(name)
    options = {"do_sample": True, "top_k": 7, "temperature": 1.3}
    asked = requests(name, whole, some, batch(name, ROWS), **options)
    done, _ = serve(whole, some, asked, slots=3, seed=seed)
    check(asked, done)
    assert len({tuple(request.alone.new_tokens[0].tolist()) for request in asked}) == ROWS


@pytest.mark.parametrize(
    "option",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 5, "eos_token_id": list(range(8, 40))},
        {"eos_token_id": list(range(8, 24))},
    ],
    ids=["repetition", "ngram", "minimum", "end"],
)
@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5"])
def test_rows_keep_their_own_processors_and_end_tokens(name, option, backbone, exits, batch):
    whole, some = backbone(name), exits(name)
    asked = requests(name, whole, some, batch(name, ROWS), **option)
    done, _ = serve(whole, some, asked, slots=3, seed=len(name))
    check(asked, done)
