"""What early exits cannot do exactly inside vLLM, and is refused when the server starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from offramp_vllm.scores import SCORES


class Refused(ValueError):
    """A request, an adapter or a setting that early exits cannot serve exactly."""

    def __init__(self, problem: str, remedy: str) -> None:
        """problem: what came and why it fails. remedy: what to do."""
        self.problem, self.remedy = problem, remedy
        super().__init__(f"{problem}\n{remedy}")


WITHOUT = "Serve without it, or without offramp in --additional-config."
QUANTISED = (
    None,
    "compressed-tensors",
    "fp8",
    "awq",
    "auto_awq",
    "awq_marlin",
    "gptq",
    "auto_gptq",
    "gptq_marlin",
)
"""vLLM's names of forms of weights beside which exits of plain weights are built."""
SPECULATIVE = ("draft_model", "ngram")
"""Methods whose drafts are verified by a full-depth call that needs no states of single layers."""


def _pipeline(config: Any) -> str | None:
    size = config.parallel_config.pipeline_parallel_size
    return f"Pipeline parallel of {size}: exits run on one rank." if size > 1 else None


def _data_parallel(config: Any) -> str | None:
    size = config.parallel_config.data_parallel_size
    if size == 1 or not config.model_config.is_moe:
        return None
    return f"A mixture of experts over {size} servers: its experts run in step, and exits do not."


def _context_parallel(config: Any) -> str | None:
    parallel = config.parallel_config
    sizes = [
        getattr(parallel, name, 1)
        for name in ("decode_context_parallel_size", "prefill_context_parallel_size")
    ]
    return "Context parallel splits keys that exits read whole." if max(sizes) > 1 else None


def _connector(config: Any) -> str | None:
    if config.kv_transfer_config is None:
        return None
    return "A KV connector moves keys of upper layers that may not be written yet."


def _quantised(config: Any) -> str | None:
    method = config.model_config.quantization
    return None if method in QUANTISED else f"Exits beside weights in {method} were not tried."


def _backend(config: Any) -> str | None:
    if not config.model_config.using_transformers_backend():
        return None
    kind = config.model_config.hf_text_config.model_type
    return f"vLLM has no class of its own for {kind} and runs it by transformers, whole."


def _loaded(config: Any) -> str | None:
    kind = str(getattr(config.load_config.load_format, "value", config.load_config.load_format))
    if kind in ("auto", "hf", "safetensors", "pt"):
        return None
    return f"Exits cannot be put beside weights of load format {kind}."


def _encoder_decoder(config: Any) -> str | None:
    return "Encoder-decoder models." if config.model_config.is_encoder_decoder else None


def _pooling(config: Any) -> str | None:
    kind = config.model_config.runner_type
    return None if kind == "generate" else f"Exits are of models that write, not of {kind} models."


def _drafts(config: Any) -> str | None:
    speculative = config.speculative_config
    if speculative is None or speculative.method in SPECULATIVE:
        return None
    if speculative.method == "custom_class":
        if speculative.model == "offramp_vllm.drafts.ExitDrafts":
            return None
        return f"Drafts by {speculative.model} were not tried."
    return (
        f"Drafts by {speculative.method} read states of single layers, which early exits leave out."
    )


def _ubatches(config: Any) -> str | None:
    on = getattr(config.parallel_config, "enable_dbo", False)
    return "Dual-batch overlap splits the batch that exits look at." if on else None


REFUSALS = (
    _pipeline,
    _data_parallel,
    _context_parallel,
    _connector,
    _backend,
    _quantised,
    _loaded,
    _encoder_decoder,
    _pooling,
    _drafts,
    _ubatches,
)
"""Each takes vLLM's whole configuration and says what is wrong, or nothing."""


def check_config(config: Any) -> None:
    """Raise `Refused` where a setting of vLLM's does not go with early exits."""
    for look in REFUSALS:
        problem = look(config)
        if problem is not None:
            raise Refused(problem, WITHOUT)


KINDS = ("layer", "drafting")


def check_policy(kind: str, policy: Mapping[str, Any]) -> None:
    """Raise `Refused` for exits, or a policy, that the plug-in does not follow.

    kind: of the exits. policy: as adapter.json has it.
    """
    other = "Calibrate without it, or answer with `offramp serve`."
    if kind not in KINDS:
        raise Refused(
            f"Exits of kind {kind!r} do not run inside vLLM.", f"Train exits of kind {KINDS[0]!r}."
        )
    if policy.get("score", "max_probability") not in SCORES:
        known = ", ".join(SCORES)
        raise Refused(
            f"The score {policy['score']!r} is not computed inside vLLM, only {known}.", other
        )
    if policy.get("kv", "recompute") != "recompute":
        raise Refused(f"Keys and values by {policy['kv']!r} are not exact.", other)
    if policy.get("gates"):
        raise Refused("Gates are not asked inside vLLM.", other)
    if policy.get("visual_keep", 1.0) < 1.0:
        raise Refused("All visual tokens go on inside vLLM, and here some stay behind.", other)
