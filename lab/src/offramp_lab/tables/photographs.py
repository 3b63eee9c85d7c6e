"""The model of photographs: quality, thresholds, lossless mode, corruptions, methods."""

from typing import Any

from offramp.report.html import times
from offramp.report.table import Table, Told, told
from offramp_lab.tables.markdown import Make, MakeTable, Value, bold, record, with_range

EXITS = "photo-exits"
"""The record of the exits that ship."""


def _first(found: Value) -> Any:
    """Of a record of exits on photographs, the regime of which most was measured."""
    return found["regimes"][found["first"]]


def photo_model() -> Table:
    """The photo model's, on the half of the photographs that chose nothing."""
    ours = record("photo-model")

    def count(decoding: str) -> str:
        return f"{ours['captions'][decoding]['count']:,}"

    columns = {
        f"greedy ({count('greedy')})": ours["captions"]["greedy"]["figures"],
        f"beam of 3 ({count('beam')})": ours["captions"]["beam"]["figures"],
    }
    rows = [
        (name.replace("_", "-"), *(_ranged(figures[name], ".3f") for figures in columns.values()))
        for name in ("CIDEr", "Bleu_4", "METEOR", "ROUGE_L")
    ]
    right = _ranged(ours["questions"]["greedy"]["figures"]["accuracy"], ".1%")
    rows.append(("DAQUAR accuracy", right, ""))
    return Table(("metric", *columns), rows)


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


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f}"


TABLES: dict[str, MakeTable] = {
    "photo-model": photo_model,
    "photo-exits": thresholds,
    "photo-exits-lossless": lossless,
    "photo-exits-corrupted": corrupted,
}
FIGURES: dict[str, Make] = {
    "photo-card-minutes": lambda: _minutes(
        sum(stage["trained"]["cpu_seconds"] for stage in record("photo-card")["stages"])
    ),
}
