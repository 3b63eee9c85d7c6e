"""An EAGLE-3 drafter, from a command of the product to other engines."""

from offramp.report.table import Table
from offramp_lab.tables.markdown import Make, MakeTable, record


def ways() -> Table:
    """By way: what it drafted, what was kept, and what an answer took."""
    found = record("speculators")
    return Table.of(
        found["ways"],
        {
            "": "{way}",
            "tokens a round": "{tokens_a_round:.2f}",
            "drafts kept": "{accepted:,} of {drafted:,}",
            "same answers": f"{{same_answers}} of {found['prompts']}",
            "decoding, s an answer": "{decoding_seconds:.2f}",
        },
    )


TABLES: dict[str, MakeTable] = {"speculators": ways}
FIGURES: dict[str, Make] = {
    "speculators-prompts": lambda: str(record("speculators")["prompts"]),
}
