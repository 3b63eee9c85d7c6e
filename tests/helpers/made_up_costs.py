"""Costs of decoding that are easy to add up by hand."""

from __future__ import annotations

from offramp.calibration.cost_model import Costs

LAYERS, EXIT = 8, 3
COSTS = Costs(
    layers=LAYERS,
    batch=1,
    context=40,
    layer=(1.0, 1.1, 1.2, 1.5),
    head=(2.0, 2.1, 2.2, 2.4),
    exit=1.0,
    check=2.5,
    score=0.2,
    token=0.5,
    reenter=0.3,
)
