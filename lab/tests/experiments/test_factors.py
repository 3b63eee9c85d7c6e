"""Laws of multiples and their factors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from offramp_lab.experiments.factors import DECODING, STAGES, Measured, entries_of, factors, read

FULL, SHORT, EARLY = (("PyTorch", mode, "torch") for mode in ("full", "short", "early"))
CHAIN = (("", FULL), ("head", SHORT), ("layers skipped", EARLY))


def measured(seed: int, n: int = 20) -> Measured:
    draw = np.random.default_rng(seed)
    return Measured(
        draw.integers(2, 20, n).tolist(),
        draw.uniform(1, 9, (n, len(STAGES))).round(2),
        {"CIDEr": draw.uniform(0, 3, n).round(3).tolist()},
        draw.integers(0, 2, (n, 1)).tolist(),
    )


def entries(told: dict[Any, Measured]) -> list[dict[str, Any]]:
    return entries_of(told, lambda name: {"full": FULL})


@pytest.fixture
def told() -> dict[Any, Measured]:
    return {name: measured(seed) for seed, name in enumerate((FULL, SHORT, EARLY))}


@pytest.mark.parametrize("stages", [STAGES, DECODING])
def test_the_product_of_all_factors_is_the_multiple(
    told: dict[Any, Measured], stages: tuple[str, ...]
) -> None:
    found = factors(entries(told), CHAIN, stages)
    product = found["head"]["times"] * found["layers skipped"]["times"]
    assert product == pytest.approx(found["all"]["times"], rel=1e-3)
    direct = entries(told)[2]["over_full" if stages == STAGES else "decoding_over_full"]
    assert found["all"] == direct


@pytest.mark.parametrize("stages", [DECODING, ("prompt", "decoding")])
def test_no_other_stage_counts(told: dict[Any, Measured], stages: tuple[str, ...]) -> None:
    before = factors(entries(told), CHAIN, stages)
    for own in told.values():
        own.milliseconds[:, : -len(stages)] *= 7
    assert factors(entries(told), CHAIN, stages) == before


def test_drafts_that_share_the_prompts_call_count_as_decoding(told: dict[Any, Measured]) -> None:
    """An answer that is there with its prompt took what that took beyond full depth's prompt."""
    name, prompt = ("PyTorch", "lossless", "torch"), STAGES.index("prompt")
    took = told[FULL].milliseconds.copy()
    took[:, prompt] += took[:, -1] / 4
    took[:, -1] = 0
    told[name] = replace(told[FULL], milliseconds=took)
    entry = entries(told)[-1]
    assert entry["decoding_over_full"]["times"] == pytest.approx(4, rel=1e-3)
    chain = (("", FULL), ("layers skipped", name))
    assert factors(entries(told), chain, DECODING)["all"]["times"] == pytest.approx(4, rel=2e-3)


def test_an_entry_keeps_what_every_answer_took_and_scored(told: dict[Any, Measured]) -> None:
    for entry, own in zip(entries(told), told.values(), strict=True):
        kept = read(entry)
        assert kept.tokens == own.tokens and (kept.milliseconds == own.milliseconds).all()
        assert kept.scores["CIDEr"] == pytest.approx(own.scores["CIDEr"])
        assert entry["whole_milliseconds"] == pytest.approx(own.milliseconds.sum(1).mean(), 0.01)
        low, high = entry["CIDEr"]["difference"]
        assert low <= entry["CIDEr"]["minus_full"] <= high
    assert entries(told)[0]["CIDEr"]["difference"] == [0, 0]
