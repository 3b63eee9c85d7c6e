"""Put the earlier photo model together from its trained bridge, and save it; records rest on it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from examples.photo_vlm.command import command, parser_of
from examples.photo_vlm.vision import Bridge, LiteTowerConfig
from offramp.errors import DataError
from offramp.models.photo.build import IMAGE_TOKEN, image_processor, load_language, load_network
from offramp.models.photo.packages import LANGUAGE, VISION, weights_file
from offramp.models.photo.tower import EfficientNetLite0, Neck
from offramp.storage import atomic_folder, read_json, write_json

BRIDGE = Path(__file__).parent / "bridge"


def new_bridge(lm_config: Any, tower: LiteTowerConfig) -> Bridge:
    """An untrained bridge, with LLaVA's own projector."""
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    projector = LlavaMultiModalProjector(_llava_config(lm_config, tower))
    for parameter in projector.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
        else:
            torch.nn.init.zeros_(parameter)
    return Bridge(Neck(tower), projector)


def _llava_config(lm_config: Any, tower: LiteTowerConfig, image_token: int = 0) -> Any:
    from transformers import LlavaConfig

    return LlavaConfig(
        vision_config=tower,
        # A copy: a LLaVA configuration sets its text model's attention, here to none, and the
        # language model in training would read its prompts without a causal mask.
        text_config=copy.deepcopy(lm_config),
        image_token_index=image_token,
        image_seq_length=tower.tokens,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )


def assemble(
    lm: Any, network: EfficientNetLite0, bridge: Bridge, tower: LiteTowerConfig, image_token: int
) -> Any:
    """A `LlavaForConditionalGeneration` in the language model's precision, with copies of all."""
    from transformers import LlavaForConditionalGeneration

    config = _llava_config(lm.config, tower, image_token)
    model: Any = LlavaForConditionalGeneration._from_config(config, dtype=lm.dtype)  # type: ignore[no-untyped-call]
    model.model.language_model.load_state_dict(lm.model.state_dict())
    model.model.vision_tower.net.load_state_dict(network.state_dict())
    model.model.vision_tower.neck.load_state_dict(bridge.neck.state_dict())
    model.model.multi_modal_projector.load_state_dict(bridge.projector.state_dict())
    model.tie_weights()
    model.generation_config.eos_token_id = lm.config.eos_token_id
    model.generation_config.pad_token_id = lm.config.eos_token_id
    return model.eval().requires_grad_(False)


def new_processor(tokenizer: Any, tower: LiteTowerConfig) -> Any:
    """LLaVA's own processor; a photograph becomes as many image tokens as the tower gives."""
    from transformers import LlavaProcessor

    return LlavaProcessor(  # type: ignore[no-untyped-call]
        image_processor(),
        tokenizer,
        patch_size=tower.image_size // tower.grid,
        num_additional_image_tokens=tower.queries,
        vision_feature_select_strategy="full",
        image_token=IMAGE_TOKEN,
    )


def save_bridge(bridge: Bridge, folder: Path, card: dict[str, Any]) -> None:
    """The trained weights in bfloat16, with their card."""
    from safetensors.torch import save_file

    weights = {name: w.bfloat16().contiguous() for name, w in bridge.state_dict().items()}
    with atomic_folder(folder) as staging:
        save_file(weights, staging / "bridge.safetensors")
        write_json(staging / "bridge.json", card)


def load_bridge(folder: Path, lm_config: Any) -> tuple[Bridge, LiteTowerConfig]:
    """Raise `DataError` where the folder holds no whole bridge of this language model."""
    from safetensors.torch import load_file

    card = read_json(folder / "bridge.json")
    tower = LiteTowerConfig(**card["tower"])
    bridge = new_bridge(lm_config, tower)
    try:
        bridge.load_state_dict(load_file(folder / "bridge.safetensors"))
    except Exception as error:  # safetensors' own, or torch's where names or shapes differ
        raise DataError(
            f"{folder} holds no whole bridge: {str(error).splitlines()[0]}",
            "Restore the folder, or train a new one: python -m examples.photo_vlm.train.",
        ) from error
    return bridge, tower


def build(work: Path, bridge_folder: Path) -> tuple[Any, Any]:
    """The whole VLM and its processor."""
    lm, tokenizer = load_language(weights_file(LANGUAGE, work / "weights"))
    bridge, tower = load_bridge(bridge_folder, lm.config)
    image_token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    model = assemble(
        lm, load_network(weights_file(VISION, work / "weights")), bridge, tower, image_token
    )
    return model, new_processor(tokenizer, tower)


@command
def main() -> None:
    parser = parser_of("build", "--out runs/photo_vlm/model", str(__doc__), "work")
    parser.add_argument("--out", type=Path, required=True, help="folder for the VLM, 290 MB")
    parser.add_argument("--bridge", type=Path, default=BRIDGE, help="trained bridge's folder")
    arguments = parser.parse_args()
    model, processor = build(arguments.work, arguments.bridge)
    with atomic_folder(arguments.out) as staging:
        model.save_pretrained(staging)
        processor.save_pretrained(staging)
    print(arguments.out)


if __name__ == "__main__":
    main()
