"""Tiny vision-language models of random weights with processors of their own, as `make_models.py`
makes language models."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

WORDS = (
    "<pad>",
    "<s>",
    "</s>",
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<video>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
    "<file_sep>",
    *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
)
FIRST = len(WORDS)
"""Ids from here on are no special words."""
VOCABULARY = 512
PICTURES = 16
TEXTS = ("Caption:", "What is this?", "a red dog", "Describe it. Then say what is on the left.")
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
SQUARE = {**TOWER, "image_size": 28, "patch_size": 14}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
MIXTURE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}


def at(word: str) -> int:
    return WORDS.index(word)


VISION_IDS = {
    "image_token_id": at("<|image_pad|>"),
    "video_token_id": at("<|video_pad|>"),
    "vision_start_token_id": at("<|vision_start|>"),
    "vision_end_token_id": at("<|vision_end|>"),
}


def tokenizer(**named: str) -> Any:
    """A byte a token, and the special words of all families. named: what a processor asks for."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    every = {word: place for place, word in enumerate([*WORDS, *signs])}
    made = Tokenizer(models.BPE(vocab=every, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(WORDS))
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=named,
    )


def _made(name: str, **settings: Any) -> Any:
    import transformers

    model = getattr(transformers, f"{name}ForConditionalGeneration")
    return model(getattr(transformers, f"{name}Config")(**settings, tie_word_embeddings=False))


def llava(text: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, LlavaProcessor

    model = _made(
        "Llava",
        vision_config=CLIPVisionConfig(**SQUARE),
        text_config=text,
        image_token_index=at("<image>"),
        image_seq_length=4,
    )
    looks = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return model, LlavaProcessor(
        looks,
        tokenizer(image_token="<image>"),
        patch_size=14,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    )


def llava_next(text: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import CLIPVisionConfig, LlavaNextImageProcessor, LlavaNextProcessor

    grid = [[28, 28], [28, 56]]
    model = _made(
        "LlavaNext",
        vision_config=CLIPVisionConfig(**SQUARE),
        text_config=text,
        image_token_index=at("<image>"),
        image_grid_pinpoints=grid,
    )
    looks = LlavaNextImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=grid
    )
    return model, LlavaNextProcessor(
        looks,
        tokenizer(image_token="<image>"),
        patch_size=14,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    )


def idefics3(name: str) -> Callable[[dict[str, Any]], tuple[Any, Any]]:
    def make(text: dict[str, Any]) -> tuple[Any, Any]:
        import transformers

        model = _made(
            name,
            vision_config={**TOWER, "image_size": 32, "patch_size": 8},
            text_config=text,
            image_token_id=at("<image>"),
            scale_factor=2,
            pad_token_id=0,
        )
        looks = getattr(transformers, f"{name}ImageProcessor")(
            size={"longest_edge": 32}, max_image_size={"longest_edge": 32}, do_image_splitting=False
        )
        words = tokenizer(
            image_token="<image>",
            fake_image_token="<fake_token_around_image>",
            global_image_token="<global-img>",
            end_of_utterance_token="<end_of_utterance>",
            video_token="<video>",
        )
        moves = [transformers.SmolVLMVideoProcessor(size={"longest_edge": 32})]
        return model, getattr(transformers, f"{name}Processor")(
            looks,
            words,
            *(moves if name == "SmolVLM" else ()),
            image_seq_len=4,
            chat_template="{{ messages }}",
        )

    return make


def qwen(name: str) -> Callable[[dict[str, Any]], tuple[Any, Any]]:
    def make(text: dict[str, Any]) -> tuple[Any, Any]:
        import transformers

        wide = text["hidden_size"]
        if name == "Qwen2VL":
            tower = {"depth": 2, "embed_dim": 32, "hidden_size": wide, "mlp_ratio": 2}
        else:
            tower = {
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 64,
                "out_hidden_size": wide,
            }
        if name == "Qwen2_5_VL":
            tower |= {"window_size": 32, "fullatt_block_indexes": [1]}
        rope = {**MROPE}
        newer = name.startswith("Qwen3VL")
        if newer:
            tower |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
            rope["mrope_interleaved"] = True
        experts = MIXTURE if name.endswith("Moe") else {}
        model = _made(
            name,
            vision_config={**tower, "num_heads": 2, "patch_size": 8},
            text_config={**text, **experts, "rope_parameters": rope},
            **VISION_IDS,
        )
        sides = {"patch_size": 8, "size": {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}}
        looks = transformers.Qwen2VLImageProcessor(**sides)
        moves = "Qwen3VLVideoProcessor" if newer else "Qwen2VLVideoProcessor"
        words = tokenizer(
            image_token="<|image_pad|>",
            video_token="<|video_pad|>",
            vision_bos_token="<|vision_start|>",
            vision_eos_token="<|vision_end|>",
        )
        return model, getattr(transformers, f"{name.removesuffix('Moe')}Processor")(
            looks, words, getattr(transformers, moves)(**sides), chat_template="{{ messages }}"
        )

    return make


def internvl(text: dict[str, Any]) -> tuple[Any, Any]:
    import transformers

    sides = {"image_size": [32, 32], "patch_size": [8, 8]}
    model = _made(
        "InternVL",
        vision_config={**TOWER, **sides},
        text_config=text,
        image_token_id=at("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    looks = transformers.GotOcr2ImageProcessor(
        size={"height": 32, "width": 32}, crop_to_patches=False
    )
    words = tokenizer(
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    moves = transformers.InternVLVideoProcessor(size={"height": 32, "width": 32})
    return model, transformers.InternVLProcessor(
        looks, words, moves, image_seq_length=4, chat_template="{{ messages }}"
    )


def photo(text: dict[str, Any]) -> tuple[Any, Any]:
    """The photo model's tower before another language model, all of random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from offramp_photo.build import empty_model, new_processor
    from offramp_photo.tower import PhotoTowerConfig

    small = {"neck_size": 32, "heads": 4, "layers": 1, "words": 2, "detector_size": 16}
    tower = PhotoTowerConfig(hidden_size=text["hidden_size"], vocabulary=5, **small)
    language = AutoModelForCausalLM.from_config(AutoConfig.for_model(**text))
    model = empty_model(language, tower, at("<file_sep>"))
    return model, new_processor(tokenizer(image_token="<file_sep>"), tower)


SHOWN = "<|vision_start|><|image_pad|><|vision_end|>"
KINDS: Mapping[str, tuple[Callable[[dict[str, Any]], tuple[Any, Any]], str, str, int]] = {
    "llava": (llava, "llama", "<image>", 28),
    "llava-mistral": (llava, "mistral", "<image>", 28),
    "llava-next": (llava_next, "llama", "<image>", 28),
    "photo": (photo, "llama", "<file_sep>", 224),
    "photo-chat": (photo, "llama", "<file_sep>", 224),
    "idefics3": (idefics3("Idefics3"), "llama", "<image>", 32),
    "smolvlm": (idefics3("SmolVLM"), "llama", "<image>", 32),
    "qwen2-vl": (qwen("Qwen2VL"), "", SHOWN, 32),
    "qwen2.5-vl": (qwen("Qwen2_5_VL"), "", SHOWN, 32),
    "qwen3-vl": (qwen("Qwen3VL"), "", SHOWN, 32),
    "qwen3-vl-moe": (qwen("Qwen3VLMoe"), "", SHOWN, 32),
    "internvl": (internvl, "qwen2", "<IMG_CONTEXT>", 32),
    "internvl-qwen3": (internvl, "qwen3", "<IMG_CONTEXT>", 32),
}
"""How each is built, its language model, how a prompt shows an image, and the image's side."""


def build(name: str, text: Mapping[str, Any], folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """Write `model` and `images`; return prompts, and what the processor makes of each."""
    from make_models import sharpen
    from PIL import Image

    maker, decoder, shown, side = KINDS[name]
    kind = {"model_type": decoder} if decoder else {}
    model, processor = maker({**text, "vocab_size": VOCABULARY, **kind})
    sharpen(model.eval())
    if name.startswith("photo"):
        _save_photo(model, processor, folder / "model")
    else:
        model.save_pretrained(folder / "model")
        processor.save_pretrained(folder / "model")
    if name.startswith("llava") or name.endswith("moe"):
        _as_on_the_hub(folder / "model" / "model.safetensors")
    (folder / "images").mkdir(exist_ok=True)
    draw = torch.Generator().manual_seed(3)
    found = []
    for place in range(PICTURES):
        pixels = torch.randint(0, 256, (side, side, 3), generator=draw, dtype=torch.uint8)
        image = Image.fromarray(pixels.numpy())
        image.save(folder / "images" / f"{place}.png")
        prompt = f"{shown}{TEXTS[place % len(TEXTS)]}"
        found.append((prompt, dict(processor(images=image, text=prompt, return_tensors="pt"))))
    return found


def encoder(name: str, backbone: Any, folder: Path) -> Any:
    """What makes inputs of a picture, of a model that sees them; None of a language model."""
    if name not in KINDS:
        return None
    from transformers import AutoProcessor

    from offramp.features.input_processor import InputProcessor

    made = InputProcessor(backbone, AutoProcessor.from_pretrained(folder))
    shown = KINDS[name][2]
    made.prompt_text = lambda prompt: f"{shown}{prompt}"  # these have no chat template
    return made


def _save_photo(model: Any, processor: Any, folder: Path) -> None:
    from offramp_photo.build import hand_on, save

    hand_on(model.model.multi_modal_projector)  # vLLM's class has none
    save(model, processor, folder)


def _as_on_the_hub(file: Path) -> None:
    """Give a CLIP tower's tensors the names, and experts the axes, that published checkpoints have,
    which vLLM reads."""
    from safetensors.torch import load_file, save_file

    found = {}
    for key, tensor in load_file(file).items():
        name = re.sub(r"vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", key)
        found[name] = tensor.transpose(1, 2).contiguous() if ".experts." in key else tensor
    save_file(found, file, metadata={"format": "pt"})
