"""Law 14: whatever joins, leaves, waits or is cancelled beside it, a row gets what it gets alone.

Rows of all modes share a decoder, joined and moved on in an order that is drawn; each is held
against `generate` on its own: tokens, depths, scores, and the logits that its tokens came from.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import fakes
import pytest
import torch
from decoding import agreeing
from families import NAMES, WORDLESS, build, depths, one_row, perturb

from offramp.core.decoding.policy import MODES, ExitPolicy, GenerationOutput
from offramp.core.engine.generate import generate
from offramp.core.engine.plan import plan_of
from offramp.core.engine.sampler import Sampler, SeededNoise
from offramp.core.errors import InputError, UnsupportedBackboneError
from offramp.core.executors.choice import EXECUTORS
from offramp.core.models.backbone import Backbone
from offramp.core.models.exit_kinds import EXIT_KINDS, ExitKind
from offramp.core.models.exits import Exits, ExitSet, copy_layer
from offramp.core.models.opened import first
from offramp.engines.packed import prepack
from offramp.features.compiled.compiled import COMPILED
from offramp.features.exact_batches import EXACT_BATCHES
from offramp.features.quantized.linears import quantize_layers

ROWS = 5
NEW = (7, 4, 6, 8, 6)
EXACT = 1e-4
OTHERWISE = ("blip2-t5", "instructblip-t5", "florence2", "paligemma2")
"""Those with an encoder, or attention with capped logits."""
BY_TOKEN = [name for name in NAMES if name not in OTHERWISE]


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
    """A request: its prompt and options, its mode, and what it gets alone."""

    inputs: dict[str, Any]
    options: dict[str, Any]
    policy: ExitPolicy
    mode: str
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
    """Requests of all modes."""
    rows = [one_row(name, inputs, row % 4) for row in range(ROWS)]
    at = thresholds(whole, exits, rows[0])
    policy = ExitPolicy(at, max_draft=3)
    modes = ("early_exit", "full", "lossless", "early_exit", "lossless")
    asked = []
    for row, (given, mode, new) in enumerate(zip(rows, modes, NEW, strict=True)):
        options = {"max_new_tokens": new, "do_sample": False, **more}
        seen = LogitsWarper()
        alone = generate(
            whole,
            given,
            exits=exits,
            policy=policy.in_mode(mode),
            logits_processor=[seen],
            seed=row,  # matters where tokens are sampled
            **options,
        )
        asked.append(Asked(given, options, policy, mode, alone, seen))
    return asked


def serve(
    whole: Any,
    exits: Any,
    asked: list[Asked],
    *,
    slots: int,
    seed: int,
    noted: int | None = None,
    longest: int | None = None,
    engine: str = "slots",
    packs: bool | None = None,
) -> tuple[dict[int, Any], dict[int, LogitsWarper]]:
    """Answer all in one decoder, in an order drawn from `seed`; one of them is taken out once.

    noted: every other request notes its logits, from this one on. Odd seeds read prompts in chunks,
    even ones let prompts that come together run together.
    """
    draw = random.Random(seed)
    plan = plan_of(whole, exits, asked[0].policy, modes=MODES)
    executor = plan.executor(engine=engine, slots=slots, limit=64)
    if packs is not None:
        executor.packs = packs
    decoder = plan.decoder(executor, longest=longest)
    prompts = plan.reader(chunk=3 if seed % 2 else 64)
    queue, done, notes = list(range(len(asked))), {}, {}
    draw.shuffle(queue)
    cancelled = False

    def join(number: int) -> None:
        request = asked[number]
        extra = {}
        if noted is not None and number % 2 == noted:
            notes[number] = LogitsWarper()
            extra = {"logits_processor": [notes[number]]}
        prepared = prompts.prepare(request.inputs, {**request.options, **extra})
        sampler = Sampler(prepared, noise=SeededNoise(number))
        rule = plan.rule(request.mode)
        with torch.inference_mode():
            prompt, [token] = decoder.read(prompts, prepared, [sampler], rule, later=True)
            decoder.join(prompt, 0, sampler, rule, token, number)

    while queue or decoder.sequences:
        rows = decoder.sequences
        if queue and len(rows) < slots and draw.random() < 0.5:
            join(queue.pop())
            continue
        decoder.begin()
        if any(row.ready(longest) for row in rows) and draw.random() < 0.7:
            plain = decoder.next_call() == "full"
            decoder.make("full" if plain else "feed")
        elif rows:
            decoder.make("deep")
        if not cancelled and len(rows) == slots and draw.random() < 0.3:
            queue.append(rows[0].owner)
            decoder.leave(rows[0])
            cancelled = True
        for row in list(decoder.sequences):
            assert row.error is None
            if row.over:
                done[row.owner] = GenerationOutput.of_rows(
                    row.sampler.ids, [row.tokens], whole.depth
                )
                decoder.leave(row)
    return done, notes


def check(asked: list[Asked], done: dict[int, Any], scores: bool = True) -> None:
    for number, request in enumerate(asked):
        alone, ours = request.alone, done[number]
        assert torch.equal(ours.sequences, alone.sequences), number
        assert torch.equal(ours.depths, alone.depths), number
        if scores:
            torch.testing.assert_close(
                ours.scores, alone.scores, atol=EXACT, rtol=0, equal_nan=True
            )


@pytest.mark.parametrize("name", NAMES)
def test_a_row_in_a_batch_gets_what_it_gets_alone(name, backbone, exits, batch):
    whole, some = backbone(name), exits(name)
    asked = requests(name, whole, some, batch(name, 4))
    packs = whole.text_config._attn_implementation == "sdpa"
    number = NAMES.index(name)
    for noted, packed in enumerate((False, packs)):
        seed, longest = 2 * number + noted, 5 if noted else None
        done, notes = serve(
            whole, some, asked, slots=3, seed=seed, noted=noted, longest=longest, packs=packed
        )
        check(asked, done)
        for number, seen in notes.items():
            for length, logits in asked[number].logits.by_length.items():
                torch.testing.assert_close(seen.by_length[length], logits, atol=EXACT, rtol=0)


@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5", "gemma3", "qwen2.5-vl"])
def test_so_it_does_through_the_models_own_stack(name, backbone, exits, batch):
    whole, some = backbone(name), exits(name)
    asked = requests(name, whole, some, batch(name, 4))
    done, _ = serve(whole, some, asked, slots=3, seed=4, engine="stack")
    check(asked, done)


PADDED = [name for name in NAMES if name not in ("instructblip-opt", "instructblip-llama")]
"""Not those whose own `generate` writes otherwise where a prompt is padded: their Q-Former reads
the padding."""


@pytest.mark.parametrize("engine", EXECUTORS)
@pytest.mark.parametrize("name", PADDED)
def test_rows_of_one_padded_call_get_what_each_gets_alone(
    name, engine, backbone, exits, batch, monkeypatch
):
    """A static batch through `generate`, read in one pass: early exit and lossless."""
    whole, some = backbone(name), exits(name)
    inputs = batch(name, 3)
    monkeypatch.setattr(whole, "engine", engine)
    at = thresholds(whole, some, one_row(name, inputs, 0))
    for lossless in (False, True):
        policy = ExitPolicy(at, lossless=lossless, first={})
        options = {"exits": some, "policy": policy, "max_new_tokens": 6, "do_sample": False}
        together = generate(whole, inputs, **options)
        for row in range(3):
            alone = generate(whole, one_row(name, inputs, row), **options)
            assert torch.equal(together.new_tokens[row], alone.new_tokens[0])
            assert torch.equal(together.depths[row], alone.depths[0])


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
    asked = requests(name, whole, exits, batch(name, 4))
    done, _ = serve(whole, exits, asked, slots=3, seed=0)
    check(asked, done)


@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5"])
@pytest.mark.parametrize("seed", range(2))
def test_sampled_rows_get_the_tokens_of_their_seed(name, seed, backbone, exits, batch):
    """Lossless rows get the full model's sample of that seed, token for token."""
    whole, some = backbone(name), exits(name)
    options = {"do_sample": True, "top_k": 7, "temperature": 1.3}
    asked = requests(name, whole, some, batch(name, 4), **options)
    done, _ = serve(whole, some, asked, slots=3, seed=seed)
    check(asked, done)
    for row in (2, 4):
        given = {**asked[row].options, "seed": row}
        full = generate(whole, asked[row].inputs, **given)
        assert torch.equal(done[row].sequences, full.sequences)
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
    asked = requests(name, whole, some, batch(name, 4), **option)
    done, _ = serve(whole, some, asked, slots=3, seed=len(name))
    check(asked, done)


def test_a_draft_is_counted_alike_however_many_may_be_open(backbone, exits, batch):
    """`max_draft` says speed alone: tokens, depths and scores are those of any other."""
    whole, some, inputs = backbone("llava"), exits("llava"), batch("llava", 1)
    at = thresholds(whole, some, inputs)
    made = [
        generate(
            whole,
            inputs,
            exits=some,
            policy=replace(ExitPolicy(at, lossless=True), max_draft=most),
            max_new_tokens=16,
            do_sample=False,
        )
        for most in (1, 2, 8, 64)
    ]
    for other in made[1:]:
        assert torch.equal(other.sequences, made[0].sequences)
        assert torch.equal(other.depths, made[0].depths)
        torch.testing.assert_close(other.scores, made[0].scores, equal_nan=True, atol=EXACT, rtol=0)


def laid_out(name: str, dtype: torch.dtype, word: str = "") -> tuple[Any, Any]:
    """A backbone of its own whose weights are laid out, exact in any company, and its exits. word:
    of how its layers are quantised."""
    model = build(name, dtype)
    if word:
        quantize_layers(Backbone(model).layers, word)
    whole = Backbone(model)
    some = Exits(whole, depths(name)).requires_grad_(False)
    perturb(some)
    prepack(whole, ExitSet.of(some), every=True)
    return whole.with_decoding(exact_batches=EXACT_BATCHES), some


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype", "word"),
    [
        *(pytest.param(name, torch.bfloat16, "", marks=fakes.NEEDS_BF16) for name in BY_TOKEN),
        *((name, torch.float32, "") for name in ("llava", "qwen2.5-vl", "gemma3", "blip2-opt")),
        pytest.param("llava", torch.bfloat16, "int8", marks=fakes.NEEDS_BF16),
        pytest.param("llava", torch.bfloat16, "int4", marks=fakes.NEEDS_BF16),
    ],
)
def test_to_the_last_bit_where_batches_are_to_be_exact(name, dtype, word, batch):
    """In half precision too, whatever the order: scores and logits, and so all that follows."""
    whole, some = laid_out(name, dtype, word)
    asked = requests(name, whole, some, batch(name, 4, dtype))
    for seed in range(2):
        done, notes = serve(whole, some, asked, slots=3, seed=seed, noted=seed % 2)
        check(asked, done, scores=False)
        for number, request in enumerate(asked):
            ours, alone = (made.scores.nan_to_num(9) for made in (done[number], request.alone))
            assert torch.equal(ours, alone)
        for number, seen in notes.items():
            for length, logits in asked[number].logits.by_length.items():
                assert torch.equal(seen.by_length[length], logits)


@pytest.mark.parametrize("name", ["gemma3", "llava"])
def test_exact_batches_write_the_models_own_answer_where_drafts_stand(name, batch):
    """Several tokens of a slot in a call, each by the mask of its own place."""
    whole, given = Backbone(build(name)), one_row(name, batch(name, 4), 0)
    options = {"max_new_tokens": 16, "do_sample": False, "suppress_tokens": WORDLESS}
    own = whole.model.generate(**given, **options)
    exits = agreeing(whole)
    prepack(whole, ExitSet.of(exits), every=True)
    policy = ExitPolicy(dict.fromkeys(exits.depths, 0.0), lossless=True, max_draft=3)
    exact = whole.with_decoding(exact_batches=EXACT_BATCHES)
    made = generate(exact, given, exits=exits, policy=policy, **options)
    assert torch.equal(made.sequences, own) and made.rounds[0] == (3, 3)


@pytest.mark.parametrize("name", OTHERWISE)
def test_where_that_is_not_known_it_is_refused(name, batch):
    whole, some = laid_out(name, torch.float32)
    with pytest.raises(UnsupportedBackboneError, match="Exact batches are not known"):
        generate(whole, one_row(name, batch(name, 4), 0), exits=some, max_new_tokens=2)


def test_exact_batches_want_weights_that_are_laid_out_and_prompts_one_by_one(batch):
    whole = Backbone(build("llava")).with_decoding(exact_batches=EXACT_BATCHES)
    with pytest.raises(UnsupportedBackboneError, match="the LM head has others"):
        generate(whole, one_row("llava", batch("llava", 4), 0), max_new_tokens=2)
    prepack(whole, every=True)
    with pytest.raises(InputError, match="one at a time, and 4 rows came"):
        generate(whole, batch("llava", 4), max_new_tokens=2)
    compiled = whole.with_decoding(instead=COMPILED)
    with pytest.raises(UnsupportedBackboneError, match="other code than that of several"):
        generate(compiled, one_row("llava", batch("llava", 4), 0), max_new_tokens=2)
