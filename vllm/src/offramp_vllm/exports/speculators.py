"""An EAGLE-3 drafter as a folder that other engines read: the layout of the library speculators,
which vLLM and SGLang load and llama.cpp's converter takes.

config.json          the drafter's sizes, the states it reads, and the model it drafts for
model.safetensors    its tensors; embeddings are the model's own, and left there
README.md            a card
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from offramp.common.names import is_hub_name
from offramp.core.errors import InputError
from offramp.core.models.backbone import Backbone
from offramp.core.save_and_load.tensors import write_tensors
from offramp.core.storage import atomic_folder, read_json, write_json
from offramp_vllm.exports.eagle3 import Eagle3Drafter

CONFIG, TENSORS, CARD = "config.json", "model.safetensors", "README.md"
LAYOUT = "0.9.0"
"""Version of speculators whose layout this is."""


def check_out(folder: Path) -> None:
    """Raise `InputError` where a drafter would replace files that are of something else, such as a
    model's own weights."""
    there = [name for name in (CONFIG, TENSORS, CARD) if os.path.lexists(folder / name)]
    if not there or (CONFIG in there and "speculators_model_type" in read_json(folder / CONFIG)):
        return
    raise InputError(
        f"{folder} holds {' and '.join(there)} of something else than a drafter.",
        "Give another --out, or --overwrite to replace what is there.",
    )


def save_drafter(
    drafter: Eagle3Drafter,
    backbone: Backbone,
    out: Path,
    *,
    drafts: int,
    measured: Mapping[str, Any],
) -> None:
    """Write the folder, whole or not at all.

    drafts: how many an engine should make in a row. measured: their acceptance, as
    `Acceptance.to_json` has it.
    """
    with atomic_folder(out, owns=(CONFIG, TENSORS, CARD)) as folder:
        tensors = drafter.tensors()
        kept = {n: t.to(backbone.dtype) if t.is_floating_point() else t for n, t in tensors.items()}
        write_tensors(kept, folder / TENSORS)
        write_json(folder / CONFIG, drafter_json(drafter, backbone, drafts))
        text = _card(drafter, backbone, measured["acceptance"], drafts)
        (folder / CARD).write_text(text, encoding="utf-8")


def drafter_json(drafter: Eagle3Drafter, backbone: Backbone, drafts: int) -> dict[str, Any]:
    """The content of config.json. It has no `model_type`: by one vLLM would pick another loader."""
    layer = drafter.config.to_diff_dict()
    # By its older name too: not every reader knows `rope_parameters`.
    layer["rope_theta"] = (drafter.config.rope_parameters or {})["rope_theta"]
    return {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": LAYOUT,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "draft_vocab_size": len(drafter.d2t),
        "target_hidden_size": backbone.width,
        "eagle_aux_hidden_state_layer_ids": list(drafter.depths),
        "norm_before_residual": False,
        "norm_before_fc": False,
        "norm_output": False,
        "tie_word_embeddings": False,
        "transformer_layer_config": layer,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": drafts}],
            "verifier": {
                "name_or_path": backbone.name,
                "architectures": [type(backbone.model).__name__],
            },
        },
    }


def vllm_config(folder: str, drafts: int) -> str:
    """Return what vLLM is told of a drafter in a folder, which is to make so many drafts in a
    row."""
    return json.dumps({"model": folder, "method": "eagle3", "num_speculative_tokens": drafts})


def _card(
    drafter: Eagle3Drafter, backbone: Backbone, acceptance: Sequence[float], drafts: int
) -> str:
    name = backbone.name
    data = ModelCardData(
        base_model=name if is_hub_name(name) else None,
        library_name="speculators",
        tags=["eagle3", "speculative-decoding", "offramp"],
    )
    places = "\n".join(f"| {k} | {share:.1%} |" for k, share in enumerate(acceptance, 1))
    low, middle, high = drafter.depths
    return f"""---
{data.to_yaml()}
---
# EAGLE-3 drafter for {name}

It drafts tokens that the model then verifies, so the answers are the model's own. One decoder layer
reads the model's states at depths {low}, {middle} and {high} and the token just written, and can
say {len(drafter.d2t):,} of {backbone.vocabulary:,} tokens. It was trained on the model's own
answers, without labels and without images.

How often each draft in a row was right, those before it being right, on answers kept for validation
(teacher-forced):

| draft | right |
|---|---|
{places}

The layout is that of the library speculators {LAYOUT}. With vLLM:

```bash
vllm serve {name} --speculative-config '{vllm_config("FOLDER", drafts)}'
```

With llama.cpp, whose converter makes a file of it:

```bash
python convert_hf_to_gguf.py FOLDER --target-model-dir MODEL_FOLDER --outfile eagle3.gguf
llama-server -m model.gguf --model-draft eagle3.gguf --spec-type draft-eagle3
```
"""
