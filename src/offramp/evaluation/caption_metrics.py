"""Captions scored through pycocoevalcap: BLEU, METEOR, ROUGE-L, CIDEr and SPICE.

Every value is a fraction in [0, 1], except CIDEr (0 to 10).
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from offramp.core.errors import DataError, InputError, check_known
from offramp.core.missing import how_to_install
from offramp.evaluation.metrics import Measured
from offramp.evaluation.statistics import Array, Measure, mean_of

BLEU = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4")
CAPTION_METRICS = (*BLEU, "METEOR", "ROUGE_L", "CIDEr", "SPICE")
TOKENIZERS = ("auto", "ptb", "simple")

Texts = dict[str, list[str]]
Scored = tuple[Measure, list[float]]


class _Unavailable(Exception):
    """A metric cannot be computed here; the text says why and what would help."""


def caption_scores(
    answers: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    *,
    metrics: Sequence[str] = CAPTION_METRICS,
    tokenizer: str = "auto",
) -> Measured:
    """Score one caption for each key against that key's references.

    metrics: of `CAPTION_METRICS`. METEOR, SPICE and the PTB tokenizer need Java; SPICE also needs
    Stanford's models. `unavailable` names what is missing. tokenizer: "ptb": pycocoevalcap's, as in
    published numbers; "simple": lower case without punctuation, in Python; "auto": "ptb" if there
    is Java.

    Raises:
        InputError: an unknown metric or tokenizer, or pycocoevalcap is not installed.
        DataError: nothing to score, or an answer without references.
    """
    check_known("Metric", metrics, CAPTION_METRICS)
    check_known("Tokenizer", [tokenizer], TOKENIZERS)
    _check_captions(answers, references)
    need_pycocoevalcap()
    texts = {key: [text, *references[key]] for key, text in answers.items()}
    words, used, note = _words(texts, tokenizer)
    candidates = {key: texts[:1] for key, texts in words.items()}
    expected = {key: texts[1:] for key, texts in words.items()}
    result = Measured({}, tokenizer=used, tokenizer_note=note)
    for name in metrics:
        if name in result.measures or name in result.unavailable:
            continue
        family = BLEU if name in BLEU else (name,)
        try:
            scored = _SCORERS["Bleu" if name in BLEU else name](expected, candidates)
        except _Unavailable as why:
            result.unavailable.update({n: str(why) for n in family if n in metrics})
            continue
        for metric, (measure, by_example) in zip(family, scored, strict=True):
            if metric in metrics:
                result.measures[metric], result.by_example[metric] = measure, by_example
    return result


def _check_captions(answers: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> None:
    if not answers:
        raise DataError("There are no captions to score.", "Evaluate at least one example.")
    for key in answers:
        texts = references.get(key, ())
        if isinstance(texts, str) or not any(text.strip() for text in texts):
            raise DataError(
                f"Example {key!r} has no reference caption.",
                "Give a list of at least one text for each example.",
            )


def need_pycocoevalcap() -> None:
    """Raise `InputError` where the package pycocoevalcap is not installed."""
    try:
        import pycocoevalcap  # noqa: F401
    except ImportError as error:
        raise InputError(
            "Caption metrics need the package 'pycocoevalcap', which is not installed.",
            how_to_install("pycocoevalcap"),
        ) from error


def _java() -> str | None:
    return shutil.which("java")


def _need_java() -> None:
    if not _java():
        raise _Unavailable("no Java was found; install a Java runtime")


def _one_line(text: str) -> str:
    """Without line breaks of any alphabet, and without METEOR's field separator."""
    return " ".join(text.replace("|||", " ").split())


def _words(texts: Texts, tokenizer: str) -> tuple[Texts, str, str]:
    """Texts as words, the tokenizer that was used, and what should be known about it."""
    if tokenizer == "simple":
        return _simple(texts), "simple", "by the simple tokenizer, as asked"
    try:
        return _ptb(texts), "ptb", ""
    except _Unavailable as why:
        if tokenizer == "ptb":
            raise InputError(
                f"The PTB tokenizer did not run: {why}.",
                "Repair that, or use the simple tokenizer (not comparable to papers).",
            ) from why
        note = f"without the PTB tokenizer ({why}), so not comparable to published numbers"
        return _simple(texts), "simple", note


def _simple(texts: Texts) -> Texts:
    return {key: [" ".join(simple_words(text)) for text in group] for key, group in texts.items()}


def simple_words(text: str) -> list[str]:
    """Return lower-case words, without the punctuation that pycocoevalcap drops."""
    need_pycocoevalcap()
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

    parts = re.findall(r"\w+(?:['\u2019-]\w+)*|[^\w\s]", _one_line(text).lower())
    return [word for word in parts if word not in PUNCTUATIONS]


def _ptb(texts: Texts) -> Texts:
    """Penn Treebank words by Stanford's tokenizer, in Java."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    _need_java()
    rows = {key: [{"caption": _one_line(text)} for text in group] for key, group in texts.items()}
    try:
        words: Texts = PTBTokenizer().tokenize(rows)
    except OSError as error:  # it writes beside its own source
        raise _Unavailable(str(error)) from error
    if {k: len(v) for k, v in words.items()} != {k: len(v) for k, v in rows.items()}:
        raise _Unavailable("it gave back another number of lines than it was given")
    return words


def _bleu(references: Texts, answers: Texts) -> list[Scored]:
    """BLEU of the corpus; an interval resamples each example's n-gram counts and lengths."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=4)
    for key, (answer,) in answers.items():
        scorer += (answer, references[key])
    values, by_order = scorer.compute_score(option="closest", verbose=0)
    rows = np.array(
        [
            [
                *c["correct"],
                *c["guess"],
                c["testlen"],
                scorer._single_reflen(c["reflen"], "closest", c["testlen"]),
            ]
            for c in scorer.ctest
        ],
        dtype=np.float64,
    )
    return [
        (Measure(float(value), rows, _bleu_of(order)), list(map(float, by_example)))
        for order, (value, by_example) in enumerate(zip(values, by_order, strict=True), 1)
    ]


def _bleu_of(order: int) -> Callable[[Array], Array]:
    """BLEU from summed counts, with pycocoevalcap's guards against 0, to which a test holds it."""

    def bleu(sums: Array) -> Array:
        precision = (sums[..., :order] + 1e-15) / (sums[..., 4 : 4 + order] + 1e-9)
        ratio = (sums[..., 8] + 1e-15) / (sums[..., 9] + 1e-9)
        brevity = np.exp(np.minimum(0.0, 1 - 1 / ratio))
        score: Array = precision.prod(-1) ** (1 / order) * brevity
        return score

    return bleu


def _rouge(references: Texts, answers: Texts) -> list[Scored]:
    from pycocoevalcap.rouge.rouge import Rouge

    _, by_example = Rouge().compute_score(references, answers)
    return [(mean_of(by_example), list(map(float, by_example)))]


def _cider(references: Texts, answers: Texts) -> list[Scored]:
    """CIDEr; what a word is worth comes from all the references, in an interval's samples too."""
    from pycocoevalcap.cider.cider import Cider

    if any(map(any, references.values())):
        _, by_example = Cider().compute_score(references, answers)
    else:  # no reference has a word, which it cannot count
        by_example = np.zeros(len(answers))
    note = "document frequencies are those of all the references, in the interval too"
    if len(answers) == 1:
        note = "0 by definition: with one example every word is in all references"
    return [(mean_of(by_example, note), list(map(float, by_example)))]


@dataclass(frozen=True)
class Frequencies:
    """Document frequencies of n-grams: the number of `documents` with each n-gram. A document is
    the references of one image."""

    documents: int
    counts: Mapping[tuple[str, ...], float]

    @classmethod
    def of(cls, references: Sequence[Sequence[str]]) -> Frequencies:
        """Count n-grams in the references of each image, by the simple tokenizer. Raise `DataError`
        below two images."""
        need_pycocoevalcap()
        from pycocoevalcap.cider.cider_scorer import CiderScorer

        if len(references) < 2:
            raise DataError(
                f"Words cannot be weighed by the references of {len(references)} images.",
                "Give those of at least two other images than the ones that are scored.",
            )
        scorer = CiderScorer()
        for texts in references:
            scorer.cook_append(None, [" ".join(simple_words(text)) for text in texts])
        scorer.compute_doc_freq()
        return cls(len(references), dict(scorer.document_frequency))

    def cider(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> Array:
        """Return CIDEr-D [n] (Vedantam et al. 2015), in [0, 10], of answers [n] against the
        references of each; an answer's score does not depend on other answers."""
        from pycocoevalcap.cider.cider_scorer import CiderScorer

        scorer = CiderScorer()
        scorer.document_frequency = defaultdict(float, self.counts)
        scores = []
        for answer, right in zip(answers, references, strict=True):
            scorer.ctest, scorer.crefs = [], []
            words = [" ".join(simple_words(text)) for text in (answer, *right)]
            scorer.cook_append(words[0], words[1:])
            scorer.crefs += [[]] * (self.documents - 1)  # it counts these as the documents
            scores += scorer.compute_cider()
        return np.array(scores)


def _meteor(references: Texts, answers: Texts) -> list[Scored]:
    _need_java()
    try:
        value, by_example = _meteor_process().compute_score(references, answers)
    except (OSError, ValueError) as error:
        _meteor_process.cache_clear()
        raise _Unavailable(f"METEOR's Java program failed: {error}") from error
    note = "no interval: its corpus score is not a function of sums over examples"
    return [(Measure(value, None, note=note), by_example)]


@functools.cache
def _meteor_process() -> Any:
    """METEOR's Java program, kept running: it takes seconds to start."""
    from pycocoevalcap.meteor.meteor import Meteor

    with _utf8_java():
        return Meteor()


def _spice(references: Texts, answers: Texts) -> list[Scored]:
    _need_java()
    import pycocoevalcap.spice

    folder = Path(pycocoevalcap.spice.__file__).parent / "lib"
    jars = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
    missing = [jar for jar in jars if not (folder / jar).is_file()]
    if missing:
        raise _Unavailable(
            f"SPICE's models are not installed ({', '.join(missing)}); while online, run "
            "`python -m pycocoevalcap.spice.get_stanford_models` once"
        )
    from pycocoevalcap.spice.spice import Spice

    try:
        with _stdout_to_stderr():
            _, scores = Spice().compute_score(references, answers)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise _Unavailable(f"SPICE's Java program failed: {error} (it wants Java 8)") from error
    by_key = dict(zip(sorted(references), (float(f["All"]["f"]) for f in scores), strict=True))
    by_example = [by_key[key] for key in answers]
    if not all(map(math.isfinite, by_example)):
        raise _Unavailable("SPICE gave no number for some examples")
    return [(mean_of(by_example), by_example)]


_SCORERS: dict[str, Callable[[Texts, Texts], list[Scored]]] = {
    "Bleu": _bleu,
    "METEOR": _meteor,
    "ROUGE_L": _rouge,
    "CIDEr": _cider,
    "SPICE": _spice,
}


@contextlib.contextmanager
def _utf8_java() -> Iterator[None]:
    """Java before 18 reads bytes as the locale says, which loses all but ASCII where that is C."""
    name = "JAVA_TOOL_OPTIONS"
    before = os.environ.get(name)
    os.environ[name] = f"{before or ''} -Dfile.encoding=UTF-8".strip()
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Send what child processes print on stdout, which carries data, to stderr."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
