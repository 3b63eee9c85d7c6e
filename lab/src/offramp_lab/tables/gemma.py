"""Exits for a language model most of whose weights are its head."""

from typing import Any

from offramp_lab.tables.markdown import Make, record


def _agreement() -> str:
    """Of all tokens, and of those that repeat nothing."""
    found: dict[str, Any] = record("gemma")["agreement"]
    return " and ".join(f"{found[of]['agree']:.0%}" for of in ("all", "new"))


def _forecast() -> str:
    """The forecast's speeds while 95% of tokens stay, by depth."""
    told = record("gemma")["walk"][0]["said"]["depths"]
    return ", ".join(f"{one['speedup']['0.95']:.2f}" for one in told)


FIGURES: dict[str, Make] = {"gemma-agreement": _agreement, "gemma-forecast": _forecast}
