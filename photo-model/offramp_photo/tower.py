"""The photo model's vision tower: EfficientNet-lite0, a trained neck, and words that it detects.

The network is that of the published TensorFlow weights (EfficientNet, Tan and Le 2019; the lite
variant has no squeeze-and-excite and ReLU6 for swish). What LLaVA reads as visual tokens are those
of the neck and, after them, the embeddings of the words that a detector on the same features is
surest of (words as input to a caption model: Fang et al. 2015; You et al. 2016). So language model,
serving and export see a LLaVA with so many visual tokens, and nothing else. Importing this module
registers the tower with `AutoConfig` and `AutoModel`, which loading a built folder needs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

MODEL_TYPE = "offramp_photo_tower"
ARCHITECTURE = "OfframpPhotoForConditionalGeneration"
"""The whole model's class in vLLM. transformers goes by the type, and builds its LLaVA."""
# Of SmolLM2's unused special tokens; a new one would change the vocabulary's size.
IMAGE_TOKEN = "<file_sep>"
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
    """No bias, unless a norm is folded into it; padded as TensorFlow's SAME does: the odd pixel
    goes right and below."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        total = max((-(-x.shape[-1] // stride) - 1) * stride + kernel - x.shape[-1], 0)
        low, high = total // 2, total - total // 2
        if low != high:
            x, low = F.pad(x, (low, high, low, high)), 0
        return F.conv2d(x, self.weight, self.bias, self.stride, low, 1, self.groups)


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


class PhotoTowerConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """hidden_size: the language model's width, in which tokens leave the tower; neck_size: the
    neck's.

    grid: side of the map that the neck's tokens form; queries: tokens more, which belong to no
    place. words: how many detected words follow; vocabulary: among how many; detector_size: the
    detector's inner width.
    """

    model_type = MODEL_TYPE

    hidden_size: int = 576
    neck_size: int = 512
    layers: int = 2
    heads: int = 8
    grid: int = 4
    queries: int = 4
    words: int = 12
    vocabulary: int = 1
    detector_size: int = 512
    image_size: int = 224

    @property
    def tokens(self) -> int:
        """Visual tokens of one photograph."""
        return self.grid**2 + self.queries + self.words


class Neck(nn.Module):
    """A small transformer over the feature map and its queries; the map is then pooled.

    Residual from end to end, so that at the start it is little more than a projection of each
    place: a resampler that has to find the places first learns much slower.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.neck_size
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
        """Features [B, 49, 1280] to tokens [B, grid * grid + queries, neck_size]."""
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


class Projector(nn.Module):
    """LLaVA's, kept in the tower because the detected words must not pass it."""

    def __init__(self, config: PhotoTowerConfig) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(config.neck_size, config.hidden_size)
        self.linear_2 = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        projected: Tensor = self.linear_2(F.gelu(self.linear_1(tokens)))
        return projected


class WordDetector(nn.Module):
    """Scores the `vocabulary` words that people would say of a photograph, from its pooled
    features."""

    def __init__(self, config: PhotoTowerConfig, dropout: float = 0.4) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(3 * FEATURES), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(3 * FEATURES), requires_grad=False)
        self.dropout = nn.Dropout(dropout)
        self.inner = nn.Linear(3 * FEATURES, config.detector_size)
        self.outer = nn.Linear(config.detector_size, config.vocabulary)

    @staticmethod
    def pooled(features: Tensor) -> Tensor:
        """Features [B, 49, 1280] to their mean, maximum and deviation over places [B, 3 * 1280]."""
        features = features.float()
        return torch.cat((features.mean(1), features.amax(1), features.std(1)), 1)

    def forward(self, pooled: Tensor) -> Tensor:
        """Pooled features [B, 3 * 1280] to logits [B, vocabulary]."""
        standard = ((pooled - self.mean) * self.scale).to(self.inner.weight.dtype)
        inner = F.gelu(self.inner(self.dropout(standard)))
        logits: Tensor = self.outer(self.dropout(inner))
        return logits


class WordTokens(nn.Module):
    """The words that are likeliest, as the language model's own embeddings of them.

    A word of probability p weighs min(1, 2p); gain, bias and place are learnt. A word that is
    dropped leaves bias and place: a token of zeros would stay zeros through every norm.
    """

    def __init__(self, config: PhotoTowerConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.count = config.words
        self.table = nn.Parameter(torch.zeros(config.vocabulary, width), requires_grad=False)
        self.gain = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.place = nn.Parameter(torch.zeros(config.words, width))

    def forward(self, logits: Tensor, keep: Tensor | None = None) -> Tensor:
        """Logits [B, vocabulary] to tokens [B, words, width], surest first.

        keep: [B, words], 0 where a word is dropped in training.
        """
        surest, words = logits.float().sigmoid().topk(self.count)
        weights = (2 * surest).clamp(max=1)
        weights = (weights if keep is None else weights * keep).to(self.table.dtype)
        return self.table[words] * weights[..., None] * self.gain + self.bias + self.place


class Bridge(nn.Module):
    """Everything between the features and the language model, but for the detector."""

    def __init__(self, config: PhotoTowerConfig) -> None:
        super().__init__()
        self.neck, self.projector = Neck(config), Projector(config)
        self.words = WordTokens(config)

    def forward(self, features: Tensor, logits: Tensor, keep: Tensor | None = None) -> Tensor:
        """Features [B, 49, 1280] and the detector's logits to visual tokens [B, tokens, width]."""
        seen = self.projector(self.neck(features))
        return torch.cat((seen, self.words(logits, keep).to(seen.dtype)), 1)


class PhotoTower(PreTrainedModel):  # type: ignore[no-untyped-call]
    """The tower that LLaVA calls: one entry of `hidden_states`, with every token meant (strategy
    "full")."""

    config_class = PhotoTowerConfig
    main_input_name = "pixel_values"

    def __init__(self, config: PhotoTowerConfig) -> None:
        super().__init__(config)
        self.net = EfficientNetLite0()
        self.detector = WordDetector(config)
        self.bridge = Bridge(config)
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: weights are loaded, and what is trained starts as torch starts it."""

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutput:
        features = self.net(pixel_values)
        tokens = self.bridge(features, self.detector(WordDetector.pooled(features)))
        return BaseModelOutput(last_hidden_state=tokens, hidden_states=(tokens,))


AutoConfig.register(MODEL_TYPE, PhotoTowerConfig)
AutoModel.register(PhotoTowerConfig, PhotoTower)
