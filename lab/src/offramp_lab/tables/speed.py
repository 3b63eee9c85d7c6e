"""Exits forced on real shapes, what else `transformers` offers, and dialogues."""

from collections.abc import Mapping
from statistics import mean, median
from typing import Any

from offramp.report.html import times
from offramp.report.table import Table, Told, told
from offramp_lab.tables.markdown import KINDS, Make, MakeTable, Value, by, record, tiny

CASES = {
    "50% exit": ("recompute", 0.5),
    "75%": ("recompute", 0.75),
    "90%": ("recompute", 0.9),
    "90%, `propagate`": ("propagate", 0.9),
    "lossless, 80% accepted": ("lossless", 0.8),
    "none exits": ("recompute", 0.0),
}


def shapes() -> Table:
    """Decoding speed on random weights, and in brackets what the cost model said before; in a batch
    that of rows which exit independently."""
    forced = [e for e in record("bench") if e["exit_depth"] is not None]
    alone = [e for e in forced if e.get("rows", "independent") == "independent"]
    found = by(alone, "shape", "batch", "exit_depth", "policy", "exit_rate")
    columns: dict[str, Any] = {
        "decoder": lambda of: f"{of[0]}, {of[1]} rows" if of[1] > 1 else of[0],
        "exit at": lambda of: str(of[2]),
        **{t: lambda of, case=case: _case(found.get((*of, *case))) for t, case in CASES.items()},
    }
    return Table.of(by(forced, "shape", "batch", "exit_depth"), columns)


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


def _both(name: str, titles: Mapping[str, str], lines: Mapping[str, Told]) -> Table:
    """Ways of a record by their titles, and what is told of each on every tiny model."""
    measured = record(name)
    return Table.grid(
        {title: way for way, title in titles.items()},
        {f"{tiny(k)}, {what}": (measured[k], tell) for k in KINDS for what, tell in lines.items()},
        lambda way, of: told(of[1], of[0][way]),
    )


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


def peers() -> Table:
    """Each method that transformers offers, interleaved with ours."""

    def where(form: str, otherwise: str = "") -> Told:
        return lambda peer: otherwise if "not_applicable" in peer else told(form, peer)

    titles = {name: _peer(name) for name in record("peers")["opt"]}
    return _both(
        "peers",
        titles,
        {
            "decoding": where("{speedup_decode:.2f}x", "does not run"),
            "end to end": where("{speedup_end_to_end:.2f}x"),
            "identical": where("{identical:.0%}"),
        },
    )


def _peer(name: str) -> str:
    settings = dict.fromkeys(s for k in KINDS if (s := record("peers")[k][name].get("setting")))
    title = PEERS.get(name, name.replace("_", " "))
    return f"{title} ({' / '.join(settings)})" if settings else title


BENCH = "here: `make bench`"


def instead() -> Table:
    """What somebody might take instead of exits, measured here or cited, which is told apart."""

    def ours(title: str, what: str, way: str, same: str = "") -> tuple[str, ...]:
        both = [record("peers")[kind][way] for kind in KINDS]
        speeds = [times(peer["speedup_decode"]) for peer in both]
        shares = [f"{peer['identical']:.0%}" for peer in both]
        return title, what, " / ".join(speeds), same or f"{' / '.join(shares)} the same", BENCH

    tide = record("tide")
    ran = f"none: {tide['layers_per_token']:g} of {tide['layers']} layers run for every token"
    rows = [
        ours("**offramp, early exit**", "trained exits, the model frozen", "early_exit"),
        ours(
            "**offramp, lossless**", "exits draft, the model verifies", "lossless", "all the same"
        ),
        (
            f"tide-inference {tide['version']}",
            "small routers, the model frozen; asked after all layers have run",
            ran,
            "may differ",
            "here: `python -m offramp_lab.records.tide`",
        ),
        ours("static truncation", "the first layers alone, as many as exits run", "truncation"),
        ours("prompt lookup", "drafts copied from the prompt, verified", "prompt_lookup"),
        (
            "LayerSkip in transformers",
            "`assistant_early_exit`: the model's own early layers draft",
            "raises an error on both",
            "",
            BENCH,
        ),
        (
            "LayerSkip",
            "the whole model is trained, so that its early layers can draft",
            "up to 2.16x, CNN/DM summaries; 1.82x, code; 2.0x, TOPv2",
            "verified",
            "cited: [Elhoushi et al. 2024](https://arxiv.org/abs/2404.16710), abstract",
        ),
        (
            "EAGLE head",
            "one trained layer drafts on final features; the model, frozen, verifies",
            "2.7x to 3.5x, LLaMA2-Chat 70B",
            "distribution kept",
            "cited: [Li et al. 2024](https://proceedings.mlr.press/v235/li24bt.html), abstract",
        ),
        (
            "a smaller model",
            "another model, such as SmolVLM-256M for one of 2.2 billion",
            "not given there",
            "its own",
            "cited: [Marafioti et al. 2025](https://arxiv.org/abs/2504.05299), abstract",
        ),
    ]
    return Table(("", "what it is", "decoding", "answers", "from where"), rows)


DIALOGUES = {
    "full": "full depth",
    "full, kept": "full depth, caches kept",
    "early_exit": "early exit",
    "early_exit, kept": "early exit, caches kept",
}


def dialogues() -> Table:
    """Turns of dialogues, end to end, with and without caches between calls."""
    lines: dict[str, Told] = {
        "end to end": "{speedup_end_to_end:.2f}x",
        "prefill": "{prefill_share:.0%}",
        "same answers": lambda turns: "yes" if turns["same_answers"] else "NO",
    }
    return _both("dialogues", DIALOGUES, lines)


TABLES: dict[str, MakeTable] = {
    "shapes": shapes, "peers": peers, "instead": instead, "dialogues": dialogues
}  # fmt: skip
FIGURES: dict[str, Make] = {
    "loop-backbones": lambda: str(len(_whole_loop())),
    "loop-slowest": lambda: f"{_whole_loop()[0]:.2f}",
    "loop-fastest": lambda: f"{_whole_loop()[-1]:.2f}",
    "loop-median": lambda: f"{median(_whole_loop()):.2f}",
}
