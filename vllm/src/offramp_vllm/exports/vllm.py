"""An adapter for vLLM: its own files, and what the plug-in `offramp-vllm` needs besides.

The folder of an adapter, and in it vllm.json: the backbone's layers, the layer that each exit is a
copy of, and prompts with the answers that early exits give here, which vLLM's are held to at every
start.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from offramp.adapter.adapter import Adapter
from offramp.core.decoding.policy import first_token_may_exit
from offramp.core.engine.generate import generate
from offramp.core.errors import InputError, OfframpError
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits, ExitSet, copied_index
from offramp.core.save_and_load import CONFIG, exits_digest, read_config
from offramp.core.storage import write_json

log = logging.getLogger(__name__)

VLLM = "vllm.json"
FORMAT = 1
KINDS = ("layer", "drafting")
PROMPTS = (
    "Caption:",
    "A photograph of",
    "Question: what is shown here? Answer:",
    "Once upon a time",
    "The capital of France is",
    "1, 2, 3, 4,",
)
"""Texts that the check at start asks where no others are given."""


def export_vllm(
    adapter: Adapter, out: Path, prompts: Sequence[Sequence[int]], *, max_new_tokens: int = 16
) -> int:
    """Write an adapter's folder that vLLM serves beside the backbone's own checkpoint.

    prompts: token ids of texts; the answers to them are kept.

    Returns how many answers are kept: 0 where the backbone's decoder does not answer texts alone.

    Raises:
        InputError: exits of a kind that vLLM has no layer for, or without thresholds.
    """
    kind = adapter.exits.modules.kind
    if kind not in KINDS:
        raise InputError(
            f"Exits of kind {kind!r} are no layers of the backbone's own; vLLM builds no other.",
            f"Train exits of kind {KINDS[0]!r}.",
        )
    backbone = adapter.backbone
    if not adapter.policy.thresholds:
        raise InputError(
            "These exits have no thresholds, so no token would leave early.",
            "Find thresholds first: offramp calibrate.",
        )
    checked = _answers(adapter, prompts, max_new_tokens)
    adapter.save(out)
    write_json(
        out / VLLM,
        {
            "format": FORMAT,
            "exits": exits_digest(read_config(out)),
            "layers": backbone.depth,
            "copied": {str(d): copied_index(backbone, d) for d in adapter.exits.depths},
            "first_may_exit": first_token_may_exit(backbone, adapter.policy),
            "dtype": str(backbone.dtype).removeprefix("torch."),
            "checked": checked,
        },
    )
    return len(checked)


def check_out(out: Path) -> None:
    """Raise `InputError` where a folder holds files of something else than such an export."""
    if os.path.lexists(out / CONFIG) and not os.path.lexists(out / VLLM):
        raise InputError(
            f"{out} holds an adapter that was not exported for vLLM.",
            "Give another --out, or --overwrite to replace what is there.",
        )


def _answers(
    adapter: Adapter, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[dict[str, list[int]]]:
    failures = OfframpError, AttributeError, TypeError, ValueError, RuntimeError
    policy = adapter.chosen_policy("early_exit", None, None)
    kept = []
    try:
        backbone, exits = _of_text(adapter)
        for prompt in prompts:
            ids = torch.tensor([list(prompt)], device=backbone.device)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            made = generate(
                backbone, inputs, exits=exits, policy=policy, do_sample=False,
                max_new_tokens=max_new_tokens,
            )  # fmt: skip
            tokens, depths = made.new_tokens[0].tolist(), made.depths[0].tolist()
            kept.append({"prompt": list(prompt), "tokens": tokens, "depths": depths})
    except failures as error:
        log.warning("vLLM's answers will not be checked at start: %s", str(error).splitlines()[0])
        return []
    return kept


def _of_text(adapter: Adapter) -> tuple[Backbone, ExitSet]:
    """The backbone's decoder as a language model, with the exits; the whole backbone, to be asked
    without images, where transformers has no such class for the decoder alone."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    backbone, exits = adapter.backbone, adapter.exits
    if backbone.text_only or type(backbone.text_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return backbone, exits
    text = Backbone.of(_language_model(backbone))
    attached = Exits(text, exits.depths, kind=exits.modules.kind)
    attached.load_state_dict(exits.modules.state_dict())
    return text, ExitSet(attached.requires_grad_(False), exits.shortlist)


def _language_model(backbone: Backbone) -> Any:
    """The causal language model in a vision-language model, of its own weights."""
    from transformers import AutoModelForCausalLM

    of_config: Any = AutoModelForCausalLM.from_config
    for module in backbone.model.modules():
        if type(module).__name__.endswith("ForCausalLM"):
            return module
    with torch.device("meta"):
        model: Any = of_config(backbone.text_config)
    model.base_model_prefix = model.base_model_prefix or "model"
    setattr(model, model.base_model_prefix, backbone.stack)
    model.set_output_embeddings(backbone.head)
    left = [name for name, weight in model.named_parameters() if weight.is_meta]
    if left:
        raise InputError(f"{type(model).__name__} has weights of its own.", "Nothing to do.")
    return model.eval()
