"""What a model is asked for: answers that exit at one depth, and a replay of known ones."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from offramp.adapter import Adapter
from offramp.answers import Answer, generate_answers
from offramp.calibration.replay import PolicyReplay, Replay, can_replay, replay
from offramp.data.example import Example
from offramp.engine.policy import ExitPolicy
from offramp.engine.teacher_forcing import Answered
from offramp.models.exits import Exits, ExitSet, check_depths
from offramp.models.input_processor import InputProcessor
from offramp_lab.experiments.analysis.config import AnalysisConfig

log = logging.getLogger(__name__)

_DECODED = 12


@dataclass(frozen=True)
class Seen:
    """What a kind of exit says at every depth.

    own, labelled: along the full model's own answers, and along the data's; None: it has none.
    forced: answers to all examples where every token exits at one depth, the full model's last.
    """

    own: Replay
    labelled: Replay | None
    forced: Mapping[int, Sequence[Answer]]


@dataclass(frozen=True)
class Observed:
    """All that a model was asked for. kinds: of exit ("lens", "exits").

    policy: the answers by the adapter's own policy; None: it has none. policy_replay: the depths
    that it gives to the data's answers; None: it cannot be replayed, or there are none.
    """

    kinds: Mapping[str, Seen]
    full: Sequence[Answer]
    policy: Sequence[Answer] | None
    policy_replay: PolicyReplay | None


def observe(
    adapter: Adapter | None,
    encoder: InputProcessor,
    examples: Sequence[Example],
    config: AnalysisConfig,
    progress: Any = iter,
) -> Observed:
    """Decode and replay; see `Observed`."""
    backbone = encoder.backbone
    size: dict[str, Any] = {"batch_size": config.batch_size, "progress": progress}
    asked = {"max_new_tokens": config.max_new_tokens, **size}
    full = generate_answers(backbone, encoder, examples, **asked)
    written = [Answered(e, a.ids, labelled=False) for e, a in zip(examples, full, strict=True)]
    people = [
        Answered(e, tuple(encoder.answer_ids(e.prompt, e.answers[0])), labelled=True)
        for e in examples
        if e.answers
    ]
    # A threshold of 0: every token exits, the first one too where the prompt allows it.
    rule = ExitPolicy(first={} if config.exit_in_prefill is False else None)

    def seen(exits: ExitSet, depths: Sequence[int]) -> Seen:
        at_one = Adapter(backbone, exits)
        forced = {
            depth: generate_answers(
                at_one, encoder, examples, replace(rule, thresholds={depth: 0.0}), **asked
            )
            for depth in depths
        }
        own = replay(encoder, exits, written, **size)
        labelled = replay(encoder, exits, people, **size) if people else None
        return Seen(own, labelled, {**forced, backbone.depth: full})

    lens = ExitSet(Exits(backbone, range(1, backbone.depth), kind="lens"))
    kinds = {"lens": seen(lens, _decode_depths(config, backbone.depth))}
    if adapter is None:
        return Observed(kinds, full, None, None)
    kinds["exits"] = seen(adapter.exits, adapter.exits.depths)
    policy, answers, replayed = adapter.policy, None, None
    if config.exit_in_prefill is not None:
        policy = replace(policy, first=(policy.first or None) if config.exit_in_prefill else {})
    if policy.thresholds:
        answers = generate_answers(adapter, encoder, examples, policy, **asked)
        if people and can_replay(policy):
            replayed = PolicyReplay.of(encoder, adapter.exits, people, policy, **size)
        elif people:
            log.warning("This policy cannot be replayed, so it is judged by its answers alone.")
    return Observed(kinds, full, answers, replayed)


def _decode_depths(config: AnalysisConfig, layers: int) -> tuple[int, ...]:
    if config.decode_depths is not None:
        return check_depths(config.decode_depths, layers)
    spread = np.linspace(1, layers - 1, min(_DECODED, layers - 1))
    return tuple(sorted({round(d) for d in spread.tolist()}))
