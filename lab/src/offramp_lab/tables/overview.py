"""The one table of the README: a row for each model, with what was guaranteed."""

from offramp.report.html import times
from offramp.report.table import Table, told
from offramp_lab.tables.end_to_end import EARLY, LOSSLESS, PACKED, PLAIN, Q8, captioned
from offramp_lab.tables.markdown import (
    KINDS,
    Make,
    MakeTable,
    Value,
    bold,
    by,
    record,
    times_with_range,
    tiny,
)

COLUMNS = (
    "model",
    "decoding, over full depth",
    "over full depth with the same shortlist",
    "end to end",
    "guaranteed",
    "quality, full / early exit",
)
"""Exits' own part of a speedup stands beside all of it."""
SAME_TOKENS = "nothing to trust: full depth's tokens"


def overview() -> Table:
    """At most seven rows."""
    return Table(
        COLUMNS,
        [
            *map(_tiny, KINDS),
            _early("the photo model that ships, 30 layers, PyTorch, float32", PLAIN),
            _early("the same in q8_0 inside llama.cpp", Q8),
            _lossless("the photo model, lossless, packed float32", PACKED),
            _lossless("the photo model, lossless, q8_0 inside llama.cpp", Q8),
            _at_once(),
        ],
    )


def _tiny(kind: str) -> tuple[str, ...]:
    rows = record("calibrated")[kind]
    row = next(r for r in rows if (r["risk"], r["risk_target"]) == ("disagreement", 0.01))
    right = " / ".join(
        f"{row[name]['questions']:.1%}" for name in ("quality_full", "quality_early")
    )
    return (
        f"{tiny(kind)}, 12 layers",
        bold(times(row["speedup_decode"])),
        "the same: it has no shortlist",
        f"{times(row['speedup_end_to_end'])} of full depth",
        told("by image, at most {risk_target:.0%} of answers change (here {risk_test:.2%})", row),
        f"questions right: {right}",
    )


def _early(name: str, engine: str) -> tuple[str, ...]:
    row = captioned()[engine, EARLY, "onnxruntime"]
    promised = "the same thresholds, not calibrated here"
    if engine == PLAIN:
        promised = f"captions lose at most {promise():g} of CIDEr, at 95% confidence"
    return (
        name,
        bold(times_with_range(row["decoding_over_full"])),
        times_with_range(row["decoding_over_full_shortlist"]),
        _ended(row, engine),
        promised.format(promise())
        if engine == PLAIN
        else "the same thresholds, not calibrated here",
        cider(row),
    )


def _lossless(name: str, engine: str) -> tuple[str, ...]:
    row = captioned()[engine, LOSSLESS, "onnxruntime"]
    return (
        name,
        bold(times_with_range(row["decoding_over_full"])),
        "the same: it reads the whole head",
        _ended(row, engine),
        SAME_TOKENS,
        f"{row['as_full']} of {record('end_to_end')['photographs']} captions the same",
    )


def _ended(row: Value, engine: str) -> str:
    if engine == Q8:
        return f"{times_with_range(row['over_fastest'])} of llama.cpp's fastest format"
    return f"{times_with_range(row['over_full'])} of full depth"


def promise() -> float:
    """What captions may lose of CIDEr at the thresholds that ship."""
    from offramp.calibration.risk_functions import CIDER_CAP

    return float(CIDER_CAP * record("photo-adapter")["calibration"]["target"])


def cider(row: Value) -> str:
    """Full depth's and a mode's, with the interval of the difference."""
    found = row["CIDEr"]
    low, high = found["difference"]
    full = found["value"] - found["minus_full"]
    return f"CIDEr {full:.3f} / {found['value']:.3f} [{low:+.3f}, {high:+.3f}]"


def _at_once() -> tuple[str, ...]:
    """Captions in the batch engine, against full depth there."""
    found = record("end_to_end")
    row = by(found["together"], "mode")[EARLY]
    return (
        f"the photo model, {found['slots']} captions at once (batch engine, float32)",
        "not measured apart",
        "",
        f"{times_with_range(row['over_full'])} of full depth at once",
        "the same thresholds",
        cider(row),
    )


TABLES: dict[str, MakeTable] = {"overview": overview}
FIGURES: dict[str, Make] = {
    "photo-promised-cider": lambda: f"{promise():g}",
    "photo-exit-minutes": lambda: f"{record('photo-adapter')['metrics']['seconds'] / 60:.0f}",
    "student-minutes": lambda: f"{record('five_layers')['student']['seconds'] / 60:.0f}",
}
