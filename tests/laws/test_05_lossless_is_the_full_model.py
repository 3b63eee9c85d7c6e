"""Law 5: lossless decoding gives the full model's tokens, whether drafts are accepted never,
sometimes or always."""

from __future__ import annotations

import families
import pytest
import torch
from decoding import agreeing, lossless
from families import NAMES, WORDLESS
from reference import Dice

from offramp.core.decoding.policy import ExitPolicy
from offramp.core.engine.generate import generate
from offramp.core.models.exits import Exits
from offramp.core.models.opened import first

NEW = 16
GREEDY = {"max_new_tokens": NEW, "do_sample": False}
DEPTHS = (1, 2, 3, 5)


class Contrary(Exits):
    """Exits that never agree: what they make of a state points the other way."""

    def __init__(self, *args, **kw):
        super().__init__(*args, **kw)
        for exit in self.values():
            exit.register_forward_hook(lambda exit, given, output: -first(output))


def accepted(result):
    return sum(kept for _, kept in result.rounds)


def drafted(result):
    return sum(count for count, _ in result.rounds)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_output_is_the_full_models_whether_drafts_are_accepted_never_sometimes_or_always(
    name, rows, backbone, exits, batch, scored
):
    whole, inputs, options = backbone(name), batch(name, rows), {**GREEDY, "max_new_tokens": 10}
    full = generate(whole, inputs, **options).sequences
    last = (whole.depth - 1,)

    def made(parts, policy):
        result = generate(whole, inputs, exits=parts, policy=policy, **options)
        assert torch.equal(result.sequences, full) and drafted(result) > 0
        return result

    if rows == 1:
        always = made(agreeing(whole), lossless(name, depths=last, max_draft=4))
        assert accepted(always) == drafted(always)
        rejected = made(Contrary(whole, last), lossless(name, depths=last, max_draft=2))
        assert accepted(rejected) == 0
    else:
        scored(Dice(5))
        lens = Exits(whole, families.depths(name), kind="lens")  # keeps no keys of its own
        made(lens, lossless(name, 0.1, depths=lens.depths))
    scored(Dice(5))
    made(exits(name), lossless(name, 0.3 if rows == 1 else 0.1))


@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5"])
@pytest.mark.parametrize("longest", [1, 3, 8])
def test_output_is_the_full_models_if_everything_is_drafted(name, longest, backbone, exits, batch):
    whole, inputs = backbone(name), batch(name, 1)
    full = generate(whole, inputs, **GREEDY)
    policy = lossless(name, 0.0, max_draft=longest)
    ours = generate(whole, inputs, exits=exits(name), policy=policy, **GREEDY)
    assert torch.equal(ours.sequences, full.sequences)
    assert max(count for count, _ in ours.rounds) == longest


@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5"])
def test_drafts_that_agree_fill_each_round(name, backbone, batch):
    whole, inputs = backbone(name), batch(name, 1)
    policy = lossless(name, 0.0, depths=(whole.depth - 1,), max_draft=4)
    ours = generate(whole, inputs, exits=agreeing(whole), policy=policy, **GREEDY)
    # Each full round writes its drafts and one token more; the first begins with the prompt.
    assert [count for count, _ in ours.rounds] == [4, 4, 4, 1]


def test_drafts_that_are_never_made_cost_no_round(backbone, exits, batch):
    whole, inputs = backbone("blip2-opt"), batch("blip2-opt", 1)
    policy = lossless("blip2-opt", 1.0)
    ours = generate(whole, inputs, exits=exits("blip2-opt"), policy=policy, **GREEDY)
    assert torch.equal(ours.sequences, generate(whole, inputs, **GREEDY).sequences)
    assert accepted(ours) == 0


@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5"])
def test_two_exits_draft_together(name, backbone, exits, batch, scored):
    scored(Dice(2))
    whole, inputs = backbone(name), batch(name, 1)
    policy = lossless(name, 0.5, depths=families.depths(name))
    ours = generate(whole, inputs, exits=exits(name), policy=policy, **GREEDY)
    assert torch.equal(ours.sequences, generate(whole, inputs, **GREEDY).sequences)


OPTIONS = {
    "min_new_tokens": {"min_new_tokens": 8},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "no_repeat_ngram": {"no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_processors_shape_drafts_and_verification_alike(option, backbone, exits, batch, scored):
    whole, options = backbone("blip2-opt"), {**GREEDY, **OPTIONS[option]}
    for rows in (1, 4):
        scored(Dice(4))
        inputs, policy = batch("blip2-opt", rows), lossless("blip2-opt", 0.3)
        ours = generate(whole, inputs, exits=exits("blip2-opt"), policy=policy, **options)
        assert torch.equal(ours.sequences, generate(whole, inputs, **options).sequences)


@pytest.mark.parametrize("name", ["llava", "blip2-t5"])
@pytest.mark.parametrize(("score", "threshold"), [("margin", 0.01), ("idle", 0.47)])
def test_output_is_greedy_whatever_the_score_of_the_drafts(
    score, threshold, name, backbone, exits, batch, idle
):
    policy = lossless(name, threshold, depths=DEPTHS, score=score)
    whole, parts = backbone(name), exits(name, depths=DEPTHS)
    options = {**GREEDY, "suppress_tokens": WORDLESS}
    for rows in (1, 4):
        inputs = batch(name, rows)
        made = generate(whole, inputs, exits=parts, policy=policy, **options)
        assert torch.equal(made.sequences, whole.model.generate(**inputs, **options))
        assert drafted(made) > 0


@pytest.mark.parametrize("name", ["llava", "blip2-t5", "gemma3"])
def test_output_is_greedy_where_a_lens_drafts_by_its_states(name, backbone, batch, idle):
    whole = backbone(name)
    lens = Exits(whole, families.depths(name), kind="lens")
    policy = ExitPolicy(dict.fromkeys(lens.depths, 0.9), score=idle, lossless=True)
    for rows in (1, 4):
        inputs = batch(name, rows)
        made = generate(whole, inputs, exits=lens, policy=policy, **GREEDY)
        assert torch.equal(made.sequences, whole.model.generate(**inputs, **GREEDY))
        assert drafted(made) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5"])
def test_sampled_output_has_the_full_models_distribution(name, backbone, exits, batch):
    """Chi-square of the second and third token against the full model's own samples."""
    whole, inputs = backbone(name), batch(name, 1)
    draws, top = 600, 3
    options = {"max_new_tokens": 3, "do_sample": True, "top_k": top, "temperature": 1.5}
    options["num_return_sequences"] = draws
    ours = generate(whole, inputs, exits=exits(name), policy=lossless(name, 0.0), **options)
    full = generate(whole, inputs, **options)
    assert drafted(ours) > 0
    from scipy.stats import chi2_contingency

    for result in (ours, full):
        assert len(result.new_tokens) == draws
    pairs = [[tuple(row) for row in r.new_tokens[:, :2].tolist()] for r in (ours, full)]
    kinds = sorted(set(pairs[0]) | set(pairs[1]))
    table = [[p.count(kind) for kind in kinds] for p in pairs]
    table = [
        [row[i] for i in range(len(kinds)) if table[0][i] + table[1][i] >= 10] for row in table
    ]
    assert chi2_contingency(table).pvalue > 1e-3


def test_in_half_precision_output_differs_only_where_logits_tie(backbone, exits, batch):
    """A layer over several tokens and over one may round differently: that is all that may show."""
    name = "blip2-opt"
    whole, inputs = backbone(name, torch.bfloat16), batch(name, 1, torch.bfloat16)
    full = generate(whole, inputs, **GREEDY)
    policy = lossless(name, 0.0)
    ours = generate(whole, inputs, exits=exits(name, torch.bfloat16), policy=policy, **GREEDY)
    differing = (ours.new_tokens != full.new_tokens)[0].nonzero()
    if len(differing) == 0:
        return
    place = int(differing[0])  # before it the two read the same tokens
    longer = {**inputs}
    written = full.sequences[:, : inputs["input_ids"].shape[1] + place]
    longer["input_ids"] = written
    longer["attention_mask"] = torch.ones_like(written)
    with torch.inference_mode():
        logits = whole.model(**longer).logits[0, -1].float()
    one, other = full.new_tokens[0, place], ours.new_tokens[0, place]
    scale = logits.abs().max()
    assert abs(logits[one] - logits[other]) <= 2**-6 * scale  # bfloat16 keeps 8 bits
