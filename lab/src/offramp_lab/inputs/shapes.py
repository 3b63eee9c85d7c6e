"""Decoders of known sizes with random weights, to measure speed without a checkpoint.

Real Hugging Face classes. Cut down is only what decoding a token never runs: the vision tower, the
Q-Former and a text encoder have one layer each, and the towers are 16 wide. Time and memory of
decoding are the model's own; what it writes is noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from offramp.errors import InputError, check_known

if TYPE_CHECKING:
    import torch  # names and sizes need no PyTorch
    from torch import Tensor, nn

    from offramp.models.backbone import Backbone

FIRST_WORD = 8


@dataclass(frozen=True)
class Shape:
    """A backbone to build: `config` is the text model's, and `wrap`, of
    `offramp_lab.inputs.tiny_families.models`, puts a VLM around it.

    images: tokens that an image takes in the prompt. image: what makes the inputs of one, of the
    same module, and its side in what that counts in. sees: what else `wrap` is told of images.
    """

    name: str
    config: Callable[[], Any]
    wrap: str
    images: int = 4
    image: tuple[str, int] = ("sized", 28)
    sees: Mapping[str, int] = field(default_factory=dict)

    def empty(self) -> nn.Module:
        """The model with real buffers and parameters that take no memory."""
        from accelerate import init_empty_weights

        from offramp_lab.inputs.tiny_families import models

        with init_empty_weights(include_buffers=False):
            model: Any = getattr(models, self.wrap)(self.config(), layers=1, **self.sees)
        encoder = getattr(getattr(model, "language_model", None), "encoder", None)
        if encoder is not None:  # only now: its config also sizes the decoder's cache
            encoder.block = encoder.block[:1]
        model.tie_weights()
        return model  # type: ignore[no-any-return]

    def bytes(self, dtype: torch.dtype) -> int:
        """Size of the parameters, and of one exit's beside them."""
        from offramp.models.backbone import Backbone

        backbone = Backbone(self.empty())
        parameters = [*backbone.model.parameters(), *backbone.layers[0].parameters()]
        numbers: int = sum(p.numel() for p in parameters)
        return numbers * dtype.itemsize

    def build(self, dtype: torch.dtype | None = None, seed: int = 0) -> Backbone:
        """The backbone, its weights drawn from `seed`, directly in `dtype` (None: float32).

        Raises:
            InputError: it does not fit into the memory that is free.
        """
        import torch

        from offramp.engine.executors.slots.memory import free_bytes
        from offramp.models.backbone import Backbone
        from offramp_lab.inputs.drawn_weights import fill

        dtype = dtype or torch.float32
        size, free = self.bytes(dtype), free_bytes()
        if free is not None and size > free:
            raise InputError(
                f"Shape {self.name} takes {size / 1e9:.1f} GB in {str(dtype)[6:]}, and "
                f"{free / 1e9:.1f} GB of memory are free.",
                "Use a smaller shape or bfloat16, or free some memory.",
            )
        model = self.empty()
        fill(model, dtype, seed)
        return Backbone(model, name=self.name)

    def inputs(
        self, backbone: Backbone, batch: int = 1, words: int = 32, seed: int = 0
    ) -> dict[str, Tensor]:
        """What a processor would return for `batch` prompts of an image and `words` words."""
        import torch

        from offramp_lab.inputs.tiny_families import models
        from offramp_lab.inputs.tiny_families.text import IMAGE

        draw = torch.Generator().manual_seed(seed)
        text = torch.randint(FIRST_WORD, backbone.vocabulary, (batch, words), generator=draw)
        ids = torch.cat([torch.full((batch, self.images), IMAGE), text], 1)
        mask, (make, side) = torch.ones_like(ids), self.image
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            extra = getattr(models, make)(ids, mask, side)
        extra["pixel_values"] = extra["pixel_values"].to(backbone.dtype)
        return {"input_ids": ids, "attention_mask": mask, **extra}


def shape(name: str) -> Shape:
    """A known shape. Raise `InputError` with those there are."""
    check_known("Shape", [name], tuple(SHAPES))
    return SHAPES[name]


# -- text models ------------------------------------------------------------------------------


def _text(family: str, layers: int, width: int, heads: int, vocabulary: int, **more: Any) -> Any:
    """A text model of `offramp_lab.inputs.tiny_families.text`, in these sizes."""
    from offramp_lab.inputs.tiny_families import text

    return getattr(text, family)(**_sizes(layers, width, heads, vocabulary, **more))


def _sizes(layers: int, width: int, heads: int, vocabulary: int, **more: Any) -> dict[str, Any]:
    """By the names that most configurations have."""
    named = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
    return {**named, "vocab_size": vocabulary, **more}


def _opt(layers: int, width: int, heads: int, vocabulary: int) -> Any:
    own = {"word_embed_proj_dim": width, "ffn_dim": 4 * width, "max_position_embeddings": 2048}
    return _text("opt_config", layers, width, heads, vocabulary, **own)


def _t5(layers: int, width: int, heads: int, inner: int, vocabulary: int) -> Any:
    from offramp_lab.inputs.tiny_families import text

    return text.t5(
        num_layers=layers, num_decoder_layers=layers, d_model=width, d_kv=64, d_ff=inner,
        num_heads=heads, vocab_size=vocabulary, relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
    )  # fmt: skip


def _llama(
    layers: int, width: int, heads: int, kv_heads: int, inner: int, vocabulary: int, tied: bool
) -> Any:
    own = {"num_key_value_heads": kv_heads, "intermediate_size": inner, "tie_word_embeddings": tied}
    return _text("llama", layers, width, heads, vocabulary, max_position_embeddings=4096, **own)


def _qwen(layers: int, width: int, heads: int, kv_heads: int, inner: int, vocabulary: int) -> Any:
    """What Qwen2.5-VL's text model differs in from the tiny one."""
    head = width // heads
    axes = [head // 8, head // 16 * 3, head // 16 * 3]  # of time, height and width
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": axes}
    return _sizes(
        layers, width, heads, vocabulary, num_key_value_heads=kv_heads, intermediate_size=inner,
        max_position_embeddings=4096, rope_parameters=rope, tie_word_embeddings=True,
    )  # fmt: skip


_FINELY: Any = {"images": 576, "image": ("sized", 336), "sees": {"side": 336}}

SHAPES: dict[str, Shape] = {
    s.name: s
    for s in (
        Shape("opt-2.7b", lambda: _opt(32, 2560, 32, 50304), "blip2"),
        Shape("flan-t5-xl", lambda: _t5(24, 2048, 32, 5120, 32128), "blip2"),
        Shape("llava-7b", lambda: _llama(32, 4096, 32, 32, 11008, 32064, False), "llava"),
        Shape("smollm2-135m", lambda: _llama(30, 576, 9, 3, 1536, 49152, True), "llava"),
        Shape("llava-135m", lambda: _llama(30, 576, 9, 3, 1536, 49152, True), "llava", **_FINELY),
        Shape("llava-1b", lambda: _llama(16, 2048, 32, 8, 8192, 32064, True), "llava", **_FINELY),
        Shape(
            "qwen2.5-vl-3b-10",
            lambda: _qwen(10, 2048, 16, 2, 11008, 32064),
            "qwen25",
            images=576,
            image=("patches", 48),
        ),
        Shape("mini-opt", lambda: _opt(8, 32, 2, 512), "blip2"),
        Shape("mini-t5", lambda: _t5(8, 32, 2, 64, 512), "blip2"),
        Shape("mini-llava", lambda: _llama(8, 32, 4, 2, 64, 512, True), "llava"),
    )
}
"""By name; the minis are for trying things out."""
