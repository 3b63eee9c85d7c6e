"""`--additional-config '{"offramp": {"exits": FOLDER}}'`, and what it sets of vLLM's arguments.

In a folder's place may stand a hub name.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

from offramp_vllm import tell
from offramp_vllm.adapter import exits_at, read_exported
from offramp_vllm.attach import MoreLayers
from offramp_vllm.drafts import NAME, ON_A_CPU, exits_draft
from offramp_vllm.policy import MODES, Asked, Rule, asked
from offramp_vllm.refuse import Refused, check_config

log = logging.getLogger("vllm.offramp")
KEY, EXITS, WATCH, MODE = "offramp", "exits", "watch", "mode"
_V2 = "VLLM_USE_V2_MODEL_RUNNER"


def wanted(additional: Any) -> Mapping[str, Any] | None:
    """The entry of an additional configuration; None where exits are not asked for.

    Raises:
        Refused: it is not {"exits": FOLDER}, with a share from 0 to 1 as "watch", and a mode, or
            without.
    """
    if not isinstance(additional, Mapping) or KEY not in additional:
        return None
    entry = additional[KEY]
    share = entry.get(WATCH, 0.0) if isinstance(entry, Mapping) else None
    good = isinstance(share, int | float) and 0 <= share <= 1 and isinstance(entry.get(EXITS), str)
    good = good and entry.get(MODE, MODES[0]) in MODES
    if not good or not {EXITS, WATCH, MODE} >= set(entry):
        raise Refused(
            f"{entry!r} under {KEY!r} of --additional-config.",
            'Give {"exits": "FOLDER"} there, as "watch" a share of answers, from 0 to 1, and as '
            f'"mode" of requests that name none {", ".join(MODES)}.',
        )
    return entry


def folder_of(config: Any) -> str:
    """The adapter's folder, of vLLM's whole configuration."""
    entry = wanted(config.additional_config)
    assert entry is not None
    return str(entry[EXITS])


def watched_share(config: Any) -> float:
    """The share of early answers that is watched, of vLLM's whole configuration."""
    entry = wanted(config.additional_config)
    assert entry is not None
    return float(entry.get(WATCH, 0.0))


def served(config: Any, rule: Rule, extra: Mapping[str, Any] | None) -> Asked:
    """What a request asks for, of a server. config: vLLM's whole. rule, extra: as of `asked`.

    Raises:
        Refused: as `asked` says.
    """
    entry = wanted(config.additional_config)
    assert entry is not None
    return asked(
        rule,
        extra,
        drafts=config.speculative_config is not None,
        by_exits=exits_draft(config),
        own=entry.get(MODE),
    )


def prepare(arguments: Any) -> None:
    """Set vLLM's arguments for exits, before its configuration is made of them.

    Raises:
        Refused: the folder cannot be read, or an argument does not go with exits.
    """
    from vllm.config import CUDAGraphMode
    from vllm.platforms import current_platform

    entry = wanted(arguments.additional_config)
    assert entry is not None
    if arguments.hf_overrides and not isinstance(arguments.hf_overrides, MoreLayers):
        raise Refused("--hf-overrides beside exits were not tried.", "Leave them out.")
    if os.environ.get(_V2) == "1":
        raise Refused(f"Exits run in vLLM's first model runner, and {_V2} is 1.", "Unset it.")
    for name in ("worker_cls", "scheduler_cls"):
        if getattr(arguments, name) not in (None, "auto") and KEY not in getattr(arguments, name):
            raise Refused(f"--{name.replace('_', '-')} beside exits.", "Leave it out.")
    os.environ[_V2] = "0"
    folder = exits_at(entry[EXITS])
    exported = read_exported(folder)
    # All processes are handed the folder, so that one of them asks the hub.
    here = {KEY: {**entry, EXITS: str(folder)}}
    arguments.additional_config = {**arguments.additional_config, **here}
    arguments.hf_overrides = MoreLayers(exported.layers, exported.copied)
    arguments.worker_cls = "offramp_vllm.v1.ExitWorker"
    arguments.scheduler_cls = "offramp_vllm.v1.ExitScheduler"
    # Parts of the decoder are compiled, but no CUDA graph is captured of them: which rows go deeper
    # is known only as they run. And a step's answer is needed before the next one is planned.
    arguments.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
    arguments.async_scheduling = False
    speculative = arguments.speculative_config
    if speculative and speculative.get("model") == NAME and current_platform.is_cpu():
        arguments.speculative_config = {
            "num_speculative_tokens_per_batch_size": [*ON_A_CPU],
            **speculative,
        }
    # Places that wait must not be freed when a window has moved past them.
    arguments.disable_hybrid_kv_cache_manager = True


def features_joined(hf_config: Any) -> int:
    """After how many decoder layers features of images join the states (Qwen3-VL); 0: none."""
    vision = getattr(hf_config, "vision_config", None)
    return len(getattr(vision, "deepstack_visual_indexes", None) or ())


def check_made(config: Any) -> None:
    """Raise `Refused` where the configuration that vLLM made does not go with exits."""
    from vllm.config import CompilationMode

    check_config(config)
    exported = read_exported(folder_of(config))
    layers = config.model_config.hf_text_config.num_hidden_layers
    if layers != exported.all_layers:
        raise Refused(
            f"{config.model_config.model} has {layers} decoder layers, and the exits in "
            f"{exported.folder} are of a model with {exported.layers}.",
            "Serve the model that they were trained for.",
        )
    if config.compilation_config.mode == CompilationMode.STOCK_TORCH_COMPILE:
        raise Refused(
            "torch.compile of the whole model would run exits as more layers of it.",
            "Leave the mode out of --compilation-config: parts of the decoder are compiled.",
        )
    features = features_joined(config.model_config.hf_config)
    if features > exported.depths[0]:
        raise Refused(
            f"Features of images join the states after {features} layers, and an exit stands at "
            f"depth {exported.depths[0]}.",
            f"Train exits from depth {features} on.",
        )
    if config.model_config.is_mm_prefix_lm:
        raise Refused(
            "Tokens of an image that see each other forwards were not tried.",
            "Serve it without exits.",
        )


def tell_guarantees(config: Any) -> None:
    """Say in the log, and show among the metrics, what is guaranteed of the exits here."""
    exported, model = read_exported(folder_of(config)), config.model_config
    here = {
        "engine": tell.SERVED_BY,
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantized": model.quantization or "",
        "device": config.device_config.device_type,
    }
    found = [*tell.guarantees(exported.calibrations, exported.policy, here)]
    if exported.rule.trust is not None and not exits_draft(config):
        found = [one._replace(reason="the server has none of the exits' drafts") for one in found]
    log.info("Exits at %s: %s.", exported.depths, tell.in_words(found))
    tell.show(found)
