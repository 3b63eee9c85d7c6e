"""What a record of photographs is: which ways answer how many of them, and what is told of that."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from examples.photo_vlm.evaluate import accuracy

from offramp.evaluation.caption_metrics import caption_scores
from offramp.evaluation.statistics import interval, mean_of
from offramp.inputs.example import Example
from offramp_lab.experiments.experiment import times
from offramp_lab.experiments.factors import DECODER, STAGES, Measured, Name, named
from offramp_lab.records.photographs.opened import Opened
from offramp_lab.records.record import Record
from offramp_lab.records.subjects import text_of

AFTER_PICTURE = STAGES[1:]


@dataclass(frozen=True)
class Told:
    """captions, questions: what every way took and scored. examples: the photographs captioned."""

    opened: Opened
    examples: Sequence[Example]
    captions: Mapping[Name, Measured]
    questions: Mapping[Name, Measured]

    @property
    def encoder(self) -> Any:
        return self.opened.encoder


@dataclass(frozen=True)
class Spec:
    """names: of the ways, for the exits that are measured. asked: those of them that answer
    questions too. photographs, questions: how many. figures: of the record."""

    record: Record
    names: Callable[[Opened], Sequence[Name]]
    figures: Callable[[Told], dict[str, Any]]
    photographs: int
    questions: int = 0
    asked: Callable[[Name], bool] = lambda name: True

    def of(self, kind: str, opened: Opened) -> list[Name]:
        """Its ways to caption photographs or to answer questions."""
        return [n for n in self.names(opened) if kind == "captions" or self.asked(n)]

    def count(self, kind: str) -> int:
        return self.photographs if kind == "captions" else self.questions


def scored(
    told: Mapping[Name, Sequence[Any]], kind: str, encoder: Any, examples: Sequence[Example]
) -> dict[Name, Measured]:
    """told: by way, ids and seconds of each answer."""
    return {
        name: Measured.of(rows, scores(kind, encoder, [ids for ids, _ in rows], examples))
        for name, rows in told.items()
    }


def scores(
    kind: str, encoder: Any, answers: Sequence[Any], examples: Sequence[Example]
) -> dict[str, Sequence[float]]:
    """Each answer's, by metric: CIDEr of captions, right or not of questions.
    answers: their ids."""
    texts = [text_of(encoder, ids) for ids in answers]
    if kind == "questions":
        pairs = zip(texts, examples, strict=True)
        return {"right": [accuracy([text], [example]) for text, example in pairs]}
    keyed = {example.key: text for example, text in zip(examples, texts, strict=True)}
    references = {example.key: example.answers for example in examples}
    found = caption_scores(keyed, references, metrics=("CIDEr",), tokenizer="ptb")
    return dict(found.by_example)


def worth(own: Measured, full: Measured) -> dict[str, Any]:
    """CIDEr, and the interval of its difference from full depth's."""
    mine, theirs = (mean_of(one.scores["CIDEr"]) for one in (own, full))
    return {"CIDEr": mine.value, "difference_interval": interval(mine, minus=theirs)}


def speeds(
    told: Mapping[Name, Measured], bases: Callable[[Name], Mapping[str, Name]]
) -> list[dict[str, Any]]:
    """An entry for each way: tokens a CPU second of prompt and answer, seconds of an answer, and
    the speed over that of others, each with its interval over photographs.

    bases: of a way, the others by the name of the ratio; those that were not measured are left out.
    """
    rates = {name: own.rates(DECODER) for name, own in told.items()}
    entries = []
    for name, own in told.items():
        to = {over: base for over, base in bases(name).items() if base in rates}
        entries.append(
            {
                **named(name),
                "cpu_tokens_per_second": float(rates[name][0].sum() / rates[name][1].sum()),
                "end_to_end_cpu_seconds": float(own.rates(AFTER_PICTURE)[1].mean()),
                **{over: times(rates[name], rates[base]) for over, base in to.items()},
            }
        )
    return entries
