"""Builders of the tiny BLIP-2: tokenizer, processor, configurations; nothing custom."""

import copy
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessor,
    GenerationConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

from offramp.data.scenes import language, world
from offramp.storage import atomic_folder

WIDTH = 128
HEADS = 4
DECODER_LAYERS = 12
QUERIES = world.GRID * world.GRID + 1  # one per cell, and one for the whole picture
PIXEL_MEAN, PIXEL_STD = 0.5, 0.5  # per channel, of pixels in [0, 1]
SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<image>"]  # ids 0 to 4, in OPT's order
PAD, EOS, IMAGE = 1, 2, 4
MAX_NEW_TOKENS = 48  # more than the longest caption and its </s>; `generate` alone stops at 20


def build_tokenizer(backbone: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE: one token per word of the world, and bytes for any other text (lossless).

    Every word carries its leading space, also the first (as in sentencepiece), so that an answer
    tokenises alike after a prompt (OPT) and on its own (T5); decoding drops the first space.
    OPT texts start with </s> as OPT's do; T5 texts end with it.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Strip(content=" ", left=1, right=0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=2,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Text from which BPE learns every word of the world as one token, with its leading space.
    tokenizer.train_from_iterator([" ".join(language.vocabulary())] * 8, trainer)
    template = "</s> $A" if backbone == "opt" else "$A </s>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left" if backbone == "opt" else "right",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def build_processor(backbone: str) -> Blip2Processor:
    """Image and text processor; puts `QUERIES` image tokens before every prompt."""
    side = {"height": world.IMAGE_SIZE, "width": world.IMAGE_SIZE}
    images = BlipImageProcessor(size=side, image_mean=[PIXEL_MEAN] * 3, image_std=[PIXEL_STD] * 3)
    return Blip2Processor(images, build_tokenizer(backbone), num_query_tokens=QUERIES)


def vision_config() -> Blip2VisionConfig:
    return Blip2VisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=HEADS,
        image_size=world.IMAGE_SIZE,
        patch_size=12,
        initializer_range=0.02,
    )


def qformer_config() -> Blip2QFormerConfig:
    return Blip2QFormerConfig(
        vocab_size=8,  # the Q-Former reads no text
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        max_position_embeddings=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        cross_attention_frequency=1,
        encoder_hidden_size=WIDTH,
    )


def text_config(backbone: str, vocab_size: int) -> OPTConfig | T5Config:
    """OPT decoder or T5 encoder-decoder, both with `DECODER_LAYERS` decoder layers."""
    if backbone == "opt":
        return OPTConfig(
            vocab_size=vocab_size,
            hidden_size=WIDTH,
            word_embed_proj_dim=WIDTH,
            ffn_dim=4 * WIDTH,
            num_hidden_layers=DECODER_LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=256,
            do_layer_norm_before=True,
            init_std=0.05,  # 0.02 suits wider models; this one would start almost linear
            dropout=0.0,
            pad_token_id=PAD,
            bos_token_id=EOS,
            eos_token_id=EOS,
        )
    return T5Config(
        vocab_size=vocab_size,
        d_model=WIDTH,
        d_kv=WIDTH // HEADS,
        d_ff=4 * WIDTH,
        num_layers=4,
        num_decoder_layers=DECODER_LAYERS,
        # `generate` sizes its cache by `decoder_layers` where there is one, else by the depth of
        # the encoder, which is too little here.
        decoder_layers=DECODER_LAYERS,
        num_heads=HEADS,
        dropout_rate=0.0,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=EOS,
        decoder_start_token_id=PAD,
        is_encoder_decoder=True,
    )


def build_model(backbone: str, vocab_size: int) -> Blip2ForConditionalGeneration:
    """A randomly initialised tiny BLIP-2."""
    config = Blip2Config(
        vision_config=vision_config(),
        qformer_config=qformer_config(),
        text_config=text_config(backbone, vocab_size),
        num_query_tokens=QUERIES,
        image_token_index=IMAGE,
    )
    model = Blip2ForConditionalGeneration(config)
    nn.init.normal_(model.query_tokens, std=1.0)  # zero queries would start out all alike
    if backbone == "t5":  # beside T5's unit embeddings, image tokens of the default 0.02 go unheard
        nn.init.normal_(model.language_projection.weight, std=0.1)
    return model


def generation_config(backbone: str) -> GenerationConfig:
    """Greedy, and stops at </s>."""
    start = {"decoder_start_token_id": PAD} if backbone == "t5" else {}
    return GenerationConfig(
        bos_token_id=EOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        **start,
    )


def export(model: Blip2ForConditionalGeneration, backbone: str, folder: Path) -> None:
    """Write float16 weights, configurations and processor; complete or not at all.

    The file holds float16 to be small, but its configuration asks for float32, so that a plain
    `from_pretrained` computes in float32: half precision is slow on a CPU.
    """
    model = copy.deepcopy(model).half().eval()
    model.generation_config = generation_config(backbone)
    with atomic_folder(folder) as fresh:
        model.save_pretrained(fresh)
        build_processor(backbone).save_pretrained(fresh)
        config = fresh / "config.json"
        config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
