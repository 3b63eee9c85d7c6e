"""Ways to generate, for `offramp.measure.race`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteriaList

from offramp.backbone import Backbone
from offramp.decode import generate
from offramp.exits import Exits
from offramp.measure import Way
from offramp.policy import FULL, Policy


def stock_way(backbone: Backbone, **options: Any) -> Way:
    """HF's own `generate`, untouched. Rows of a batch come one behind the other."""

    def run(inputs: Mapping[str, Any], stop: StoppingCriteriaList) -> Tensor:
        with torch.inference_mode():
            found = backbone.model.generate(**inputs, stopping_criteria=stop, **options)
        prompt = 1 if backbone.is_encoder_decoder else inputs["input_ids"].shape[1]
        return found[:, prompt:].flatten()  # type: ignore[no-any-return]

    return run


def own_way(
    backbone: Backbone,
    exits: Exits | None = None,
    policy: Policy = FULL,
    discriminators: nn.ModuleDict | None = None,
    **options: Any,
) -> Way:
    """Generation by `policy`; without thresholds the full model, through the same loop."""

    def run(inputs: Mapping[str, Any], stop: StoppingCriteriaList) -> Tensor:
        found = generate(
            backbone, inputs, exits=exits if policy.effective.thresholds else None, policy=policy,
            discriminators=discriminators, stopping_criteria=stop, **options,
        )  # fmt: skip
        return found.new_tokens.flatten()

    return run
