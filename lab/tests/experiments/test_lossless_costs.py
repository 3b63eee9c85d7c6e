"""Laws of lossless decoding's costs, on made-up ones."""

from __future__ import annotations

import numpy as np
import pytest
from made_up_costs import COSTS, EXIT

from offramp_lab.experiments.benchmark.bench import best_draft, lossless_seconds, rounds_seconds


def test_a_lossless_round_runs_its_drafts_shallow_and_all_of_them_deep_at_once() -> None:
    shallow = 4 * (0.5 + 3 + 1.0 + 2.5)  # the token behind the drafts is looked at too
    deep = 0.3 + 5 * 1.2 + 2.2
    assert rounds_seconds(COSTS, EXIT, [3]) == pytest.approx(shallow + deep)
    assert rounds_seconds(COSTS, EXIT, [3, 3]) == pytest.approx(2 * (shallow + deep))


def test_a_round_without_drafts_is_the_full_model_and_its_check() -> None:
    assert lossless_seconds(COSTS, EXIT, 0.9, drafts=0) == pytest.approx(COSTS.full + 3.8)


def test_more_acceptance_never_costs_more_and_allows_longer_drafts() -> None:
    accepted = np.linspace(0, 1, 11)
    seconds = [lossless_seconds(COSTS, EXIT, a, drafts=8) for a in accepted]
    assert np.all(np.diff(seconds) < 0)
    drafts = [best_draft(COSTS, EXIT, a) for a in accepted]
    assert drafts == sorted(drafts) and drafts[0] < drafts[-1]
