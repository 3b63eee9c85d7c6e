"""The comparison of all checks: relative to the largest, blind to nothing."""

from __future__ import annotations

import math

import pytest
import torch

from offramp.core.models.discovery.comparison import relative_difference

LOGITS = torch.tensor([1.0, -4.0, 2.0, 0.5])


def test_it_is_the_largest_difference_over_the_largest_value() -> None:
    ours = LOGITS + torch.tensor([0.0, 0.0, -0.02, 0.01])
    assert relative_difference(ours, LOGITS) == pytest.approx(0.02 / 4)
    assert relative_difference(LOGITS, LOGITS.double()) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("never", ["inf", "lowest"])
def test_tokens_that_are_never_said_hide_no_difference(never: str, dtype: torch.dtype) -> None:
    theirs = LOGITS.clone().to(dtype)
    theirs[1] = -math.inf if never == "inf" else torch.finfo(dtype).min
    ours = theirs.clone()
    assert relative_difference(ours, theirs) == 0.0
    ours[2] = 1.0
    assert relative_difference(ours, theirs) == 0.5
    ours[1] = 0.0  # what is never said would be said
    assert relative_difference(ours, theirs) == math.inf


def test_what_is_no_number_is_as_far_as_can_be() -> None:
    broken = LOGITS.clone()
    broken[0] = math.nan
    assert relative_difference(broken, LOGITS) == relative_difference(LOGITS, broken) == math.inf
    assert relative_difference(broken, broken) == 0.0
    assert relative_difference(torch.full((2,), math.nan), torch.full((2,), math.nan)) == 0.0
