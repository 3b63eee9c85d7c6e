"""The batch engine in PyTorch, asked for several answers at the same moment."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from examples.photo_vlm.evaluate import LONGEST
from offramp_vllm.exports.eagle3 import Eagle3Drafter

from offramp.adapter.adapter import Adapter
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.models.exits import ExitSet
from offramp.serving.core import EngineCore
from offramp.serving.engine_config import EngineConfig
from offramp.serving.request import Request
from offramp_lab.methods.eagle import attached
from offramp_lab.records.record import Group

LIMIT = 128
OPTIONS: dict[str, Any] = {"max_new_tokens": LONGEST["captions"], "do_sample": False}


@dataclass(frozen=True)
class Batched:
    """drafter: that is attached meanwhile."""

    policy: ExitPolicy
    exits: ExitSet | None = None
    drafter: Eagle3Drafter | None = None


def answered(
    group: Group, adapter: Adapter, encoder: Any, way: Batched, at_once: int
) -> list[dict[str, Any]]:
    """Caption photographs, which come at the same moment and are opened in the same thread. Return
    for each the ids, the CPU seconds to the first token, after it, and its part of all, and the
    rounds."""
    attaching: AbstractContextManager[None] = nullcontext()
    if way.drafter is not None:
        attaching = attached(adapter.backbone, way.drafter, at_once, LIMIT)
    config, begin = EngineConfig(slots=at_once, limit=LIMIT), time.process_time()
    with attaching:
        clock = time.process_time
        core = EngineCore(adapter.backbone, way.exits, way.policy, config, clock=clock)
        start = time.process_time()
        handles = [
            core.add(Request(encoder.prompts([one]), way.policy.own_mode, options=OPTIONS))
            for one in group.examples
        ]
        opened = time.process_time() - start
        core.run()
    spent = time.process_time() - begin
    done = [handle.result() for handle in handles]
    return [
        {
            "ids": one.output.new_tokens[0].tolist(),
            "first": opened / len(done) + one.first,
            "rest": sum(one.gaps),
            "spent": spent / len(done),
            "rounds": [*one.output.rounds],
        }
        for one in done
    ]
