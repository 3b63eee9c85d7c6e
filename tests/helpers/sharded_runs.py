"""What two processes that split a model do, and one that holds it whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import families
from training_runs import SHARED, SHORT

from offramp.core.decoding.policy import ExitPolicy
from offramp.core.engine.generate import generate
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits

DEPTHS = (2, 4)
POLICIES = (ExitPolicy({2: 0.15, 4: 0.12}), ExitPolicy({2: 0.2}, lossless=True))
"""Early exit at several depths, and lossless decoding."""
TRAINED = replace(SHARED, evaluate_every=1)
UNLABELLED = replace(SHORT, steps=2, regime="unsupervised", shortlist=9, adversarial=0.0)
"""Learns from answers of different lengths, which the model writes."""


def decoded(backbone: Backbone, exits: Exits, policy: ExitPolicy) -> dict[str, Any]:
    """Tokens and depths of one answer."""
    inputs = families.KINDS["llava"].inputs(1)
    made = generate(backbone, inputs, exits=exits, policy=policy, max_new_tokens=8, do_sample=False)
    return {"tokens": made.sequences, "depths": made.depths}
