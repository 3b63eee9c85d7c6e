"""Exits beside quantised backbones, scheme by scheme."""

from typing import Any

from offramp_lab.tables.markdown import Make, record, table

COLUMNS = (
    "scheme", "exits' tensors trained", "saved and loaded", "full", "early exit", "lossless",
    "the float model's exits load", "writes the float model's tokens",
)  # fmt: skip

ROUNDING = 2e-3
"""The largest difference of logits, relative to the largest, that is float32's."""


def _mode(row: dict[str, Any], mode: str) -> str:
    """exact, where logits and answers are; else how far they are."""
    off, answers = row["logits"][mode], row["answers"]
    if not isinstance(off, float):
        return str(off)
    logits = "exact" if off <= ROUNDING else f"to {off:.0e}"
    if mode == "early_exit" or answers[mode] == answers["of"]:
        return logits
    return f"{logits}, {answers[mode]} of {answers['of']} answers"


def _schemes(model: str) -> str:
    rows = []
    for name, row in record("quantised-models")[model].items():
        if "refused" in row:
            rows.append((name, f"not here: {row['refused'].rstrip('.')}", *[""] * 6))
            continue
        tensors = row["tensors"]
        rows.append(
            (
                name,
                f"{tensors - row['unmoved']} of {tensors}",
                "yes" if row["kept"] == tensors else f"{row['kept']} of {tensors} tensors",
                *(_mode(row, mode) for mode in ("full", "early_exit", "lossless")),
                "with a warning" if row["beside"] else "no",
                f"{row['agreement']:.1%}",
            )
        )
    return table(rows, COLUMNS)


def versions() -> str:
    return ", ".join(f"{name} {v}" for name, v in record("quantised-models")["versions"].items())


TABLES: dict[str, Make] = {
    "quantised-tiny": lambda: _schemes("tiny"),
    "quantised-photo": lambda: _schemes("photo"),
}
FIGURES: dict[str, Make] = {"quantised-versions": versions}
