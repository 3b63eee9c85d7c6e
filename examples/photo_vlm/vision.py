"""EfficientNet-lite0 and a trained neck, as a vision tower for `LlavaForConditionalGeneration`.

The network is that of the published TensorFlow weights (EfficientNet, Tan and Le 2019; the lite
variant has no squeeze-and-excite and ReLU6 for swish). Importing this module registers the tower
with `AutoConfig` and `AutoModel`, which loading a built folder needs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

MODEL_TYPE = "efficientnet_lite_tower"
FEATURES = 1280  # channels of the last feature map
GRID = 7  # its side, from 224 pixels

# kernel, stride, expansion, channels, repeats of EfficientNet-B0, which lite0 leaves as they are
_STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


class _Conv(nn.Conv2d):
    """No bias, and padded as TensorFlow's SAME does: the odd pixel goes right and below."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        total = max((-(-x.shape[-1] // stride) - 1) * stride + kernel - x.shape[-1], 0)
        low, high = total // 2, total - total // 2
        if low != high:
            x, low = F.pad(x, (low, high, low, high)), 0
        return F.conv2d(x, self.weight, None, self.stride, low, 1, self.groups)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class _Block(nn.Module):
    """Inverted residual. Attributes are named as the published weights are."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        inner = inputs * expansion
        self.skips = stride == 1 and inputs == outputs
        if expansion != 1:
            self._expand_conv, self._bn0 = _Conv(inputs, inner, 1), _norm(inner)
        self._depthwise_conv = _Conv(inner, inner, kernel, stride, groups=inner)
        self._bn1 = _norm(inner)
        self._project_conv, self._bn2 = _Conv(inner, outputs, 1), _norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x
        if hasattr(self, "_expand_conv"):
            y = F.relu6(self._bn0(self._expand_conv(y)))
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return y + x if self.skips else y


class EfficientNetLite0(nn.Module):
    """Photographs [B, 3, 224, 224], as (x - 127) / 128, to features [B, 49, 1280], row by row."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _Conv(3, 32, 3, 2), _norm(32)
        blocks, inputs = [], 32
        for kernel, stride, expansion, outputs, repeats in _STAGES:
            for repeat in range(repeats):
                step = stride if repeat == 0 else 1
                blocks.append(_Block(inputs, outputs, kernel, step, expansion))
                inputs = outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = _Conv(inputs, FEATURES, 1), _norm(FEATURES)

    def forward(self, pixels: Tensor) -> Tensor:
        x = F.relu6(self._bn0(self._conv_stem(pixels)))
        for block in self._blocks:
            x = block(x)
        features: Tensor = self._bn1(self._conv_head(x))
        return F.relu6(features).flatten(2).transpose(1, 2)


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


class Neck(nn.Module):
    """A small transformer over the feature map and its queries; the map is then pooled.

    Residual from end to end, so that at the start it is little more than a projection of each
    place: a resampler that has to find the places first learns much slower.
    """

    def __init__(self, config: LiteTowerConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.grid = config.grid
        self.norm_in = nn.LayerNorm(FEATURES)
        self.project = nn.Linear(FEATURES, width)
        self.position = nn.Parameter(0.02 * torch.randn(GRID**2, width))
        self.query = nn.Parameter(torch.randn(config.queries, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width,
                config.heads,
                4 * width,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(config.layers)
        )
        self.norm_out = nn.LayerNorm(width)

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, 49, 1280] to tokens [B, grid * grid + queries, hidden_size]."""
        places = self.project(self.norm_in(features)) + self.position
        queries = self.query.expand(len(places), -1, -1)
        x = torch.cat((places, queries.to(places.dtype)), 1)
        for layer in self.layers:
            x = layer(x)
        places, queries = x[:, : GRID**2], x[:, GRID**2 :]
        square = places.transpose(1, 2).reshape(len(x), -1, GRID, GRID)
        pooled = F.adaptive_avg_pool2d(square, self.grid).flatten(2).transpose(1, 2)
        tokens: Tensor = self.norm_out(torch.cat((pooled, queries), 1))
        return tokens


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

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutput:
        tokens = self.neck(self.net(pixel_values))
        return BaseModelOutput(last_hidden_state=tokens, hidden_states=(tokens,))


AutoConfig.register(MODEL_TYPE, LiteTowerConfig)
AutoModel.register(LiteTowerConfig, LiteTower)
