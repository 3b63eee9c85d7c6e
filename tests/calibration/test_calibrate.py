"""Laws of calibration: what is guaranteed was measured on free-running answers, or nothing is."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import fakes
import families
import numpy as np
import pytest
import torch
from risks import COARSE, DEPTHS, population, seconds

from offramp.adapter.adapter import Adapter
from offramp.adapter.answers import Answer, answers_of, generate_answers
from offramp.adapter.model_card import model_card
from offramp.calibration import calibrate as module
from offramp.calibration.attempts import Draws, images_of, merged
from offramp.calibration.calibrate import calibrate, calibrated
from offramp.calibration.cost_model import Costs
from offramp.calibration.risk_control import upper_bound
from offramp.calibration.risk_functions import RISKS, Judged
from offramp.calibration.threshold_evaluator import (
    LOST_SHARE,
    SEARCH,
    ThresholdEvaluator,
    split_images,
)
from offramp.calibration.threshold_search import LIMIT, candidates, pareto_path
from offramp.calibration.trial import Calibration
from offramp.core.decoding.policy import FULL, ExitPolicy, GenerationOutput
from offramp.core.errors import DataError, InputError
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits, ExitSet
from offramp.data.decontamination import picture_digests
from offramp.data.item import Item
from offramp.data.scenes import world
from offramp.features.exact_batches import EXACT_BATCHES
from offramp.features.input_processor import InputProcessor
from offramp.inputs.example import Example
from offramp.promises.prompt_kinds import point_of

LAYERS, TOKENS = 6, 6
OPTIONS: dict[str, Any] = {"max_new_tokens": TOKENS, "do_sample": False}
GRID = tuple(np.linspace(0.076, 0.03, 16))
LAX: dict[str, Any] = {"target": 0.6, "confidence": 0.8, "thresholds": GRID, **OPTIONS}


def costs(check: float = 1e-4) -> Costs:
    return Costs(
        layers=LAYERS,
        batch=1,
        context=8,
        layer=(1e-3,) * 4,
        head=(1e-4,) * 4,
        exit=1e-4,
        check=check,
        score=0.0,
        token=1e-4,
        reenter=0.0,
    )


@cache
def encoder() -> InputProcessor:
    model = Backbone(families.build("blip2-opt", wide=2.0))
    return InputProcessor(model, fakes.Blip2FakeProcessor("blip2-opt"))


@cache
def adapter_at(*depths: int) -> Adapter:
    """Exits that often agree with the full model, and often do not."""
    exits = Exits(encoder().backbone, depths)
    families.perturb(exits)
    return Adapter(encoder().backbone, exits.requires_grad_(False), seen={"train": []})


@cache
def examples(n: int = 40) -> list[Example]:
    """Half of them answered as the full model would."""
    some = fakes.examples(n)
    full = generate_answers(adapter_at(4), encoder(), some, FULL, **OPTIONS)
    return [
        replace(e, answers=(a.text,)) if i % 2 and a.text else e
        for i, (e, a) in enumerate(zip(some, full, strict=True))
    ]


def found(*depths: int, policy: ExitPolicy | None = None, **more: Any) -> Calibration:
    given = {"costs": costs(), **LAX, **more}
    some = given.pop("examples", examples())
    return calibrate(adapter_at(*depths), encoder(), some, policy or ExitPolicy(), **given)


def lost(risk: str, policy: ExitPolicy, some: Sequence[Example | Item], *depths: int) -> Any:
    """Losses [n] of all answers written again, in other batches."""
    asked = list(map(Judged.of, some))
    early, full = (
        generate_answers(adapter_at(*depths), encoder(), asked, p, batch_size=10, **OPTIONS)
        for p in (policy, FULL)
    )
    return RISKS[risk].losses(early, full, asked)


# -- what is guaranteed -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("risk", "prefill"),
    [
        ("disagreement", False),
        ("consistency", True),
        ("exact_match_drop", False),
        ("rouge_l_drop", True),
    ],
)
def test_every_point_of_the_path_has_the_risk_of_answers_written_again(
    risk: str, prefill: bool
) -> None:
    policy = ExitPolicy(first=None if prefill else {})
    path = found(4, policy=policy, risk=risk).path
    assert len(path) > 1
    for point in (path[len(path) // 2], path[-1]):
        losses = lost(risk, replace(policy, thresholds=point.thresholds), examples(), 4)
        assert point.risk == pytest.approx(losses.mean())
    assert any(point.risk != 0 for point in path)


@pytest.mark.slow
def test_a_risk_that_needs_right_answers_says_what_is_watched_in_its_place() -> None:
    assert found(4).watched is None
    result = found(4, risk="rouge_l_drop")
    assert result.watched is not None and result.watched["risk"] == "consistency"
    differs = lost("consistency", result.policy, examples(), 4).mean()
    assert all(differs <= bound < 1 for bound in result.watched["targets"].values())


@pytest.mark.parametrize("depths", [(4,), (4, 5)])
def test_what_is_promised_was_measured_and_its_bound_is_below_the_target(
    depths: tuple[int, ...],
) -> None:
    result = found(*depths)
    assert result.policy.thresholds and not result.reason
    assert result.measured is not None and result.bound is not None
    assert result.measured <= result.bound <= result.target
    assert {"thresholds": result.policy.thresholds, "risk": result.measured} in [
        {"thresholds": p.thresholds, "risk": p.risk} for p in result.path
    ]


def of_two_kinds(n: int = 40) -> list[Example]:
    """One in three asks for a caption, the others ask a question each."""
    return [
        replace(e, prompt="Caption:" if i % 3 == 0 else f"Question: {e.prompt} Answer:")
        for i, e in enumerate(fakes.examples(n))
    ]


@pytest.mark.parametrize("each", [False, True])
def test_what_was_measured_is_told_by_kind_of_prompt_and_may_be_promised_of_each(
    each: bool,
) -> None:
    some = of_two_kinds()
    result = found(4, examples=some, each_kind=each)
    assert [kind.kind for kind in result.kinds] == ["Caption:", "Question: ... Answer:"]
    caption = np.array([example.prompt == "Caption:" for example in some])
    risks = [
        lost("disagreement", result.policy.moved(kind.point), some, 4)[of_it].mean()
        for kind, of_it in zip(result.kinds, (caption, ~caption), strict=True)
    ]
    losses = lost("disagreement", result.policy, some, 4)
    assert [kind.risk for kind in result.kinds] == pytest.approx(risks)
    assert [kind.answers for kind in result.kinds] == [caption.sum(), (~caption).sum()]
    assert result.measured == pytest.approx(max(risks) if each else losses.mean())
    card = model_card(encoder().backbone, calibrated(adapter_at(4), result, some))
    assert "| Caption: |" in card and ("not of each" in card) != each
    promise = calibrated(adapter_at(4), result, some).standing().promise
    assert promise is not None and ("for each kind of prompt" in promise.claim) == each


@pytest.mark.slow
def test_any_question_is_guaranteed_where_enough_answers_were_calibrated_to_call_one_unlike() -> (
    None
):
    for n, told in ((40, None), (220, True)):
        some = [
            replace(example, prompt=f"word{number % 10} {number}")
            for number, example in enumerate(fakes.examples(n))
        ]
        calibration = found(4, examples=some)
        assert calibration.policy.thresholds
        assert calibration.conditions.get("any_prompt") == told


@pytest.mark.slow
@pytest.mark.parametrize("trust", [False, True])
def test_each_kind_of_prompt_goes_as_far_as_its_own_losses_let_it(trust: bool) -> None:
    """As it would alone; and what all kinds passed is the policy of prompts of no kind."""
    some, by = of_two_kinds(60), ExitPolicy(trust=1.0) if trust else ExitPolicy()
    targets = {"Caption:": 0.6, "Question": 0.3}
    result = found(4, examples=some, policy=by, costs=None, target=0.5, kind_targets=targets)
    adapter = calibrated(adapter_at(4), result, some)
    points = []
    for kind in result.kinds:
        asked = [e for e in some if (e.prompt == "Caption:") == (kind.kind == "Caption:")]
        of_it = kind.target or 0.5
        alone = found(4, examples=asked, policy=by, costs=None, target=of_it)
        own = adapter.policy_of(asked[0].prompt)
        assert result.policy.moved(kind.point) == alone.policy == own
        points.append(min(kind.point.values()))
    assert trust or len(set(points)) == 2  # else nothing is shown
    common = result.policy.trust if trust else min(result.policy.thresholds.values())
    assert common == max(points) and adapter.policy_of("unheard of") == result.policy
    read = json.loads(json.dumps(result.to_json()))
    assert [point_of(read, kind.kind) for kind in result.kinds] == [
        dict(kind.point) for kind in result.kinds
    ]


def test_a_kind_of_prompt_may_have_a_target_of_its_own() -> None:
    some, own = of_two_kinds(), {"Question": 0.55}
    result = found(4, examples=some, kind_targets=own, target=0.5)
    caption, question = result.kinds
    assert (caption.target, question.target) == (None, 0.55)
    assert result.each_kind and question.risk <= 0.55
    assert result.measured == pytest.approx(max(caption.risk, question.risk / 1.1))
    promise = calibrated(adapter_at(4), result, some).standing().promise
    assert promise is not None and "0.5 (0.55 of 'Question: ... Answer:')" in promise.claim
    strict = found(4, examples=some, each_kind=True, target=0.5)
    for point, other in zip(result.path, strict.path, strict=False):
        assert point.bound <= other.bound


@pytest.mark.parametrize("own", [{"Question": 0.0}, {"Question": 1.0}, {" ": 0.1}])
def test_a_target_of_its_own_needs_a_kind_and_a_share(own: dict[str, float]) -> None:
    with pytest.raises(InputError, match="says nothing"):
        found(4, examples=of_two_kinds(), kind_targets=own)


@pytest.mark.slow
def test_words_of_cider_are_weighed_by_images_that_are_not_tested_on() -> None:
    some = examples()
    part = found(4, risk="cider_drop")
    assert 0 < part.n < len(some)
    others = [replace(e, answers=("a red ball", "a cube")) for e in fakes.examples(60)[40:]]
    whole = found(4, risk="cider_drop", frequencies=[*others, *some[:5]])
    assert whole.n == len(some)
    same = found(4, risk="cider_drop", frequencies=others)
    assert same.attempts[-1].asked == whole.attempts[-1].asked
    fewer = found(4, risk="cider_drop", frequencies=others[:9])
    assert len({a.attempts[-1].asked for a in (part, whole, fewer)}) == 3
    with pytest.raises(DataError, match="references of 0 images"):
        found(4, risk="cider_drop", frequencies=some)


def test_of_each_kind_fewer_thresholds_pass_than_of_all_together() -> None:
    some = of_two_kinds()
    together, each = (
        found(4, examples=some, each_kind=each, target=0.35).path for each in (False, True)
    )
    for point, other in zip(together, each, strict=False):
        assert point.bound <= other.bound
    assert any(p.bound < q.bound for p, q in zip(together, each, strict=False))


def test_what_no_test_can_show_on_so_many_images_spends_no_attempt() -> None:
    result = found(4, target=0.01, confidence=0.95)
    assert result.path == () and result.attempts == () and not result.policy.thresholds
    assert result.reason.startswith(
        "40 images are too few for 0.01 even if no answer lost anything"
    )
    assert "337 are needed" in result.reason
    assert found(4, target=0.01, confidence=0.95, risk="exact_match_drop").path  # gains may count


def test_an_exit_that_is_seldom_sure_may_exit_where_that_is_harmless() -> None:
    """As on photographs, where few words are said with half of the probability."""
    assert found(4, thresholds=module.GRID).path[-1].thresholds[4] == 0.1


def test_the_path_is_walked_to_its_first_failure() -> None:
    result = found(4, target=0.35)
    *passed, last = result.path
    assert all(point.bound <= 0.35 for point in passed) and last.bound > 0.35
    assert result.policy.thresholds == passed[-1].thresholds


def test_the_full_model_answers_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[ExitPolicy] = []

    def spy(adapter: Any, encoder: Any, some: Any, policy: ExitPolicy, **more: Any) -> Any:
        asked.extend([policy] * len(some))
        return generate_answers(adapter, encoder, some, policy, **more)

    monkeypatch.setattr("offramp.calibration.threshold_evaluator.generate_answers", spy)
    result = found(4)
    assert sum(policy == FULL for policy in asked) == len(examples())
    early = sum(policy != FULL for policy in asked)
    once_more = len(examples())  # by the thresholds that were chosen, to know their scores
    assert early == round(sum(point.risk for point in result.path) * result.n) + once_more


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_half_precision_no_answer_is_taken_for_unchanged(dtype: torch.dtype) -> None:
    model = Backbone(families.build("blip2-opt", dtype))
    exits = Exits(model, (2,)).requires_grad_(False)
    reader = InputProcessor(model, fakes.Blip2FakeProcessor("blip2-opt"))
    tried = ThresholdEvaluator.of(
        Adapter(model, exits),
        reader,
        examples()[:4],
        ExitPolicy(),
        RISKS["disagreement"],
        batch_size=4,
        **OPTIONS,
    )
    assert tried.doubtful.all() == (dtype != torch.float32)


def test_a_policy_that_cannot_be_replayed_shares_one_threshold(idle: str) -> None:
    result = found(4, 5, policy=ExitPolicy(score=idle))
    assert result.policy.score == idle and result.n == len(examples())
    assert all(len(set(point.thresholds.values())) == 1 for point in result.path)
    point = result.path[-1]
    losses = lost(
        "disagreement", replace(result.policy, thresholds=point.thresholds), examples(), 4, 5
    )
    assert point.risk == pytest.approx(losses.mean())


def test_several_exits_are_tested_on_pictures_that_the_search_did_not_use() -> None:
    result = found(4, 5)
    assert 0.5 < result.n / len(examples()) < 0.9  # 70% of them, by a hash of their content
    assert any(len(set(point.thresholds.values())) > 1 for point in result.path)


def test_copies_of_an_image_are_all_searched_on_or_all_tested_on() -> None:
    scenes = [world.render(world.scene("calibration", i)) for i in range(40)]
    copies = [image.resize((60, 60)) for image in scenes[:4]]
    some = [Example(image, "w1", (), f"e{i}") for i, image in enumerate([*scenes, *copies])]
    images = images_of(some)
    assert merged(images) == 4
    parts = split_images(None, images, also=True)  # type: ignore[arg-type]
    searched, tested = ({image.cluster for image in part} for part in parts)
    assert searched.isdisjoint(tested) and sum(map(len, parts)) == len(images)
    apart = [image for image in images if image.rank < SEARCH]
    assert {image.cluster for image in apart} == searched and len(parts[0]) > len(apart)
    alone = images_of(some[:40])
    assert split_images(None, alone, also=True)[0] == [i for i in alone if i.rank < SEARCH]  # type: ignore[arg-type]


def test_an_exit_that_does_not_pay_is_off() -> None:
    for depths in ((4,), (4, 5)):
        result = found(*depths, costs=costs(check=1.0))
        assert result.policy.thresholds == {} and "pay" in result.reason
        assert result.measured is None and result.speedup is None


def test_the_predicted_speedup_is_that_of_the_predicted_seconds() -> None:
    result = found(4)
    (took,) = [p.seconds for p in result.path if p.thresholds == result.policy.thresholds]
    assert took is not None and took < costs().full
    assert result.speedup == pytest.approx(costs().full / took)


@pytest.mark.parametrize("depths", [(4,), (4, 5)])
def test_without_costs_no_speed_is_predicted_and_exits_share_a_threshold(
    depths: tuple[int, ...],
) -> None:
    result = found(*depths, costs=None)
    assert all(point.seconds is None for point in result.path) and result.speedup is None
    assert all(len(set(point.thresholds.values())) == 1 for point in result.path)
    assert result.policy.thresholds == result.path[-2].thresholds  # the last that passed


# -- what an adapter keeps of it ----------------------------------------------------------------


def test_a_calibrated_adapter_comes_back_with_its_promise(tmp_path: Path) -> None:
    result = found(4)
    kept = calibrated(adapter_at(4), result, examples())
    kept.save(tmp_path / "exits")
    loaded = Adapter.load(tmp_path / "exits", encoder().backbone)
    assert loaded.policy == result.policy
    assert loaded.calibration == kept.calibration == result.to_json()
    assert set(loaded.seen["calibration"]) == set(picture_digests(examples()))
    card = model_card(loaded.backbone, loaded)
    assert f"at most {result.target:.3g}" in card and f"n = {result.n}" in card


def test_the_card_tells_what_is_guaranteed_in_whatever_precision_it_is_written() -> None:
    result = found(4)
    rounded = Backbone(families.build("blip2-opt", wide=2.0).bfloat16())
    card = model_card(rounded, calibrated(adapter_at(4), result, examples()))
    assert f"at most {result.target:.3g}" in card and "float32" in card


def test_the_card_of_an_adapter_tells_when_nothing_could_be_promised() -> None:
    kept = calibrated(adapter_at(4), found(4, target=0.01), examples())
    assert "could not guarantee" in model_card(kept.backbone, kept)


class Templated(fakes.Blip2FakeProcessor):
    chat_template = "{{ messages }}"

    def apply_chat_template(self, turns: Any, **_: Any) -> str:
        return str(turns[-1]["content"][-1]["text"])

    def _extra(self, image: Any, ids: Any, mask: Any) -> dict[str, torch.Tensor]:
        return super()._extra(image[0], ids, mask)  # such a processor is given lists of images


SHORT: dict[str, Any] = {"costs": costs(), **LAX, "thresholds": GRID[:2]}


def again(result: Calibration, adapter: Adapter, reader: InputProcessor | None = None) -> int:
    """The number of an attempt that asks the same of an adapter which knows those before."""
    adapter = replace(adapter, attempts=[attempt.to_json() for attempt in result.attempts])
    reader = reader or encoder()
    return calibrate(adapter, reader, examples(), adapter.policy, **SHORT).attempt


def test_what_was_asked_under_other_conditions_is_another_attempt() -> None:
    """In other weights, of another text, by other checks: these are other answers."""
    before = calibrate(adapter_at(4), encoder(), examples(), FULL, **SHORT)
    assert "conditions" not in before.attempts[0].settings  # as in attempts recorded before
    assert again(before, adapter_at(4)) == 1
    rounded = Backbone(families.build("blip2-opt", wide=2.0).bfloat16())
    exits = Exits(rounded, (4,))
    exits.load_state_dict(adapter_at(4).exits.modules.state_dict())
    in_half = replace(adapter_at(4), backbone=rounded, exits=ExitSet(exits.requires_grad_(False)))
    reader = InputProcessor(rounded, fakes.Blip2FakeProcessor("blip2-opt"))
    assert again(before, in_half, reader) == 2
    templated = InputProcessor(encoder().backbone, Templated("blip2-opt"))
    assert again(before, adapter_at(4), templated) == 2


def test_kernels_that_change_no_answer_ask_the_same() -> None:
    before = calibrate(adapter_at(4), encoder(), examples(), FULL, **SHORT)
    exact = encoder().backbone.with_decoding(exact_batches=EXACT_BATCHES)
    assert again(before, adapter_at(4), InputProcessor(exact, encoder().processor)) == 1


def test_how_many_tokens_are_drafted_asks_nothing_else() -> None:
    before = calibrate(adapter_at(4), encoder(), examples(), ExitPolicy(max_draft=4), **SHORT)
    assert again(before, replace(adapter_at(4), policy=ExitPolicy(max_draft=12))) == 1


def test_another_shortlist_asks_something_else() -> None:
    ids, policy = torch.arange(20), ExitPolicy(shortlist=True)

    def having(ids: torch.Tensor) -> Adapter:
        exits = ExitSet(adapter_at(4).exits.modules, ids)
        return replace(adapter_at(4), exits=exits, policy=policy)

    before = calibrate(having(ids), encoder(), examples(), policy, **SHORT)
    assert again(before, having(ids)) == 1
    assert again(before, having(ids + 1)) == 2


# -- data that cannot carry it --------------------------------------------------------------------


def test_too_few_samples_promise_nothing_and_say_how_many_are_needed() -> None:
    result = found(4, target=0.01, thresholds=(1.0, 0.99))
    assert result.policy.thresholds == {} and result.measured is None
    assert result.needed is not None and result.needed > len(examples())
    assert str(result.needed) in result.reason


def test_a_risk_above_the_target_at_the_safest_point_needs_no_more_samples() -> None:
    result = found(4, target=0.1, thresholds=(0.03,))
    assert result.needed is None and "above the target" in result.reason


def test_no_examples_are_refused() -> None:
    with pytest.raises(DataError, match="no examples"):
        found(4, examples=[])


def test_pictures_that_training_used_are_refused() -> None:
    trained_on = replace(adapter_at(4), seen={"train": list(picture_digests(examples()[3:5]))})
    with pytest.raises(DataError, match=r"2 of 40 images were used in training.*'e3'"):
        calibrate(trained_on, encoder(), examples(), ExitPolicy(), **LAX)


def test_an_adapter_that_does_not_tell_its_pictures_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    old = replace(adapter_at(4), seen={})
    calibrate(old, encoder(), examples()[:4], ExitPolicy(), costs=costs(), **LAX)
    assert "does not say" in caplog.text


@pytest.mark.parametrize("risk", ["exact_match_drop", "vqa_accuracy_drop", "rouge_l_drop"])
def test_a_risk_with_labels_refuses_examples_without(risk: str) -> None:
    some = [replace(examples()[0], answers=()), *examples()[1:]]
    with pytest.raises(DataError, match=r"1 examples, such as 'e0'"):
        found(4, risk=risk, examples=some)


def test_what_no_risk_can_be_measured_on_is_refused_before_the_model_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("offramp.calibration.threshold_evaluator.generate_answers", None)
    some = [replace(example, answers=("a cat",)) for example in examples()]
    with pytest.raises(DataError, match=r"there are 1\.\n.*--risk exact_match_drop"):
        found(4, risk="vqa_accuracy_drop", examples=some)


def test_a_drop_is_against_all_that_people_answered_blanks_too() -> None:
    full = generate_answers(adapter_at(4), encoder(), examples(), FULL, **OPTIONS)
    items = [
        Item(replace(e, answers=(a.text or "a cat",) * 9), (a.text or "a cat",) * 9 + ("",))
        for e, a in zip(examples(), full, strict=True)
    ]
    result = found(4, risk="vqa_accuracy_drop", examples=items)
    point = result.path[-1]
    assert point.risk > 0
    losses = lost("vqa_accuracy_drop", ExitPolicy(point.thresholds), items, 4)
    assert point.risk == pytest.approx(losses.mean())


def test_a_model_that_is_wrong_everywhere_has_nothing_to_lose() -> None:
    some = [replace(example, answers=("never said",)) for example in examples()]
    with pytest.raises(DataError, match="wrong on all 40"):
        found(4, risk="exact_match_drop", examples=some)


@pytest.mark.parametrize(("value", "words"), [(0.5, "All scores are the same"), (math.nan, "NaN")])
def test_scores_that_tell_nothing_apart_are_refused(
    value: float, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from offramp.core.decoding.scores import SCORES

    def constant(logits: Any) -> Any:
        return torch.full(logits.shape[:-1], value)

    monkeypatch.setitem(SCORES, "max_probability", constant)
    with pytest.raises(DataError, match=words):
        found(4)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"target": 0}, "between 0 and 1"),
        ({"target": 1}, "between 0 and 1"),
        ({"confidence": 0}, "between 0 and 1"),
        ({"confidence": math.nan}, "between 0 and 1"),
        ({"risk": "disagrement"}, "Did you mean 'disagreement'"),
        ({"method": "learn"}, "Allowed: auto, sharp, upper_bound, learn_then_test"),
        ({"policy": ExitPolicy(lossless=True)}, "Lossless"),
    ],
)
def test_what_cannot_be_asked_is_refused(more: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        found(4, **more)


# -- losses -----------------------------------------------------------------------------------


def answer(text: str) -> Answer:
    return Answer(tuple(map(ord, text)), text)


def losses_of(risk: str, early: str, full: str, *right: str) -> float:
    example = Example(fakes.picture(0), "", right, "e")
    return float(RISKS[risk].losses([answer(early)], [answer(full)], [example])[0])


@pytest.mark.parametrize("text", ["一只猫 坐着", "чёрный кот", "cat 🐈 sat", "", "...", "a\nb"])
def test_the_same_answer_loses_nothing_in_any_script(text: str) -> None:
    for risk in ("disagreement", "consistency"):
        assert losses_of(risk, text, text) == 0
    for risk in ("exact_match_drop", "rouge_l_drop"):
        assert losses_of(risk, text, text, "一只猫") == 0


@pytest.mark.parametrize("pair", [("", "猫"), ("猫", ""), ("...", "猫"), ("狗", "猫")])
def test_an_answer_with_nothing_in_common_loses_all(pair: tuple[str, str]) -> None:
    assert losses_of("disagreement", *pair) == losses_of("consistency", *pair) == 1


@pytest.mark.parametrize("pair", [("", "."), ("?", "."), ("a", " "), (".", "")])
def test_nothing_is_like_an_answer_without_a_word(pair: tuple[str, str]) -> None:
    assert losses_of("consistency", *pair) == 1


def test_consistency_counts_what_two_answers_share() -> None:
    near, far = (losses_of("consistency", text, "a red ball") for text in ("a red cube", "a cube"))
    assert 0 < near < far < 1


def test_a_drop_is_below_zero_where_leaving_early_is_better() -> None:
    assert losses_of("exact_match_drop", "cat", "dog", "cat") == -1
    assert losses_of("exact_match_drop", "dog", "cat", "cat") == 1
    assert losses_of("vqa_accuracy_drop", "cat", "dog", *["cat"] * 2, *["dog"] * 8) > 0
    assert losses_of("rouge_l_drop", "a red ball", "a cube", "a red ball") < 0


def test_answers_are_rows_without_their_padding() -> None:
    result = GenerationOutput(
        torch.tensor([[9, 4, 5, 1], [9, 6, 7, 8]]),
        torch.tensor([[3, 12, 0], [12, 3, 3]]),
        torch.tensor([[0.9, 0.1, math.nan], [0.2, 0.3, 0.4]]),
        12,
    )
    short, whole = answers_of(result, encoder())
    assert (short.ids, whole.ids) == ((4, 5), (6, 7, 8))
    assert short.depths == (3, 12) and short.scores == pytest.approx((0.9, 0.1))
    assert whole.text == "w6 w8"  # w7 stands for unknown words, which are special


# -- the search over several exits ----------------------------------------------------------------


def test_no_candidate_is_both_safer_and_faster_than_a_point_of_the_path() -> None:
    whole, tried = population(), candidates(DEPTHS, COARSE)
    search = whole.part(np.arange(300))

    def measured(thresholds: dict[int, float]) -> tuple[float, float]:
        ran = search.depths(thresholds)
        return search.differs(thresholds).mean(), seconds(ran, tuple(thresholds))

    front = [measured(thresholds) for thresholds in pareto_path(search, tried, seconds, ())]
    assert len(front) >= 3
    for risk, time in front:
        assert not any(r <= risk and s < time for r, s in map(measured, tried))


def test_a_path_starts_at_thresholds_at_least_as_strict_as_all_that_follow() -> None:
    whole, tried = population(), candidates(DEPTHS, COARSE)
    path = pareto_path(whole.part(np.arange(300)), tried, seconds, COARSE)
    assert min(path[0].values()) == max(COARSE)


def test_two_exits_are_tried_in_every_combination() -> None:
    tried = candidates((2, 4), (0.9, 0.5))
    pairs = [(t.get(2), t.get(4)) for t in tried]
    wanted = {(a, b) for a in (None, 0.9, 0.5) for b in (None, 0.9, 0.5)} - {(None, None)}
    assert set(pairs) == wanted and len(pairs) == len(wanted)


@pytest.mark.parametrize("exits", [1, 2, 3, 5, 8, 12, 30])
def test_candidates_stay_few_however_many_exits_there_are(exits: int) -> None:
    tried = candidates(tuple(range(1, exits + 1)), module.GRID)
    assert len(tried) <= LIMIT
    assert {depth for thresholds in tried for depth in thresholds} == set(range(1, exits + 1))
    assert {max(module.GRID), min(module.GRID)} <= {v for t in tried for v in t.values()}


@pytest.mark.parametrize("first", [0.05, "auto"])
@pytest.mark.parametrize("depths", [(4,), (4, 5)])
def test_what_is_promised_covers_first_tokens_at_their_own_threshold(
    first: Any, depths: tuple[int, ...]
) -> None:
    result = found(*depths, first=first)
    assert result.policy.first and result.conditions["first"] == result.policy.first.to_json()
    assert {*result.policy.first} == {*result.policy.thresholds}
    searched = [i for i in images_of(examples()) if i.rank < SEARCH]
    at_all = first == "auto" or len(depths) > 1  # what is searched on is not tested on
    assert result.n == len(examples()) - (len(searched) if at_all else 0)
    rows = [row for i in images_of(examples()) if not at_all or i not in searched for row in i.rows]
    some = [examples()[row] for row in rows]
    losses = lost("disagreement", result.policy, some, *depths)
    assert result.measured == pytest.approx(losses.mean())


def with_error(losses: Any) -> float:
    """Their mean, with a standard error on top."""
    return float(losses.mean() + losses.std() / len(losses) ** 0.5)


def spare(result: Calibration) -> float:
    """What a test leaves below the target where no answer loses anything."""
    nothing = Draws.of(np.zeros(result.n), whole=True)
    return max(0.0, result.target - upper_bound(nothing, result.level, "sharp"))


@pytest.mark.slow
def test_a_searched_threshold_of_first_tokens_is_the_lowest_at_which_these_lose_little() -> None:
    lax, strict = (found(4, first="auto", target=target) for target in (0.9, 0.25))
    (loose,), (tight,) = (r.attempts[-1].outcome["first"].values() for r in (lax, strict))
    assert loose < tight
    searched = [examples()[row] for i in images_of(examples()) if i.rank < SEARCH for row in i.rows]

    def alone(threshold: float) -> float:
        """What is lost where first tokens alone exit."""
        policy = ExitPolicy({4: 1.0}, first={4: threshold})
        return with_error(lost("disagreement", policy, searched, 4))

    for threshold, result in ((loose, lax), (tight, strict)):
        assert alone(threshold) <= LOST_SHARE * spare(result)
        lower = [t for t in sorted(GRID, reverse=True) if t < threshold]
        assert not lower or alone(lower[0]) > LOST_SHARE * spare(result)


def test_what_too_few_images_could_not_promise_is_not_spent_on_first_tokens() -> None:
    result = found(4, first="auto", target=0.05)
    assert spare(result) == 0 and result.attempts == ()
    assert not result.policy.first and "too few" in result.reason


def test_more_images_keep_the_threshold_of_first_tokens_that_was_searched() -> None:
    few = found(4, first="auto", examples=examples()[:24])
    adapter = replace(adapter_at(4), attempts=[a.to_json() for a in few.attempts])
    given = {"costs": costs(), **LAX, "first": "auto"}
    more = calibrate(adapter, encoder(), examples(), ExitPolicy(), **given)
    assert more.attempt == few.attempt == 1 and more.n > few.n
    assert more.attempts[-1].outcome["first"] == few.attempts[-1].outcome["first"]


@pytest.mark.parametrize("wrong", ["some", 1.5])
def test_a_threshold_of_first_tokens_is_a_share_or_searched(wrong: Any) -> None:
    with pytest.raises(InputError, match="first tokens"):
        found(4, first=wrong)


def test_first_tokens_that_never_exit_have_no_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = encoder().backbone
    monkeypatch.setattr(backbone, "family", replace(backbone.family, causal_prompt=False))
    with pytest.raises(InputError, match="read whole"):
        found(4, first="auto")


@pytest.mark.slow
def test_the_policy_says_whether_first_tokens_exited_on_this_backbone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert found(4).policy.exit_in_prefill
    backbone = encoder().backbone
    looking_ahead = replace(backbone.family, causal_prompt=False)
    monkeypatch.setattr(backbone, "family", looking_ahead)
    assert not found(4).policy.exit_in_prefill


@pytest.mark.slow
def test_a_calibration_is_rows_of_a_data_frame() -> None:
    made = found(2, 5)
    rows = made.rows()
    assert [row["risk"] for row in rows] == [point.risk for point in made.path]
    assert all({*row} >= {"threshold_5", "risk", "bound", "seconds", "chosen"} for row in rows)
    (own,) = (row for row in rows if row["chosen"])
    assert {d: own.get(f"threshold_{d}") for d in made.policy.thresholds} == made.policy.thresholds
    frame = pytest.importorskip("pandas").DataFrame(rows)
    assert len(frame) == len(made.path) and frame[frame.chosen].bound.item() <= made.target
