"""Generation by recorded programs, in the adapter's place."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from offramp.adapter import Adapter
from offramp.engine.confidence import SCORES
from offramp.engine.exit_check import ExitScorer
from offramp.engine.policy import ExitPolicy, GenerationOutput, first_token_may_exit
from offramp.engine.slots.cache import check_memory, slot_bytes
from offramp.engine.slots.memory import free_bytes
from offramp.engine.slots.prompt import Prompt, PromptReader
from offramp.errors import InputError, UnsupportedBackboneError, did_you_mean
from offramp.models.backbone import Backbone
from offramp.models.vision_cache import VisionCache
from offramp.runtimes.graphs.decoding import GraphDecoder
from offramp.runtimes.graphs.programs import RowPrograms
from offramp.runtimes.one_row import GreedyRow

PENDING = 16
"""States that wait at most before the layers above the exit run; drafts may ask for more."""


class GraphRuntime:
    """An adapter whose decoder runs as CUDA graphs; on other devices the same programs, unrecorded.

    `generate` takes and returns what `Adapter.generate` does, for one greedy row without logits
    processors. Score, shortlist and depth of the exit are those of `policy`; thresholds, levels of
    gates and modes may change from call to call. Programs are recorded when they are first needed,
    for each width of the cache and number of pending states. Calls from several threads take turns.

    policy: None: the adapter's. context: tokens of a prompt and its answer.
    """

    rows = 1
    """Prompts in one call of `generate`."""

    def __init__(
        self, adapter: Adapter, *, policy: ExitPolicy | None = None, context: int = 1024
    ) -> None:
        """Allocate keys and values of `context` tokens.

        Raises:
            InputError: a policy with several exits or a score of more than one exit's logits; more
                tokens than memory holds.
            UnsupportedBackboneError: an encoder-decoder, or one that is spread over devices.
        """
        self.adapter, self.policy = adapter, policy or adapter.policy
        self.context = context
        backbone = adapter.backbone
        if backbone.is_encoder_decoder or backbone.sharded:
            what = "an encoder-decoder" if backbone.is_encoder_decoder else "spread over devices"
            raise UnsupportedBackboneError(
                f"CUDA graphs run a decoder alone on one device, and {backbone.name} is {what}.",
                "Use --engine torch.",
            )
        self._check_look(self.policy)
        entries = backbone.depth + len(adapter.exits.entries)
        size = slot_bytes(backbone.text_config, entries, context, backbone.dtype)
        check_memory(size, free_bytes(backbone.device), 1, context)
        drafts = 2 ** self.policy.max_draft.bit_length()
        depths = self.policy.depths
        self._programs = RowPrograms(
            backbone, adapter.exits, self.policy, depths[0] if depths else None, context,
            max(PENDING, drafts),
        )  # fmt: skip
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return f"CUDA graphs on {self.backbone.device}"

    @property
    def backbone(self) -> Backbone:
        return self.adapter.backbone

    def generate(
        self,
        inputs: Mapping[str, Any],
        *,
        policy: ExitPolicy | None = None,
        vision_cache: VisionCache | None = None,
        streamer: Any = None,
        **options: Any,
    ) -> GenerationOutput:
        """Generate by the runtime's policy, or by one that reads the exit as it does.

        Raises:
            InputError: more than one row, sampling or logits processors, a prompt with its answer
                longer than the context, a policy with another exit, score or shortlist.
        """
        policy = (self.policy if policy is None else policy).effective
        self._check_policy(policy)
        with self._lock, torch.inference_mode():
            reader = PromptReader(
                self.backbone, self.adapter.exits, self._depths, vision_cache=vision_cache,
                first_may_exit=first_token_may_exit(self.backbone, policy) and not policy.lossless,
            )  # fmt: skip
            prompt = reader.read(inputs, options, use_exits=bool(policy.thresholds))
            if not GreedyRow.fits(prompt.prepared):
                raise InputError(
                    "CUDA graphs write greedy answers without logits processors.",
                    "Set do_sample=False and leave processors out, or use --engine torch.",
                )
            device = prompt.prepared.ids.device
            here = replace(prompt.prepared, ids=prompt.prepared.ids.cpu())
            sequence = GreedyRow(here, streamer)
            rounds = self._decode(prompt, sequence, policy)
            sequence.end()
        output = sequence.output(self.backbone.depth, rounds)
        return replace(output, sequences=output.sequences.to(device))

    # -- one generation ------------------------------------------------------------------------

    @property
    def _depths(self) -> tuple[int, ...]:
        depth = self._programs.depth
        return () if depth is None else (depth,)

    def _decode(
        self, prompt: Prompt, sequence: GreedyRow, policy: ExitPolicy
    ) -> list[tuple[int, int]]:
        depth = self._programs.depth
        threshold = 1.0 if depth is None else policy.thresholds.get(depth, 1.0)
        level = -math.inf if depth is None else policy.gates.get(depth, -math.inf)
        self._programs.load(prompt, threshold, level)
        self._check_room(sequence)
        sequence.write(*self._first(prompt, policy))
        decoder = GraphDecoder(self._programs, sequence, self.backbone.depth)
        if not sequence.live:
            return []
        if depth is None or not policy.thresholds:
            decoder.full()
        elif policy.lossless:
            return decoder.lossless(depth, threshold, policy.max_draft)
        else:
            decoder.early_exit(depth, threshold)
        return []

    def _first(self, prompt: Prompt, policy: ExitPolicy) -> tuple[int, int, float]:
        """Token, depth and score of the first token, which the exit may have said."""
        score = math.nan
        for depth in prompt.looks.exits:
            entry = prompt.looks.entries[depth]
            look = ExitScorer(self.backbone, policy, (depth,), self.adapter.exits)(
                depth, prompt.looks.exits[depth], entry, prompt.looks.previous[depth]
            )
            gate, level = self.adapter.exits.gates.get(depth), policy.gates.get(depth, -math.inf)
            if gate is not None and not bool(gate(entry) >= level):
                continue
            threshold = policy.thresholds[depth]
            score = float(look.score) if threshold else score
            if bool(look.score >= threshold):
                return int(look.logits.argmax(-1)), depth, score
        return int(prompt.logits.argmax(-1)), self.backbone.depth, score

    # -- checks --------------------------------------------------------------------------------

    def _check_look(self, policy: ExitPolicy) -> None:
        depths = policy.depths
        if len(depths) > 1:
            raise InputError(
                f"CUDA graphs have one exit, and the policy has depths {list(depths)}.",
                "Give a policy with one of them.",
            )
        if policy.score not in SCORES:
            raise InputError(
                f"CUDA graphs have no score {policy.score!r}: it reads more than one exit's "
                "logits.",
                did_you_mean(policy.score, tuple(SCORES)),
            )
        if policy.kv != "recompute":
            raise InputError(
                f"CUDA graphs do not know the KV policy {policy.kv!r}.", "Use kv='recompute'."
            )

    def _check_policy(self, policy: ExitPolicy) -> None:
        """Raise `InputError` where the programs read the exit otherwise than `policy` does."""
        if not policy.thresholds:
            return
        self._check_look(policy)
        if policy.lossless and 2 ** policy.max_draft.bit_length() > self._programs.most:
            raise InputError(
                f"Drafts of {policy.max_draft} tokens are longer than the {self._programs.most} "
                "states that were made room for.",
                "Give the runtime a policy with that max_draft.",
            )
        mine = (self._depths, self.policy.score, self.policy.shortlist)
        theirs = (policy.depths, policy.score, policy.shortlist)
        if mine != theirs:
            raise InputError(
                "The programs read (depths, score, shortlist) "
                f"{mine}, and the policy wants {theirs}.",
                "Make a GraphRuntime with that policy.",
            )

    def _check_room(self, sequence: GreedyRow) -> None:
        longest = sequence.longest
        new = 1 if longest is None else max(1, longest - sequence.length)
        if self._programs.column + new > self.context:
            raise InputError(
                f"A prompt of {self._programs.column} tokens and an answer of {new} are longer "
                f"than the context of {self.context}.",
                "Load the runtime with a longer one (--context), or lower max_new_tokens.",
            )
