"""Laws of the record of long answers."""

from __future__ import annotations

from offramp_lab.records.long import PARTS, agreeing
from offramp_lab.records.walk import prompts_of


def test_answers_agree_up_to_the_first_token_that_differs() -> None:
    assert agreeing([1, 2, 3, 4], [1, 2, 4, 4]) == 2
    assert agreeing([1, 2], [1, 2, 3]) == 2


def test_training_and_measuring_have_other_prompts() -> None:
    train, held = (set(prompts_of(*part)) for part in PARTS.values())
    assert not train & held
