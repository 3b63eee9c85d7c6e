"""Laws of the record of a model whose texts repeat themselves."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from offramp_lab.records.gemma import PARTS, RUN, repeated
from offramp_lab.records.walk import prompts_of

IDS = st.lists(st.integers(0, 2), max_size=20)


@given(IDS, IDS)
def test_a_repeated_token_ends_a_run_that_stands_before(
    prompt: list[int], answer: list[int]
) -> None:
    found = repeated(prompt, answer)
    text = [*prompt, *answer]
    for place, again in enumerate(found.tolist(), start=len(prompt)):
        run = text[max(0, place - RUN + 1) : place + 1]
        before = (text[at : at + RUN] for at in range(place - RUN + 1))
        assert again == (len(run) == RUN and run in before)


def test_a_loop_is_counted_from_its_second_turn() -> None:
    assert repeated([9], [1, 2, 3, 4, 1, 2, 3, 4]).tolist() == 7 * [False] + [True]


def test_training_choosing_and_measuring_have_other_prompts() -> None:
    parts = [set(prompts_of(*part)) for part in PARTS.values()]
    assert [len(part) for part in parts] == [count for _, count in PARTS.values()]
    assert len(set.union(*parts)) == sum(map(len, parts))
