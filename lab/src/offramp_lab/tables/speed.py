"""Exits forced on real shapes, what else `transformers` offers, and dialogues."""

from collections.abc import Mapping
from statistics import mean, median
from typing import Any

from offramp_lab.tables.markdown import KINDS, Make, record, table, times, tiny

Value = Mapping[str, Any]


def _forced_entries() -> list[Value]:
    return [e for e in record("bench") if e["exit_depth"] is not None]


def forced(shape: str, batch: int, depth: int, policy: str, rate: float) -> Value | None:
    """One measured case; in a batch that of rows which exit independently."""
    entries = [
        e for e in _forced_entries()
        if (e["shape"], e["batch"], e["exit_depth"]) == (shape, batch, depth)
        and (e["policy"], e["exit_rate"]) == (policy, rate)
        and e.get("rows", "independent") == "independent"
    ]  # fmt: skip
    return entries[0] if entries else None


CASES = {
    "50% exit": ("recompute", 0.5),
    "75%": ("recompute", 0.75),
    "90%": ("recompute", 0.9),
    "90%, `propagate`": ("propagate", 0.9),
    "lossless, 80% accepted": ("lossless", 0.8),
    "none exits": ("recompute", 0.0),
}


def shapes() -> str:
    """Decoding speed on random weights, and in brackets what the cost model said before."""
    subjects = dict.fromkeys((e["shape"], e["batch"], e["exit_depth"]) for e in _forced_entries())
    rows = [
        (
            f"{shape}, {batch} rows" if batch > 1 else shape,
            str(depth),
            *(_case(forced(shape, batch, depth, *case)) for case in CASES.values()),
        )
        for shape, batch, depth in subjects
    ]
    return table(rows, ("decoder", "exit at", *CASES))


def _case(entry: Value | None) -> str:
    if entry is None:
        return ""
    text = f"{times(entry['measured'])} ({entry['predicted']:.2f})"
    if entry["policy"] != "lossless":
        return text
    # A draft counts up to the first wrong one of its round.
    planned = mean(entry["exit_rate"] ** n for n in range(1, entry["max_draft"] + 1))
    accepted = entry["accepted"] / entry["drafted"]
    return text if accepted > planned - 0.2 else f"{text}, {accepted:.0%} accepted"


def _whole_loop() -> list[float]:
    """Our loop without exits against `generate`, over all backbones that were measured."""
    return sorted(e["measured"] for e in record("bench") if e["policy"] == "full")


# -- on the tiny models ---------------------------------------------------------------------------

PEERS = {
    "full": "full depth, our loop",
    "generate": "stock `generate`",
    "assistant_early_exit": "`assistant_early_exit`",
    "prompt_lookup": "prompt lookup",
    "assisted": "assisted generation",
    "truncation": "truncated model",
    "early_exit": "early exit, no guarantee",
    "lossless": "lossless",
}


def peers() -> str:
    """Each method that transformers offers, interleaved with ours."""

    def cells(peer: Value) -> list[str]:
        if "not_applicable" in peer:
            return ["does not run", "", ""]
        speeds = [times(peer[name]) for name in ("speedup_decode", "speedup_end_to_end")]
        return [*speeds, f"{peer['identical']:.0%}"]

    rows = [
        (_peer(name), *(c for kind in KINDS for c in cells(record("peers")[kind][name])))
        for name in record("peers")["opt"]
    ]
    heads = (f"{tiny(k)}, {h}" for k in KINDS for h in ("decoding", "end to end", "identical"))
    return table(rows, ("", *heads))


def _peer(name: str) -> str:
    settings = dict.fromkeys(s for k in KINDS if (s := record("peers")[k][name].get("setting")))
    title = PEERS.get(name, name.replace("_", " "))
    return f"{title} ({' / '.join(settings)})" if settings else title


DIALOGUES = {
    "full": "full depth",
    "full, kept": "full depth, caches kept",
    "early_exit": "early exit",
    "early_exit, kept": "early exit, caches kept",
}


def dialogues() -> str:
    """Turns of dialogues, end to end, with and without caches between calls."""

    def cells(turns: Value) -> list[str]:
        same = "yes" if turns["same_answers"] else "NO"
        return [times(turns["speedup_end_to_end"]), f"{turns['prefill_share']:.0%}", same]

    rows = [
        (title, *(c for kind in KINDS for c in cells(record("dialogues")[kind][name])))
        for name, title in DIALOGUES.items()
    ]
    heads = (f"{tiny(k)}, {h}" for k in KINDS for h in ("end to end", "prefill", "same answers"))
    return table(rows, ("", *heads))


TABLES: dict[str, Make] = {"shapes": shapes, "peers": peers, "dialogues": dialogues}
FIGURES: dict[str, Make] = {
    "loop-backbones": lambda: str(len(_whole_loop())),
    "loop-slowest": lambda: f"{_whole_loop()[0]:.2f}",
    "loop-fastest": lambda: f"{_whole_loop()[-1]:.2f}",
    "loop-median": lambda: f"{median(_whole_loop()):.2f}",
}
