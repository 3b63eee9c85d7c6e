"""What else `transformers` offers, and what somebody might take instead of exits."""

from collections.abc import Mapping

from offramp.report.html import times
from offramp.report.table import Table, Told, told
from offramp_lab.tables.markdown import KINDS, MakeTable, record, tiny


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


BENCH = "here: `python -m offramp_lab.records.peers`"


def instead() -> Table:
    """What somebody might take instead of exits, measured here or cited, which is told apart."""

    def ours(title: str, what: str, way: str, same: str = "") -> tuple[str, ...]:
        both = [record("peers")[kind][way] for kind in KINDS]
        speeds = [times(peer["speedup_decode"]) for peer in both]
        shares = [f"{peer['identical']:.0%}" for peer in both]
        return title, what, " / ".join(speeds), same or f"{' / '.join(shares)} the same", BENCH

    rows = [
        ours("**offramp, early exit**", "trained exits, the model frozen", "early_exit"),
        ours(
            "**offramp, lossless**", "exits draft, the model verifies", "lossless", "all the same"
        ),
        (
            "tide-inference 0.2.1",
            "small routers, the model frozen; asked after all layers have run",
            "none: 16 of 16 layers run for every token",
            "may differ",
            "counted once, with a router that fires for every token",
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


TABLES: dict[str, MakeTable] = {"peers": peers, "instead": instead}
