"""An EAGLE-3 drafter, from a command of the product to other engines."""

from offramp.report.table import Table
from offramp_lab.tables.markdown import Make, MakeTable, Value, by, record

_TOKENS = "{tokens_a_round:.2f}"


def ways() -> Table:
    """By way: what it drafted, what was kept, and what an answer took."""
    found = record("speculators")
    return Table.of(
        found["ways"],
        {
            "": "{way}",
            "tokens a round": _TOKENS,
            "drafts kept": "{accepted:,} of {drafted:,}",
            "same answers": f"{{same_answers}} of {found['prompts']}",
            "decoding, s an answer": "{decoding_seconds:.2f}",
        },
    )


def _trained(model: str = "model") -> Value:
    """The command that trained a model's drafter."""
    steps: list[Value] = record("speculators")["walk"]
    return next(step for step in steps if f" {model} " in step["command"])


def _acceptance(model: str = "model") -> str:
    return ", ".join(f"{share:.2f}" for share in _trained(model)["said"]["acceptance"][:4])


TABLES: dict[str, MakeTable] = {"speculators": ways}
FIGURES: dict[str, Make] = {
    "speculators-tokens": lambda: _TOKENS.format_map(
        by(record("speculators")["ways"], "way")["EAGLE-3 drafter"]
    ),
    "speculators-prompts": lambda: str(record("speculators")["prompts"]),
    "speculators-acceptance": _acceptance,
    "speculators-validation": lambda: _TOKENS.format_map(_trained()["said"]),
}
