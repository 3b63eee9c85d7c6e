"""The check at start: answers that `offramp.generate` wrote, written again by the engine as it will
serve. Where they differ, every token runs to full depth, and the log says so."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from offramp_vllm import tell
from offramp_vllm.adapter import Checked, Exported

log = logging.getLogger("vllm.offramp")
HALF_PRECISION = 0.5
"""Share of an answer's tokens that must be the stored ones up to the first that differs, where
numbers are rounded otherwise than they were for the stored answers; in float32 all must be."""


def check(core: Any, exported: Exported) -> None:
    """Compare, and switch exits off where it fails. core: vLLM's EngineCore, just made."""
    if not exported.checked:
        log.warning("No prompts in %s: the exits are not checked.", exported.folder)
        return
    exact = exported.dtype == "float32" == str(core.vllm_config.model_config.dtype)[6:]
    least = 1.0 if exact else HALF_PRECISION
    alone = [_answers(core, [one])[0] for one in exported.checked]
    together = _answers(core, exported.checked)
    core.reset_prefix_cache()
    shares = [
        _share(one, tokens, depths if exact else one.depths)
        for answers in (alone, together)
        for one, (tokens, depths) in zip(exported.checked, answers, strict=True)
    ]
    found = min(shares) if exact else sum(shares) / len(shares)
    if found >= least:
        log.info("Exits checked: %d answers are offramp's own.", len(exported.checked))
        return
    core.model_executor.collective_rpc("offramp_switch", args=(False,))
    log.warning(
        "Early exits are OFF: answers differ from those stored in %s (%.0f%% the same, %.0f%% "
        "needed). All tokens run at full depth. Serve the model that the exits were trained for.",
        exported.folder, 100 * found, 100 * least,
    )  # fmt: skip


def _share(stored: Checked, tokens: Sequence[int], depths: Sequence[int]) -> float:
    """Share of a stored answer up to the first token that differs in itself or its depth."""
    pairs = list(zip(stored.tokens, stored.depths, strict=True))
    same = 0
    for want, got in zip(pairs, zip(tokens, depths, strict=True), strict=False):
        if want != got:
            break
        same += 1
    return same / max(1, len(pairs))


def _answers(core: Any, asked: Sequence[Checked]) -> list[tuple[list[int], list[int]]]:
    """Tokens and depths of each prompt's greedy answer, all at once."""
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine import EngineCoreRequest

    from offramp_vllm.policy import EARLY, MODE
    from vllm import SamplingParams

    found: dict[str, tuple[list[int], list[int]]] = {}
    for place, one in enumerate(asked):
        params = SamplingParams(
            temperature=0.0, max_tokens=len(one.tokens), ignore_eos=True, detokenize=False,
            extra_args={MODE: EARLY}, output_kind=RequestOutputKind.DELTA,
        )  # fmt: skip
        request = EngineCoreRequest(
            request_id=f"offramp-check-{uuid4().hex}", prompt_token_ids=list(one.prompt),
            mm_features=None, sampling_params=params, pooling_params=None,
            arrival_time=time.time(), lora_request=None, cache_salt=f"offramp-check-{place}",
            data_parallel_rank=None,
        )  # fmt: skip
        found[request.request_id] = [], []
        core.add_request(*core.preprocess_add_request(request))
    while core.scheduler.has_unfinished_requests():
        outputs, ran = core.step()
        core.post_step(ran)
        for client in outputs.values():
            for output in client.outputs:
                tokens, depths = found[output.request_id]
                tokens += output.new_token_ids
                depths += (output.kv_transfer_params or {}).get(tell.KEY, {}).get("depths", [])
    core.step()  # the last finished requests leave the batch
    return list(found.values())
