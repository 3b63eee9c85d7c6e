"""Law 6: training leaves the backbone bit-identical; every parameter of an exit gets a gradient."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from training_runs import SHORT, VARIANTS, same, trainer, untrained

FEW = {"steps": 2}


@pytest.mark.parametrize(
    ("name", "variant"),
    [*((name, "free") for name in families.NAMES[1:]), *(("blip2-opt", v) for v in VARIANTS)],
)
def test_the_backbone_stays_as_it_was_and_everything_else_moves(
    name: str, variant: str, backbone: Any, tmp_path: Path
) -> None:
    one, config = backbone(name), replace(SHORT, **{**FEW, **VARIANTS[variant]})
    before = {n: t.clone() for n, t in one.model.state_dict().items()}
    run = trainer(one, tmp_path, config, name=name)
    judges = {n: t.clone() for n, t in run.discriminators.state_dict().items()}
    run.run()
    assert same(before, one.model.state_dict())
    assert all(p.grad is None and not p.requires_grad for p in one.model.parameters())
    start = untrained(run)
    for n, p in run.exits.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, n
        assert not torch.equal(start[n], p), n
    for n, p in run.discriminators.named_parameters() if config.has_discriminator else ():
        assert p.grad is not None, n
        assert not torch.equal(judges[n], p), n


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "regression"])
def test_what_the_discriminators_lose_is_nothing_to_the_exits(
    variant: str, opt: Any, tmp_path: Path
) -> None:
    run = trainer(opt, tmp_path, replace(SHORT, **VARIANTS[variant]))
    inputs = run.objective.loss_inputs(run.states.record()[0][0])
    run.objective.discriminator_loss(inputs)[0].backward()
    assert all(p.grad is None for p in run.exits.parameters())
    assert all(p.grad is not None for p in run.discriminators.parameters())
