"""Law 12: metrics equal published reference cases, to their digits."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offramp.evaluation.caption_metrics import BLEU, Frequencies, caption_scores
from offramp.evaluation.metrics import (
    Measured,
    gold_rank,
    ndcg,
    normalise_answer,
    rank_measures,
    strip_marks,
    vqa_accuracy,
)
from offramp.evaluation.statistics import mean_of

REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "reference"
PURE = (*BLEU, "ROUGE_L", "CIDEr")
java = pytest.mark.skipif(shutil.which("java") is None, reason="needs a Java runtime")


def golden(name: str) -> Any:
    path = REFERENCE / f"{name}_goldens.json"
    if not path.is_file():
        pytest.skip(f"{path.name} is not beside this checkout")
    return json.loads(path.read_text(encoding="utf-8"))


def values(found: Measured) -> dict[str, float]:
    return {name: measure.value for name, measure in found.measures.items()}


@pytest.mark.parametrize(
    "name", ["clipscore_readme_good", "clipscore_readme_bad", "nlg_eval_readme", "nlg_eval_single"]
)
def test_captions_equal_the_published_cases_without_java(name: str) -> None:
    case = golden("caption")[name]
    found = caption_scores(case["cands"], case["refs"], metrics=PURE, tokenizer="simple")
    for metric, value in values(found).items():
        assert value == pytest.approx(case["pycocoevalcap_1.2"][metric], abs=1e-12)
        published = case["published"][metric]
        assert value == pytest.approx(published, abs=1e-4)
        assert found.by_example[metric] == pytest.approx(case["per_item"][metric], abs=1e-12)


@pytest.mark.parametrize("name", ["clipscore_readme_good", "nlg_eval_readme"])
def test_cider_by_the_corpus_s_own_frequencies_is_the_corpus_s(name: str) -> None:
    case = golden("caption")[name]
    references = [case["refs"][key] for key in case["cands"]]
    scores = Frequencies.of(references).cider([*case["cands"].values()], references)
    assert scores == pytest.approx(case["per_item"]["CIDEr"], abs=1e-12)


@pytest.mark.slow
@java
def test_captions_equal_the_published_cases_with_java() -> None:
    for name, case in golden("caption").items():
        found = caption_scores(case["cands"], case["refs"], tokenizer="ptb")
        assert found.tokenizer == "ptb"
        assert "METEOR" in found.measures
        for metric, value in values(found).items():
            if metric != "SPICE":  # pycocoevalcap's own number is not among the cases
                assert value == pytest.approx(case["pycocoevalcap_1.2"][metric], abs=1e-12), name
            assert value == pytest.approx(case["published"][metric], abs=1e-4), name
        assert ("SPICE" in found.measures) != ("SPICE" in found.unavailable)
    unicode = caption_scores(
        {"a": "un caf\u00e9", "b": ""},
        {"a": ["un caf\u00fc"], "b": ["\u732b \u732b"]},
        metrics=["METEOR"],
    )
    assert unicode.by_example["METEOR"][1] == 0.0
    assert unicode.by_example["METEOR"][0] < 1.0  # letters outside ASCII are not all one


GUIDE = [
    "It is a guide to action that ensures that the military will forever heed Party commands.",
    "It is the guiding principle which guarantees the military forces always being under the "
    "command of the Party.",
    "It is the practical guide for the army always to heed the directions of the party.",
]
"""References of the first example of Papineni et al., "BLEU" (ACL 2002), section 2.1."""


@pytest.mark.parametrize(
    ("text", "references", "unigrams", "bigrams", "brevity"),
    [
        (
            "It is a guide to action which ensures that the military always obeys the commands of "
            "the party.",
            GUIDE,
            17 / 18,
            10 / 17,
            1.0,
        ),
        (
            "It is to insure the troops forever hearing the activity guidebook that party direct.",
            GUIDE,
            8 / 14,
            1 / 13,
            math.exp(1 - 16 / 14),
        ),
        (
            "the the the the the the the",
            ["The cat is on the mat.", "There is a cat on the mat."],
            2 / 7,
            0.0,
            1.0,
        ),
    ],
)
def test_bleu_equals_the_examples_of_its_paper(
    text: str, references: list[str], unigrams: float, bigrams: float, brevity: float
) -> None:
    found = caption_scores({"a": text}, {"a": references}, metrics=BLEU[:2], tokenizer="simple")
    assert values(found)["Bleu_1"] == pytest.approx(brevity * unigrams, abs=1e-9)
    both = brevity * math.sqrt(unigrams * bigrams)
    assert values(found)["Bleu_2"] == pytest.approx(both, abs=1e-6)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("police kill the gunman", 3 / 4),
        ("the gunman kill police", 2 / 4),
        ("the gunman police killed", 2 / 4),
    ],
)
def test_rouge_equals_the_examples_of_its_paper(text: str, value: float) -> None:
    """Lin, "ROUGE" (2004), section 3.1: sentences of one length, so that beta does not matter."""
    reference = {"a": ["police killed the gunman"]}
    found = caption_scores({"a": text}, reference, metrics=("ROUGE_L",), tokenizer="simple")
    assert values(found)["ROUGE_L"] == pytest.approx(value)


def test_bleu_of_a_case_counted_by_hand() -> None:
    # 5 of 6 words and 3 of 5 pairs of "the cat sat on a mat" are in the reference, of equal length
    found = caption_scores(
        {"a": "the cat sat on a mat"},
        {"a": ["The cat sat on the mat."]},
        metrics=("Bleu_1", "Bleu_2"),
        tokenizer="simple",
    )
    assert values(found)["Bleu_1"] == pytest.approx(5 / 6, abs=1e-9)
    assert values(found)["Bleu_2"] == pytest.approx(math.sqrt(5 / 6 * 3 / 5), abs=1e-9)


def test_rouge_of_a_case_counted_by_hand() -> None:
    # longest common subsequence 2: precision 2/2, recall 2/4, beta 1.2
    found = caption_scores(
        {"a": "a dog"}, {"a": ["a big brown dog"]}, metrics=("ROUGE_L",), tokenizer="simple"
    )
    assert values(found)["ROUGE_L"] == pytest.approx((1 + 1.44) * 0.5 / (0.5 + 1.44))


def test_vqa_accuracy_equals_the_official_cases() -> None:
    cases = golden("vqa")
    each = []
    kinds: dict[str, dict[str, list[float]]] = {"question_type": {}, "answer_type": {}}
    for case in cases["cases"]:
        found = vqa_accuracy(case["prediction"], case["answers"])
        assert 100 * found == pytest.approx(case["official_accuracy_percent"], abs=1e-4)
        assert normalise_answer(case["prediction"]) == case["processed_prediction_if_normalised"]
        each.append(found)
        for kind, by_name in kinds.items():
            by_name.setdefault(case[kind], []).append(found)
    assert round(100 * mean_of(each).value, 4) == cases["overall"]["overall"]
    for kind, official in (("question_type", "perQuestionType"), ("answer_type", "perAnswerType")):
        found_by = {n: round(100 * mean_of(v).value, 4) for n, v in kinds[kind].items()}
        assert found_by == cases["overall"][official]


def test_the_normaliser_equals_the_official_cases() -> None:
    for case in golden("vqa")["normaliser"]:
        assert strip_marks(case["in"]) == case["punct"]
        assert normalise_answer(case["in"]) == case["out"]


@pytest.mark.parametrize("matches", range(11))
def test_vqa_accuracy_leaves_one_out(matches: int) -> None:
    answers = ["red"] * matches + [f"other {i}" for i in range(10 - matches)]
    # those who said it see one match fewer than the others do
    by_hand = (matches * min(1, (matches - 1) / 3) + (10 - matches) * min(1, matches / 3)) / 10
    assert vqa_accuracy("red", answers) == pytest.approx(by_hand)


def test_ranks_equal_the_official_cases() -> None:
    names = {
        "r@1": "recall@1",
        "r@5": "recall@5",
        "r@10": "recall@10",
        "mean": "mean_rank",
        "mrr": "mrr",
    }
    for case in golden("visdial")["sparse"]:
        pairs = zip(case["scores"], case["gt_index"], strict=True)
        ranks = [gold_rank(s, g) for d, gs in pairs for s, g in zip(d, gs, strict=True)]
        found = rank_measures(ranks)
        for name, ours in names.items():
            # official numbers are single precision
            assert found[ours].value == pytest.approx(case["official"][name], rel=1e-6)


def test_ndcg_equals_the_official_cases() -> None:
    for case in golden("visdial")["ndcg"]:
        found = [ndcg(s, r) for s, r in zip(case["scores"], case["relevance"], strict=True)]
        assert np.mean(found) == pytest.approx(case["official"]["ndcg"], rel=1e-6)


def test_ranks_of_a_case_counted_by_hand() -> None:
    assert [gold_rank([0.1, 3.0, -2.0], gold) for gold in range(3)] == [2, 1, 3]
    found = rank_measures([1, 4])
    assert found["recall@1"].value == 0.5
    assert found["recall@5"].value == 1
    assert found["mean_rank"].value == 2.5
    assert found["mrr"].value == (1 + 1 / 4) / 2


def test_ndcg_of_a_case_counted_by_hand() -> None:
    # k = 2; ranked: irrelevant, then the half-relevant one
    found = ndcg([3.0, 2.0, 1.0], [0.0, 0.5, 1.0])
    assert found == pytest.approx((0.5 / math.log2(3)) / (1 + 0.5 / math.log2(3)))
    assert ndcg([1.0, 2.0, 3.0], [0.0, 0.5, 1.0]) == 1
