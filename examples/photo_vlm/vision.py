"""EfficientNet-lite0 and a trained neck, as a vision tower for `LlavaForConditionalGeneration`.

Importing this module registers the tower
with `AutoConfig` and `AutoModel`, which loading a built folder needs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from offramp.models.photo.tower import EfficientNetLite0, Neck

MODEL_TYPE = "efficientnet_lite_tower"


class LiteTowerConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """hidden_size: of the neck; grid: side of the map the visual tokens form; queries: tokens more,
    which belong to no place."""

    model_type = MODEL_TYPE

    hidden_size: int = 512
    layers: int = 2
    heads: int = 8
    grid: int = 4
    queries: int = 4
    image_size: int = 224

    @property
    def tokens(self) -> int:
        """Visual tokens of one photograph."""
        return self.grid**2 + self.queries

    @property
    def neck_size(self) -> int:
        """The neck's width, by the name that it is read by."""
        return self.hidden_size


class Bridge(nn.Module):
    """Neck and projector: everything that was trained."""

    def __init__(self, neck: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.neck, self.projector = neck, projector


class LiteTower(PreTrainedModel):  # type: ignore[no-untyped-call]
    """What LLaVA calls: one entry of `hidden_states`, with every token meant (strategy "full")."""

    config_class = LiteTowerConfig
    main_input_name = "pixel_values"

    def __init__(self, config: LiteTowerConfig) -> None:
        super().__init__(config)
        self.net = EfficientNetLite0()
        self.neck = Neck(config)
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: weights are loaded, and what is trained starts as torch starts it."""

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> BaseModelOutput:
        tokens = self.neck(self.net(pixel_values))
        return BaseModelOutput(last_hidden_state=tokens, hidden_states=(tokens,))


AutoConfig.register(MODEL_TYPE, LiteTowerConfig)
AutoModel.register(LiteTowerConfig, LiteTower)
