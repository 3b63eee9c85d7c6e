"""Tiny random models of every supported family, with inputs as their processors would give them.

Six decoder layers or more, width 32, a vision tower of one or two layers. The weights are drawn
wide enough that greedy outputs wander over the vocabulary: a decoder that repeats one token would
agree with anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 96
PAD, BOS, EOS, IMAGE, VISION_START, VISION_END, VIDEO = 0, 1, 2, 3, 4, 5, 6
FIRST_WORD = 8
WIDTH = 32
LAYERS = 6
IDS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
PROMPTS = (7, 3, 5, 4)
"""Words in each row's prompt: rows of a batch need padding."""


@dataclass(frozen=True)
class Kind:
    """One family: how to build it, and what its processor returns besides ids and mask.

    images: tokens an image takes in the prompt. extra: further inputs, from ids and mask.
    wide, loud: standard deviation of the matrices and of the token embeddings. frame: tokens
    around the image.
    """

    build: Callable[[], Any]
    images: int
    extra: Callable[[Tensor, Tensor], dict[str, Tensor]]
    padding: str = "left"
    wide: float = 0.25
    loud: float = 0.1
    frame: tuple[tuple[int, ...], tuple[int, ...]] = field(default=((), ()))

    def inputs(self, batch: int, seed: int = 0) -> dict[str, Tensor]:
        """What the processor would return for `batch` rows, each with one image."""
        draw = torch.Generator().manual_seed(1000 + seed)
        before, after = self.frame
        rows = []
        for row in range(batch):
            words = torch.randint(
                FIRST_WORD, VOCABULARY, (PROMPTS[row % len(PROMPTS)],), generator=draw
            )
            rows.append([*before, *[IMAGE] * self.images, *after, *words.tolist()])
        longest = max(map(len, rows))
        padded, masks = [], []
        for ids in rows:
            gap = [PAD] * (longest - len(ids))
            on, off = [1] * len(ids), [0] * len(gap)
            padded.append(gap + ids if self.padding == "left" else ids + gap)
            masks.append(off + on if self.padding == "left" else on + off)
        ids, mask = torch.tensor(padded), torch.tensor(masks)
        torch_state = torch.random.get_rng_state()
        torch.manual_seed(2000 + seed)
        extra = self.extra(ids, mask)
        torch.random.set_rng_state(torch_state)
        return {"input_ids": ids, "attention_mask": mask, **extra}


def kind_of(name: str) -> Kind:
    return KINDS[name] if name in KINDS else FURTHER[name]


def build(
    name: str, dtype: torch.dtype = torch.float32, seed: int = 0, wide: float | None = None
) -> Any:
    """The tiny model of a family, with weights drawn from `seed`; `wide` overrides its scale."""
    kind = kind_of(name)
    wide = kind.wide if wide is None else wide
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = kind.build()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, wide)
            elif path.endswith("bias"):
                parameter.normal_(0.0, 0.05)
        # Faint, or a tied head would only repeat the last token.
        model.get_input_embeddings().weight.normal_(0.0, kind.loud)
    torch.random.set_rng_state(state)
    model.tie_weights()
    # Random weights hit the end token early; laws on stopping set it themselves.
    for part in (model, getattr(model, "language_model", None)):
        config = getattr(part, "generation_config", None)
        if config is not None:
            config.eos_token_id = None
            config.pad_token_id = PAD
    return model.to(dtype).eval()


# -- text models ------------------------------------------------------------------------------


def _heads() -> dict[str, int]:
    return {"num_attention_heads": 4, "num_key_value_heads": 2}


def _llama(**more: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        **_heads(),
        **IDS,
        **more,
    )


def opt_config(**more: Any) -> Any:
    from transformers import OPTConfig

    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "word_embed_proj_dim": WIDTH,
        "ffn_dim": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        **IDS,
        **more,
    }
    return OPTConfig(**settings)


def _t5(tied: bool = False) -> Any:
    from transformers import T5Config

    return T5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=8,
        d_ff=64,
        # transformers 5.24 sizes the decoder's cache from the encoder's number of layers
        num_layers=LAYERS,
        num_decoder_layers=LAYERS,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=tied,  # tied, the head reads scaled states
        decoder_start_token_id=PAD,
        pad_token_id=PAD,
        eos_token_id=EOS,
    )


# -- pixels -----------------------------------------------------------------------------------


def _square(size: int) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
    def pixels(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"pixel_values": torch.randn(len(ids), 3, size, size)}

    return pixels


def _with_question(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """InstructBLIP's Q-Former reads the question too, through a tokenizer of its own."""
    words = torch.where(ids > IMAGE, ids, PAD)
    return {
        **_square(28)(ids, mask),
        "qformer_input_ids": words,
        "qformer_attention_mask": (words != PAD).long(),
    }


def _tiles(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    rows = len(ids)
    return {
        "pixel_values": torch.randn(rows, 1, 3, 32, 32),
        "pixel_attention_mask": torch.ones(rows, 1, 32, 32, dtype=torch.bool),
    }


def _crops(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """LLaVA-NeXT sees each image whole and in crops; here one."""
    rows = len(ids)
    return {
        "pixel_values": torch.randn(rows, 2, 3, 28, 28),
        "image_sizes": torch.tensor([[28, 28]] * rows),
    }


def _patches(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Qwen's processor flattens the patches of all images and tells their grids apart."""
    rows = len(ids)
    return {
        "pixel_values": torch.randn(rows * 16, 3 * 2 * 8 * 8),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * rows),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


def _prefix(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return {**_square(28)(ids, mask), "token_type_ids": torch.zeros_like(ids)}


def _blocks(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return {**_square(28)(ids, mask), "token_type_ids": (ids == IMAGE).long()}


# -- vision-language models -------------------------------------------------------------------

_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def blip2(text: Any) -> Any:
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2QFormerConfig,
        Blip2VisionConfig,
    )

    return Blip2ForConditionalGeneration(
        Blip2Config(
            vision_config=Blip2VisionConfig(**_TOWER, image_size=28, patch_size=14),
            qformer_config=Blip2QFormerConfig(**_TOWER, vocab_size=8, encoder_hidden_size=16),
            text_config=text,
            num_query_tokens=4,
            image_token_index=IMAGE,
        )
    )


def _instructblip(text: Any) -> Any:
    from transformers import (
        InstructBlipConfig,
        InstructBlipForConditionalGeneration,
        InstructBlipQFormerConfig,
        InstructBlipVisionConfig,
    )

    return InstructBlipForConditionalGeneration(
        InstructBlipConfig(
            vision_config=InstructBlipVisionConfig(**_TOWER, image_size=28, patch_size=14),
            qformer_config=InstructBlipQFormerConfig(
                **_TOWER, vocab_size=VOCABULARY, encoder_hidden_size=16, max_position_embeddings=64
            ),
            text_config=text,
            num_query_tokens=4,
            image_token_index=IMAGE,
        )
    )


def _llava() -> Any:
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**_TOWER, image_size=28, patch_size=14),
            text_config=_llama(),
            image_token_index=IMAGE,
            image_seq_length=4,
        )
    )


def _llava_next() -> Any:
    from transformers import CLIPVisionConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    return LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            vision_config=CLIPVisionConfig(**_TOWER, image_size=28, patch_size=14),
            text_config=_llama(),
            image_token_index=IMAGE,
            image_grid_pinpoints=[[28, 28]],
        )
    )


def _idefics3() -> Any:
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration
    from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig

    return Idefics3ForConditionalGeneration(
        Idefics3Config(
            vision_config=Idefics3VisionConfig(**_TOWER, image_size=32, patch_size=8),
            text_config=_llama(),
            image_token_id=IMAGE,
            scale_factor=2,
            **{"pad_token_id": PAD},
        )
    )


def _smolvlm() -> Any:
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration
    from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

    return SmolVLMForConditionalGeneration(
        SmolVLMConfig(
            vision_config=SmolVLMVisionConfig(**_TOWER, image_size=32, patch_size=8),
            text_config=_llama(),
            image_token_id=IMAGE,
            scale_factor=2,
            **{"pad_token_id": PAD},
        )
    )


_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_VISION_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}


def _qwen2() -> Any:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            vision_config={
                "depth": 2,
                "embed_dim": 16,
                "hidden_size": WIDTH,
                "num_heads": 2,
                "mlp_ratio": 2,
                "patch_size": 8,
            },
            text_config={
                "vocab_size": VOCABULARY,
                "hidden_size": WIDTH,
                "intermediate_size": 64,
                "num_hidden_layers": LAYERS,
                "max_position_embeddings": 128,
                "rope_parameters": _ROPE,
                **_heads(),
                **IDS,
            },
            **_VISION_IDS,
        )
    )


def _qwen25() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            vision_config={
                "depth": 2,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_heads": 2,
                "patch_size": 8,
                "window_size": 32,
                "out_hidden_size": WIDTH,
                "fullatt_block_indexes": [1],
            },
            text_config={
                "vocab_size": VOCABULARY,
                "hidden_size": WIDTH,
                "intermediate_size": 64,
                "num_hidden_layers": LAYERS,
                "max_position_embeddings": 128,
                "rope_parameters": _ROPE,
                **_heads(),
                **IDS,
            },
            **_VISION_IDS,
        )
    )


def _qwen3() -> Any:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            vision_config={
                "depth": 3,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_heads": 2,
                "patch_size": 8,
                "out_hidden_size": WIDTH,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0, 1, 2],
            },
            text_config={
                "vocab_size": VOCABULARY,
                "hidden_size": WIDTH,
                "intermediate_size": 64,
                "num_hidden_layers": LAYERS,
                "head_dim": 8,
                "max_position_embeddings": 128,
                "rope_parameters": {**_ROPE, "mrope_interleaved": True},
                **_heads(),
                **IDS,
            },
            **_VISION_IDS,
        )
    )


def _paligemma(text: dict[str, Any]) -> Any:
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration, SiglipVisionConfig

    return PaliGemmaForConditionalGeneration(
        PaliGemmaConfig(
            vision_config=SiglipVisionConfig(
                **_TOWER, image_size=28, patch_size=14, vision_use_head=False
            ),
            text_config={
                "vocab_size": VOCABULARY,
                "hidden_size": WIDTH,
                "intermediate_size": 64,
                "num_hidden_layers": LAYERS,
                "head_dim": 8,
                "max_position_embeddings": 128,
                **_heads(),
                **IDS,
                **text,
            },
            image_token_index=IMAGE,
            projection_dim=WIDTH,
            hidden_size=WIDTH,
            **IDS,
        )
    )


def _gemma3() -> Any:
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3TextConfig,
        SiglipVisionConfig,
    )

    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            vision_config=SiglipVisionConfig(
                **_TOWER, image_size=28, patch_size=7, vision_use_head=False
            ),
            text_config=Gemma3TextConfig(
                vocab_size=VOCABULARY,
                hidden_size=WIDTH,
                intermediate_size=64,
                num_hidden_layers=8,  # more than the pattern of three
                head_dim=8,
                query_pre_attn_scalar=8,
                max_position_embeddings=128,
                sliding_window=6,  # shorter than prompt and answer
                layer_types=[
                    "full_attention" if i % 3 == 2 else "sliding_attention" for i in range(8)
                ],
                **_heads(),
                **IDS,
            ),
            mm_tokens_per_image=4,
            image_token_index=IMAGE,
            boi_token_index=VISION_START,
            eoi_token_index=VISION_END,
        )
    )


def _internvl(text: Any) -> Any:
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig

    return InternVLForConditionalGeneration(
        InternVLConfig(
            vision_config=InternVLVisionConfig(**_TOWER, image_size=[32, 32], patch_size=[8, 8]),
            text_config=text,
            image_token_id=IMAGE,
            image_seq_length=4,
            tie_word_embeddings=False,
        )
    )


def _qwen_text(third: bool = False) -> Any:
    """The text model of InternVL 2.5 or, the third, of 3.5."""
    from transformers import Qwen2Config, Qwen3Config

    return (Qwen3Config if third else Qwen2Config)(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        **({"head_dim": 16} if third else {}),
        **_heads(),
        **IDS,
    )


def _florence2() -> Any:
    from transformers import (
        BartConfig,
        Florence2Config,
        Florence2ForConditionalGeneration,
    )
    from transformers.models.florence2.configuration_florence2 import Florence2VisionConfig

    return Florence2ForConditionalGeneration(
        Florence2Config(
            vision_config=Florence2VisionConfig(
                depths=[1, 1],
                patch_size=[7, 3],
                patch_stride=[4, 2],
                patch_padding=[3, 1],
                patch_prenorm=[False, True],
                embed_dim=[8, 16],
                num_heads=[2, 2],
                num_groups=[2, 2],
                window_size=2,
                drop_path_rate=0.0,
                projection_dim=WIDTH,
                max_position_embeddings=8,
            ),
            text_config=BartConfig(
                vocab_size=VOCABULARY,
                d_model=WIDTH,
                encoder_layers=2,
                decoder_layers=LAYERS,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=64,
                decoder_ffn_dim=64,
                max_position_embeddings=128,
                decoder_start_token_id=EOS,
                forced_eos_token_id=None,
                **IDS,
            ),
            image_token_id=IMAGE,
        )
    )


_FRAME = ((VISION_START,), (VISION_END,))

KINDS: dict[str, Kind] = {
    "blip2-opt": Kind(lambda: blip2(opt_config()), 4, _square(28)),
    "blip2-llama": Kind(lambda: blip2(_llama()), 4, _square(28)),
    "blip2-t5": Kind(lambda: blip2(_t5()), 4, _square(28), padding="right"),
    "instructblip-opt": Kind(lambda: _instructblip(opt_config()), 4, _with_question),
    "instructblip-llama": Kind(lambda: _instructblip(_llama()), 4, _with_question),
    "instructblip-t5": Kind(
        lambda: _instructblip(_t5(tied=True)), 4, _with_question, padding="right"
    ),
    "llava": Kind(_llava, 4, _square(28)),
    "llava-next": Kind(_llava_next, 4 + 6, _crops),
    "idefics3": Kind(_idefics3, 4, _tiles),
    "smolvlm": Kind(_smolvlm, 4, _tiles),
    "qwen2-vl": Kind(_qwen2, 4, _patches, frame=_FRAME),
    "qwen2.5-vl": Kind(_qwen25, 4, _patches, frame=_FRAME),
    "qwen3-vl": Kind(_qwen3, 4, _patches, frame=_FRAME),
    "paligemma": Kind(lambda: _paligemma({"model_type": "gemma"}), 4, _prefix),
    "paligemma2": Kind(
        lambda: _paligemma(
            {"model_type": "gemma2", "sliding_window": 6, "query_pre_attn_scalar": 8}
        ),
        4,
        _prefix,
    ),
    "gemma3": Kind(_gemma3, 4, _blocks, frame=_FRAME),
    "internvl": Kind(lambda: _internvl(_qwen_text()), 4, _square(32)),
    "florence2": Kind(_florence2, 16 + 1, _square(32), padding="right", wide=0.1, loud=0.02),
}

NAMES = tuple(KINDS)
FURTHER: dict[str, Kind] = {
    "internvl-qwen3": Kind(lambda: _internvl(_qwen_text(third=True)), 4, _square(32)),
}
"""Kinds that are no family of their own, for tests that are about their text model."""
WORDLESS = [BOS, EOS, IMAGE, VISION_START, VISION_END, VIDEO]
"""Never said, where outputs go back in as a prompt: an image token there would want an image."""


def depths(name: str) -> tuple[int, ...]:
    """Two exits; in Gemma 3 at a full and a sliding layer, with no full layer above the second."""
    return (2, 7) if name == "gemma3" else (2, 4)


LOOKS_AHEAD = ("qwen3-vl", "paligemma", "paligemma2", "gemma3")
CAUSAL_PROMPT = tuple(name for name in NAMES if name not in LOOKS_AHEAD)


def one_row(name: str, inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """What the processor would have returned for one row of a batch, without its padding."""
    batch = len(inputs["input_ids"])
    real = inputs["attention_mask"][row].bool()
    longest = len(real)
    one = {}
    for key, value in inputs.items():
        share = len(value) // batch  # Qwen's patches of all images stand in one dimension
        one[key] = value[row * share : (row + 1) * share]
        if one[key].shape == (1, longest):
            one[key] = one[key][:, real]
    return one
