"""Multiples in their factors, all from one record that keeps what every answer took and scored.

A multiple is of two ways to write the same answers. Between them stand ways that differ from the
one before in a single thing: head, layers skipped, kernels, number format, tower, prompt or batch.
What each is faster than the one before is that thing's factor, and their product is the multiple;
in another order the factors would be others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from offramp.evaluation.statistics import Array, interval, mean_of
from offramp.evaluation.timing import decoding
from offramp_lab.experiments.experiment import Rates, same, times

STAGES = ("picture", "tower", "entry", "prompt", "decoding")
DECODING = ("decoding",)
DECODER = ("prompt", *DECODING)
"""Where drafts share the prompt's call, decoding alone tells nothing."""
Entry = Mapping[str, Any]
Name = tuple[str, str, str]
NAMED = ("engine", "mode", "tower")
LOSSLESS = "lossless"


def named(name: Name) -> dict[str, str]:
    """What an entry of a record says of whose it is."""
    return dict(zip(NAMED, name, strict=True))


@dataclass(frozen=True)
class Measured:
    """tokens: of each of n answers. milliseconds: of each, by stage [n, 5]. scores: of each, by
    metric. answers: ids."""

    tokens: Sequence[int]
    milliseconds: Array
    scores: Mapping[str, Sequence[float] | Array]
    answers: Sequence[Sequence[int]]

    @classmethod
    def of(cls, rows: Sequence[Any], scores: Mapping[str, Sequence[float] | Array]) -> Measured:
        """rows: ids and seconds by stage of each answer."""
        milliseconds = 1e3 * np.array([seconds for _, seconds in rows])
        answers = [ids for ids, _ in rows]
        return cls([*map(len, answers)], milliseconds, scores, answers)

    def rates(self, stages: Sequence[str] = STAGES) -> Rates:
        """Answers and their seconds in these stages. Of `DECODER` tokens are counted instead, of
        `DECODING` those after the first."""
        columns = [STAGES.index(stage) for stage in stages]
        seconds = self.milliseconds[:, columns].sum(1) / 1e3
        tokens = np.array(self.tokens, float)
        counts = {DECODING: np.maximum(tokens - 1, 0), DECODER: tokens}
        return np.stack([counts.get(tuple(stages), np.ones(len(tokens))), seconds])

    def drafted(self, full: Measured) -> Measured:
        """The same of an answer by drafts, with decoding counted as `decoding` says: what the
        prompt's call takes beyond full depth's is decoding."""
        prompt, rest = (STAGES.index(stage) for stage in ("prompt", "decoding"))
        took = self.milliseconds.copy()
        both = took[:, prompt] + took[:, rest]
        took[:, rest] = decoding((both, took[:, rest]), (full.milliseconds[:, prompt], 0.0))
        took[:, prompt] = both - took[:, rest]
        return replace(self, milliseconds=took)


def entries_of(
    told: Mapping[Name, Measured],
    bases: Callable[[Any], Mapping[str, Name]],
    names: Collection[Name] | None = None,
) -> list[dict[str, Any]]:
    """An entry of a record for each way, or of some: its milliseconds by stage; how many times as
    fast it is as others (`bases`), all in all and in decoding; scores, and their differences from
    full depth's; and `each`: what every answer took and scored, to make all that again."""
    entries = []
    for name in told if names is None else names:
        own, to = told[name], {key: other for key, other in bases(name).items() if other in told}
        full = told[to["full"]]
        decoded = own.drafted(full) if name[1] == LOSSLESS else own
        means = own.milliseconds.mean(0).tolist()
        entries.append(
            {
                **named(name),
                "milliseconds": {s: round(m, 2) for s, m in zip(STAGES, means, strict=True)},
                "whole_milliseconds": round(sum(means), 2),
                **{f"over_{key}": _times(own, told[other]) for key, other in to.items()},
                **{
                    f"decoding_over_{key}": _times(decoded, told[other], DECODING)
                    for key, other in to.items()
                },
                "as_full": same(own.answers, full.answers),
                **{metric: _score(metric, own, full) for metric in own.scores},
                "each": {
                    "tokens": _packed(own.tokens, 0),
                    "milliseconds": [_packed(row, 2) for row in own.milliseconds.T],
                    **{metric: _packed(values, 3) for metric, values in own.scores.items()},
                },
            }
        )
    return entries


def read(entry: Entry) -> Measured:
    """What an entry keeps of each answer; ids are not kept."""
    each = {key: value for key, value in entry["each"].items()}
    tokens = [int(n) for n in each.pop("tokens").split()]
    stages = np.array([_unpacked(row) for row in each.pop("milliseconds")]).T
    scores: dict[str, Sequence[float] | Array] = {m: _unpacked(v) for m, v in each.items()}
    return Measured(tokens, stages, scores, [])


def factors(
    entries: Sequence[Entry], chain: Sequence[tuple[str, Name]], stages: Sequence[str] = STAGES
) -> dict[str, dict[str, float]]:
    """By thing, how many times as fast each way is as the one before it (times, low, high), and
    under "all" the last as the first.

    chain: ways by engine, mode and tower, each with what sets it apart from the one before; the
    first is what all are compared with. stages: that count.
    """
    by_name: dict[Any, Entry] = {tuple(entry[key] for key in NAMED): entry for entry in entries}
    told = [(thing, read(by_name[name])) for thing, name in chain]
    full = told[0][1]
    told = [
        (thing, own.drafted(full) if name[1] == LOSSLESS else own)
        for (thing, own), (_, name) in zip(told, chain, strict=True)
    ]
    steps = zip(told[1:], told, strict=False)
    found = {thing: _times(own, before, stages) for (thing, own), (_, before) in steps}
    return {**found, "all": _times(told[-1][1], told[0][1], stages)}


def _times(own: Measured, base: Measured, stages: Sequence[str] = STAGES) -> dict[str, float]:
    found = times(own.rates(stages), base.rates(stages))
    return {key: round(value, 4) for key, value in found.items()}


def _score(metric: str, own: Measured, full: Measured) -> dict[str, Any]:
    """The mean, and its difference from full depth's, each with its interval."""
    mine, theirs = mean_of(own.scores[metric]), mean_of(full.scores[metric])
    found: dict[str, Any] = {
        "value": mine.value,
        "interval": interval(mine),
        "minus_full": mine.value - theirs.value,
        "difference": interval(mine, minus=theirs),
    }
    return {key: np.round(value, 5).tolist() for key, value in found.items()}


def _packed(values: Sequence[float] | Array, digits: int) -> str:
    """Numbers in one line of text: a record holds thousands."""
    return " ".join(f"{value:.{digits}f}" for value in values)


def _unpacked(text: str) -> Array:
    return np.array(text.split(), float)
