"""Laws of the replay: without decoding again it tells what decoding would do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import fakes
import numpy as np
import pytest

from offramp.adapter.answers import full_model_answers
from offramp.calibration.replay import PolicyReplay, Replay, replay
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.engine.generate import generate
from offramp.features.input_processor import InputProcessor

NAMES = ("blip2-opt", "blip2-t5", "llava")
TOKENS = 8
Build = Callable[..., Any]


def replayed(backbone: Any, name: str, exits: Any, batch_size: int = 4) -> Any:
    encoder = InputProcessor(backbone, fakes.Blip2FakeProcessor(name))
    examples = fakes.examples(6)
    rows = full_model_answers(encoder, examples, batch_size=1, max_new_tokens=TOKENS)
    return encoder, examples, rows, replay(encoder, exits, rows, batch_size=batch_size)


def middling(found: Replay) -> list[dict[int, float]]:
    """Threshold vectors that let some tokens exit at each depth and not others."""
    vectors = [{d: float(np.nanmedian(s)) for d, s in found.scores.items()}]
    for depth, scores in found.scores.items():
        vectors += [{depth: float(np.nanquantile(scores, q))} for q in (0.3, 0.9)]
    return vectors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("blip2-opt", True),
        ("blip2-opt", False),
        ("llava", True),
        ("llava", False),
        ("blip2-t5", True),
    ],
)
def test_it_tells_which_answers_change_and_where_their_tokens_leave(
    backbone: Build, exits: Build, name: str, first: bool
) -> None:
    model, trained = backbone(name, wide=4.0), exits(name, wide=4.0)
    encoder, examples, rows, found = replayed(model, name, trained)
    changed = 0
    for thresholds in middling(found):
        depths = found.depths(thresholds, first=None if first else {})
        differs = found.differs(depths)
        changed += differs.sum()
        for i, (example, row) in enumerate(zip(examples, rows, strict=True)):
            result = generate(
                model,
                encoder.prompts([example]),
                exits=trained,
                policy=ExitPolicy(thresholds, first=None if first else {}),
                max_new_tokens=TOKENS,
                do_sample=False,
            )
            assert differs[i] == (tuple(result.new_tokens[0].tolist()) != row.ids)
            if not differs[i]:
                assert depths[i, : len(row.ids)].tolist() == result.depths[0].tolist()
    assert 0 < changed < len(rows) * len(middling(found))  # both kinds were met


@pytest.mark.parametrize("name", NAMES)
def test_the_final_layer_says_what_it_wrote(backbone: Build, exits: Build, name: str) -> None:
    *_, found = replayed(backbone(name, wide=4.0), name, exits(name, wide=4.0))
    assert (found.final[found.mask] == found.targets[found.mask]).all()
    assert not found.differs(found.depths({})).any()


@pytest.mark.parametrize("name", NAMES)
def test_batches_change_nothing(backbone: Build, exits: Build, name: str) -> None:
    model, trained = backbone(name, wide=4.0), exits(name, wide=4.0)
    *_, alone = replayed(model, name, trained, batch_size=1)
    *_, together = replayed(model, name, trained, batch_size=10)
    for depth in trained.depths:
        assert (alone.said[depth] == together.said[depth]).all()
        np.testing.assert_allclose(alone.scores[depth], together.scores[depth], atol=1e-5)


def test_a_token_leaves_at_the_first_exit_that_is_sure_enough() -> None:
    targets = np.array([[5, 6, -1]])
    scores = {2: np.array([[0.9, 0.1, np.nan]]), 4: np.array([[0.9, 0.8, np.nan]])}
    said = {2: np.array([[7, 6, -1]]), 4: np.array([[5, 6, -1]])}
    found = Replay(12, targets, targets, said, scores)
    assert found.depths({2: 0.5, 4: 0.5}).tolist() == [[2, 4, 0]]
    assert found.depths({2: 0.5, 4: 0.5}, first={}).tolist() == [[12, 4, 0]]
    assert found.depths({}).tolist() == [[12, 12, 0]]
    policy = ExitPolicy({2: 0.5, 4: 0.5})
    assert PolicyReplay(found, policy, first=True).depths().tolist() == [[2, 4, 0]]
    assert PolicyReplay(found, policy, first=False).depths().tolist() == [[12, 4, 0]]
    assert found.differs(found.depths({2: 0.5})).tolist() == [True]
    assert found.differs(found.depths({4: 0.5})).tolist() == [False]
    assert found.written(found.depths({2: 0.5}))[0, :2].tolist() == [7, 6]


def test_rows_come_back_in_the_order_they_were_given(backbone: Build, exits: Build) -> None:
    model, trained = backbone("blip2-opt", wide=4.0), exits("blip2-opt", wide=4.0)
    encoder, _, rows, found = replayed(model, "blip2-opt", trained)
    mixed = [replace(row) for row in rows[::-1]]
    again = replay(encoder, trained, mixed, batch_size=3)
    assert (again.targets == found.targets[::-1]).all()
