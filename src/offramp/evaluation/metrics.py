"""Metrics as numbers that can be resampled; answers to questions, and ranks in dialogue.

Every value is a fraction in [0, 1], except the mean rank (1 to the number of candidates, smaller
is better). A `Measure` keeps what each example adds to its metric, so that intervals come from
resampling examples and never from scoring again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from offramp.core.errors import DataError
from offramp.evaluation.statistics import Measure, finite, mean_of

RECALLS = (1, 5, 10)


@dataclass(frozen=True)
class Measured:
    """The metrics of one set of answers, and the reason for each metric that could not be computed.

    by_example: for captions: each metric's values, in the order of the answers; BLEU and METEOR of
    a corpus are not the mean of these. tokenizer: for captions: "ptb", as in published numbers, or
    "simple", with the reason in the note.
    """

    measures: dict[str, Measure]
    unavailable: dict[str, str] = field(default_factory=dict)
    by_example: dict[str, list[float]] = field(default_factory=dict)
    tokenizer: str | None = None
    tokenizer_note: str = ""


# -- questions -----------------------------------------------------------------------------------

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_WORDS = {"none": "0", **{word: str(number) for number, word in enumerate(_NUMBERS)}}
_ARTICLES = ("a", "an", "the")
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_INNER_COMMA = re.compile(r"\d,\d")
# The official pattern looks behind with a typing mistake, so only what follows a period counts.
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS = 32  # the official call passes re.UNICODE (32) where `sub` expects a count

_SPELLED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't
mightn't've must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""


def _contractions() -> dict[str, str]:
    """What is respelled: each of these words with one of its apostrophes left out."""
    spelled = {"somebody'd": "somebodyd"}  # the wrong way round, officially
    for word in _SPELLED.split():
        for place, letter in enumerate(word):
            if letter == "'":
                spelled[word[:place] + word[place + 1 :]] = word
    return spelled


_CONTRACTIONS = _contractions()


def strip_marks(text: str) -> str:
    """Do the first half of the official VQA normalisation: punctuation.

    A mark beside a space, or in a text with a number with an inner comma, is removed; other marks
    become a space.
    """
    comma = bool(_INNER_COMMA.search(text))
    out = text
    for mark in _MARKS:
        beside = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside or comma else " ")
    return _PERIOD.sub("", out, count=_PERIODS)


def normalise_answer(text: str) -> str:
    """Do the official VQA normalisation, its quirks included (Agrawal et al. 2015, vqaEval.py).

    Punctuation, lower case, number words up to ten, articles, and contractions.
    """
    words = (_WORDS.get(word, word) for word in strip_marks(text).lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _one_space(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def vqa_accuracy(answer: str, answers: Sequence[str]) -> float:
    """Return the official accuracy in [0, 1] against the answers of ten people (VQA v2, OK-VQA).

    Mean over the ten of min(matches among the other nine / 3, 1). As in the official script,
    nothing is normalised where all ten agree letter by letter. OK-VQA asked five people and counts
    each twice; five answers are treated in this way.

    Raises:
        DataError: neither ten answers nor five.
    """
    if len(answers) not in (5, 10):
        raise DataError(
            f"VQA accuracy needs the answers of ten people (OK-VQA: five); there are "
            f"{len(answers)}.",
            "For data with one right answer use exact match: `offramp eval --task gqa`, `offramp "
            "calibrate --risk exact_match_drop`.",
        )
    said = _one_space(answer)
    right = [_one_space(text) for text in answers] * (10 // len(answers))
    if len(set(right)) > 1:
        said = normalise_answer(said)
        right = [normalise_answer(text) for text in right]
    matches = sum(text == said for text in right)
    accuracies = [min(1.0, (matches - (text == said)) / 3) for text in right]
    return sum(accuracies) / len(accuracies)


def _normalised(text: str) -> str:
    return normalise_answer(text) or strip_marks(text).strip().lower() or text.strip()


def exact_match(answer: str, answers: Sequence[str], *, normalise: bool = False) -> float:
    """Return 1 where the answer is one of `answers`, else 0 (GQA's accuracy), without outer spaces.

    normalise: apply `normalise_answer` to both, as is usual for models that write freely; if that
    leaves nothing, as for a single article, the texts are compared as they are.
    """
    if not answers:
        raise DataError("A question has no answer to compare with.", "Add its answer to the data.")
    form = _normalised if normalise else str.strip
    return float(form(answer) in {form(text) for text in answers})


# -- dialogue ------------------------------------------------------------------------------------

_UNRANKED = "candidates cannot be ranked"


def gold_rank(scores: Sequence[float], gold: int) -> int:
    """Return the rank, from 1, of candidate `gold` by descending score.

    Ties count against the model: constant scores earn the last rank.
    """
    values = finite(scores, _UNRANKED)
    if not 0 <= gold < len(values):
        raise DataError(
            f"The right candidate is number {gold}, of {len(values)}.",
            f"Give a number from 0 to {len(values) - 1}.",
        )
    return int((values >= values[gold]).sum())


def ndcg(scores: Sequence[float], relevance: Sequence[float]) -> float:
    """Return the normalised discounted cumulative gain in [0, 1], at k = number of relevant
    candidates.

    VisDial's form (Das et al. 2017, challenge 2018): gain is the relevance, discount log2(rank+1).
    Ties count against the model.
    """
    values, gain = finite(scores, _UNRANKED), finite(relevance, _UNRANKED)
    k = int((gain != 0).sum())
    if len(values) != len(gain) or k == 0:
        raise DataError(
            f"NDCG has {len(values)} scores and {len(gain)} relevances, {k} of them not 0.",
            "Give a relevance for each candidate, at least one above 0.",
        )
    discount = np.log2(np.arange(k) + 2)
    order = np.lexsort((gain, -values))
    best = np.sort(gain)[::-1]
    return float((gain[order][:k] / discount).sum() / (best[:k] / discount).sum())


def rank_measures(ranks: Sequence[int]) -> dict[str, Measure]:
    """Return recall at 1, 5 and 10, mean rank and mean reciprocal rank of ranks from 1."""
    values = np.asarray(ranks, dtype=np.float64)
    recalls = {f"recall@{k}": mean_of((values <= k).astype(float)) for k in RECALLS}
    return {**recalls, "mean_rank": mean_of(values), "mrr": mean_of(1 / values)}
