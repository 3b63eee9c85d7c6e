"""A tiny random SmolVLM with a processor of its own, as a user has them: in one folder.

Of the architecture of SmolVLM-256M-Instruct, which transformers calls Idefics3.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

IMAGE_TOKENS = 4
SPECIAL = (
    "<|pad|>",
    "<|im_start|>",
    "<end_of_utterance>",
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
)
TEXT = "User: Assistant: What is this? Describe the image. a red dog runs on green grass"
CHAT = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        extra_special_tokens={
            "image_token": SPECIAL[3],
            "fake_image_token": SPECIAL[4],
            "global_image_token": SPECIAL[5],
            "end_of_utterance_token": SPECIAL[2],
        },
    )


def save_smolvlm(folder: Path, seed: int = 2) -> None:
    """Write model and processor to `folder`; an image of 32 by 32 pixels is four tokens."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_idefics3 import Idefics3ImageProcessor

    words = tokenizer()
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = Idefics3Config(
        vision_config={**sizes, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8},
        text_config={
            **sizes,
            "model_type": "llama",
            "num_hidden_layers": 6,
            "num_key_value_heads": 2,
            "vocab_size": len(words),
            "pad_token_id": words.pad_token_id,
            "initializer_range": 0.2,
        },
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=words.pad_token_id,
    )
    model = Idefics3ForConditionalGeneration(config)
    model.generation_config.eos_token_id = words.eos_token_id
    model.generation_config.pad_token_id = words.pad_token_id
    model.save_pretrained(folder)
    images = Idefics3ImageProcessor(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 32}, do_image_splitting=False
    )
    made = Idefics3Processor(images, words, image_seq_len=IMAGE_TOKENS, chat_template=CHAT)
    made.save_pretrained(folder)
