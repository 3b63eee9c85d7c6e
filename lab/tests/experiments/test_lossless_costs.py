"""Laws of lossless decoding's costs, on made-up ones."""

from __future__ import annotations

import numpy as np
import pytest
from made_up_costs import COSTS, EXIT

from offramp.errors import InputError
from offramp_lab.experiments.benchmark.lossless_costs import (
    best_draft,
    predict_lossless,
    rounds_seconds,
)


def test_a_lossless_round_runs_its_drafts_shallow_and_all_of_them_deep_at_once() -> None:
    shallow = 4 * (0.5 + 3 + 1.0 + 2.5)  # the token behind the drafts is looked at too
    deep = 0.3 + 5 * 1.2 + 2.2
    assert rounds_seconds(COSTS, EXIT, [3]) == pytest.approx(shallow + deep)
    assert rounds_seconds(COSTS, EXIT, [3, 3]) == pytest.approx(2 * (shallow + deep))


def test_lossless_without_a_sure_exit_is_the_full_model_and_its_checks() -> None:
    seconds = predict_lossless(COSTS, EXIT, acceptance=0.9, sure=0.0)
    assert seconds == pytest.approx(COSTS.full + 3.8)


def test_more_acceptance_never_costs_more_and_allows_longer_drafts() -> None:
    accepted = np.linspace(0, 1, 11)
    seconds = [predict_lossless(COSTS, EXIT, acceptance=a) for a in accepted]
    assert np.all(np.diff(seconds) < 0)
    drafts = [best_draft(COSTS, EXIT, acceptance=a) for a in accepted]
    assert drafts == sorted(drafts) and drafts[0] < drafts[-1]


@pytest.mark.parametrize("wrong", [{"acceptance": 1.1}, {"acceptance": 0.5, "max_draft": 0}])
def test_wrong_questions_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError):
        predict_lossless(COSTS, EXIT, **wrong)  # type: ignore[arg-type]
