"""Objectives and policies at equal quality on the tiny models."""

from collections.abc import Callable, Iterable
from functools import partial
from statistics import mean

from offramp.report.html import times
from offramp.report.table import Table, told
from offramp_lab.experiments.comparison.equal_quality import ahead, t_interval
from offramp_lab.tables.markdown import (
    KINDS,
    Make,
    MakeTable,
    Value,
    by,
    level,
    record,
    tiny,
    with_range,
)


def equal_quality(curves: dict[str, Iterable[Value]], cell: Callable[[Value, str], str]) -> Table:
    """A row for each objective and policy, the first model's fastest at 1% first. curves: by what
    the model's columns are headed."""
    all_of = [by(some, "objective", "policy") for some in curves.values()]
    first = all_of[0]
    levels = list(next(iter(first.values()))["speedup_decode"])
    names = sorted(first, key=lambda name: -first[name]["speedup_decode"]["0.01"])
    return Table(
        ("objective", "policy", *(f"{head}{level(at)}" for head in curves for at in levels)),
        [
            [*(f"`{part}`" for part in n), *(cell(c[n], at) for c in all_of for at in levels)]
            for n in names
        ],
    )


def _of_tiny(cell: Callable[[Value, str], str]) -> Table:
    compared = {f"{tiny(k)}, ": record("compare")[k]["equal_quality"]["curves"] for k in KINDS}
    return equal_quality(compared, cell)


def speed(curve: Value, at: str) -> str:
    return times(curve["speedup_decode"][at])


def keys_and_values() -> Table:
    """What fills the cache above the exit."""
    return Table.grid(
        {f"`{policy}`": policy for policy in ("recompute", "propagate")},
        {tiny(kind): record("compare")[kind]["kv"] for kind in KINDS},
        lambda policy, kv: told("{speedup_decode:.2f}x, {identical_answers:.1%}", kv[policy]),
        "policy",
    )


def seeds() -> Table:
    """FREE against distillation alone, in more seeds and on more answers."""
    rows = [
        (tiny(kind), str(len(next(iter(of.values())))), *map(_over_seeds, of.values()))
        for kind in KINDS
        for of in [_by_seed(kind)]
    ]
    return Table(("", "seeds", *map(level, _by_seed(KINDS[0]))), rows)


def _by_seed(kind: str) -> dict[str, list[float]]:
    """By drop of quality and seed, how many times as fast as distillation alone FREE is."""
    found: dict[str, list[float]] = record("compare")[kind]["distillation"]["free_over_by_seed"]
    return found


def _over_seeds(by_seed: list[float]) -> str:
    ends = [end for end in t_interval(by_seed) if end is not None]
    return with_range(f"{mean(by_seed):.3f}", ends, ".3f")


TABLES: dict[str, MakeTable] = {
    "equal-quality": partial(_of_tiny, speed),
    "free-ahead": partial(_of_tiny, partial(ahead, spread="free_over_by_seed")),
    "keys-and-values": keys_and_values,
    "adversary-seeds": seeds,
}
FIGURES: dict[str, Make] = {
    "adversary-opt-seeds": lambda: _over_seeds(_by_seed("opt")["0.005"]),
}
