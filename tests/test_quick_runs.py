"""Laws of a quick run: a few cases of each law, in any order, and no more tests than is said."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import quick

TESTS = Path(__file__).parent
MOST = 530
"""Tests of `make core`, which a newcomer waits for: 0.1 s of CPU each. Above, some are made one, or
laws of what only attaches to the core go to its room."""


class Noted:
    """What pytest would run."""

    names: tuple[str, ...] = ()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        self.names = tuple(item.nodeid for item in items)


def collected(*words: str) -> tuple[str, ...]:
    noted = Noted()
    pytest.main(["-q", "-n", "0", "--collect-only", "-p", "no:cacheprovider", *words], [noted])
    return noted.names


def test_the_cores_quick_run_has_few_cases_of_each_law() -> None:
    names = collected("--quick", str(TESTS / "core"))
    laws = Counter(name.partition("[")[0] for name in names)
    assert max(laws.values()) == quick.CASES
    assert 400 < len(names) <= MOST


def test_the_order_of_tests_decides_nothing() -> None:
    words = ("--quick", str(TESTS / "core" / "decoding"))
    one, other = (collected(*words, f"--randomly-seed={seed}") for seed in (1, 2))
    assert sorted(one) == sorted(other) and len(one) > 50


def test_a_long_file_runs_where_it_is_named() -> None:
    file = TESTS / "core" / "models" / "test_text_only.py"
    assert collected("--quick", str(file))
    assert not collected("--quick", str(file.parent), "-k", file.stem)


def test_what_is_named_as_long_is_there() -> None:
    assert {*quick.LONG} <= {file.stem for file in TESTS.rglob("test_*.py")}
