"""Laws of lossless decoding: the exits may say what they like, the output is the full model's."""

import families
import pytest
import torch
from families import NAMES
from reference import Dice

from offramp.engine.confidence import SCORES
from offramp.engine.generate import generate
from offramp.engine.policy import ExitPolicy
from offramp.errors import InputError
from offramp.models.exits import Exits

NEW = 16
GREEDY = {"max_new_tokens": NEW, "do_sample": False}


def lossless(name, threshold=0.0, depths=None, **more):
    chosen = depths or families.depths(name)[:1]
    return ExitPolicy(dict.fromkeys(chosen, threshold), lossless=True, **more)


def accepted(result):
    return sum(kept for _, kept in result.rounds)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_greedy_output_is_the_full_models_whatever_the_drafts(
    name, rows, backbone, exits, batch, monkeypatch
):
    monkeypatch.setitem(SCORES, "max_probability", Dice(5))
    whole, inputs = backbone(name), batch(name, rows)
    full = generate(whole, inputs, **GREEDY)
    ours = generate(whole, inputs, exits=exits(name), policy=lossless(name, 0.3), **GREEDY)
    assert torch.equal(ours.sequences, full.sequences)
    assert sum(drafted for drafted, _ in ours.rounds) > 0


@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5"])
@pytest.mark.parametrize("longest", [1, 3, 8])
def test_output_is_the_full_models_if_everything_is_drafted(name, longest, backbone, exits, batch):
    whole, inputs = backbone(name), batch(name, 1)
    full = generate(whole, inputs, **GREEDY)
    policy = lossless(name, 0.0, max_draft=longest)
    ours = generate(whole, inputs, exits=exits(name), policy=policy, **GREEDY)
    assert torch.equal(ours.sequences, full.sequences)
    assert max(drafted for drafted, _ in ours.rounds) == longest


def agreeing(whole, name):
    """Exits that always agree: a copy of the last layer, at the depth before it."""
    return Exits(whole, (whole.depth - 1,))


@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5", "llava"])
def test_drafts_that_agree_are_all_kept(name, backbone, batch):
    whole, inputs = backbone(name), batch(name, 1)
    policy = lossless(name, 0.0, depths=(whole.depth - 1,), max_draft=4)
    ours = generate(whole, inputs, exits=agreeing(whole, name), policy=policy, **GREEDY)
    assert torch.equal(ours.sequences, generate(whole, inputs, **GREEDY).sequences)
    assert all(drafted == kept for drafted, kept in ours.rounds)
    # The prompt gives the first token; then each full round writes its drafts and one token more.
    assert [drafted for drafted, _ in ours.rounds] == [4, 4, 4]


def test_drafts_that_are_never_made_cost_no_round(backbone, exits, batch):
    whole, inputs = backbone("blip2-opt"), batch("blip2-opt", 1)
    policy = lossless("blip2-opt", 1.0)
    ours = generate(whole, inputs, exits=exits("blip2-opt"), policy=policy, **GREEDY)
    assert torch.equal(ours.sequences, generate(whole, inputs, **GREEDY).sequences)
    assert accepted(ours) == 0


@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5"])
def test_two_exits_draft_together(name, backbone, exits, batch, monkeypatch):
    monkeypatch.setitem(SCORES, "max_probability", Dice(2))
    whole, inputs = backbone(name), batch(name, 1)
    policy = lossless(name, 0.5, depths=families.depths(name))
    ours = generate(whole, inputs, exits=exits(name), policy=policy, **GREEDY)
    assert torch.equal(ours.sequences, generate(whole, inputs, **GREEDY).sequences)


def test_no_layer_is_run_twice_on_a_kept_token(backbone, batch):
    whole, inputs = backbone("blip2-opt"), batch("blip2-opt", 1)
    agreed = agreeing(whole, "blip2-opt")  # before the hooks, which a copied layer would keep
    counts = [0] * whole.depth
    handles = [
        layer.register_forward_hook(
            lambda _m, args, _o, i=i: counts.__setitem__(i, counts[i] + args[0].shape[1])
        )
        for i, layer in enumerate(whole.layers)
    ]
    policy = lossless("blip2-opt", 0.0, depths=(whole.depth - 1,), max_draft=4)
    try:
        generate(whole, inputs, exits=agreed, policy=policy, **GREEDY)
    finally:
        for handle in handles:
            handle.remove()
    prompt = inputs["input_ids"].shape[1]
    assert counts == [prompt + NEW - 1] * whole.depth  # the last token is never fed back


OPTIONS = {
    "min_new_tokens": {"min_new_tokens": 8},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "no_repeat_ngram": {"no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("rows", [1, 4])
def test_processors_shape_drafts_and_verification_alike(
    option, rows, backbone, exits, batch, monkeypatch
):
    monkeypatch.setitem(SCORES, "max_probability", Dice(4))
    whole, inputs = backbone("blip2-opt"), batch("blip2-opt", rows)
    options = {**GREEDY, **OPTIONS[option]}
    full = generate(whole, inputs, **options)
    policy = lossless("blip2-opt", 0.3)
    ours = generate(whole, inputs, exits=exits("blip2-opt"), policy=policy, **options)
    assert torch.equal(ours.sequences, full.sequences)


@pytest.mark.parametrize("rows", [1, 4])
def test_nothing_is_written_past_the_end_token(rows, backbone, exits, batch):
    whole, inputs = backbone("blip2-opt"), batch("blip2-opt", rows)
    free = generate(whole, inputs, **GREEDY)
    options = {**GREEDY, "eos_token_id": int(free.new_tokens[0, 5])}
    full = generate(whole, inputs, **options)
    policy = lossless("blip2-opt", 0.0)
    ours = generate(whole, inputs, exits=exits("blip2-opt"), policy=policy, **options)
    assert torch.equal(ours.sequences, full.sequences)
    assert torch.equal(ours.depths > 0, full.depths > 0)


class Puts:
    """A streamer that notes what it is given."""

    def __init__(self):
        self.puts, self.ended = [], False

    def put(self, value):
        self.puts.append(value.tolist())

    def end(self):
        self.ended = True


def test_a_streamer_gets_confirmed_tokens_only_one_by_one(backbone, exits, batch):
    whole, inputs = backbone("blip2-opt"), batch("blip2-opt", 1)
    full, ours = Puts(), Puts()
    generate(whole, inputs, streamer=full, **GREEDY)
    policy = lossless("blip2-opt", 0.0)
    generate(whole, inputs, exits=exits("blip2-opt"), policy=policy, streamer=ours, **GREEDY)
    assert ours.puts == full.puts
    assert ours.ended


@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5"])
def test_sampled_output_has_the_full_models_distribution(name, backbone, exits, batch):
    """Chi-square of the second and third token against the full model's own samples."""
    whole, inputs = backbone(name), batch(name, 1)
    draws, top = 600, 3
    options = {"max_new_tokens": 3, "do_sample": True, "top_k": top, "temperature": 1.5}
    options["num_return_sequences"] = draws
    ours = generate(whole, inputs, exits=exits(name), policy=lossless(name, 0.0), **options)
    full = generate(whole, inputs, **options)
    assert sum(drafted for drafted, _ in ours.rounds) > 0
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


@pytest.mark.parametrize("longest", [0, -1, 1.5, True])
def test_a_draft_length_out_of_range_is_refused(longest):
    with pytest.raises(InputError, match="draft"):
        ExitPolicy({2: 0.5}, lossless=True, max_draft=longest)


def test_lossless_refuses_approximate_keys():
    with pytest.raises(InputError, match="exact"):
        ExitPolicy({2: 0.5}, lossless=True, kv="propagate")
