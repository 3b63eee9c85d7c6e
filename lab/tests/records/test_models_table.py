"""The record of model types."""

from __future__ import annotations

from offramp_lab.tables.markdown import record
from offramp_lab.tables.models import COLUMNS, verdict


def test_sixty_types_are_exact_in_every_column() -> None:
    run = [found for found in record("models")["types"].values() if "1" in found]
    for column in COLUMNS:
        assert sum(verdict(f, column) == "exact" for f in run) >= 60, column
