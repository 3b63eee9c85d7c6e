"""An adapter for vLLM: its own files, and what the plug-in `offramp-vllm` needs besides.

The folder of an adapter, and in it vllm.json: the backbone's layers, the layer that each exit is a
copy of, names for the fingerprint's sample of weights, and prompts with the answers that early
exits and full depth give here, which vLLM's are held to at every start.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from offramp.adapter.adapter import Adapter
from offramp.adapter.shipped import example_picture
from offramp.core.decoding.policy import FULL, first_token_may_exit
from offramp.core.engine.generate import generate
from offramp.core.errors import InputError, OfframpError
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits, ExitSet, copied_index
from offramp.core.models.fingerprint import TENSORS, sample
from offramp.core.models.weights import named_float_parameters
from offramp.core.save_and_load import CONFIG, exits_digest, read_config
from offramp.core.storage import write_atomic, write_json
from offramp.features.input_processor import InputProcessor
from offramp_vllm.policy import CHECKED_AT

log = logging.getLogger(__name__)

VLLM = "vllm.json"
PICTURE = "check.png"
FORMAT = 2
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
PICTURED = 2
"""How many of them are asked about a picture."""


def export_vllm(
    adapter: Adapter,
    out: Path,
    prompts: Sequence[Sequence[int]],
    *,
    encoder: InputProcessor | None = None,
    max_new_tokens: int = 16,
) -> int:
    """Write an adapter's folder that vLLM serves beside the backbone's own checkpoint.

    prompts: token ids of texts; the answers to them are kept. encoder: of a backbone that sees
    images; answers about a picture are kept too.

    Returns how many answers are kept: 0 where the backbone answers neither.

    Raises:
        InputError: exits of a kind that vLLM has no layer for, or without thresholds and drafts.
    """
    kind = adapter.exits.modules.kind
    if kind not in KINDS:
        raise InputError(
            f"Exits of kind {kind!r} are no layers of the backbone's own; vLLM builds no other.",
            f"Train exits of kind {KINDS[0]!r}.",
        )
    backbone = adapter.backbone
    if not adapter.policy.depths:
        raise InputError(
            "These exits have no thresholds and draft nothing, so every token would run whole.",
            "Find thresholds first: offramp calibrate.",
        )
    checked = _answers(adapter, prompts, max_new_tokens)
    if encoder is not None and not backbone.text_only:
        checked += _seen(adapter, encoder, max_new_tokens)
    adapter.save(out)
    if any("image" in one for one in checked):
        write_atomic(out / PICTURE, example_picture(backbone.name).read_bytes())
    write_json(
        out / VLLM,
        {
            "format": FORMAT,
            "exits": exits_digest(read_config(out)),
            "layers": backbone.depth,
            "copied": {str(d): copied_index(backbone, d) for d in adapter.exits.depths},
            "first_may_exit": first_token_may_exit(backbone, adapter.policy),
            "dtype": str(backbone.dtype).removeprefix("torch."),
            "sampled": sampled_names(backbone),
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


_FAILURES = OfframpError, AttributeError, TypeError, ValueError, RuntimeError


def _answers(
    adapter: Adapter, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[dict[str, Any]]:
    kept = []
    try:
        backbone, exits = _of_text(adapter)
        for prompt in prompts:
            ids = torch.tensor([list(prompt)], device=backbone.device)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            made = _answered(adapter, backbone, exits, inputs, max_new_tokens)
            kept.append({"prompt": list(prompt), **made})
    except _FAILURES as error:
        log.warning("vLLM's answers to texts will not be checked: %s", str(error).splitlines()[0])
        return []
    return kept


def _seen(adapter: Adapter, encoder: InputProcessor, max_new_tokens: int) -> list[dict[str, Any]]:
    """Answers about a picture, to a prompt in the form that the backbone was tuned on."""
    kept = []
    with Image.open(example_picture(adapter.backbone.name)) as picture:
        shown = picture.convert("RGB")
    try:
        for text in map(encoder.prompt_text, PROMPTS[:PICTURED]):
            inputs = encoder.of_text(text, [shown])
            # One placeholder stands for the picture: vLLM makes of it as many as the model wants.
            special = encoder.adds_special_tokens(text)
            ids = encoder.tokenizer(text, add_special_tokens=special)["input_ids"]
            made = _answered(adapter, adapter.backbone, adapter.exits, inputs, max_new_tokens)
            kept.append({"prompt": list(ids), "image": PICTURE, **made})
    except _FAILURES as error:
        log.warning("vLLM's answers to images will not be checked: %s", str(error).splitlines()[0])
        return []
    return kept


def _answered(
    adapter: Adapter, backbone: Backbone, exits: Any, inputs: dict[str, Any], max_new_tokens: int
) -> dict[str, list[int]]:
    """Return the early answer with its depths, and full depth's. Exits without thresholds answer
    early at `CHECKED_AT`."""
    depths, given = adapter.exits.depths, bool(adapter.policy.thresholds)
    at = None if given else dict.fromkeys(depths, CHECKED_AT)
    early, full = (
        generate(
            backbone,
            dict(inputs),
            exits=exits,
            policy=policy,
            do_sample=False,
            max_new_tokens=max_new_tokens,
        )
        for policy in (adapter.policy.asked("early_exit", at, depths), FULL)
    )
    return {
        "tokens": early.new_tokens[0].tolist(),
        "depths": early.depths[0].tolist(),
        "full": full.new_tokens[0].tolist(),
    }


def _of_text(adapter: Adapter) -> tuple[Backbone, ExitSet]:
    """The backbone's decoder as a language model, with the exits; the whole backbone, to be asked
    without images, where transformers has no such class for the decoder alone."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    backbone, exits = adapter.backbone, adapter.exits
    if backbone.text_only or type(backbone.text_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return backbone, exits
    text = Backbone.of(_language_model(backbone))
    # Where its own class is new here, first tokens would not exit, and in vLLM they do.
    text.family = replace(text.family, causal_prompt=backbone.family.causal_prompt)
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


def sampled_names(backbone: Backbone) -> dict[str, int]:
    """Names of the decoder's tensors in the sample "weights", in order, each with the number of its
    values there."""
    makes = named_float_parameters(backbone.layers)
    if backbone.norm is not None:
        makes += [(f"norm.{name}", make) for name, make in named_float_parameters(backbone.norm)]
    names = [name for name, _ in makes][:: max(1, len(makes) // TENSORS)]
    rows = sample([make for _, make in makes])
    return {name: len(row) for name, row in zip(names, rows, strict=True)}
