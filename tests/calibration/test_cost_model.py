"""Laws of the cost model: on made-up costs, and on those measured of a tiny decoder."""

import numpy as np
import pytest
import torch
from made_up_costs import COSTS, EXIT, LAYERS
from shapes import shape

from offramp.calibration.cost_model import Costs, layer_seconds, token_seconds
from offramp.calibration.profiler import measure_costs
from offramp.core.decoding.scores import SCORES
from offramp.core.engine.generate import generate
from offramp.core.errors import InputError
from offramp.core.models.exits import Exits
from offramp.evaluation.scripted_exits import OPTIONS, Script, generate_forced


def spread(n: int, share: float, depth: int = EXIT) -> np.ndarray:
    """`n` depths of which `share` leave, the rest evenly between."""
    stays = np.floor(np.arange(1, n + 1) * (1 - share) + 1e-9)
    return np.where(np.diff(stays, prepend=0) > 0, LAYERS, depth)


def test_without_exits_the_prediction_is_the_full_model() -> None:
    assert COSTS.full == 0.5 + 8 * 1.0 + 2.0
    assert token_seconds(COSTS, [LAYERS] * 5, []) == pytest.approx(5 * COSTS.full)


def test_an_exit_that_never_fires_costs_its_check_and_a_call_behind_it() -> None:
    assert token_seconds(COSTS, [LAYERS], [EXIT]) == pytest.approx(COSTS.full + 1.0 + 2.5 + 0.3)
    assert token_seconds(COSTS, [LAYERS], [2, 5]) == pytest.approx(COSTS.full + 2 * 3.8)


def test_a_token_that_leaves_pays_its_layers_and_checks_only() -> None:
    assert token_seconds(COSTS, [EXIT], [EXIT]) == pytest.approx(0.5 + 3 * 1.0 + 1.0 + 2.5)


def test_those_who_wait_run_deeper_in_one_go() -> None:
    """Three leave, the fourth takes them along: five layers over four positions."""
    full_depth = token_seconds(COSTS, [EXIT, EXIT, EXIT, LAYERS], [EXIT])
    shallow = 4 * (0.5 + 3 * 1.0 + 3.5)
    assert full_depth == pytest.approx(shallow + 5 * 1.2 + 0.3 + 2.0)


def test_tokens_that_wait_at_the_end_are_never_paid_for() -> None:
    waiting = token_seconds(COSTS, [LAYERS, EXIT, EXIT], [EXIT])
    assert waiting == pytest.approx(COSTS.full + 3.8 + 2 * (0.5 + 3 * 1.0 + 1.0 + 2.5))


def test_with_two_exits_a_chunk_meets_the_next_exit_whole() -> None:
    """One exits at 2, the next takes it to 5 and leaves there, the third takes both up."""
    seconds = token_seconds(COSTS, [2, 5, LAYERS], [2, 5])
    first = 0.5 + 2 + 3.5
    second = 0.5 + 2 + 3.5 + 0.3 + 3 * 1.1 + 1.0 * 1.1 + 2.5
    third = 0.5 + 2 + 3.5 + 0.3 + 3 + 3.5 + 0.3 + 3 * layer_seconds(COSTS, 3) + 2.0
    assert seconds == pytest.approx(first + second + third)


@pytest.mark.parametrize("share", [0.5, 0.75, 0.9])
def test_of_evenly_spread_exits_as_many_run_deeper_together_as_waited(share: float) -> None:
    """Every token up to the exit; the rest of the layers, and the head, over 1 / (1 - share)."""
    stays = 1 - share
    deep = 0.3 + (LAYERS - EXIT) * layer_seconds(COSTS, 1 / stays) + 2.0
    each = token_seconds(COSTS, spread(400, share), [EXIT]) / 400
    assert each == pytest.approx(0.5 + 3 * 1.0 + 3.5 + stays * deep)


def test_sequences_are_counted_each_on_its_own_and_up_to_its_end() -> None:
    one, other = [EXIT, LAYERS, EXIT], [LAYERS]
    together = token_seconds(COSTS, [one, [*other, 0, 0]], [EXIT])
    apart = [float(token_seconds(COSTS, s, [EXIT])) for s in (one, other)]
    assert together == pytest.approx(apart)


def test_layers_between_and_beyond_the_measured_lengths_are_on_the_line() -> None:
    assert layer_seconds(COSTS, [1, 3, 6, 8, 16]) == pytest.approx([1.0, 1.15, 1.35, 1.5, 2.1])


def test_costs_come_back_from_json_and_nothing_else_does() -> None:
    assert Costs.from_json(COSTS.to_json()) == COSTS
    with pytest.raises(InputError, match="token"):
        Costs.from_json({k: v for k, v in COSTS.to_json().items() if k != "token"})
    assert Costs.from_json({**COSTS.to_json(), "leave": 0.1}) == COSTS  # as older files have it


@pytest.mark.parametrize(
    "change", [{"layers": 1}, {"token": -1.0}, {"check": float("nan")}, {"layer": (1.0, 1.1)}]
)
def test_impossible_costs_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(InputError):
        Costs(**{**COSTS.to_json(), **change})


def test_depths_without_an_exit_are_refused() -> None:
    with pytest.raises(InputError):
        token_seconds(COSTS, [2, LAYERS], [EXIT])


# -- measured -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mini-llava", "mini-t5"])
@pytest.mark.parametrize("batch", [1, 2])
def test_measured_costs_describe_the_decoder(name: str, batch: int) -> None:
    backbone = shape(name).build()
    costs = measure_costs(backbone, shape(name).inputs(backbone, batch, words=6), repeats=1)
    assert (costs.layers, costs.batch) == (backbone.depth, batch)
    # A check's remainder, a small difference of large times, may drown in noise here.
    assert costs.layer[0] > 0 and costs.exit > 0 and costs.token > 0
    assert costs.score < costs.full


def test_measuring_leaves_the_model_and_the_scores_as_they_were() -> None:
    backbone, known = shape("mini-opt").build(), dict(SCORES)
    measure_costs(backbone, shape("mini-opt").inputs(backbone), repeats=1)
    assert known == SCORES
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.model.modules())


def test_measuring_refuses_a_score_that_reads_no_logits() -> None:
    backbone = shape("mini-opt").build()
    with pytest.raises(InputError, match="saturation"):
        measure_costs(backbone, shape("mini-opt").inputs(backbone), score="saturation")


@pytest.mark.parametrize("name", ["mini-llava", "mini-t5"])
def test_tokens_leave_where_the_script_says(name: str) -> None:
    backbone = shape(name).build()
    exits = Exits(backbone, (EXIT,)).requires_grad_(False)
    leave = torch.tensor([False, True, False, True, True, False])
    script = Script(leave[:, None].expand(-1, 2))
    found = generate_forced(backbone, shape(name).inputs(backbone, 2), exits, script, 8)
    plan = torch.where(leave, EXIT, backbone.depth).tolist()
    assert found.depths.tolist() == [plan + [backbone.depth] * 2] * 2


@pytest.mark.parametrize("name", ["mini-llava", "mini-t5"])
def test_each_row_leaves_by_its_own_plan_in_whatever_order_rows_run(name: str) -> None:
    """Five rows park and catch up without waiting for each other."""
    backbone = shape(name).build()
    exits = Exits(backbone, (EXIT,)).requires_grad_(False)
    leave = torch.rand(12, 5, generator=torch.Generator().manual_seed(3)) < 0.6
    leave[0] = False
    found = generate_forced(backbone, shape(name).inputs(backbone, 5), exits, Script(leave), 12)
    assert found.depths.tolist() == torch.where(leave.T, EXIT, backbone.depth).tolist()


def test_an_exit_drafts_what_the_script_says() -> None:
    """Full agreement: every draft is kept; every other token wrong: at most one draft is."""
    backbone = shape("mini-llava").build()
    inputs = shape("mini-llava").inputs(backbone)
    exits = Exits(backbone, (EXIT,)).requires_grad_(False)
    full = generate(backbone, inputs, max_new_tokens=13, **OPTIONS).new_tokens[0]
    sure = torch.ones(13, 1, dtype=torch.bool)
    wrong = torch.where(torch.arange(13) % 2 == 0, full, (full + 1) % backbone.vocabulary)
    for says, most in ((full, 3), (wrong, 1)):
        script = Script(sure, says=says)
        found = generate_forced(backbone, inputs, exits, script, 13, lossless=True, max_draft=3)
        assert found.new_tokens[0].tolist() == full.tolist()
        assert max(kept for _, kept in found.rounds) == most
        if says is full:
            assert all(made == kept for made, kept in found.rounds)
