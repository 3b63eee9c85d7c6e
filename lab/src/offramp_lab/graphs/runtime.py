"""Generation by recorded programs, in the adapter's place."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from offramp.adapter.adapter import Adapter
from offramp.core.decoding.policy import ExitPolicy, GenerationOutput
from offramp.core.engine.generate import write_answers
from offramp.core.engine.plan import plan_of
from offramp.core.errors import InputError, UnsupportedBackboneError
from offramp.features.vision_cache import VisionCache
from offramp.serving.slot_memory import check_room
from offramp_lab.graphs.executor import GraphExecutor, GraphHeads
from offramp_lab.graphs.programs import RowPrograms


class GraphRuntime:
    """An adapter whose decoder runs as CUDA graphs; on other devices the same programs, unrecorded.

    `generate` takes and returns what `Adapter.generate` does, for one row. Score, shortlist and
    depths of the exits are those of `policy`; thresholds and modes may change from
    call to call. Programs are recorded when they are first needed, for each width of the cache and
    number of pending states. A greedy answer without logits processors and by a score of one exit's
    logits is quickest: its next token is begun before the last is known. Calls from several threads
    take turns.

    policy: None: the adapter's. context: tokens of a prompt and its answer.
    """

    rows = 1
    """Prompts in one call of `generate`."""

    def __init__(
        self, adapter: Adapter, *, policy: ExitPolicy | None = None, context: int = 1024
    ) -> None:
        """Allocate keys and values of `context` tokens.

        Raises:
            InputError: a policy whose keys and values are not exact; more tokens than memory holds.
            UnsupportedBackboneError: an encoder-decoder, or one that is spread over devices.
        """
        self.adapter: Adapter = adapter
        self.policy: ExitPolicy = policy or adapter.policy
        self.context = context
        self.backbone = backbone = adapter.backbone
        if backbone.is_encoder_decoder or backbone.sharded:
            what = "an encoder-decoder" if backbone.is_encoder_decoder else "spread over devices"
            raise UnsupportedBackboneError(
                f"CUDA graphs run a decoder alone on one device, and {backbone.name} is {what}.",
                "Use --engine torch.",
            )
        backbone.check_whole("A CUDA graph")
        check_room(backbone, adapter.exits, 1, context)
        programs = RowPrograms(backbone, adapter.exits, self.policy, context)
        self._executor = GraphExecutor(programs)
        self._programs = programs
        self._lock = threading.Lock()
        self.name: str = f"CUDA graphs on {backbone.device}"

    def generate(
        self,
        inputs: Mapping[str, Any],
        *,
        policy: ExitPolicy | None = None,
        vision_cache: VisionCache | None = None,
        streamer: Any = None,
        seed: int | None = None,
        **options: Any,
    ) -> GenerationOutput:
        """Generate by the runtime's policy, or by one that reads the exits as it does.

        Raises:
            InputError: more than one row, a prompt with its answer longer than the context, a
                policy with other exits, another score or shortlist.
        """
        policy = self.policy if policy is None else policy
        self._check_policy(policy.effective)
        with self._lock, torch.inference_mode():
            plan = plan_of(
                self.backbone, self.adapter.exits, policy, heads=GraphHeads, drafts_on=False
            )
            reader = plan.reader(vision_cache=vision_cache)
            prepared = reader.prepare(inputs, options)
            if len(prepared.ids) != 1:
                raise InputError(
                    f"CUDA graphs write one answer at a time, and {len(prepared.ids)} rows came.",
                    "Call generate once for each row.",
                )
            executor, rule = self._executor, plan.rule()
            if policy.lossless:  # recorded programs verify no prompt together with drafts
                rule = replace(rule, first={})
            plain = not prepared.config.do_sample and not prepared.processors
            executor.plain = plain and (not plan.depths or self._programs.reads)
            try:
                return write_answers(
                    plan.decoder(executor), reader, prepared, rule, streamer=streamer, seed=seed
                )
            finally:
                executor.close()

    # -- checks --------------------------------------------------------------------------------

    def _check_policy(self, policy: ExitPolicy) -> None:
        """Raise `InputError` where the programs read the exits otherwise than `policy` does."""
        if not policy.thresholds:
            return
        mine = (self.policy.depths, self.policy.score, self.policy.shortlist)
        theirs = (policy.depths, policy.score, policy.shortlist)
        if mine != theirs:
            raise InputError(
                "The programs read (depths, score, shortlist) "
                f"{mine}, and the policy wants {theirs}.",
                "Make a GraphRuntime with that policy.",
            )
