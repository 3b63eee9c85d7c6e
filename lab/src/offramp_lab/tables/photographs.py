"""The model of photographs: quality, thresholds, lossless mode, corruptions, depth, methods."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from offramp_lab.experiments.comparison.equal_quality import LEVELS, ahead
from offramp_lab.tables.comparison import by_name, equal_quality_rows, speed
from offramp_lab.tables.markdown import Make, bold, level, record, table, times, with_range

Value = Mapping[str, Any]


def _photo() -> Any:
    return record("photo")


def full_model() -> str:
    """What the model itself reaches."""
    full = _photo()["full"]
    titles = {"cider": "CIDEr", "bleu_4": "BLEU-4", "meteor": "METEOR", "rouge_l": "ROUGE-L"}
    rows = [(title, f"{full[name]:.3f}") for name, title in titles.items()]
    rows.append(("DAQUAR accuracy", f"{full['daquar_accuracy']:.1%}"))
    return table(rows, ("metric", "full model"))


def bridge() -> str:
    """The bridge's quality on the way."""
    rows = [
        (
            f"{row['step']:,}",
            f"{row['CIDEr']:.3f}",
            f"{row['Bleu_4']:.3f}",
            f"{row['accuracy']:.1%}",
        )
        for row in record("bridge")["curve"]
    ]
    return table(rows, ("step", "CIDEr", "BLEU-4", "DAQUAR accuracy"))


def photo_model() -> str:
    """The photo model and the earlier one, on the half of the photographs that chose nothing."""
    ours, before = record("photo-model"), _photo()["regimes"]["unsupervised"]["points"][0]
    columns = {
        f"{title} ({ours['captions'][decoding]['count']:,})": ours["captions"][decoding]["figures"]
        for decoding, title in {"greedy": "greedy", "beam": "beam of 3"}.items()
        if decoding in ours["captions"]
    }
    rows = []
    for name, earlier in {"CIDEr": "cider_full", "Bleu_4": "", "METEOR": "", "ROUGE_L": ""}.items():
        cells = [_ranged(figures[name], ".3f") for figures in columns.values()]
        rows.append((name.replace("_", "-"), *cells, f"{before[earlier]:.3f}" if earlier else ""))
    asked = ours["questions"]["greedy"]["figures"]["accuracy"]
    right = _ranged(asked, ".1%")
    rest = [""] * (len(columns) - 1)
    rows.append(("DAQUAR accuracy", right, *rest, f"{before['daquar_accuracy_full']:.1%}"))
    return table(rows, ("metric", *columns, f"earlier model, greedy ({before['n_test']:,})"))


def _ranged(figure: Value, form: str) -> str:
    """With its interval, where the metric has one."""
    value = format(figure["value"], form)
    return with_range(value, figure["interval"], form) if figure["interval"] else value


def photo_curve() -> str:
    """The photo model on the way, on photographs of the choosing half."""
    rows = [
        (
            f"{row['step']:,}",
            f"{row['cpu_seconds'] / 60:.0f}",
            f"{row['CIDEr']:.3f}",
            f"{row['Bleu_4']:.3f}",
            f"{row['accuracy']:.1%}",
        )
        for row in record("photo-card")["curve"]
    ]
    return table(rows, ("step", "CPU minutes", "CIDEr", "BLEU-4", "DAQUAR accuracy"))


THRESHOLD_COLUMNS = (
    "chosen by", "thresholds", "decoding", "end to end", "CIDEr, full / early",
    "CIDEr drop [95% interval]", "DAQUAR, full / early",
)  # fmt: skip


def thresholds(regime: str) -> str:
    """What was chosen on one half of the photographs, measured on the other."""
    return table(map(_chosen, _photo()["regimes"][regime]["points"]), THRESHOLD_COLUMNS)


def _chosen(row: Value) -> list[str]:
    if not row["thresholds"]:
        return [row["chosen_by"], "off", "1.00x", "1.00x", "", "", ""]
    drop = with_range(f"{row['cider_drop']:+.1%}", row["cider_drop_interval"], "+.1%")
    return [
        row["chosen_by"],
        ", ".join(f"{t:g} at {d}" for d, t in row["thresholds"].items()),
        bold(times(row["speedup_decode"])),
        times(row["speedup_end_to_end"]),
        f"{row['cider_full']:.3f} / {row['cider']:.3f}",
        drop,
        f"{row['daquar_accuracy_full']:.1%} / {row['daquar_accuracy']:.1%}",
    ]


def lossless() -> str:
    """Drafts that the full model verifies, in both precisions."""
    rows = []
    for row in (_photo()["lossless"], _photo()["lossless_bfloat16"]):
        rows.append(
            (
                row["dtype"],
                bold(times(row["speedup_decode"])),
                times(row["speedup_end_to_end"]),
                times(row["speedup_vs_generate"]),
                f"{row['identical_captions']:,} of {row['captions']:,}",
                f"{row['acceptance']:.0%}",
                *(f"{row['tokens_per_second'][name]:.1f}" for name in ("full", "lossless")),
            )
        )
    return table(
        rows,
        (
            "precision", "decoding", "end to end", "against `generate`", "identical captions",
            "drafts accepted", "tokens/s, full", "tokens/s, lossless",
        ),
    )  # fmt: skip


def corrupted() -> str:
    """CIDEr under each corruption, of each regime's exits."""
    by_regime = _photo()["damaged"]
    heads = [f"{regime}, {what}" for regime in by_regime for what in ("early", "drop")]
    rows = []
    for name, first in next(iter(by_regime.values())).items():
        cells = [
            text
            for f in by_regime.values()
            for text in (f"{f[name]['cider']:.3f}", f"{f[name]['cider_drop']:+.1%}")
        ]
        rows.append((name, f"{first['cider_full']:.3f}", *cells))
    return table(rows, ("corruption", "CIDEr, full", *heads))


def regimes() -> str:
    """Regimes of equal training, side by side."""
    matched = list(_photo()["matched"].values())
    rows = []
    for regime in matched:
        cells = (
            f"{times(row['speedup_decode'])}, {row['cider_drop']:+.1%}"
            if row["thresholds"]
            else "off"
            for row in regime["points"]
        )
        agreement = ", ".join(f"{a:.1%}" for a in regime["agreement"].values())
        rows.append((regime["regime"], agreement, *cells))
    return table(rows, ("regime", "agreement", *(row["chosen_by"] for row in matched[0]["points"])))


def by_depth() -> str:
    """Agreement and accuracy at every depth, teacher-forced."""
    forced = _photo()["analysis"]["teacher_forced"]
    columns = {
        f"{measure}, {title}": dict(
            zip(forced[kind][measure]["depths"], forced[kind][measure]["values"], strict=True)
        )
        for measure in ("agreement", "accuracy")
        for kind, title in {"lens": "logit lens", "exits": "exits"}.items()
    }
    depths = sorted({depth for column in columns.values() for depth in column})
    rows = [
        (str(depth), *(f"{c[depth]['value']:.1%}" if depth in c else "" for c in columns.values()))
        for depth in depths
    ]
    return table(rows, ("depth", *columns))


# -- methods --------------------------------------------------------------------------------------

METHODS = {
    ("free", "max_probability"): "FREE, no labels",
    ("distillation", "max_probability"): "distillation alone, no labels",
    ("cross_entropy_own", "max_probability"): "cross-entropy, the model's own captions",
    ("cross_entropy", "max_probability"): "cross-entropy, all human captions",
    ("cross_entropy_few", "max_probability"): "cross-entropy, 10% of the human captions",
    ("free", "patience"): "FREE, patience (PABEE)",
    ("free", "saturation"): "FREE, saturation (MuE)",
    ("logit_lens", "saturation"): "logit lens, saturation (MuE)",
    ("logit_lens", "max_probability"): "logit lens",
}


def _curves() -> dict[tuple[str, str], Value]:
    return by_name(record("compare-photo")["equal_quality"]["curves"])


def methods() -> str:
    """The usual methods at equal CIDEr, and by how much FREE is faster."""
    rows = []
    for name, title in METHODS.items():
        curve = _curves()[name]
        rows.append((title, *(speed(curve, at) + _ahead(curve, at) for at in map(str, LEVELS))))
    return table(rows, ("exits", *(f"{level(at)}, FREE faster by" for at in LEVELS)))


def _ahead(curve: Value, at: str) -> str:
    itself = curve["free_over_interval"][at] == [1, 1]
    return "" if itself else f", {ahead(curve, at)}"


def equal_quality() -> str:
    """All objectives and policies at equal CIDEr."""
    rows = equal_quality_rows(
        [_curves()], lambda curve, at: f"{speed(curve, at)}, {ahead(curve, at)}"
    )
    return table(rows, ("objective", "policy", *map(level, LEVELS)))


TABLES: dict[str, Make] = {
    "photo-full": full_model,
    "photo-model": photo_model,
    "photo-curve": photo_curve,
    "photo-bridge": bridge,
    "photo-unsupervised": partial(thresholds, "unsupervised"),
    "photo-pseudo-labels": partial(thresholds, "pseudo-labels"),
    "photo-lossless": lossless,
    "photo-corrupted": corrupted,
    "photo-regimes": regimes,
    "photo-depths": by_depth,
    "photo-methods": methods,
    "photo-equal-quality": equal_quality,
}
FIGURES: dict[str, Make] = {
    "photo-card-minutes": lambda: f"{record('photo-card')['trained']['cpu_seconds'] / 60:.0f}",
    "bridge-minutes": lambda: f"{record('bridge')['seconds'] / 60:.0f}",
    **{
        f"photo-minutes-{name}": partial(
            lambda name: f"{_photo()['regimes'][name]['training_seconds'] / 60:.0f}", name
        )
        for name in ("unsupervised", "pseudo-labels")
    },
}
