"""Objectives and policies at equal quality, and what the adversary does, on the tiny models."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from statistics import mean
from typing import Any

from offramp.evaluation.statistics import t_interval
from offramp_lab.experiments.comparison.equal_quality import ahead
from offramp_lab.tables.markdown import (
    KINDS,
    Make,
    bold,
    level,
    record,
    table,
    times,
    tiny,
    with_range,
)

Value = Mapping[str, Any]
Cell = Callable[[Value, str], str]


def equal_quality_rows(curves: list[dict[tuple[str, str], Value]], cell: Cell) -> list[list[str]]:
    """A row for each objective and policy, the first model's fastest at 1% first.

    curves: for each model, its curves by objective and policy.
    """
    levels = list(next(iter(curves[0].values()))["speedup_decode"])
    names = sorted(curves[0], key=lambda name: -curves[0][name]["speedup_decode"]["0.01"])
    return [
        [*(f"`{part}`" for part in name), *(cell(c[name], at) for c in curves for at in levels)]
        for name in names
    ]


def by_name(curves: list[Value]) -> dict[tuple[str, str], Value]:
    return {(c["objective"], c["policy"]): c for c in curves}


def _equal_quality(cell: Cell) -> str:
    curves = [record("compare")[kind]["equal_quality"]["curves"] for kind in KINDS]
    heads = [f"{tiny(k)}, {level(at)}" for k in KINDS for at in curves[0][0]["speedup_decode"]]
    rows = equal_quality_rows([by_name(curves_of_kind) for curves_of_kind in curves], cell)
    return table(rows, ("objective", "policy", *heads))


def speed(curve: Value, at: str) -> str:
    return times(curve["speedup_decode"][at])


def keys_and_values() -> str:
    """What fills the cache above the exit."""
    rows = []
    for policy in ("recompute", "propagate"):
        figures = [record("compare")[kind]["kv"][policy] for kind in KINDS]
        cells = (f"{times(f['speedup_decode'])}, {f['identical_answers']:.1%}" for f in figures)
        rows.append((f"`{policy}`", *cells))
    return table(rows, ("policy", *map(tiny, KINDS)))


def seeds() -> str:
    """FREE against distillation alone, in more seeds and on more answers."""
    rows = []
    for kind in KINDS:
        ratios = record("compare")[kind]["distillation"]["free_over_by_seed"]
        cells = (
            with_range(
                f"{mean(by_seed):.3f}",
                [end for end in t_interval(by_seed) if end is not None],
                ".3f",
            )
            for by_seed in ratios.values()
        )
        rows.append((tiny(kind), str(len(next(iter(ratios.values())))), *cells))
    return table(rows, ("", "seeds", *map(level, ratios)))


# -- the adversary --------------------------------------------------------------------------------

MEASURES = {
    "identical_in": "identical",
    "identical_out": "identical, corrupted",
    "may_leave_in": "may exit",
    "may_leave_out": "may exit, corrupted",
}


def adversary(kind: str) -> str:
    """FREE and its variants against distillation alone."""
    rows = [
        (cell["setting"], cell["game"], *(_difference(cell, name) for name in MEASURES))
        for cell in record("ablation")["cells"]
        if cell["backbone"] == kind
    ]
    return table(rows, ("setting", "adversary", *MEASURES.values()))


def _difference(cell: Value, name: str) -> str:
    figure = cell[name]
    if cell["game"] == "distillation":
        return f"{figure['mean']:.1%}"
    low, high = (100 * figure[end] for end in ("low", "high"))
    text = with_range(f"{100 * figure['difference']:+.2f}", (low, high), "+.2f")
    return bold(text) if low > 0 or high < 0 else text


def _variants() -> Iterator[Value]:
    """All differences from distillation alone, of both models."""
    for cell in record("ablation")["cells"]:
        if cell["game"] != "distillation":
            yield from (cell[name] for name in MEASURES)


def _count(keep: Callable[[Value], bool]) -> str:
    return str(sum(map(keep, _variants())))


TABLES: dict[str, Make] = {
    "equal-quality": partial(_equal_quality, speed),
    "free-ahead": partial(_equal_quality, partial(ahead, spread="free_over_by_seed")),
    "keys-and-values": keys_and_values,
    "adversary-seeds": seeds,
    "adversary-opt": partial(adversary, "opt"),
    "adversary-t5": partial(adversary, "t5"),
}
FIGURES: dict[str, Make] = {
    "adversary-figures": partial(_count, lambda figure: True),
    "adversary-worse": partial(_count, lambda figure: figure["high"] < 0),
    "adversary-chance": lambda: f"{0.025 * int(_count(lambda figure: True)):.1f}",
    "adversary-better": partial(_count, lambda figure: figure["low"] > 0),
}
