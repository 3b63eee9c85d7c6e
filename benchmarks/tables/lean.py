"""PyTorch without the framework around a token: milliseconds, and what they were with it."""

from typing import Any

from benchmarks.tables.markdown import Make, record, table

MODES = {
    "full": "exits off",
    "early_exit": "early exit at the shipped threshold",
    "every_token": "every token at the exit",
    "lossless": "lossless",
}
PARTS = {"speeds": "", "overhead": ", products left out"}


def speeds() -> str:
    """CPU milliseconds of a token: Hugging Face's, with the stack's own code, and without it."""
    rows = []
    for part, what in PARTS.items():
        found = {(r["model"], r["mode"], r["path"]): r for r in record("lean")[part]}
        for model, mode in dict.fromkeys((model, mode) for model, mode, _ in found):
            theirs, stack, lean = (
                _milliseconds(found.get((model, mode, path)))
                for path in ("generate", "stack", "lean")
            )
            before, after = (found[model, mode, p]["cpu_milliseconds"] for p in ("stack", "lean"))
            name = f"{model}, {MODES[mode]}{what}"
            rows.append((name, theirs, stack, lean, f"{before / after:.2f}x"))
    return table(rows, ("", "`generate`", "with the stack", "without", "gain"))


def _milliseconds(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{row['cpu_milliseconds']:.2f}"


def _share(mode: str, of: str) -> str:
    """Overhead on the photo model without the stack's own code, over that of the path `of`."""
    found = {(r["mode"], r["path"]): r["cpu_milliseconds"] for r in record("lean")["overhead"]}
    return f"{found[mode, 'lean'] / found[mode, of]:.2f}"


def _rehearsal() -> str:
    """What the second token takes longer than the others, at full depth, products left out."""
    rows = [r for r in record("lean")["overhead"] if (r["path"], r["mode"]) == ("lean", "full")]
    return f"{rows[0]['second_token_cpu_milliseconds'] - rows[0]['cpu_milliseconds']:.0f}"


FIGURES: dict[str, Make] = {
    "lean-rehearsal": _rehearsal,
    "lean-overhead-full": lambda: _share("full", "generate"),
    "lean-overhead-every": lambda: _share("every_token", "stack"),
}
TABLES: dict[str, Make] = {"lean-speeds": speeds}
