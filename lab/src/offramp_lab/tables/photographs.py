"""The model of photographs: quality, training, methods."""

from offramp.calibration.risk_functions import CIDER_CAP
from offramp.report.table import Table
from offramp_lab.tables.markdown import Make, MakeTable, Value, record, with_range


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


def _trained() -> str:
    """CPU minutes of all stages of the photo model's training."""
    seconds = sum(stage["trained"]["cpu_seconds"] for stage in record("photo-card")["stages"])
    return f"{seconds / 60:.0f}"


def _promised() -> str:
    """What captions may lose of CIDEr at the thresholds that ship."""
    return f"{CIDER_CAP * record('photo-adapter')['calibration']['target']:g}"


TABLES: dict[str, MakeTable] = {"photo-model": photo_model}
FIGURES: dict[str, Make] = {"photo-card-minutes": _trained, "photo-promised-cider": _promised}
