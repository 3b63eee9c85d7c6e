"""Laws of scores that follow a token from exit to exit: each equals a slow walk over the exits, and
belongs to one token of one sequence."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import families
import pytest
import torch
from exit_walks import DEPTHS, KINDS, check_walks, decoded

from offramp.core.decoding.policy import ExitPolicy
from offramp.core.decoding.reader import Query
from offramp.core.decoding.rule import ExitRule
from offramp.core.errors import InputError
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits, ExitSet
from offramp_lab.methods.streaks import Agreement, Patience, StreakHeads

WEIGHTS = {1: 0.2, 2: 0.5, 3: 0.0, 5: 0.9}
THRESHOLDS = {"llava": 0.1, "blip2-t5": 0.02}
"""Of agreement, at which the tokens of these tiny models leave here and there."""
PATIENCE = 0.3
MADE = {"patience": Patience, "agreement": Agreement}


def weighed(parts: Exits) -> ExitSet:
    return ExitSet(parts, measured={"weights": {str(d): w for d, w in WEIGHTS.items()}})


def heads(name: str, whole: Backbone, parts: ExitSet) -> StreakHeads:
    return MADE[name](whole, parts, ExitPolicy({}, score=name), parts.depths)


def walked(made: StreakHeads, queries: Any, *said: torch.Tensor) -> list[list[float]]:
    """The scores, exit by exit, of logits [n, V] that each of the exits says."""
    return [
        [*made.scores(SimpleNamespace(depth=depth, allowed=logits), queries)]  # type: ignore[arg-type]
        for depth, logits in zip(made._depths, said, strict=True)
    ]


def queries(rows: int, place: int = 0) -> list[Query]:
    return [Query(_Sampler(), ExitRule({}), [7] * place) for _ in range(rows)]


class _Sampler:
    """Stands where a sampler stands."""


# -- each equals its slow reference -----------------------------------------------------------


def agreeing(said: list[int]) -> list[int]:
    """The places of the last exit and of those just before it that say the same."""
    places = [len(said) - 1]
    while places[-1] > 0 and said[places[-1] - 1] == said[-1]:
        places.append(places[-1] - 1)
    return places


def slow_agreement(seen: Any) -> float:
    said = [row.argmax().item() for row in seen.logits]
    weights = list(WEIGHTS.values())
    gathered = [weights[i] * seen.logits[i].softmax(-1).max().item() for i in agreeing(said)]
    return float(sum(gathered) / sum(weights))


def slow_patience(seen: Any) -> float:
    return (len(agreeing([row.argmax().item() for row in seen.logits])) - 1) / (len(DEPTHS) - 1)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", KINDS)
def test_depths_and_scores_are_those_of_a_slow_walk_over_the_exits(
    name: str, rows: int, backbone: Any, exits: Any, batch: Any
) -> None:
    whole, parts, inputs = backbone(name), exits(name, depths=DEPTHS), batch(name, rows)
    check_walks(slow_agreement, "agreement", THRESHOLDS[name], whole, weighed(parts), inputs)
    check_walks(slow_patience, "patience", PATIENCE, whole, parts, inputs)


@pytest.mark.parametrize("name", MADE)
def test_a_streak_belongs_to_its_row_and_its_token(name: str, backbone: Any, exits: Any) -> None:
    whole, parts = backbone("llava"), weighed(exits("llava", depths=DEPTHS))
    one, rows = heads(name, whole, parts), [_Sampler() for _ in range(4)]
    for place in range(5):
        said = 3 * torch.randn(len(DEPTHS), 4, 3)
        asking = [Query(sampler, ExitRule({}), [7] * place) for sampler in rows]
        together = walked(one, asking, *said)
        for row in range(4):
            alone = walked(heads(name, whole, parts), queries(1, place), *said[:, row : row + 1])
            assert [scores[row] for scores in together] == [score for [score] in alone]


def test_a_token_that_is_asked_about_again_starts_over(backbone: Any, exits: Any) -> None:
    made = heads("patience", backbone("llava"), ExitSet(exits("llava", depths=DEPTHS)))
    asking, said = queries(1), [torch.tensor([[0.0, 1.0]])] * len(DEPTHS)
    assert walked(made, asking, *said) == walked(made, asking, *said)


def test_equal_exits_that_are_certain_agree_fully(backbone: Any, exits: Any) -> None:
    made = heads("agreement", backbone("llava"), weighed(exits("llava", depths=DEPTHS)))
    certain = [torch.tensor([[0.0, 200.0]])] * len(DEPTHS)
    assert walked(made, queries(1), *certain)[-1] == [1.0]


def test_without_weights_all_exits_count_alike(backbone: Any, exits: Any) -> None:
    whole, parts = backbone("llava"), exits("llava", depths=DEPTHS)
    alike = ExitSet(parts, measured={"weights": dict.fromkeys(DEPTHS, 0.3)})
    said = torch.randn(len(DEPTHS), 1, 3)
    first, second = (
        walked(heads("agreement", whole, one), queries(1), *said) for one in (ExitSet(parts), alike)
    )
    assert torch.allclose(torch.tensor(first), torch.tensor(second))


@pytest.mark.parametrize("exits_on", range(2, 6))
def test_a_patience_has_its_threshold(exits_on: int, backbone: Any) -> None:
    """After n agreeing pairs in a row the score reaches n / (E - 1), and not n + 1 of them."""
    whole, depths = backbone("llava"), tuple(range(1, exits_on + 1))
    made = Patience(whole, ExitSet(Exits(whole, depths)), ExitPolicy(score="patience"), depths)
    said = [torch.tensor([[0.0, 1.0]])] * exits_on
    for pairs, [score] in enumerate(walked(made, queries(1), *said)):
        rule = ExitRule({1: pairs / (exits_on - 1), 2: (pairs + 1) / (exits_on - 1)})
        assert rule.reaches(1, score) and not rule.reaches(2, score)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0, 60000.0])
@pytest.mark.parametrize("name", MADE)
def test_a_streak_is_finite_and_in_range_at_any_scale(
    name: str, scale: float, dtype: torch.dtype, backbone: Any, exits: Any
) -> None:
    made = heads(name, backbone("llava"), ExitSet(exits("llava", depths=DEPTHS)))
    said = (scale * torch.randn(len(DEPTHS), 16, 50)).clamp(-60000, 60000).to(dtype)
    assert all(0 <= score <= 1 for row in walked(made, queries(16), *said) for score in row)


# -- what the decoder promises of any score ------------------------------------------------------


def test_one_exit_alone_never_has_patience(backbone: Any, exits: Any, batch: Any) -> None:
    name = "blip2-t5"
    policy = ExitPolicy({3: 0.001}, score="patience")
    made = decoded(backbone(name), exits(name, depths=DEPTHS), batch(name, 1), policy)
    assert (made.depths == families.LAYERS).all() and (made.scores == 0).all()


@pytest.mark.parametrize("weights", [{2: -1.0}, {4: 1.0}, {2: 0.0, 4: 1.0}, {2: float("nan")}])
def test_weights_must_fit_the_exits_with_thresholds(
    weights: dict[int, float], backbone: Any, exits: Any, batch: Any
) -> None:
    parts = ExitSet(exits("llava", depths=(2, 4)), measured={"weights": weights})
    policy = ExitPolicy({2: 0.5}, score="agreement")
    with pytest.raises(InputError, match="do not fit") as caught:
        decoded(backbone("llava"), parts, batch("llava", 1), policy)
    assert len(str(caught.value).splitlines()) == 2
