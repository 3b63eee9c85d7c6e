"""The model of photographs: quality, thresholds, lossless mode, corruptions, depth, methods."""

from functools import partial
from typing import Any

from offramp.report.html import times
from offramp.report.table import Table, Told, told
from offramp_lab.experiments.comparison.equal_quality import LEVELS, ahead
from offramp_lab.tables.comparison import equal_quality, speed
from offramp_lab.tables.markdown import Make, MakeTable, Value, bold, by, level, record, with_range

EXITS = "photo-exits"
"""The record of the exits that ship."""
EARLIER = "photo"
"""That of a model which shipped before; what made it is in this repository's history."""


def _first(found: Value) -> Any:
    """Of a record of exits on photographs, the regime of which most was measured."""
    return found["regimes"][found["first"]]


def stages() -> Table:
    """The photo model's, in each of its trainings."""
    rows = [
        {
            **row,
            "learnt from": "its own, by CIDEr" if "sampled" in stage["settings"] else "people's",
        }
        for stage in record("photo-card")["stages"]
        for row in stage["curve"]
    ]
    return Table.of(
        rows,
        {
            "captions learnt from": "{learnt from}",
            "step": "{step:,}",
            "CPU minutes": lambda row: _minutes(row["cpu_seconds"]),
            "CIDEr": "{CIDEr:.3f}",
            "BLEU-4": "{Bleu_4:.3f}",
            "DAQUAR accuracy": "{accuracy:.1%}",
        },
    )


def photo_model() -> Table:
    """The photo model, what it was before reinforcement, and the earlier one, on the half of the
    photographs that chose nothing."""
    ours, before = record("photo-model"), record("photo-model-before")
    earliest = record(EARLIER)["regimes"]["unsupervised"]["points"][0]

    def count(record: Value, decoding: str = "greedy") -> str:
        return f"{record['captions'][decoding]['count']:,}"

    columns = {
        f"greedy ({count(ours)})": ours["captions"]["greedy"]["figures"],
        f"beam of 3 ({count(ours, 'beam')})": ours["captions"]["beam"]["figures"],
        f"before reinforcement, greedy ({count(before)})": before["captions"]["greedy"]["figures"],
    }
    rows = []
    for name, earlier in {"CIDEr": "cider_full", "Bleu_4": "", "METEOR": "", "ROUGE_L": ""}.items():
        cells = [_ranged(figures[name], ".3f") for figures in columns.values()]
        last = f"{earliest[earlier]:.3f}" if earlier else ""
        rows.append((name.replace("_", "-"), *cells, last))
    right, was = (
        _ranged(one["questions"]["greedy"]["figures"]["accuracy"], ".1%") for one in (ours, before)
    )
    rows.append(("DAQUAR accuracy", right, "", was, f"{earliest['daquar_accuracy_full']:.1%}"))
    return Table(("metric", *columns, f"earlier model, greedy ({earliest['n_test']:,})"), rows)


def _ranged(figure: Value, form: str) -> str:
    """With its interval, where the metric has one."""
    value = format(figure["value"], form)
    return with_range(value, figure["interval"], form)


def thresholds() -> Table:
    """What was chosen on one half of the photographs, measured on the other."""

    def on(form: Told, off: str = "") -> Told:
        return lambda row: told(form, row) if row["thresholds"] else off

    return Table.of(
        _first(record(EXITS))["points"],
        {
            "chosen by": "{chosen_by}",
            "thresholds": on(
                lambda row: ", ".join(
                    f"{t:g} at {d}{_first_token(row, d)}" for d, t in row["thresholds"].items()
                ),
                "off",
            ),
            "decoding": on(_decoding, "1.00x"),
            "end to end": on("{speedup_end_to_end:.2f}x", "1.00x"),
            "CIDEr, full / early": on("{cider_full:.3f} / {cider:.3f}"),
            "CIDEr drop [95% interval]": on(_drop),
            "DAQUAR, full / early": on("{daquar_accuracy_full:.1%} / {daquar_accuracy:.1%}"),
        },
    )


def _decoding(row: Value) -> str:
    """How many times as fast decoding is, with its interval where photographs were timed singly."""
    faster, ends = bold(times(row["speedup_decode"])), row.get("speedup_decode_interval")
    return with_range(faster, ends, ".2f")


def _drop(row: Value) -> str:
    """Of CIDEr, with its interval where there is one."""
    drop, ends = f"{row['cider_drop']:+.1%}", row.get("cider_drop_interval")
    return with_range(drop, ends, "+.1%")


_IDENTICAL = "{identical_captions:,} of {captions:,}"


def _first_token(row: Value, depth: str) -> str:
    own = row.get("first", {}).get(depth)
    return "" if own is None else f" (first token {own:g})"


def three_models() -> Table:
    """What an exit at depth 8 is worth on the earlier model, on the photo model before
    reinforcement, trained briefly and for long, and on the photo model; and the one at depth 4,
    which ships."""
    models = {
        "earlier model": EARLIER,
        "before reinforcement, exit trained briefly": "photo-exits-short",
        "before reinforcement": "photo-exits-before",
        "photo model, exit at 8": "photo-exits-8",
        "photo model, exit at 4": EXITS,
    }

    def agreement(one: Value) -> str:
        (share,) = _first(one)["agreement"].values()
        return f"{share:.1%}"

    def chosen(name: str) -> Told:
        """Speed and loss at the thresholds that were chosen so."""

        def of(one: Value) -> str:
            point = by(_first(one)["points"], "chosen_by").get(name)
            if point is None or not point["thresholds"]:
                return "" if point is None else "off"
            (threshold,) = point["thresholds"].values()
            return f"{_decoding(point)} at {threshold:g}, {_drop(point)}"

        return of

    def analysed(form: str) -> Told:
        return lambda one: told(form, one["analysis"]) if one["analysis"] else ""

    lines: dict[str, Told] = {
        "CIDEr of the full model": "{full[cider]:.3f}",
        "agreement of the exit": agreement,
        "every token at the exit: decoding, CIDEr lost": chosen("every token at the exit"),
        "CIDEr drop 1%, as chosen on the other half": chosen("CIDEr drop 1%"),
        "guaranteed, risk 1%": chosen("risk 1%"),
        "guaranteed, risk 5%": chosen("risk 5%"),
        "guaranteed, ROUGE-L down by 3%": chosen("ROUGE-L drop 3%"),
        "lossless, float32": lambda one: _decoding(one["lossless"]),
        "drafts accepted": "{lossless[acceptance]:.0%}",
        "identical captions": lambda one: told(_IDENTICAL, one["lossless"]),
        "mid-crisis: the logit lens falls by": analysed(
            "{teacher_forced[lens][accuracy][dip][fall]:.1%}, "
            "{teacher_forced[lens][accuracy][dip][from_depth]} to "
            "{teacher_forced[lens][accuracy][dip][to_depth]}"
        ),
        "overthinking: tokens": analysed("{overthinking[exits][overthought][share][value]:.1%}"),
        "photographs and steps of the exits' training": "{sizes[captions]:,}, {sizes[steps]:,}",
    }
    return Table.grid(lines, {title: record(name) for title, name in models.items()}, told)


def lossless() -> Table:
    """Drafts that the full model verifies, in both precisions."""
    return Table.of(
        [record(EXITS)[name] for name in ("lossless", "lossless_bfloat16")],
        {
            "precision": "{dtype}",
            "decoding": _decoding,
            "end to end": "{speedup_end_to_end:.2f}x",
            "against `generate`": "{speedup_vs_generate:.2f}x",
            "identical captions": _IDENTICAL,
            "drafts accepted": "{acceptance:.0%}",
            "tokens/s, full": "{tokens_per_second[full]:.1f}",
            "tokens/s, lossless": "{tokens_per_second[lossless]:.1f}",
        },
    )


def corrupted() -> Table:
    """CIDEr under each corruption."""
    (found,) = record(EXITS)["damaged"].values()
    return Table.of(
        [{"corruption": name, **figures} for name, figures in found.items()],
        {
            "corruption": "{corruption}",
            "CIDEr, full": "{cider_full:.3f}",
            "early": "{cider:.3f}",
            "drop": "{cider_drop:+.1%}",
        },
    )


REGIMES = ("photo-regimes", "photo-depth-4")
"""The records of regimes that were trained briefly and alike."""


def regimes() -> Table:
    """Regimes of equal training, side by side."""

    def point(place: int, regime: Value) -> str:
        row = regime["points"][place]
        return f"{times(row['speedup_decode'])}, {_drop(row)}"

    rows = [
        {"depths": record(name)["depths"], **regime}
        for name in REGIMES
        for regime in record(name)["regimes"].values()
    ]
    return Table.of(
        rows,
        {
            "regime": "{regime}",
            "exit at": lambda regime: ", ".join(map(str, regime["depths"])),
            "training, s": "{training_seconds:,.0f}",
            "agreement": lambda regime: ", ".join(f"{a:.1%}" for a in regime["agreement"].values()),
            **{r["chosen_by"]: partial(point, n) for n, r in enumerate(rows[0]["points"])},
        },
    )


def by_depth(every: int = 4) -> Table:
    """Agreement and accuracy at every few depths, teacher-forced, of the photo model and the
    earlier one."""
    columns = {
        f"{measure}, {title}{whose}": dict(zip(found["depths"], found["values"], strict=True))
        for measure in ("agreement", "accuracy")
        for kind, title in {"lens": "logit lens", "exits": "exit"}.items()
        for name, whose in {EXITS: "", EARLIER: ", earlier model"}.items()
        for found in [record(name)["analysis"]["teacher_forced"][kind][measure]]
    }
    depths = sorted({depth for column in columns.values() for depth in column})
    return Table.grid(
        {str(depth): depth for depth in depths if depth % every == 0 or depth == depths[-1]},
        columns,
        lambda depth, column: f"{column[depth]['value']:.1%}" if depth in column else "",
        "depth",
    )


# -- methods --------------------------------------------------------------------------------------

METHODS = {
    ("free", "max_probability"): "FREE, no labels",
    ("distillation", "max_probability"): "distillation alone, no labels",
    ("cross_entropy_own", "max_probability"): "cross-entropy, the model's own captions",
    ("cross_entropy", "max_probability"): "cross-entropy, all human captions",
    ("cross_entropy_few", "max_probability"): "cross-entropy, 10% of the human captions",
    ("free", "agreement"): "FREE, agreement of three exits (BEEM)",
    ("free", "patience"): "FREE, patience of three exits (PABEE)",
    ("free", "saturation"): "FREE, saturation (MuE)",
    ("logit_lens", "saturation"): "logit lens, saturation (MuE)",
    ("logit_lens", "max_probability"): "logit lens",
}


def curves() -> list[Value]:
    return list(record("compare-photo")["equal_quality"]["curves"])


def methods() -> Table:
    """The usual methods at equal CIDEr, and by how much FREE is faster."""
    named = by(curves(), "objective", "policy")
    return Table.grid(
        {title: named[name] for name, title in METHODS.items()},
        {f"{level(at)}, FREE faster by": str(at) for at in LEVELS},
        lambda curve, at: speed(curve, at) + _ahead(curve, at),
        "exits",
    )


def _ahead(curve: Value, at: str) -> str:
    itself = curve["free_over_interval"][at] == [1, 1]
    return "" if itself else f", {ahead(curve, at)}"


def at_equal_quality() -> Table:
    """All objectives and policies at equal CIDEr."""
    return equal_quality(
        {"": curves()}, lambda curve, at: f"{speed(curve, at)}, {ahead(curve, at)}"
    )


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f}"


TABLES: dict[str, MakeTable] = {
    "photo-model": photo_model,
    "photo-curve": stages,
    "photo-exits": thresholds,
    "photo-both": three_models,
    "photo-exits-lossless": lossless,
    "photo-exits-corrupted": corrupted,
    "photo-regimes": regimes,
    "photo-exits-depths": by_depth,
    "photo-methods": methods,
    "photo-equal-quality": at_equal_quality,
}
FIGURES: dict[str, Make] = {
    "photo-card-minutes": lambda: _minutes(
        sum(stage["trained"]["cpu_seconds"] for stage in record("photo-card")["stages"])
    ),
}
