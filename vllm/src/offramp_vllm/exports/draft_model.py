"""An exit as a draft model: a plain Hugging Face checkpoint of d + 1 layers.

An exit at depth d is one decoder layer that the backbone's own norm and head read. So the first d
layers, the exit as layer d, and everything else of the backbone are a smaller model of the same
class, which any engine with draft models takes: vLLM, SGLang, llama.cpp once converted, OpenVINO,
and transformers' `assistant_model`.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp.adapter.adapter import Adapter
from offramp.core.errors import InputError
from offramp.core.models.exits import copied_index
from offramp.core.models.weights import scheme
from offramp.core.storage import atomic_folder

KINDS = ("layer", "drafting")
CONFIG, CARD = "config.json", "README.md"
DRAFTED = "offramp_draft_of"
"""Entry of config.json by which such a checkpoint is known."""


def check_out(out: Path) -> None:
    """Raise `InputError` where a folder holds a checkpoint of another kind."""
    from offramp.core.storage import read_json

    config = out / CONFIG
    if os.path.lexists(config) and DRAFTED not in read_json(config):
        raise InputError(
            f"{out} holds another model.", "Give another --out, or --overwrite to replace it."
        )


def save_draft_model(adapter: Adapter, processor: Any, out: Path, depth: int | None = None) -> int:
    """Write the checkpoint with its tokenizer or processor and a card, whole or not at all.

    processor: None: the checkpoint comes without one. depth: of the exit; None: the first at which
        tokens leave or are drafted.

    Returns the number of its layers.

    Raises:
        InputError: no exit stands there, or it is no layer of the backbone's own; or the backbone's
            weights are quantised.
    """
    backbone = adapter.backbone
    depth = depth or min(adapter.policy.depths or adapter.exits.depths)
    if depth not in adapter.exits.depths:
        raise InputError(
            f"No exit stands at depth {depth}.", f"Exits stand at {list(adapter.exits.depths)}."
        )
    kind = adapter.exits.modules.kind
    if kind not in KINDS or any(map(scheme, backbone.layers)) or backbone.is_encoder_decoder:
        raise InputError(
            f"An exit of kind {kind!r} on this backbone is no layer of a plain checkpoint.",
            "Use exits of kind 'layer' on a decoder-only backbone whose weights are floats.",
        )
    model = _shorter(adapter, depth)
    with atomic_folder(out, owns=(CONFIG, CARD)) as staging:
        model.save_pretrained(staging)
        if processor is not None:
            processor.save_pretrained(staging)
        (staging / CARD).write_text(_card(backbone.name, depth), encoding="utf-8")
    return depth + 1


def _shorter(adapter: Adapter, depth: int) -> Any:
    """The backbone's class with d + 1 layers, of its own weights and the exit's."""
    backbone = adapter.backbone
    config = copy.deepcopy(backbone.model.config)
    _cut(config.get_text_config(), depth, backbone.depth, copied_index(backbone, depth))
    setattr(config, DRAFTED, {"backbone": backbone.name, "depth": depth})
    with torch.device("meta"):
        model = type(backbone.model)(config)
    state = _weights(adapter, depth)
    wanted = model.state_dict()
    state = {name: weight for name, weight in state.items() if name in wanted}
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    left = [name for name, weight in model.named_parameters() if weight.is_meta]
    if left:
        raise InputError(
            f"The exit at depth {depth} lacks {left[0]}, so the shorter model would too.",
            "Such a model cannot be written as a draft.",
        )
    return model.eval()


def _weights(adapter: Adapter, depth: int) -> Mapping[str, Tensor]:
    backbone = adapter.backbone
    family = backbone.family
    layers = f"{family.stack}.{family.layers}."
    state: dict[str, Tensor] = {}
    for name, weight in backbone.model.state_dict().items():
        inside = name.startswith(layers)
        if not inside or int(name.removeprefix(layers).split(".")[0]) < depth:
            state[name] = weight
    for name, weight in adapter.exits.at(depth).state_dict().items():
        if not name.startswith("drafts."):
            state[f"{layers}{depth}.{name}"] = weight
    return state


def _cut(text: Any, depth: int, layers: int, copied: int) -> None:
    """Have a text configuration say d + 1 layers, the last built like layer `copied`."""
    for name, value in list(vars(text).items()):
        if "layer" in name and isinstance(value, list) and len(value) == layers:
            setattr(text, name, [*value[:depth], value[copied]])
    text.num_hidden_layers = depth + 1


def _card(name: str, depth: int) -> str:
    return f"""# A draft model for {name}

The first {depth} decoder layers of {name}, and an exit that was trained after them as layer
{depth + 1}; norm, head, tokenizer and all else are the model's own. It drafts tokens that the model
then verifies, so the answers are the model's own.

```bash
vllm serve {name} --speculative-config \\
  '{{"method": "draft_model", "model": "FOLDER", "num_speculative_tokens": 4}}'
```

```python
draft = AutoModelForCausalLM.from_pretrained("FOLDER")
model.generate(**inputs, assistant_model=draft)
```

For text, llama.cpp and OpenVINO GenAI take it once it is converted:

```bash
python convert_hf_to_gguf.py FOLDER --outfile draft.gguf
llama-speculative-simple -m model.gguf -md draft.gguf --spec-type draft-simple -p "..."
optimum-cli export openvino --model FOLDER --task text-generation-with-past draft_ov
```

```python
draft = openvino_genai.draft_model("draft_ov", "CPU")
openvino_genai.LLMPipeline("model_ov", "CPU", draft_model=draft)
```
"""
