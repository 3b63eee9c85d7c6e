"""The photo model as a class of vLLM's: its LLaVA, around this tower."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.model_executor.models.utils import WeightsMapper, init_vllm_registered_model, maybe_prefix
from vllm.model_executor.models.vision import VisionEncoderInfo
from vllm.multimodal import MULTIMODAL_REGISTRY

from offramp_photo.tower import IMAGE_TOKEN, PhotoTower


class _Sizes(VisionEncoderInfo[Any]):
    """How many visual tokens a photograph becomes: as many at any size."""

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        return int(self.vision_config.tokens)

    def get_image_size(self) -> int:
        return int(self.vision_config.image_size)

    def get_patch_size(self) -> int:
        return self.get_image_size() // self.get_patch_grid_length()

    def get_patch_grid_length(self) -> int:
        return int(self.vision_config.grid)


class _Info(LlavaProcessingInfo):
    def get_vision_encoder_info(self) -> _Sizes:
        return _Sizes(self.get_hf_config())


@MULTIMODAL_REGISTRY.register_processor(
    LlavaMultiModalProcessor, info=_Info, dummy_inputs=LlavaDummyInputsBuilder
)
class PhotoForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA without a projector: the tower's tokens are as wide as the language model."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "multi_modal_projector.": None,  # the identity
            "model.multi_modal_projector.": None,
            "model.language_model.": "language_model.model.",
            "model.vision_tower.": "vision_tower.",
            "lm_head.": "language_model.lm_head.",
        }
    )

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str:
        return IMAGE_TOKEN

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        nn.Module.__init__(self)  # LLaVA's own builds one of the towers that vLLM has
        config = vllm_config.model_config.hf_config
        self.config = config
        self.multimodal_config = vllm_config.model_config.multimodal_config
        self.configure_mm_token_handling(
            vocab_size=config.text_config.vocab_size, mm_token_ids=[config.image_token_index]
        )
        with self._mark_tower_model(vllm_config, "image"):
            self.vision_tower = PhotoTower(config.vision_config)
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=config.text_config,
                prefix=maybe_prefix(prefix, "language_model"),
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load them, but for the projector's.

        Raises:
            ValueError: the checkpoint has a projector that is not the identity.
        """
        loaded: set[str] = super().load_weights(map(_handed_on, weights))
        return loaded

    def _process_image_input(self, image_input: Any) -> Tensor:
        if image_input["type"] == "image_embeds":
            found: Tensor = image_input["data"]
        else:
            found = self.vision_tower(image_input["pixel_values"]).last_hidden_state
        return found


def _handed_on(named: tuple[str, Tensor]) -> tuple[str, Tensor]:
    name, weight = named
    if "multi_modal_projector." in name:
        same = torch.eye(len(weight)) if weight.dim() > 1 else torch.zeros(len(weight))
        if not torch.equal(weight.float().cpu(), same):
            raise ValueError(
                f"{name} was trained, and the photo model's class in vLLM has no projector. "
                "Train the tower, and leave the projector the identity."
            )
    return named
