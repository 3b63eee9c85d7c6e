"""Lean and compiled decoding: milliseconds a token, and what they gain."""

from offramp.report.table import Table
from offramp_lab.tables.markdown import Make, MakeTable, Value, by, record

MODES = {
    "full": "exits off",
    "early_exit": "early exit at the shipped threshold",
    "every_token": "every token at the exit",
    "lossless": "lossless",
}
PATHS = {
    "generate": "`generate`, ms", "stack": "own forward", "lean": "lean", "compiled": "compiled"
}  # fmt: skip
GAINS = (("stack", "lean"), ("stack", "compiled"), ("lean", "compiled"))
PARTS = {"speeds": "", "overhead": ", products left out"}


def speeds() -> Table:
    """CPU milliseconds of a token: Hugging Face's, by the model's own forward, lean, compiled."""
    rows = []
    for part, what in PARTS.items():
        found = by(record("lean")[part], "model", "mode", "path")
        for model, mode in dict.fromkeys((model, mode) for model, mode, _ in found):
            took = {
                path: found[model, mode, path]["cpu_milliseconds"]
                for path in PATHS
                if (model, mode, path) in found
            }
            spent = [f"{took[path]:.2f}" if path in took else "" for path in PATHS]
            gains = [
                f"{took[a] / took[b]:.2f}x" if a in took and b in took else "" for a, b in GAINS
            ]
            rows.append((f"{model}, {MODES[mode]}{what}", *spent, *gains))
    return Table(("", *PATHS.values(), "lean gains", "compiled gains", "compiled over lean"), rows)


def _overhead(mode: str, path: str) -> Value:
    """Of the photo model, the one of which it is measured."""
    return by(record("lean")["overhead"], "mode", "path")[mode, path]


def _share(mode: str, of: str, path: str = "lean") -> str:
    """Overhead on the photo model by a path, over that of the path `of`."""
    ours, theirs = (_overhead(mode, name)["cpu_milliseconds"] for name in (path, of))
    return f"{ours / theirs:.2f}"


def _compiling() -> str:
    """CPU seconds that all code of the photo model's four modes takes to make."""
    seconds = dict.fromkeys(PATHS, 0.0)
    for row in record("lean")["speeds"]:
        if row["model"] == "photo":
            seconds[row["path"]] += row["first_round_cpu_seconds"]
    return f"{seconds['compiled'] - seconds['lean']:.0f}"


def _rehearsal() -> str:
    """What the second token takes longer than the others, at full depth, products left out."""
    row = _overhead("full", "lean")
    return f"{row['second_token_cpu_milliseconds'] - row['cpu_milliseconds']:.0f}"


FIGURES: dict[str, Make] = {
    "lean-rehearsal": _rehearsal,
    "lean-overhead-full": lambda: _share("full", "generate"),
    "lean-overhead-every": lambda: _share("every_token", "stack"),
    "compiled-overhead-every": lambda: _share("every_token", "stack", "compiled"),
    "compiled-seconds": _compiling,
}
TABLES: dict[str, MakeTable] = {"lean-speeds": speeds}
