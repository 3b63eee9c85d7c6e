"""Laws of what is guaranteed where: a guarantee is shown under its own conditions alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import fakes
import families
import pytest
import torch
from torch import nn

from offramp.adapter.adapter import Adapter
from offramp.adapter.answers import generate_answers
from offramp.adapter.model_card import model_card
from offramp.adapter.records import calibrations
from offramp.adapter.shipped import load_tiny, tiny_exits
from offramp.calibration.risk_functions import CIDER_CAP, RISKS
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.models.as_loaded import _LOADED, as_loaded, note_loaded
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits, ExitSet
from offramp.core.models.stand_in import StandIn
from offramp.core.save_and_load import read_config
from offramp.engines import ENGINES
from offramp.features.input_processor import InputProcessor
from offramp.features.vision_engine import IN_BF16
from offramp.inputs.control import WRITTEN
from offramp.promises.conditions import Conditions, differences, of_processor
from offramp.promises.conditions import _tokens_digest as tokens_digest
from offramp.promises.guarantee import (
    NEEDED,
    SCALES,
    risk_words,
    shown_conditions,
    standing,
    watched,
)
from offramp.promises.likeness import Likeness
from offramp.promises.prompt_kinds import FRAMES, OTHER, TURN, fits, kind_of, prompt_frames

POLICY = ExitPolicy({2: 0.9})
KNOWN: dict[str, Any] = {
    "sampling": "greedy",
    "longest": 40,
    "template": "",
    "shrink_on_load": False,
}


def calibration(then: Conditions, **changed: Any) -> dict[str, Any]:
    found = {
        "risk": "disagreement",
        "target": 0.01,
        "confidence": 0.95,
        "n": 1000,
        "attempt": 1,
        "unit": "image",
        "measured": 0.002,
        "bound": 0.008,
        "answers": 3000,
        "level": 0.96,
        "method": "upper_bound",
        "data_digest": "0" * 64,
        "conditions": then.to_json(),
    }
    return {**found, **changed}


@pytest.fixture
def here(opt: Any) -> Conditions:
    return Conditions.of(opt, POLICY, prompts=[["Caption:"]], **KNOWN)


def test_a_calibration_from_before_first_tokens_had_thresholds_stands(here: Conditions) -> None:
    found = calibration(here)
    del found["conditions"]["first"]
    assert standing(found, here).promise is not None
    assert standing(found, here.under(first={"2": 0.5})).promise is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": "bfloat16"}, "precision bfloat16 where float32 was calibrated"),
        ({"quantized": "int4"}, "weights in int4 where float was calibrated"),
        ({"engine": "llama.cpp q4_1"}, "llama.cpp q4_1 where those of torch"),
        ({"dtype": "bfloat16", "kernels": "compiled"}, "compiled kernels where plain"),
        ({"dtype": "bfloat16", "vision": "openvino"}, "tower in openvino where one in torch"),
        ({"vision": "openvino-bf16"}, "tower in openvino-bf16 where one in torch"),
        ({"vision": "onnxruntime-int8"}, "tower in onnxruntime-int8 where one in torch"),
        ({"shrink_on_load": True}, "JPEGs decoded smaller where whole when calibrated"),
        ({"device": "cuda"}, "on cuda where cpu"),
        ({"sampling": "sampled"}, "sampled where greedy decoding"),
        ({"longest": 150}, "up to 150 tokens where up to 40"),
        ({"prompts": [["Describe it."]]}, "a prompt unlike the calibrated ones"),
        ({"template": "another"}, "another chat template"),
        ({"score": "margin"}, "score margin where max_probability"),
        ({"kv": "propagate"}, "keys and values by propagate where recompute"),
        ({"exit_in_prefill": False}, "first tokens ran whole where they may exit"),
        ({"shortlist": True}, "with a shortlist where calibrated without"),
        ({"thresholds": {"2": 0.1}}, "thresholds 2: 0.1 where 2: 0.9"),
        ({"first": {"2": 0.5}}, "first tokens 2: 0.5 where none"),
        ({"gates": {"2": 0.5}}, "gates 2: 0.5 where none"),
        ({"visual_keep": 0.5}, "50% of the visual tokens where 100% were calibrated"),
        ({"weights": {"2": 0.5}}, "weights of exits 2: 0.5 where none"),
    ],
)
def test_another_condition_is_named_and_nothing_is_guaranteed(
    here: Conditions, change: dict[str, Any], words: str
) -> None:
    found = standing(calibration(here), here.under(**change))
    assert found.promise is None and words in found.why
    assert found.sentence.startswith("not guaranteed here: ")


@pytest.mark.parametrize(
    "change",
    [{"longest": 20}, {"kernels": "prepacked"}, {"kernels": "compiled"}, {"vision": "openvino"}],
)
def test_what_keeps_every_answer_keeps_the_guarantee(here: Conditions, change: Any) -> None:
    found = standing(calibration(here), here.under(**change))
    assert found.promise is not None and found.promise.target == 0.01
    assert "mean over images" in found.sentence and "95%" in found.sentence


def test_a_calibration_from_before_jpegs_were_shrunk_was_of_whole_ones(here: Conditions) -> None:
    found = calibration(here)
    del found["conditions"]["shrink_on_load"]
    assert standing(found, here).promise is not None
    assert standing(found, here.under(shrink_on_load=True)).promise is None


def test_a_calibration_from_before_visual_tokens_stayed_behind_stands(here: Conditions) -> None:
    found = calibration(here)
    del found["conditions"]["visual_keep"]
    assert standing(found, here).promise is not None
    assert standing(found, here.under(visual_keep=0.5)).promise is None


def test_a_runtimes_tower_is_part_of_what_was_calibrated(here: Conditions) -> None:
    """States that are rounded to 8 bits let a last bit of the tower grow."""
    inside = here.under(engine="llama.cpp q8_0", kernels=None)
    found = calibration(inside)
    assert standing(found, inside).promise is not None
    other = standing(found, inside.under(vision="onnxruntime"))
    assert other.why == "a vision tower in onnxruntime where one in torch was calibrated"
    del found["conditions"]["vision"]  # of before there was a choice
    assert standing(found, inside).promise is not None
    assert standing(found, inside.under(vision="openvino")).promise is None


def test_a_shorter_answer_keeps_no_other_risk(here: Conditions) -> None:
    then = calibration(here, risk="consistency")
    assert "up to 20 tokens" in standing(then, here.under(longest=20)).why


def test_each_unit_has_its_words(here: Conditions) -> None:
    by_answer = standing(calibration(here, unit="answer"), here).sentence
    assert "the share of answers that differ" in by_answer and "over images" not in by_answer


@pytest.mark.parametrize("target", [-1, 0, 1, 5, "0.01", None])
def test_a_target_that_is_no_risk_guarantees_nothing(here: Conditions, target: Any) -> None:
    found = standing(calibration(here, target=target), here)
    assert found.promise is None and found.why


@pytest.mark.parametrize("name", NEEDED)
def test_a_calibration_that_lacks_what_the_rules_need_guarantees_nothing(
    here: Conditions, name: str
) -> None:
    entries = calibration(here)
    del entries[name]
    found = standing(entries, here)
    assert found.promise is None
    assert found.why == f"the calibration does not say {name}, so it needs to be made again"
    assert standing(calibration(here, bound=0.02), here).promise is None


def test_where_there_is_no_calibration_nothing_is_said(here: Conditions) -> None:
    for entries in (None, {}, calibration(here, measured=None)):
        assert standing(entries, here).sentence == ""


# -- prompts ---------------------------------------------------------------------------------------


def test_prompts_are_known_by_what_they_have_in_common() -> None:
    asked = [f"Question: what is {thing}? Answer:" for thing in ("it", "this", "that", "there")]
    frames = prompt_frames([*asked, "Caption:", "Caption:"])
    assert frames == [["Caption:"], ["Question: what is ", "? Answer:"]]
    assert fits("Caption:", frames) and fits("Question: what is red? Answer:", frames)
    for other in ("Caption", "Question: what is red?", "Describe it.", ""):
        assert not fits(other, frames)


def test_a_prompt_is_of_the_kind_whose_frame_it_fits() -> None:
    asked = [f"Question: what is {thing}? Answer:" for thing in ("it", "this")]
    frames = prompt_frames([*asked, "Caption:"])
    kinds = [kind_of(p, frames) for p in ("Caption:", "Question: what is red? Answer:", "Go on.")]
    assert kinds == ["Caption:", "Question: what is ... ? Answer:", ""]
    free = [f"{word} {word}?" for word in "abcdefghijklm"]
    assert {kind_of(prompt, prompt_frames(free)) for prompt in free} == {""}


def test_a_prompt_that_is_asked_often_is_a_kind_beside_questions_of_all_sorts() -> None:
    free = [f"{word} {word}?" for word in "abcdefghijklm"]
    often = ["Caption:"] * 3
    assert prompt_frames([*free, *often]) == [["Caption:"]]
    kinds = [kind_of(prompt, prompt_frames([*free, *often])) for prompt in ("Caption:", free[0])]
    assert kinds == ["Caption:", ""]
    asked = [f"{word} it? Answer:" for word in "abcdefghijklm"]
    assert prompt_frames([*asked, *often]) == [["Caption:"], ["", " it? Answer:"]]


def test_turns_that_are_asked_often_are_a_kind_beside_questions_of_all_sorts() -> None:
    free = [f"{word} {word}?" for word in "abcdefghijklm"]
    turns = [f"{WRITTEN}user\n{said}<|im_end|>\n{WRITTEN}assistant\n" for said in ("a", "b", "c")]
    frames = prompt_frames([*free, *turns])
    assert frames == [[f"{WRITTEN}user\n", f"<|im_end|>\n{WRITTEN}assistant\n"]]
    kinds = [kind_of(prompt, frames) for prompt in (turns[0], free[0])]
    assert kinds == [TURN, ""]
    assert frames[0] not in prompt_frames([*free, *free, *turns])  # too few


def test_many_kinds_with_a_template_are_of_one_kind() -> None:
    words = ["what", "who", "where", "when", "why", "how", "is", "are", "does", "can", "which"]
    frames = prompt_frames([f"{word} {thing}? Answer:" for word in words for thing in ("a", "b")])
    assert frames == [["", "? Answer:"]]
    assert fits("do you see it? Answer:", frames) and not fits("Write a poem.", frames)


@pytest.mark.parametrize("end", ["", "?"])
def test_of_prompts_that_share_no_word_only_they_themselves_are_guaranteed(
    here: Conditions, end: str
) -> None:
    words = ["what", "who", "where", "when", "why", "how", "is", "are", "does"]
    asked = [f"{word} {thing}{end}" for word in words for thing in ("a", "b")]
    then = calibration(here.under(prompts=prompt_frames([*asked, asked[0]])))
    assert then["conditions"]["prompts"] == [[prompt] for prompt in sorted(asked)]
    assert standing(then, here.under(prompts=[[asked[3]]])).promise is not None
    for other in (f"Write a poem{end}", end, f"what c{end}"):
        found = standing(then, here.under(prompts=[[other]]))
        assert found.why == "a prompt unlike the calibrated ones"


def test_where_answers_tell_any_question_is_guaranteed_but_no_conversation(
    here: Conditions,
) -> None:
    asked = [[f"word{number} of it"] for number in range(FRAMES + 1)]
    then = calibration(here.under(prompts=asked, any_prompt=True))
    assert standing(then, here.under(prompts=[["Who is that?"]])).promise is not None
    for conversation in (OTHER, f"{WRITTEN}user\nWho?<|im_end|>\n{WRITTEN}assistant\n"):
        found = standing(then, here.under(prompts=[[conversation]]))
        assert found.why == "a prompt unlike the calibrated ones"


def test_prompts_of_which_one_begins_another_share_no_word() -> None:
    assert prompt_frames(["what", "what is it"]) == [["what"], ["what is it"]]


@pytest.mark.parametrize("frame", [["", ""], ["", "?"]])
def test_a_stored_frame_without_a_word_fits_nothing(here: Conditions, frame: list[str]) -> None:
    """As calibrations of before prompts were kept have them."""
    found = standing(calibration(here.under(prompts=[frame])), here)
    assert found.why == "a prompt unlike the calibrated ones"


def test_of_many_kept_prompts_a_few_are_shown() -> None:
    then = Conditions(prompts=[[f"prompt {i}"] for i in range(20)])
    [(_, words)] = shown_conditions({"conditions": then.to_json()})
    assert words.startswith("'prompt 0', ") and words.endswith("'prompt 7', and 12 more")


# -- where it is shown -----------------------------------------------------------------------------


def adapter(dtype: torch.dtype = torch.float32) -> Adapter:
    backbone = Backbone(families.build("blip2-opt", dtype))
    exits = Exits(backbone, (2,)).requires_grad_(False)
    then = Conditions.of(Backbone(families.build("blip2-opt")), POLICY, **KNOWN)
    return Adapter(backbone, exits, POLICY, calibration=calibration(then))


def test_repr_shows_a_guarantee_where_it_holds_and_the_card_under_which_conditions() -> None:
    promise = "the mean over images of the share of answers that differ"
    for dtype, words in {
        torch.float32: promise,
        torch.bfloat16: "not guaranteed here: precision bfloat16 where float32 was calibrated",
    }.items():
        found = adapter(dtype)
        card = model_card(found.backbone, found)
        assert words in repr(found) and promise in card and "| dtype | float32 |" in card


def test_thresholds_beside_the_calibrated_ones_are_not_guaranteed() -> None:
    found = replace(adapter(), policy=ExitPolicy({2: 0.1}))
    words = "thresholds 2: 0.1 where 2: 0.9 were calibrated"
    assert words in repr(found) and words in model_card(found.backbone, found)


# -- what may change answers and is not a policy's -------------------------------------------------


def test_what_a_part_says_and_no_rule_knows_has_to_be_equal(here: Conditions) -> None:
    then = calibration(here.under(cooling="air"))
    assert standing(then, here.under(cooling="air")).promise is not None
    found = standing(then, here.under(cooling="water"))
    assert found.why == "cooling water where air was calibrated"
    assert standing(calibration(here), here.under(cooling="water")).promise is not None  # unsaid


@pytest.mark.parametrize("name", ["pixels", "tokens", "exits", "autocast", "matmul", "parameters"])
def test_calibrations_that_do_not_say_a_later_condition_stand(here: Conditions, name: str) -> None:
    now = here.under(pixels={"size": 1}, tokens="a", exits="b")
    then = calibration(now)
    assert standing(then, now).promise is not None
    del then["conditions"][name]
    assert standing(then, now).promise is not None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"do_normalize": False}, "another image processor"),
        ({"do_rescale": False}, "another image processor"),
        ({"image_mean": [0.1, 0.2, 0.3]}, "another image processor"),
        ({"size": {"height": 8, "width": 8}}, "another image processor"),
        ({"later": None}, None),
    ],
)
def test_another_image_processor_is_named(change: dict[str, Any], words: str | None) -> None:
    _, processor = load_tiny("opt")
    then = of_processor(processor)["pixels"]
    found = differences(Conditions(pixels=then), Conditions(pixels={**then, **change}))
    assert found == ([] if words is None else ["another image processor than the calibrated one"])


def test_a_tokenizer_that_puts_no_token_first_is_another() -> None:
    _, processor = load_tiny("opt")
    _, other = load_tiny("opt")
    assert of_processor(processor) == of_processor(other)
    _, bare = load_tiny("opt")
    bare.tokenizer.backend_tokenizer.post_processor = None
    before = [list(p.tokenizer("What is it? 12 ")["input_ids"]) for p in (processor, bare)]
    same = before[0] == before[1]
    assert (of_processor(bare)["tokens"] == of_processor(processor)["tokens"]) == same
    bare.tokenizer.add_tokens(["offramp"])
    assert tokens_digest(bare.tokenizer) != of_processor(processor)["tokens"]


def test_weights_that_were_written_to_after_loading_are_named(monkeypatch: Any) -> None:
    found = adapter()
    assert found.standing().promise is not None
    with torch.no_grad():
        next(found.backbone.layers[1].parameters()).add_(0.1)
    assert found.standing().why == "weights of the backbone changed after they were loaded"


class _Adapted(torch.nn.Module):
    """As a layer of PEFT."""

    def __init__(self, base: torch.nn.Module) -> None:
        super().__init__()
        self.base, self.disable_adapters = base, False
        self.active_adapters, self.merged_adapters = ["default"], list[str]()


def test_an_adapter_of_peft_that_is_put_in_or_switched_is_named() -> None:
    found = adapter()
    found.backbone.layers[1].lora = _Adapted(torch.nn.Linear(2, 2))
    assert "changed after they were loaded" in found.standing().why
    del found.backbone.layers[1].lora
    assert found.standing().promise is not None
    other = Adapter(Backbone(families.build("blip2-opt")), found.exits)
    other.backbone.layers[1].lora = layer = _Adapted(torch.nn.Linear(2, 2))
    loaded = Backbone(other.backbone.model)
    note_loaded(loaded)
    assert not as_loaded(loaded)
    del _LOADED[loaded.model]
    loaded = Backbone(loaded.model)
    note_loaded(loaded)
    assert as_loaded(loaded)
    layer.disable_adapters = True
    assert not as_loaded(loaded)


def test_exits_that_were_changed_and_saved_have_no_guarantee(tmp_path: Any) -> None:
    backbone = Backbone(families.build("blip2-opt"))
    exits = ExitSet.of(Exits(backbone, (2,)).requires_grad_(False))
    then = Conditions.of(backbone, POLICY, exits=exits, **KNOWN)
    found = Adapter(backbone, exits, POLICY, calibration=calibration(then))
    assert found.standing().promise is not None
    found.save(tmp_path / "same")
    assert Adapter.load(tmp_path / "same", backbone).standing().promise is not None
    with torch.no_grad():
        next(exits.modules.parameters()).mul_(1.5)
    words = "other weights of the exits than the calibrated ones"
    assert found.standing().why == words
    found.save(tmp_path / "changed")
    assert words in (tmp_path / "changed" / "README.md").read_text()
    assert Adapter.load(tmp_path / "changed", backbone).standing().why == words


def test_a_generation_config_that_samples_is_named(monkeypatch: Any) -> None:
    found = adapter()
    monkeypatch.setattr(found.backbone.model.generation_config, "do_sample", True)
    assert found.standing().why == "sampled where greedy decoding was calibrated"
    assert found.standing(sampling="greedy").promise is not None


def test_autocast_and_the_precision_of_matrix_multiplication_are_named() -> None:
    found = adapter()
    with torch.autocast("cpu", torch.bfloat16):
        assert found.standing().why == "autocast to bfloat16 where none was calibrated"
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert "float32 matrix multiplication of precision medium" in found.standing().why
    finally:
        torch.set_float32_matmul_precision(before)
    assert found.standing().promise is not None


def test_how_long_drafts_are_withdraws_nothing() -> None:
    found = adapter()
    kept = found.with_policy(replace(POLICY, max_draft=3, drafts={2: 0.5}))
    assert kept.standing().promise is not None
    assert found.with_policy(replace(POLICY, thresholds={2: 0.8})).calibration is None


def test_the_same_policy_may_be_calibrated_in_several_engines(tmp_path: Path) -> None:
    found, name = adapter(), "llama.cpp f16"
    there = Conditions.of(found.backbone, POLICY, engine=name, **KNOWN)
    both = found.with_policy(POLICY, calibration(there, n=777))
    for one in (both, Adapter.load(saved(both, tmp_path), found.backbone)):
        for engine, n in ((None, 1000), (name, 777)):
            promise = one.standing(engine=engine).promise
            assert promise is not None and promise.n == n
        assert one.standing(engine="another").promise is None
        here = one.of_engine("torch")
        assert here.calibration is not None and here.calibration["n"] == 1000
        assert here.of_engine(name) == one.of_engine(name) and here.of_engine("another") is here
    for tower in ("onnxruntime", IN_BF16):
        beside = both.with_policy(POLICY, calibration(there.under(vision=tower), n=555))
        assert len(beside.elsewhere) == 2 and beside.standing(engine=name).promise == promise
        with_tower = Adapter(found.backbone.with_tower(StandIn(tower, nn.Identity())), found.exits)
        parts: dict[str, Any] = {"policy": POLICY, "calibration": beside.calibration}
        own = replace(with_tower, elsewhere=beside.elsewhere, **parts)
        for one in (own, own.of_engine(name), own.of_engine("torch").of_engine(name)):
            assert one.of_engine(name).calibration["n"] == 555  # type: ignore[index]
        assert own.of_engine("torch").calibration["n"] == 1000  # type: ignore[index]
    again = both.with_policy(POLICY, calibration(there, n=888))
    assert [*again.elsewhere] == ["torch"] and again.calibration["n"] == 888  # type: ignore[index]
    assert not both.with_policy(replace(POLICY, thresholds={2: 0.8})).elsewhere


def saved(adapter: Adapter, folder: Path) -> Path:
    adapter.save(folder)
    return folder


# -- the table of what keeps every number ----------------------------------------------------------


def test_in_float32_prepacking_and_the_batch_change_no_answer() -> None:
    plain, packed = adapter(), adapter()
    packed = ENGINES["packed"].open(packed)
    assert packed.standing().promise is not None
    some = fakes.examples(12)
    processor = fakes.Blip2FakeProcessor("blip2-opt")

    def answers(model: Adapter, rows: int) -> list[tuple[int, ...]]:
        encoder = InputProcessor(model.backbone, processor)
        policy = ExitPolicy({2: 0.04})
        found = generate_answers(model, encoder, some, policy, batch_size=rows, max_new_tokens=6)
        return [answer.ids for answer in found]

    assert answers(plain, 12) == answers(plain, 1) == answers(packed, 1) == answers(packed, 5)


def test_where_right_answers_are_needed_what_differs_is_watched(here: Conditions) -> None:
    own = calibration(here)
    promise = standing(own, here).promise
    assert promise is not None and watched(own, promise) == promise
    drop = calibration(here, risk="cider_drop", target=0.025)
    promise = standing(drop, here).promise
    assert promise is not None and watched(drop, promise) is None
    for odd in (
        {},
        {"risk": "cider_drop", "targets": {"": 0.1}},
        {"risk": "consistency"},
        {"risk": "consistency", "targets": {"": 2}},
    ):
        assert watched({**drop, "watched": odd}, promise) is None
    said = {"risk": "consistency", "targets": {"Caption:": 0.2, "Question:": 0.1}}
    found = watched({**drop, "watched": said}, promise)
    assert found is not None and found.risk == "consistency" and found.least == 0.1
    assert found.target_of("Caption:") == 0.2


PHOTO = Path(__file__).parents[2] / "photo-model" / "offramp_photo" / "exits"


@pytest.mark.parametrize("folder", [tiny_exits("opt"), PHOTO], ids=["tiny-opt", "photo"])
def test_each_calibration_that_ships_is_watched_and_knows_its_images(folder: Path) -> None:
    for calibration in calibrations(read_config(folder)):
        here = Conditions.of_calibration(calibration).under(prompts=None)
        promised = standing(calibration, here).promise
        assert promised is not None and watched(calibration, promised) is not None
        known = Likeness.from_json(calibration["likeness"])
        assert known.looks and all(map(known.tells, known.kinds))


def test_a_drop_of_cider_is_told_in_its_points(here: Conditions) -> None:
    assert SCALES == {"cider_drop": CIDER_CAP}
    kinds = [{"kind": "Caption:", "target": None}, {"kind": "Question:", "target": 0.1}]
    then = calibration(here, risk="cider_drop", target=0.025, each_kind=True, kinds=kinds)
    said = standing(then, here).sentence
    assert "CIDEr-D (capped at 2.5, for captions 1.25) against people's answers is at most" in said
    assert "at most 0.0625 (0.25 of" in said


@pytest.mark.parametrize("risk", RISKS)
def test_every_risk_is_told_in_words(risk: str) -> None:
    """Whose name alone says little: rouge_l_drop is against people's answers."""
    words = risk_words(risk, "image")
    assert words.startswith("the mean over images of the ") and risk.replace("_", " ") not in words
