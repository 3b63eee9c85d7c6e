"""What is guaranteed of the answer to one request."""

from __future__ import annotations

from collections.abc import Mapping

from offramp.adapter import Adapter
from offramp.guarantee import Conditions, Standing, of_processor, standing
from offramp.models.input_processor import InputProcessor

OTHER = "\0"
"""Stands for a prompt that is no single question about one image."""


def standing_of(
    adapter: Adapter,
    encoder: InputProcessor,
    engine: str | None = None,
    *,
    asked: str | None = None,
    longest: int | None = None,
    plain: bool | None = None,
    thresholds: Mapping[int, float] | None = None,
) -> Standing:
    """What is guaranteed of early answers; what is not given is not compared.

    engine: name of a runtime that answers in the adapter's place. asked: the text of a request with
    one image and one turn, `OTHER` of one with more. longest: tokens its answer may have. plain:
    whether it is decoded greedily, with no rule of its own. thresholds: instead of the adapter's.
    """
    policy = adapter.policy
    if thresholds is not None:
        policy = policy.at(thresholds)
    here = Conditions.of(
        adapter.backbone,
        policy,
        engine=engine,
        sampling={None: None, True: "greedy", False: "sampled or ruled by the request"}[plain],
        longest=longest,
        prompts=None if asked is None else [[asked]],
        **of_processor(encoder.processor),
    )
    return standing(adapter.calibration, here)
