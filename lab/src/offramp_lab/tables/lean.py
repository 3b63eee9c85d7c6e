"""PyTorch without the framework around a token: milliseconds, and what they were with it."""

from typing import Any

from offramp_lab.tables.markdown import Make, record, table

MODES = {
    "full": "exits off",
    "early_exit": "early exit at the shipped threshold",
    "every_token": "every token at the exit",
    "lossless": "lossless",
}
PATHS = ("stack", "lean", "compiled")
PARTS = {"speeds": "", "overhead": ", products left out"}


def speeds() -> str:
    """CPU milliseconds of a token: Hugging Face's, with the stack's own code, without it, and
    compiled."""
    rows = []
    for part, what in PARTS.items():
        found = {(r["model"], r["mode"], r["path"]): r for r in record("lean")[part]}
        for model, mode in dict.fromkeys((model, mode) for model, mode, _ in found):
            of = [found.get((model, mode, path)) for path in ("generate", *PATHS)]
            gains = [_gain(of[1], of[2]), _gain(of[1], of[3]), _gain(of[2], of[3])]
            rows.append((f"{model}, {MODES[mode]}{what}", *map(_milliseconds, of), *gains))
    titles = ("`generate`", "with the stack", "without", "compiled")
    return table(rows, ("", *titles, "without", "compiled", "compiled over without"))


def _milliseconds(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{row['cpu_milliseconds']:.2f}"


def _gain(before: dict[str, Any] | None, after: dict[str, Any] | None) -> str:
    if before is None or after is None:
        return ""
    return f"{before['cpu_milliseconds'] / after['cpu_milliseconds']:.2f}x"


def _share(mode: str, of: str, path: str = "lean") -> str:
    """Overhead on the photo model by a path, over that of the path `of`."""
    found = {(r["mode"], r["path"]): r["cpu_milliseconds"] for r in record("lean")["overhead"]}
    return f"{found[mode, path] / found[mode, of]:.2f}"


def _compiling() -> str:
    """CPU seconds that all code of the photo model's four modes takes to make."""
    rows = [r for r in record("lean")["speeds"] if r["model"] == "photo"]
    seconds = {
        path: sum(r["first_round_cpu_seconds"] for r in rows if r["path"] == path) for path in PATHS
    }
    return f"{seconds['compiled'] - seconds['lean']:.0f}"


def _rehearsal() -> str:
    """What the second token takes longer than the others, at full depth, products left out."""
    rows = [r for r in record("lean")["overhead"] if (r["path"], r["mode"]) == ("lean", "full")]
    return f"{rows[0]['second_token_cpu_milliseconds'] - rows[0]['cpu_milliseconds']:.0f}"


FIGURES: dict[str, Make] = {
    "lean-rehearsal": _rehearsal,
    "lean-overhead-full": lambda: _share("full", "generate"),
    "lean-overhead-every": lambda: _share("every_token", "stack"),
    "compiled-overhead-every": lambda: _share("every_token", "stack", "compiled"),
    "compiled-seconds": _compiling,
}
TABLES: dict[str, Make] = {"lean-speeds": speeds}
