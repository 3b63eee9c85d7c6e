"""Laws of the decode loop: layers are really skipped, the cache is exact, HF's options hold."""

from __future__ import annotations

import gc
import threading
import weakref

import families
import pytest
import torch
from families import CAUSAL_PROMPT, FIRST_WORD, LOOKS_AHEAD, NAMES, PAD, WORDLESS
from reference import Dice, Script, StepLogitsWarper, of_steps, probe

from offramp.engine.confidence import SCORES
from offramp.engine.exit_check import ExitScorer
from offramp.engine.generate import generate
from offramp.engine.model_runner import ModelRunner
from offramp.engine.policy import FULL, ExitPolicy
from offramp.engine.sampling import ActiveRows
from offramp.errors import InputError
from offramp.models.backbone import Backbone
from offramp.models.exits import Exits

NEW = 12
CALM = 0.1
"""Scale of the weights where rounding is measured: wilder ones blow it up, in HF's own cached
decoding against its uncached one to 8e-6. A wrong key or value shows as 1e-2 and more."""
EXACT = 2e-6


@pytest.fixture
def scored(monkeypatch):
    """`scored(score)`: tokens leave by this score, whatever the logits."""
    return lambda score: monkeypatch.setitem(SCORES, "max_probability", score)


def never(name):
    return ExitPolicy(dict.fromkeys(families.depths(name), 1.0))


def always(name):
    return ExitPolicy({families.depths(name)[0]: 0.0})


# -- law 3: real skipping ---------------------------------------------------------------------


def tokens_by_layer(whole, call):
    """Run `call` and count, for each layer, the tokens that went all the way through it."""
    counts = [0] * whole.depth
    handles = []
    for index, layer in enumerate(whole.layers):

        def count(_module, args, _out, index=index):
            counts[index] += args[0].shape[1]

        handles.append(layer.register_forward_hook(count))
    try:
        return call(), counts
    finally:
        for handle in handles:
            handle.remove()


def mixed(whole, name, kv, inputs, scored):
    """A generation of one row whose tokens leave at the first exit, the second and not at all."""
    scored(Dice(3))
    first, second = families.depths(name)
    exits = Exits(whole, (first, second))
    policy = ExitPolicy({first: 0.5, second: 0.5}, kv=kv)
    made, counts = tokens_by_layer(
        whole,
        lambda: generate(
            whole, inputs, exits=exits, policy=policy, max_new_tokens=16, do_sample=False
        ),
    )
    assert set(made.depths.flatten().tolist()) == {first, second, whole.depth}
    return made.depths[0].tolist(), counts


def prompt_and_steps(whole, depths, inputs):
    """Tokens of a prompt that runs whole, and depths of the tokens that may leave."""
    if whole.is_encoder_decoder:
        return 0, depths
    return inputs["input_ids"].shape[1], depths[1:]


@pytest.mark.parametrize("name", NAMES)
def test_under_propagate_a_token_runs_as_many_layers_as_its_depth(name, batch, scored):
    whole = Backbone(families.build(name))
    inputs = batch(name, 1)
    depths, counts = mixed(whole, name, "propagate", inputs, scored)
    prompt, steps = prompt_and_steps(whole, depths, inputs)
    assert counts == [prompt + sum(d > i for d in steps) for i in range(whole.depth)]


@pytest.mark.parametrize("name", NAMES)
def test_under_recompute_a_skipped_layer_runs_only_when_a_later_token_needs_it(name, batch, scored):
    whole = Backbone(families.build(name))
    inputs = batch(name, 1)
    depths, counts = mixed(whole, name, "recompute", inputs, scored)
    prompt, steps = prompt_and_steps(whole, depths, inputs)
    # Up to the last token that went through a layer, every token did, once; after it, none.
    for i, count in enumerate(counts):
        assert count == prompt + max((t + 1 for t, d in enumerate(steps) if d > i), default=0)


@pytest.mark.parametrize("kv", ["recompute", "propagate"])
def test_if_every_token_leaves_the_deeper_layers_see_the_prompt_only(kv, batch):
    whole = Backbone(families.build("llava"))
    inputs = batch("llava", 1)
    exits, policy = Exits(whole, (2,)), ExitPolicy({2: 0.0}, kv=kv)
    made, counts = tokens_by_layer(
        whole, lambda: generate(whole, inputs, exits=exits, policy=policy, max_new_tokens=9)
    )
    prompt = inputs["input_ids"].shape[1]
    assert made.depths.tolist() == [[6] + [2] * 8]
    assert counts == [prompt + 8] * 2 + [prompt] * 4


@pytest.mark.parametrize("name", CAUSAL_PROMPT)
def test_if_the_prompt_leaves_too_the_deeper_layers_see_nothing(name, batch):
    whole = Backbone(families.build(name))
    exits, policy = Exits(whole, (2,)), ExitPolicy({2: 0.0}, exit_in_prefill=True)
    inputs = batch(name, 1)
    made, counts = tokens_by_layer(
        whole, lambda: generate(whole, inputs, exits=exits, policy=policy, max_new_tokens=5)
    )
    assert made.depths.tolist() == [[2] * 5]
    assert counts[2:] == [0] * 4


@pytest.mark.parametrize("name", LOOKS_AHEAD)
def test_a_prompt_that_looks_ahead_runs_at_full_depth(name, backbone, exits, batch):
    policy = ExitPolicy(always(name).thresholds, exit_in_prefill=True)
    made = generate(
        backbone(name), batch(name, 1), exits=exits(name), policy=policy, max_new_tokens=3
    )
    first, whole = families.depths(name)[0], backbone(name).depth
    assert made.depths.tolist() == [[whole, first, first]]


def test_an_exit_switched_off_is_not_even_computed(batch):
    whole = Backbone(families.build("llava"))
    exits = Exits(whole, (2, 4))
    ran = []
    exits.at(2).register_forward_hook(lambda *_: ran.append(2))
    exits.at(4).register_forward_hook(lambda *_: ran.append(4))
    generate(whole, batch("llava", 1), exits=exits, policy=ExitPolicy({4: 1.0}), max_new_tokens=3)
    assert set(ran) == {4}


# -- law 4: the cache -------------------------------------------------------------------------


def measured(whole, exits, inputs, policy):
    """A generation, and by depth the largest error of its logits against an uncached forward."""
    noted = StepLogitsWarper()
    made = generate(
        whole,
        inputs,
        exits=exits,
        policy=policy,
        max_new_tokens=NEW,
        do_sample=False,
        suppress_tokens=WORDLESS,
        logits_processor=[noted],
    )
    uncached = probe(whole, inputs, made.sequences, exits)
    errors = {}
    for depth in sorted(set(made.depths.flatten().tolist())):
        true = of_steps(uncached.logits[depth], NEW)
        off = (noted.logits - true)[..., FIRST_WORD:][made.depths == depth]
        errors[depth] = (off.abs().max() / true.abs().max()).item()
    return made, errors


@pytest.mark.parametrize("prefill", [False, True])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_recompute_keeps_every_step_exact(name, rows, prefill, backbone, exits, batch, scored):
    scored(Dice(5))
    whole, parts = backbone(name, wide=CALM), exits(name, wide=CALM)
    first, second = parts.depths
    policy = ExitPolicy({first: 0.4, second: 0.5}, exit_in_prefill=prefill)
    made, errors = measured(whole, parts, batch(name, rows), policy)
    assert set(errors) == {first, second, whole.depth}
    assert rows == 1 or any(len(set(step)) > 1 for step in made.depths.T.tolist())
    assert max(errors.values()) <= EXACT, errors


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5", "gemma3", "llava", "florence2"])
def test_recompute_is_exact_with_an_exit_at_every_depth(name, rows, backbone, exits, batch, scored):
    scored(Dice(8))
    whole = backbone(name, wide=CALM)
    parts = exits(name, wide=CALM, depths=tuple(range(1, whole.depth)))
    policy = ExitPolicy(dict.fromkeys(parts.depths, 0.75 if rows == 1 else 0.6))
    _, errors = measured(whole, parts, batch(name, rows), policy)
    assert len(errors) >= 3
    assert max(errors.values()) <= EXACT, errors


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5", "gemma3", "llava"])
@pytest.mark.parametrize(
    ("score", "threshold"), [("patience", 0.2), ("agreement", 0.01), ("saturation", 0.93)]
)
def test_recompute_is_exact_whatever_the_score(
    score, threshold, name, rows, backbone, exits, batch
):
    whole = backbone(name, wide=CALM)
    parts = exits(name, wide=CALM, depths=tuple(range(1, whole.depth)))
    policy = ExitPolicy(dict.fromkeys(parts.depths, threshold), score=score, exit_in_prefill=True)
    _, errors = measured(whole, parts, batch(name, rows), policy)
    assert len(errors) >= 2 or rows == 1
    assert max(errors.values()) <= EXACT, errors


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5", "gemma3", "llava", "florence2"])
def test_recompute_is_exact_with_exits_that_keep_no_keys(name, rows, backbone, batch, scored):
    whole = backbone(name, wide=CALM)
    lens = Exits(whole, tuple(range(1, whole.depth)), lens=True)
    scored(Dice(8))
    for prefill in (False, True):
        policy = ExitPolicy(dict.fromkeys(lens.depths, 0.6), exit_in_prefill=prefill)
        _, errors = measured(whole, lens, batch(name, rows), policy)
        assert len(errors) >= 3
        assert max(errors.values()) <= EXACT, errors


@pytest.mark.parametrize("kv", ["recompute", "propagate"])
@pytest.mark.parametrize("name", NAMES)
def test_an_exit_that_keeps_no_keys_skips_layers_like_any_other(name, kv, backbone, batch, scored):
    whole = backbone(name)
    first, second = families.depths(name)
    lens = Exits(whole, (first, second), lens=True)
    scored(Dice(3))
    policy = ExitPolicy({first: 0.5, second: 0.5}, kv=kv, exit_in_prefill=True)
    made = generate(whole, batch(name, 4), exits=lens, policy=policy, max_new_tokens=NEW)
    assert set(made.depths.flatten().tolist()) == {first, second, whole.depth}


@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5", "gemma3", "llava"])
def test_recompute_is_exact_where_one_of_two_exits_is_off(name, backbone, exits, batch, scored):
    scored(Dice(5))
    whole, parts = backbone(name, wide=CALM), exits(name, wide=CALM)
    for on in parts.depths:
        _, errors = measured(whole, parts, batch(name, 4), ExitPolicy({on: 0.3}))
        assert set(errors) >= {on} and max(errors.values()) <= EXACT, errors


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_propagate_is_exact_at_the_first_exit_and_bounded_past_it(
    name, rows, backbone, exits, batch, scored
):
    scored(Dice(5))
    whole, parts = backbone(name, wide=CALM), exits(name, wide=CALM)
    first, second = parts.depths
    policy = ExitPolicy({first: 0.4, second: 0.5}, kv="propagate")
    _, errors = measured(whole, parts, batch(name, rows), policy)
    assert errors[first] <= EXACT
    assert EXACT < errors[whole.depth] < 1.0


@pytest.mark.parametrize("kv", ["recompute", "propagate"])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_runs_under_both_policies(name, kv, backbone, exits, batch, scored):
    scored(Dice(5))
    half = torch.bfloat16
    policy = ExitPolicy(dict.fromkeys(families.depths(name), 0.5), kv=kv, exit_in_prefill=True)
    made = generate(
        backbone(name, half),
        batch(name, 4, half),
        exits=exits(name, half),
        policy=policy,
        max_new_tokens=NEW,
    )
    assert made.depths.shape == (4, NEW) and len(set(made.depths.flatten().tolist())) == 3


def test_a_padded_decoder_prompt_is_masked_in_every_step(backbone, exits, batch):
    """Encoder-decoders take a second mask, for a decoder prompt of several tokens."""
    whole, parts = backbone("blip2-t5", wide=CALM), exits("blip2-t5", wide=CALM)
    prompt = torch.tensor([[PAD, 20, 21, 22], [PAD, PAD, 30, 31]])
    given = {
        **batch("blip2-t5", 2),
        "decoder_input_ids": prompt,
        "decoder_attention_mask": torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]]),
    }
    theirs = whole.model.generate(**given, max_new_tokens=NEW, do_sample=False)
    ours = generate(
        whole,
        given,
        exits=parts,
        policy=ExitPolicy(dict.fromkeys(parts.depths, 1.0)),
        max_new_tokens=NEW,
        do_sample=False,
    )
    assert (ours.depths == whole.depth).all()
    assert torch.equal(ours.sequences, theirs)


# -- law 10: repeatable and alone -------------------------------------------------------------


def sometimes(name="llava", **more):
    first, second = families.depths(name)
    return ExitPolicy({first: 0.1, second: 0.1}, **more)


def test_the_same_seed_gives_the_same_tokens(backbone, exits, batch):
    def sample():
        torch.manual_seed(11)
        return generate(
            backbone("llava"),
            batch("llava", 4),
            exits=exits("llava"),
            policy=sometimes(),
            max_new_tokens=NEW,
            do_sample=True,
        )

    one, two = sample(), sample()
    assert torch.equal(one.sequences, two.sequences) and torch.equal(one.depths, two.depths)
    assert len(set(one.depths.flatten().tolist())) > 1


def test_greedy_depends_on_neither_seed_nor_temperature(backbone, exits, batch):
    def decode(seed, temperature):
        torch.manual_seed(seed)
        return generate(
            backbone("llava"),
            batch("llava", 1),
            exits=exits("llava"),
            policy=sometimes(),
            max_new_tokens=NEW,
            do_sample=False,
            temperature=temperature,
        )

    one, two = decode(1, 0.3), decode(2, 3.0)
    assert torch.equal(one.sequences, two.sequences) and torch.equal(one.depths, two.depths)


class Nested:
    """A streamer that generates something else on the same model after every token."""

    def __init__(self, other):
        self.other, self.results = other, []

    def put(self, value):
        self.results.append(self.other())

    def end(self):
        pass


@pytest.mark.parametrize("kv", ["recompute", "propagate"])
@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5", "llava", "qwen2.5-vl", "gemma3"])
def test_a_generation_inside_another_disturbs_neither(name, kv, backbone, exits, batch):
    whole, parts, policy = backbone(name), exits(name), sometimes(name, kv=kv)

    def run(rows, streamer=None):
        return generate(
            whole,
            batch(name, rows),
            exits=parts,
            policy=policy,
            max_new_tokens=6,
            do_sample=False,
            streamer=streamer,
        )

    outer, inner = run(1), run(4)
    nested = Nested(lambda: run(4))
    assert torch.equal(run(1, nested).sequences, outer.sequences)
    assert nested.results
    assert all(torch.equal(each.sequences, inner.sequences) for each in nested.results)


def test_generations_in_two_threads_do_not_disturb_each_other(backbone, exits, batch):
    whole, parts, policy = backbone("llava"), exits("llava"), sometimes()

    def run(rows):
        return generate(
            whole,
            batch("llava", rows),
            exits=parts,
            policy=policy,
            max_new_tokens=NEW,
            do_sample=False,
        ).sequences

    alone = {rows: run(rows) for rows in (1, 4)}
    found = {1: [], 4: []}
    threads = [
        threading.Thread(target=lambda r=rows: found[r].extend(run(r) for _ in range(5)))
        for rows in found
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rows, results in found.items():
        assert len(results) == 5
        assert all(torch.equal(each, alone[rows]) for each in results)


# -- HF's options -----------------------------------------------------------------------------


class Forbid:
    """A user's own processor: some tokens may not come."""

    def __call__(self, ids, scores):
        return scores.index_fill(1, torch.arange(8, 40), float("-inf"))


class Overwrite(Forbid):
    """As `Forbid`, but writing into what it is given."""

    def __call__(self, ids, scores):
        scores[:, 8:40] = float("-inf")
        return scores


OPTIONS = {
    "min_new_tokens": {"min_new_tokens": 8, "eos_token_id": list(range(8, 60)), "pad_token_id": 0},
    "max_length": {"max_length": 16, "max_new_tokens": None},
    "sampling": {"do_sample": True},
    "temperature": {"do_sample": True, "temperature": 0.7},
    "top_k": {"do_sample": True, "top_k": 5},
    "top_p": {"do_sample": True, "top_p": 0.8, "temperature": 1.3},
    "repetition_penalty": {"repetition_penalty": 1.8},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": [[i] for i in range(8, 30)]},
    "logits_processor": {"logits_processor": [Forbid()]},
    "overwriting processor": {"logits_processor": [Overwrite()]},
    "stopping_criteria": {"stopping_criteria": [lambda ids, _: ids[:, -1] > 60]},
    "num_return_sequences": {"do_sample": True, "num_return_sequences": 3},
}


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ["blip2-opt", "llava", "florence2"])
def test_an_option_of_generate_does_what_it_does_there(name, option, rows, backbone, exits, batch):
    whole, inputs = backbone(name), batch(name, rows)
    options = {"max_new_tokens": NEW, "do_sample": False, **OPTIONS[option]}
    torch.manual_seed(3)
    theirs = whole.model.generate(**inputs, **options)
    torch.manual_seed(3)
    ours = generate(whole, inputs, exits=exits(name), policy=never(name), **options)
    assert torch.equal(ours.sequences, theirs)


def test_a_generation_config_is_honoured(backbone, batch):
    from transformers import GenerationConfig

    whole, inputs = backbone("llava"), batch("llava", 1)
    config = GenerationConfig(max_new_tokens=5, repetition_penalty=1.8, pad_token_id=PAD)
    theirs = whole.model.generate(**inputs, generation_config=config)
    assert torch.equal(generate(whole, inputs, generation_config=config).sequences, theirs)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_the_end_token_stops_a_row_and_pads_what_follows(name, rows, backbone, exits, batch):
    whole, inputs = backbone(name), batch(name, rows)
    free = whole.model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[:, -NEW:]
    end = {"eos_token_id": int(free[0, 4]), "pad_token_id": PAD}
    theirs = whole.model.generate(**inputs, max_new_tokens=NEW, do_sample=False, **end)
    ours = generate(
        whole,
        inputs,
        exits=exits(name),
        policy=never(name),
        max_new_tokens=NEW,
        do_sample=False,
        **end,
    )
    assert torch.equal(ours.sequences, theirs)
    for tokens, depths in zip(ours.new_tokens.tolist(), ours.depths.tolist(), strict=True):
        stop = tokens.index(end["eos_token_id"]) + 1 if end["eos_token_id"] in tokens else None
        assert all(d == whole.depth for d in depths[:stop])
        if stop is not None:
            assert set(tokens[stop:]) <= {PAD} and set(depths[stop:]) <= {0}


@pytest.mark.parametrize("way", ["recompute", "propagate", "lossless"])
@pytest.mark.parametrize("name", NAMES)
def test_taking_finished_rows_out_changes_no_other_row(
    name, way, backbone, exits, batch, monkeypatch
):
    whole, inputs = backbone(name), batch(name, 4)
    kv = "recompute" if way == "lossless" else way
    policy = ExitPolicy(
        dict.fromkeys(families.depths(name), 0.03), kv=kv, lossless=way == "lossless"
    )
    options = {"max_new_tokens": NEW, "do_sample": False, "repetition_penalty": 1.2}
    free = generate(whole, inputs, exits=exits(name), policy=policy, **options).new_tokens
    options |= {"eos_token_id": [int(free[0, 3]), int(free[1, 6])], "pad_token_id": PAD}
    fewest = []

    def run():
        seen = []
        note = whole.layers[0].register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
        made = generate(whole, inputs, exits=exits(name), policy=policy, **options)
        note.remove()
        fewest.append(min(seen))
        return made

    made = run()
    monkeypatch.setattr(ActiveRows, "keep", lambda self, *_: None)
    together = run()
    assert fewest[0] < fewest[1] == 4
    assert torch.equal(made.sequences, together.sequences)
    assert torch.equal(made.depths, together.depths)
    torch.testing.assert_close(made.scores, together.scores, equal_nan=True)


@pytest.mark.parametrize("kv", ["recompute", "propagate"])
def test_a_finished_row_is_padded_at_depth_zero_while_others_leave_early(
    kv, backbone, exits, batch
):
    whole, inputs = backbone("llava"), batch("llava", 4)
    policy = ExitPolicy({2: 0.0}, kv=kv)
    free = generate(whole, inputs, exits=exits("llava"), policy=policy, max_new_tokens=NEW)
    end = int(free.new_tokens[0, 3])
    made = generate(
        whole, inputs, exits=exits("llava"), policy=policy, max_new_tokens=NEW, eos_token_id=end
    )
    stop = made.new_tokens[0].tolist().index(end) + 1
    assert made.depths[0].tolist() == [6, *[2] * (stop - 1), *[0] * (made.depths.shape[1] - stop)]
    assert (made.new_tokens[0, stop:] == PAD).all() and made.scores[0, stop:].isnan().all()


def test_a_finished_row_no_longer_holds_the_others_at_full_depth(batch, scored):
    # The first row never leaves; it is gone once it is finished.
    scored(lambda logits: torch.tensor([0.0, 1.0, 1.0, 1.0])[-len(logits) :])
    whole, inputs = Backbone(families.build("llava")), batch("llava", 4)
    exits, policy = Exits(whole, (2,)), ExitPolicy({2: 0.5}, kv="propagate")
    free = generate(whole, inputs, exits=exits, policy=policy, max_new_tokens=NEW)
    end = int(free.new_tokens[0, 3])
    made, counts = tokens_by_layer(
        whole,
        lambda: generate(
            whole, inputs, exits=exits, policy=policy, max_new_tokens=NEW, eos_token_id=end
        ),
    )
    live = int((made.depths[0] > 0).sum())
    assert live < made.depths.shape[1]
    assert counts[5] == inputs["input_ids"].shape[1] + live - 1


class Puts:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.got = []

    def put(self, value):
        self.got.append(value.tolist())

    def end(self):
        self.got.append("end")


@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5", "llava"])
def test_a_streamer_gets_what_generate_gives_it(name, backbone, batch):
    whole, inputs = backbone(name), batch(name, 1)
    theirs, ours = Puts(), Puts()
    whole.model.generate(**inputs, max_new_tokens=5, do_sample=False, streamer=theirs)
    generate(whole, inputs, max_new_tokens=5, do_sample=False, streamer=ours)
    assert ours.got == theirs.got


# -- exits and HF's processors ----------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 4])
def test_logits_of_an_exit_pass_the_processors_once(rows, backbone, exits, batch):
    from transformers import RepetitionPenaltyLogitsProcessor

    whole, parts, inputs = backbone("llava"), exits("llava"), batch("llava", rows)
    made = generate(
        whole,
        inputs,
        exits=parts,
        policy=ExitPolicy({2: 0.0}),
        max_new_tokens=NEW,
        do_sample=False,
        repetition_penalty=1.3,
        suppress_tokens=WORDLESS,
    )
    true = of_steps(probe(whole, inputs, made.sequences, parts).logits[2], NEW).clone()
    penalty = RepetitionPenaltyLogitsProcessor(1.3)
    true[..., WORDLESS] = float("-inf")
    for step in range(1, NEW):
        before = made.sequences[:, : -NEW + step]
        assert torch.equal(penalty(before, true[:, step]).argmax(-1), made.new_tokens[:, step])


def test_confidence_is_in_what_may_be_said(backbone, exits, batch):
    """With one token allowed an exit is certain, however little it would have said it itself."""
    whole, inputs = backbone("llava"), batch("llava", 1)

    def only_nine(ids, scores):
        return torch.full_like(scores, float("-inf")).index_fill(1, torch.tensor([9]), 0)

    made = generate(
        whole,
        inputs,
        exits=exits("llava"),
        policy=ExitPolicy({2: 1.0}),
        max_new_tokens=4,
        logits_processor=[only_nine],
    )
    assert made.depths.tolist() == [[6, 2, 2, 2]]


# -- what is not done is refused --------------------------------------------------------------


def refused_options():
    from transformers import DynamicCache, GenerationConfig

    return {
        "num_beams": {"num_beams": 2},
        "num_beams, sampling": {"num_beams": 2, "do_sample": True, "num_return_sequences": 3},
        "return_dict_in_generate": {"return_dict_in_generate": True},
        "output_scores": {"return_dict_in_generate": True, "output_scores": True},
        "assistant_model": {"assistant_model": object()},
        "cache_implementation": {"cache_implementation": "static"},
        "quantized": {"cache_implementation": "quantized"},
        "offloaded": {"cache_implementation": "offloaded"},
        "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 2},
        "assistant_early_exit": {"assistant_early_exit": 2},
        "use_cache": {"use_cache": False},
        "prefill_chunk_size": {"prefill_chunk_size": 4},
        "past_key_values": {"past_key_values": DynamicCache()},
        "cache": {"cache": DynamicCache()},
        "penalty_alpha": {"penalty_alpha": 0.6, "top_k": 4},
        "dola_layers": {"dola_layers": "low"},
        "guidance_scale": {"guidance_scale": 1.5},
        "negative_prompt_ids": {"negative_prompt_ids": torch.ones(1, 1, dtype=torch.long)},
        "custom_generate": {"custom_generate": "someone/something"},
        "force_words_ids": {"force_words_ids": [[9]], "num_beams": 2},
        "stop_strings": {"stop_strings": ["."]},
        "token_healing": {"token_healing": True},
        "generation_config": {"generation_config": GenerationConfig(num_beams=4)},
    }


@pytest.mark.parametrize("option", refused_options())
@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5", "llava"])
def test_an_option_that_is_not_done_is_refused(name, option, backbone, batch):
    options = refused_options()[option]
    with pytest.raises(InputError, match="is not supported") as caught:
        generate(backbone(name), batch(name, 1), max_new_tokens=3, **options)
    assert option in str(caught.value) or option in (
        "num_beams, sampling",
        "output_scores",
        "quantized",
        "offloaded",
        "generation_config",
    )


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 1}, {"use_cache": True}, {"guidance_scale": 1}],
    ids=str,
)
def test_an_option_that_asks_for_nothing_unusual_is_taken(options, backbone, batch):
    made = generate(backbone("llava"), batch("llava", 1), max_new_tokens=2, **options)
    assert made.depths.shape == (1, 2)


def test_beams_in_the_models_own_defaults_are_refused_and_can_be_overridden(batch):
    whole = Backbone(families.build("florence2"))
    whole.model.generation_config.num_beams = 3
    with pytest.raises(InputError, match="num_beams=1"):
        generate(whole, batch("florence2", 1), max_new_tokens=2)
    made = generate(whole, batch("florence2", 1), max_new_tokens=2, num_beams=1)
    assert made.depths.shape == (1, 2)


@pytest.mark.parametrize("where", ["absent", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_a_missing_image_is_refused(name, where, backbone, batch):
    inputs = batch(name, 1)
    inputs.pop("pixel_values")
    if where == "none":
        inputs["pixel_values"] = None
    with pytest.raises(InputError, match="image"):
        generate(backbone(name), inputs, max_new_tokens=2)


def test_an_unknown_kv_policy_is_refused():
    with pytest.raises(InputError, match="recompute, propagate"):
        ExitPolicy(kv="hole")


def test_an_unknown_score_is_refused():
    with pytest.raises(InputError, match="Did you mean 'margin'"):
        ExitPolicy(score="margni")


@pytest.mark.parametrize("thresholds", [{3: 0.5}, {2: 1.5}, {2: -0.1}], ids=str)
def test_thresholds_that_fit_no_exit_or_range_are_refused(thresholds, backbone, exits, batch):
    with pytest.raises(InputError, match="Thresholds"):
        generate(
            backbone("llava"),
            batch("llava", 1),
            exits=exits("llava"),
            policy=ExitPolicy(thresholds),
        )


def test_thresholds_without_exits_are_refused(backbone, batch):
    with pytest.raises(InputError, match="no exit stands"):
        generate(backbone("llava"), batch("llava", 1), policy=ExitPolicy({2: 0.5}))


def test_the_discriminator_score_needs_discriminators(backbone, exits, batch):
    policy = ExitPolicy({2: 0.5}, score="discriminator")
    with pytest.raises(InputError, match="discriminators"):
        generate(backbone("llava"), batch("llava", 1), exits=exits("llava"), policy=policy)


# -- what comes back --------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_a_generation_tells_depth_and_score_of_every_new_token(
    name, rows, backbone, exits, batch, scored
):
    scored(Dice(1))
    whole, (first, second) = backbone(name), families.depths(name)
    made = generate(
        whole,
        batch(name, rows),
        exits=exits(name),
        policy=ExitPolicy({first: 0.5, second: 0.6}),
        max_new_tokens=NEW,
        do_sample=False,
    )
    assert made.layers == whole.depth
    assert made.depths.shape == made.scores.shape == made.new_tokens.shape == (rows, NEW)
    assert torch.equal(made.new_tokens, made.sequences[:, -NEW:])
    assert set(made.depths.flatten().tolist()) <= {first, second, whole.depth}
    assert (made.scores[made.depths == first] >= 0.5).all()
    assert (made.scores[made.depths == second] >= 0.6).all()
    looked = slice(0 if whole.is_encoder_decoder else 1, None)
    late = made.scores[:, looked][made.depths[:, looked] == whole.depth]
    assert (late < 0.6).all()
    if not whole.is_encoder_decoder:
        assert made.scores[:, 0].isnan().all() and (made.depths[:, 0] == whole.depth).all()


def test_a_token_leaves_at_the_first_depth_whose_score_reaches_the_threshold(
    backbone, exits, batch, scored
):
    # Looks, token by token: leaves at 2 on the dot; at 4; passes both; leaves at 2.
    scored(Script([0.5, 0.4, 0.7, 0.4999, 0.6999, 1.0]))
    made = generate(
        backbone("llava"),
        batch("llava", 1),
        exits=exits("llava"),
        policy=ExitPolicy({2: 0.5, 4: 0.7}),
        max_new_tokens=5,
    )
    assert made.depths.tolist() == [[6, 2, 4, 6, 2]]
    assert made.scores[0, 1:].tolist() == pytest.approx([0.5, 0.7, 0.6999, 1.0])


def test_mean_depth_counts_full_depth_tokens_and_not_the_padding():
    from offramp.engine.policy import GenerationOutput

    depths = torch.tensor([[6, 2, 2, 6], [6, 4, 0, 0]])
    made = GenerationOutput(torch.zeros(2, 9), depths, torch.zeros(2, 4), 6)
    assert made.mean_depth == pytest.approx((6 + 2 + 2 + 6 + 6 + 4) / 6)


def test_without_exits_no_scores_are_given(backbone, batch):
    made = generate(backbone("llava"), batch("llava", 1), policy=FULL, max_new_tokens=3)
    assert made.scores.isnan().all() and made.mean_depth == 6.0


def test_the_judge_reads_a_state_as_the_backbone_does(backbone, batch):
    whole = backbone("gemma3")
    states = torch.randn(3, whole.width)
    look = ExitScorer(whole, ExitPolicy(score="margin"), (2,))(2, states, states)
    assert torch.equal(look.logits, whole.logits(whole.final_norm(states)))
    assert torch.equal(look.score, SCORES["margin"](look.logits))


def test_a_run_starts_with_nobody_waiting(backbone, exits):
    run = ModelRunner(backbone("llava"), exits("llava"), ExitPolicy({2: 0.5}))
    assert run.thresholds == {2: 0.5} and not run.everybody_left


def cache_layers():
    return [o for o in gc.get_objects() if type(o).__name__ == "DynamicLayer"]


def test_a_generation_lets_go_of_its_cache_without_the_garbage_collector(backbone, exits, batch):
    name = "llava"
    whole, given = backbone(name), exits(name)
    inputs, seen = batch(name, 1), []
    gc.collect()
    others = {id(layer) for layer in cache_layers()}

    def note(_, scores):
        seen.extend(weakref.ref(layer) for layer in cache_layers() if id(layer) not in others)
        return scores

    gc.disable()
    try:
        options = {"max_new_tokens": 3, "do_sample": False, "logits_processor": [note]}
        generate(whole, inputs, exits=given, policy=always(name), **options)
        assert seen and not any(ref() is not None and ref().is_initialized for ref in seen)
    finally:
        gc.enable()
