"""What generation hands back, streams, lets go of and refuses; the laws are in `tests/laws`."""

from __future__ import annotations

import gc
import weakref

import families
import pytest
import torch
from decoding import NEW, always
from families import NAMES, PAD, WORDLESS
from reference import Dice, Script, of_steps, probe
from transformers import (
    LogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
)

from offramp.core.decoding.policy import FULL, ExitPolicy
from offramp.core.decoding.scores import SCORES
from offramp.core.engine.generate import generate
from offramp.core.engine.heads import ExitCheck, ExitScorer
from offramp.core.errors import InputError
from offramp.core.models.backbone import Backbone

# -- rows that are finished --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "way"),
    [
        *((name, "recompute") for name in NAMES),
        *(
            (name, way)
            for name in ("blip2-opt", "blip2-t5", "llava", "qwen2.5-vl", "gemma3")
            for way in ("lossless",)
        ),
    ],
)
def test_rows_that_end_change_no_other_row(name, way, backbone, exits, batch):
    whole, inputs = backbone(name), batch(name, 4)
    policy = ExitPolicy(dict.fromkeys(families.depths(name), 0.03), lossless=way == "lossless")
    options = {"max_new_tokens": NEW, "do_sample": False, "repetition_penalty": 1.2}
    free = generate(whole, inputs, exits=exits(name), policy=policy, **options)
    ends = [int(free.new_tokens[0, 3]), int(free.new_tokens[1, 6])]
    options |= {"eos_token_id": ends, "pad_token_id": PAD}
    made = generate(whole, inputs, exits=exits(name), policy=policy, **options)
    for row in range(4):
        tokens = free.new_tokens[row].tolist()
        stop = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
        assert made.new_tokens[row, :stop].tolist() == tokens[:stop]
        assert torch.equal(made.depths[row, :stop], free.depths[row, :stop])
        assert (made.depths[row, stop:] == 0).all()


def test_a_finished_row_is_padded_at_depth_zero_while_others_leave_early(backbone, exits, batch):
    whole, inputs = backbone("llava"), batch("llava", 4)
    policy = ExitPolicy({2: 0.0}, first={})
    free = generate(whole, inputs, exits=exits("llava"), policy=policy, max_new_tokens=NEW)
    end = int(free.new_tokens[0, 3])
    made = generate(
        whole, inputs, exits=exits("llava"), policy=policy, max_new_tokens=NEW, eos_token_id=end
    )
    stop = made.new_tokens[0].tolist().index(end) + 1
    assert made.depths[0].tolist() == [6, *[2] * (stop - 1), *[0] * (made.depths.shape[1] - stop)]
    assert (made.new_tokens[0, stop:] == PAD).all() and made.scores[0, stop:].isnan().all()


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


@pytest.mark.parametrize("lossless", [False, True])
def test_a_streamer_hears_of_long_rows_while_short_ones_are_over(lossless, backbone, exits, batch):
    """What a row says is handed on as soon as the others have said as much, or are over."""
    whole, inputs = backbone("llava"), batch("llava", 3)
    policy = ExitPolicy({2: 0.05}, lossless=lossless, max_draft=2)  # few are asked for ahead
    free = generate(
        whole,
        inputs,
        exits=exits("llava"),
        policy=policy,
        max_new_tokens=NEW,
        do_sample=False,
        repetition_penalty=1.2,
    )
    end, asked, puts = int(free.new_tokens[0, 1]), [0], []

    class Count(LogitsProcessor):
        def __call__(self, ids, scores):
            asked[0] = max(asked[0], ids.shape[1] - inputs["input_ids"].shape[1])
            return scores

    class Streamer(Puts):
        def put(self, value):
            puts.append((len(puts), asked[0]))
            super().put(value)

    got = Streamer()
    made = generate(
        whole,
        inputs,
        exits=exits("llava"),
        policy=policy,
        max_new_tokens=NEW,
        do_sample=False,
        repetition_penalty=1.2,
        streamer=got,
        eos_token_id=end,
        pad_token_id=PAD,
        logits_processor=[Count()],
    )
    assert got.got[1:-1] == made.new_tokens.T.tolist() and got.got[-1] == "end"
    columns = made.new_tokens.shape[1]
    assert columns > 4, "rows of one length show nothing"
    assert puts[3][1] < columns - 1


# -- criteria ----------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [2, torch.tensor([2])])
def test_a_criterion_is_asked_whatever_its_attributes_and_its_answer_are(own, backbone, batch):
    """Only Hugging Face's own is read instead; a plain bool is an answer for all rows."""
    whole, inputs = backbone("llava"), batch("llava", 1)
    most = inputs["input_ids"].shape[1] + 3

    class Short(StoppingCriteria):
        eos_token_id = own

        def __call__(self, ids, scores, **_):
            return ids.shape[1] >= most

    ours = generate(whole, inputs, stopping_criteria=[Short()], max_new_tokens=NEW)
    assert ours.new_tokens.shape[1] == 3


def test_a_watermark_that_counts_what_it_sees_is_refused(backbone, batch):
    mark = SynthIDTextWatermarkingConfig(keys=[1, 2, 3], ngram_len=3)
    with pytest.raises(InputError, match="watermarking_config"):
        generate(backbone("llava"), batch("llava", 1), watermarking_config=mark, do_sample=True)


def test_a_row_without_tokens_is_refused(backbone, batch):
    inputs = batch("llava", 2)
    inputs["attention_mask"] = inputs["attention_mask"].clone()
    inputs["attention_mask"][1] = 0
    with pytest.raises(InputError, match="no tokens"):
        generate(backbone("llava"), inputs, max_new_tokens=3)


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
    assert made.depths.tolist() == [[2, 2, 2, 2]]


# -- what is not done is refused --------------------------------------------------------------


def refused_options():
    from transformers import DynamicCache, GenerationConfig

    return {
        "num_beams": {"num_beams": 2},
        "num_beams, sampling": {"num_beams": 2, "do_sample": True, "num_return_sequences": 3},
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
        "token_healing": {"token_healing": True},
        "generation_config": {"generation_config": GenerationConfig(num_beams=4)},
    }


@pytest.mark.parametrize("option", refused_options())
def test_an_option_that_is_not_done_is_refused(option, backbone, batch):
    options = refused_options()[option]
    for name in ("blip2-opt", "blip2-t5", "llava"):
        with pytest.raises(InputError, match="is not supported") as caught:
            generate(backbone(name), batch(name, 1), max_new_tokens=3, **options)
    assert option in str(caught.value) or option in (
        "num_beams, sampling",
        "quantized",
        "offloaded",
        "generation_config",
    )


@pytest.mark.parametrize(
    "options", [{"num_beams": 1}, {"use_cache": True}, {"guidance_scale": 1}], ids=str
)
def test_an_option_that_asks_for_nothing_unusual_is_taken(options, backbone, batch):
    made = generate(backbone("llava"), batch("llava", 1), max_new_tokens=2, **options)
    assert made.depths.shape == (1, 2)


def test_no_cache_in_the_models_own_configuration_is_told_and_can_be_overridden(batch):
    whole = Backbone(families.build("llava"))
    whole.model.generation_config.use_cache = False
    whole.text_config.use_cache = whole.model.config.use_cache = False
    with pytest.raises(
        InputError, match="use_cache of the model's own generation_config"
    ) as caught:
        generate(whole, batch("llava", 1), max_new_tokens=2)
    assert "use_cache=True" in caught.value.remedy
    made = generate(whole, batch("llava", 1), max_new_tokens=2, use_cache=True)
    assert torch.equal(
        made.sequences,
        whole.model.generate(
            **batch("llava", 1), max_new_tokens=2, use_cache=True, do_sample=False, num_beams=1
        ),
    )


def test_beams_in_the_models_own_defaults_are_refused_and_can_be_overridden(batch):
    whole = Backbone(families.build("florence2"))
    whole.model.generation_config.num_beams = 3
    with pytest.raises(InputError, match="num_beams=1"):
        generate(whole, batch("florence2", 1), max_new_tokens=2)
    made = generate(whole, batch("florence2", 1), max_new_tokens=2, num_beams=1)
    assert made.depths.shape == (1, 2)


@pytest.mark.parametrize("name", ["llava", "qwen2.5-vl", "gemma3", "florence2"])
def test_a_turn_without_an_image_is_decoded_as_the_model_does(name, backbone):
    words = torch.randint(families.FIRST_WORD, families.VOCABULARY, (2, 6))
    inputs = {"input_ids": words, "attention_mask": torch.ones_like(words)}
    ours = generate(backbone(name), inputs, max_new_tokens=5, do_sample=False)
    theirs = backbone(name).model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert torch.equal(ours.sequences, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_image_is_refused(name, backbone, batch):
    inputs = batch(name, 1)
    for none in ({}, {"pixel_values": None}):
        without = {key: value for key, value in inputs.items() if key != "pixel_values"}
        with pytest.raises(InputError, match="image"):
            generate(backbone(name), {**without, **none}, max_new_tokens=2)


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
    first_looks = whole.is_encoder_decoder or whole.family.causal_prompt
    looked = slice(0 if first_looks else 1, None)
    late = made.scores[:, looked][made.depths[:, looked] == whole.depth]
    assert (late < 0.6).all()
    if not first_looks:
        assert made.scores[:, 0].isnan().all() and (made.depths[:, 0] == whole.depth).all()


def test_a_token_leaves_at_the_first_depth_whose_score_reaches_the_threshold(
    backbone, exits, batch, scored
):
    # Looks, token by token: exits at 2 on the dot; at 4; passes both; exits at 2.
    scored(Script([0.5, 0.4, 0.7, 0.4999, 0.6999, 1.0]))
    made = generate(
        backbone("llava"),
        batch("llava", 1),
        exits=exits("llava"),
        policy=ExitPolicy({2: 0.5, 4: 0.7}, first={}),
        max_new_tokens=5,
    )
    assert made.depths.tolist() == [[6, 2, 4, 6, 2]]
    assert made.scores[0, 1:].tolist() == pytest.approx([0.5, 0.7, 0.6999, 1.0])


def test_mean_depth_counts_full_depth_tokens_and_not_the_padding():
    from offramp.core.decoding.policy import GenerationOutput

    depths = torch.tensor([[6, 2, 2, 6], [6, 4, 0, 0]])
    made = GenerationOutput(torch.zeros(2, 9), depths, torch.zeros(2, 4), 6)
    assert made.mean_depth == pytest.approx((6 + 2 + 2 + 6 + 6 + 4) / 6)


def test_without_exits_no_scores_are_given(backbone, batch):
    made = generate(backbone("llava"), batch("llava", 1), policy=FULL, max_new_tokens=3)
    assert made.scores.isnan().all() and made.mean_depth == 6.0


def test_the_judge_reads_a_state_as_the_backbone_does(backbone, batch):
    whole = backbone("gemma3")
    states = torch.randn(3, whole.width)
    scorer = ExitScorer(whole, ExitPolicy(score="margin"))
    look = ExitCheck(scorer, 2, states, states)
    assert torch.equal(look.logits, whole.logits(whole.final_norm(states)))
    assert torch.equal(look.score, SCORES["margin"](look.logits))


def cache_layers():
    return [o for o in gc.get_objects() if type(o).__name__ == "DynamicLayer"]


@pytest.mark.slow
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


@pytest.mark.parametrize("mode", ["full", "early", "lossless"])
def test_what_is_longer_than_the_positions_is_refused(mode, backbone, exits, batch):
    whole, inputs = backbone("blip2-opt"), batch("blip2-opt", 1)
    limit, prompt = whole.positions, inputs["input_ids"].shape[1]
    rule = FULL if mode == "full" else ExitPolicy({2: 0.05}, lossless=mode == "lossless")
    run = {"exits": exits("blip2-opt"), "policy": rule, "do_sample": False, "eos_token_id": None}
    # The last token is not read, so it needs no position.
    last = generate(whole, inputs, max_new_tokens=limit - prompt + 1, **run)
    assert last.new_tokens.shape[1] == limit - prompt + 1
    with pytest.raises(InputError, match=f"{limit} positions"):
        generate(whole, inputs, max_new_tokens=limit - prompt + 3, **run)
    words = torch.full((1, limit), families.FIRST_WORD)
    longer = {
        n: torch.cat([v, words if n == "input_ids" else torch.ones_like(words)], 1)
        for n, v in inputs.items()
        if n in ("input_ids", "attention_mask")
    }
    with pytest.raises(InputError, match=f"{limit} positions"):
        generate(whole, {**inputs, **longer}, max_new_tokens=1, **run)


@pytest.mark.slow
def test_an_answer_that_ends_at_the_last_position_is_drafted_no_further(backbone, exits, batch):
    """Nobody said how long it may be; a draft behind the last position would have none."""
    whole, inputs = backbone("blip2-opt"), batch("blip2-opt", 1)
    room = whole.positions - inputs["input_ids"].shape[1]
    run = {"exits": exits("blip2-opt"), "do_sample": False}
    full = generate(whole, inputs, max_new_tokens=room, eos_token_id=None, **run).new_tokens[0]
    place = next(i for i in range(len(full) - 1, 0, -1) if full[i] not in full[:i])
    ends = {"eos_token_id": int(full[place]), "max_new_tokens": 10 * room}
    for most in (4, 9):  # as many may be drafted as positions are left, and more
        early = ExitPolicy({2: 0.0}, lossless=True, max_draft=most)
        made = generate(whole, inputs, policy=early, **ends, **run)
        assert torch.equal(made.new_tokens[0], full[: place + 1])


def test_a_criterion_that_has_heard_enough_is_not_asked_again(backbone, batch):
    class Ear(StoppingCriteria):
        heard = False

        def __init__(self, enough: int) -> None:
            self.lengths, self.enough = [], enough

        def __call__(self, ids, scores, **_):
            self.lengths.append(ids.shape[1])
            self.heard = len(self.lengths) == self.enough
            return torch.zeros(len(ids), dtype=torch.bool)

    ears, inputs = [Ear(1), Ear(3), Ear(99)], batch("llava", 1)
    made = generate(
        backbone("llava"), inputs, stopping_criteria=StoppingCriteriaList(ears), max_new_tokens=NEW
    )
    start, count = inputs["input_ids"].shape[1] + 1, made.new_tokens.shape[1]
    for ear in ears:
        assert ear.lengths == [*range(start, start + min(ear.enough, count))]


def test_a_processor_that_raised_is_not_asked_again(backbone, exits, batch):
    """Not by the exits above the one at which it did, nor by the full model."""
    options = {"policy": ExitPolicy({2: 1.0, 4: 1.0}), "max_new_tokens": 3, "do_sample": False}
    for last in range(1, 8):
        asked = []

        class Broken:
            def __call__(self, ids, scores):
                asked.append(ids)  # noqa: B023
                if len(asked) == last:  # noqa: B023
                    raise RuntimeError("enough")
                return scores

        some = exits("llava", depths=(2, 4))
        with pytest.raises(RuntimeError, match="enough"):
            generate(
                backbone("llava"),
                batch("llava", 1),
                exits=some,
                logits_processor=[Broken()],
                **options,
            )
        assert len(asked) == last
