"""Bounds of the metrics, intervals, and what is missing is named; published cases are law 12."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offramp.core.errors import DataError, InputError
from offramp.evaluation import caption_metrics as captions
from offramp.evaluation.answer_quality import ANSWER_QUALITIES
from offramp.evaluation.caption_metrics import BLEU, CAPTION_METRICS, caption_scores
from offramp.evaluation.metrics import (
    Measured,
    exact_match,
    gold_rank,
    ndcg,
    normalise_answer,
    vqa_accuracy,
)
from offramp.evaluation.statistics import Measure, interval, mean_of, mean_of_some

PURE = (*BLEU, "ROUGE_L", "CIDEr")


def values(found: Measured) -> dict[str, float]:
    return {name: measure.value for name, measure in found.measures.items()}


# -- captions ------------------------------------------------------------------------------------


WORDS = ("a", "the", "dog", "cat", "bird", "sits", "runs", "on", "by", "red", "small", "tree")


def corpus(seed: int, n: int = 8) -> tuple[dict[str, str], dict[str, list[str]]]:
    draw = random.Random(seed)

    def text() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(5, 9)))

    references = {str(i): [text() for _ in range(3)] for i in range(n)}
    return {key: text() for key in references}, references


@pytest.mark.parametrize("seed", range(4))
def test_an_identical_caption_is_best(seed: int) -> None:
    answers, references = corpus(seed)
    same = {key: texts[0] for key, texts in references.items()}
    worse = values(caption_scores(answers, references, metrics=PURE, tokenizer="simple"))
    one = {key: [text] for key, text in same.items()}
    best = values(caption_scores(same, one, metrics=PURE, tokenizer="simple"))
    for metric in PURE:
        assert worse[metric] < best[metric]
        assert best[metric] == pytest.approx(10 if metric == "CIDEr" else 1)


@pytest.mark.parametrize("seed", range(4))
def test_captions_do_not_depend_on_the_order_of_examples_or_references(seed: int) -> None:
    answers, references = corpus(seed)
    before = values(caption_scores(answers, references, metrics=PURE, tokenizer="simple"))
    turned = {key: answers[key] for key in reversed(answers)}
    back = {key: texts[::-1] for key, texts in references.items()}
    after = values(caption_scores(turned, back, metrics=PURE, tokenizer="simple"))
    assert after == pytest.approx(before, abs=1e-12)
    for metric, value in before.items():
        assert 0 <= value <= (10 if metric == "CIDEr" else 1)


@pytest.mark.parametrize("seed", range(4))
def test_bleu_from_summed_counts_is_pycocoevalcaps(seed: int) -> None:
    answers, references = corpus(seed)
    answers["0"] = "dog"  # shorter than its references, so the brevity penalty counts
    for measure in caption_scores(
        answers, references, metrics=BLEU, tokenizer="simple"
    ).measures.values():
        assert measure.rows is not None
        assert float(measure.of(measure.rows.sum(0))) == pytest.approx(measure.value, abs=1e-12)


def test_unicode_captions_are_words_too() -> None:
    answers = {"a": "一只 猫 坐", "b": "un café\u2028noir"}
    references = {"a": ["一只 猫 坐"], "b": ["Un café noir."]}
    found = values(caption_scores(answers, references, metrics=("Bleu_2",), tokenizer="simple"))
    assert found["Bleu_2"] == pytest.approx(1)


def test_an_empty_answer_scores_nothing() -> None:
    found = caption_scores(
        {"a": "", "b": " "}, {"a": ["a dog"], "b": ["a cat"]}, metrics=PURE, tokenizer="simple"
    )
    assert all(value == pytest.approx(0, abs=1e-6) for value in values(found).values())


@pytest.mark.parametrize("references", [{}, {"a": []}, {"a": ["", " "]}, {"a": "a dog"}])
def test_a_caption_without_references_is_refused(references: Any) -> None:
    with pytest.raises(DataError, match="'a' has no reference"):
        caption_scores({"a": "a dog"}, references)


def test_no_caption_is_refused() -> None:
    with pytest.raises(DataError, match="no captions"):
        caption_scores({}, {})


def test_an_unknown_metric_names_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"'cider'.*\n.*'CIDEr'"):
        caption_scores({"a": "b"}, {"a": ["b"]}, metrics=["cider"])
    with pytest.raises(InputError, match="'pbt'"):
        caption_scores({"a": "b"}, {"a": ["b"]}, tokenizer="pbt")


def test_without_java_what_is_missing_is_named_and_the_rest_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(captions, "_java", lambda: None)
    answers, references = corpus(0)
    found = caption_scores(answers, references)
    assert found.tokenizer == "simple"
    assert "no Java" in found.tokenizer_note
    assert set(found.measures) == set(PURE)
    assert set(found.unavailable) == {"METEOR", "SPICE"} == set(CAPTION_METRICS) - set(PURE)
    assert all("Java" in why for why in found.unavailable.values())
    with pytest.raises(InputError, match="PTB tokenizer did not run: no Java"):
        caption_scores(answers, references, tokenizer="ptb")


def test_spice_says_which_models_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "_java", lambda: "java")
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    found = caption_scores({"a": "a dog"}, {"a": ["a dog"]}, metrics=["SPICE"], tokenizer="simple")
    assert "stanford-corenlp-3.6.0-models.jar" in found.unavailable["SPICE"]


def test_java_that_fails_makes_its_metrics_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise OSError("no space left")

    broken.cache_clear = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setattr(captions, "_java", lambda: "java")
    monkeypatch.setattr(captions, "_meteor_process", broken)
    found = caption_scores({"a": "a dog"}, {"a": ["a dog"]}, metrics=["METEOR"], tokenizer="simple")
    assert "no space left" in found.unavailable["METEOR"]


def test_the_environment_is_as_before_java_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    for before in (None, "-Xmx1G"):
        monkeypatch.delenv("JAVA_TOOL_OPTIONS", raising=False)
        if before:
            monkeypatch.setenv("JAVA_TOOL_OPTIONS", before)
        with captions._utf8_java():
            assert "UTF-8" in os.environ["JAVA_TOOL_OPTIONS"]
        assert os.environ.get("JAVA_TOOL_OPTIONS") == before


def test_references_without_a_word_are_like_nothing() -> None:
    assert ANSWER_QUALITIES["cider"](["!", "x"], [["."], ["..."]]).tolist() == [0, 0]


# -- questions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Two Dogs.", "2 dogs"),
        ("none", "0"),
        ("dont", "don't"),
        ("t-shirt", "t shirt"),
        ("1,000", "1000"),
        ("black / white", "black white"),
        ("", ""),
        ("CAFÉ", "café"),
        ("somebody'd", "somebodyd"),
        ("y'alld've", "y'all'd've"),
        ("its", "its"),
    ],
)
def test_answers_are_normalised(text: str, normal: str) -> None:
    assert normalise_answer(text) == normal


def test_where_all_ten_agree_nothing_is_normalised() -> None:
    assert vqa_accuracy("Yes", ["yes"] * 10) == 0
    assert vqa_accuracy("Yes", ["yes"] * 9 + ["no"]) == 1


def test_five_answers_count_twice_as_in_okvqa() -> None:
    answers = ["race", "race", "ride", "drive", "jump"]
    assert vqa_accuracy("race", answers) == vqa_accuracy("race", answers * 2)
    # one of five: two of ten
    assert vqa_accuracy("ride", answers) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)


@pytest.mark.parametrize("n", [0, 1, 3, 9, 11])
def test_another_number_of_answers_is_refused(n: int) -> None:
    with pytest.raises(DataError, match=f"there are {n}"):
        vqa_accuracy("yes", ["yes"] * n)


def test_exact_match_is_exact() -> None:
    assert exact_match(" yes ", ["yes"]) == 1
    assert exact_match("Yes.", ["yes"]) == 0
    assert exact_match("Yes.", ["yes"], normalise=True) == 1
    assert exact_match("no", ["yes", "no"]) == 1
    with pytest.raises(DataError):
        exact_match("yes", [])


def test_an_answer_of_articles_alone_is_compared_by_them() -> None:
    for said, right in (("", "a"), ("the", "a"), ("?", "the"), ("", "?")):
        assert exact_match(said, [right], normalise=True) == 0
    for said, right in (("A.", "a"), ("The", "the"), ("?", "?")):
        assert exact_match(said, [right], normalise=True) == 1


def test_an_all_wrong_model_has_accuracy_zero_and_an_interval_of_no_width() -> None:
    each = [vqa_accuracy("wrong", ["right"] * 9 + ["left"]) for _ in range(6)]
    assert mean_of(each).value == 0
    assert interval(mean_of(each)) == (0, 0)


# -- dialogue ------------------------------------------------------------------------------------


def test_constant_scores_earn_the_last_rank() -> None:
    assert gold_rank([1.0] * 100, 0) == 100
    assert ndcg([1.0] * 4, [1.0, 0.0, 0.0, 0.0]) == 0


@pytest.mark.parametrize("seed", range(4))
def test_ranks_follow_their_candidates(seed: int) -> None:
    draw = np.random.default_rng(seed)
    scores, gain = draw.normal(size=20), draw.integers(0, 3, 20) / 2
    order = draw.permutation(20)
    assert [gold_rank(scores[order], i) for i in range(20)] == [
        gold_rank(scores, int(i)) for i in order
    ]
    assert ndcg(scores[order], gain[order]) == pytest.approx(ndcg(scores, gain))
    assert 0 <= ndcg(scores, gain) <= 1 == pytest.approx(ndcg(gain, gain))


@pytest.mark.parametrize("bad", [[], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_scores_that_cannot_be_ranked_are_refused(bad: list[float]) -> None:
    with pytest.raises(DataError, match="cannot be ranked"):
        gold_rank(bad, 0)


def test_a_right_candidate_outside_the_list_is_refused() -> None:
    with pytest.raises(DataError, match="number 3, of 2"):
        gold_rank([1.0, 2.0], 3)
    with pytest.raises(DataError, match="2 scores and 3 relevances"):
        ndcg([1.0, 2.0], [0.0, 1.0, 0.0])
    with pytest.raises(DataError, match="0 of them"):
        ndcg([1.0, 2.0], [0.0, 0.0])


# -- intervals -----------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_interval() -> None:
    measure = mean_of(np.random.default_rng(0).random(50))
    assert interval(measure, seed=3) == interval(measure, seed=3) != interval(measure, seed=4)


def test_an_interval_of_a_mean_is_about_as_wide_as_theory_says() -> None:
    each = np.random.default_rng(0).normal(size=400)
    low, high = interval(mean_of(each), resamples=4000) or (0, 0)
    theory = 1.96 * each.std() / 20
    assert low == pytest.approx(each.mean() - theory, abs=0.02)
    assert high == pytest.approx(each.mean() + theory, abs=0.02)


def coverage(draw: Callable[[np.random.Generator], tuple[list[float], list[str] | None]]) -> float:
    """Share of 200 samples of mean 0 whose 90% interval holds it."""
    held = 0
    for seed in range(200):
        each, groups = draw(np.random.default_rng(seed))
        low, high = interval(mean_of(each), groups, confidence=0.9, resamples=300) or (1, 1)
        held += low <= 0 <= high
    return held / 200


def test_intervals_hold_the_truth_as_often_as_stated() -> None:
    assert 0.84 <= coverage(lambda rng: (list(rng.normal(size=60)), None)) <= 0.96


def test_what_belongs_together_is_drawn_together() -> None:
    def five_alike(rng: np.random.Generator) -> tuple[list[float], list[str] | None]:
        each = np.repeat(rng.normal(size=40), 5)
        return list(each), [str(i // 5) for i in range(200)]

    assert 0.82 <= coverage(five_alike) <= 0.96
    assert coverage(lambda rng: (five_alike(rng)[0], None)) < 0.75  # as if 200 were independent


def test_a_difference_uses_the_same_draws() -> None:
    each = np.random.default_rng(0).random(50)
    assert interval(mean_of(each + 0.25), minus=mean_of(each)) == pytest.approx((0.25, 0.25))


def test_there_is_no_interval_where_none_can_be() -> None:
    assert interval(mean_of([1.0])) is None
    assert interval(mean_of([1.0, 2.0]), ["same", "same"]) is None
    assert interval(Measure(0.5, None)) is None


def test_examples_without_a_value_count_in_neither_sum_nor_number() -> None:
    measure = mean_of_some([1.0, None, 0.0, None])
    assert measure.value == 0.5
    low, high = interval(measure) or (-1, -1)
    assert 0 <= low <= 0.5 <= high <= 1


def test_no_value_and_nan_are_refused() -> None:
    for bad in ([], [1.0, float("nan")]):
        with pytest.raises(DataError):
            mean_of(bad)
    with pytest.raises(InputError):
        interval(mean_of([1.0, 2.0]), confidence=1.0)
    with pytest.raises(InputError, match="3 groups"):
        interval(mean_of([1.0, 2.0]), ["a", "b", "c"])
