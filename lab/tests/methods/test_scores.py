"""Laws of the baselines' scores: each equals a slow reference, reads no more than it needs, and
keeps what the decoder promises of any score."""

from __future__ import annotations

import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import pytest
import torch
from decoding import CALM, EXACT, errors_by_depth
from exit_walks import DEPTHS, KINDS, NEW, check_walks, counted

from offramp.core.decoding.confidence import check_score
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.engine.generate import generate
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits
from offramp.core.plugins import PACKAGES
from offramp.engines import engine_named
from offramp_lab import methods
from offramp_lab.methods.scores import saturation

SATURATION = 0.94
"""At which the tokens of these tiny models leave here and there."""


def test_the_plugin_brings_what_offramp_says_it_brings() -> None:
    project = Path(methods.__file__).parents[3] / "pyproject.toml"
    points = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["entry-points"]
    scores, engines = points["offramp.scores"], points["offramp.engines"]
    kinds = points["offramp.exits"]
    told = {name for name, package in PACKAGES.items() if package == "offramp-lab"}
    assert {*scores, *engines, *kinds} - {"cuda-graphs"} == told
    assert all(check_score(name) == name for name in scores)
    assert all(engine_named(name) for name in engines)


# -- each equals its slow reference -----------------------------------------------------------


def slow_saturation(seen: Any) -> float:
    before, state = (row.double() for row in seen.states[-1])
    return float((1 + (before @ state / (before.norm() * state.norm())).item()) / 2)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", KINDS)
def test_depths_and_scores_are_those_of_a_slow_walk_over_the_exits(
    name: str, rows: int, backbone: Any, exits: Any, batch: Any
) -> None:
    parts = backbone(name), exits(name, depths=DEPTHS), batch(name, rows)
    check_walks(slow_saturation, "saturation", SATURATION, *parts)


def saturated(entry: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
    return saturation(SimpleNamespace(entry=entry, previous=previous))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 60000.0])
def test_saturation_is_finite_and_in_range_at_any_scale(scale: float, dtype: torch.dtype) -> None:
    entry, previous = (
        (scale * torch.randn(16, 50)).clamp(-60000, 60000).to(dtype) for _ in range(2)
    )
    found = saturated(entry, previous)
    assert found.dtype == torch.float32 and ((found >= 0) & (found <= 1)).all()


@pytest.mark.parametrize(("factor", "score"), [(3.0, 1.0), (-0.5, 0.0)])
def test_saturation_sees_the_direction_of_a_state_and_not_its_length(
    factor: float, score: float
) -> None:
    state = torch.randn(4, 32)
    assert saturated(factor * state, state).tolist() == pytest.approx([score] * 4, abs=1e-6)


# -- what the decoder promises of any score ------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("threshold", [SATURATION, 1.0])
def test_a_score_of_features_runs_the_head_only_where_a_row_leaves(
    threshold: float, rows: int, batch: Any
) -> None:
    whole, inputs = Backbone(families.build("llava")), batch("llava", rows)
    policy = ExitPolicy(dict.fromkeys(DEPTHS, threshold), score="saturation")
    parts = Exits(whole, DEPTHS)
    made, heads = counted(
        whole, lambda: generate(whole, inputs, exits=parts, policy=policy, max_new_tokens=NEW)
    )
    # The model's own forward over the prompt runs it too, if every row has left by then.
    unread = int(whole.depth not in made.depths[:, 0])
    assert heads == sum(len(step.unique()) for step in made.depths.T) + unread
    assert (len(made.depths.unique()) > 1) == (threshold < 1)


@pytest.mark.parametrize("name", ["gemma3", "llava"])
@pytest.mark.parametrize(
    ("score", "threshold"), [("agreement", 0.02), ("patience", 0.2), ("saturation", 0.93)]
)
def test_keys_are_exact_whatever_the_score(
    score: str, threshold: float, name: str, backbone: Any, exits: Any, batch: Any
) -> None:
    whole = backbone(name, wide=CALM)
    parts = exits(name, wide=CALM, depths=tuple(range(1, whole.depth)))
    policy = ExitPolicy(dict.fromkeys(parts.depths, threshold), score=score)
    _, errors = errors_by_depth(whole, parts, batch(name, 4), policy)
    assert len(errors) >= 2 and max(errors.values()) <= EXACT, errors
