"""Objectives and policies at equal quality on the tiny models."""

from statistics import mean

from offramp.report.table import Table, told
from offramp_lab.experiments.comparison.equal_quality import t_interval
from offramp_lab.tables.markdown import KINDS, MakeTable, level, record, tiny, with_range


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


TABLES: dict[str, MakeTable] = {"keys-and-values": keys_and_values, "adversary-seeds": seeds}
