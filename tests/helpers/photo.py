"""Stand-ins for the photo model's parts: a tiny language model, its tokenizer, random weights."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from offramp.core.storage import digest_file, write_json
from offramp_photo import build
from offramp_photo.tower import Bridge, EfficientNetLite0, PhotoTowerConfig, WordDetector

END, IMAGE = 256, 257
FIELDS = {
    "hidden_size": 32,
    "neck_size": 16,
    "layers": 1,
    "heads": 2,
    "grid": 2,
    "queries": 1,
    "words": 2,
    "vocabulary": 5,
    "detector_size": 8,
}
TOWER = PhotoTowerConfig(**FIELDS)


@functools.cache
def tokenizer() -> Any:
    """Bytes, an end token, and the image's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|im_end|>", build.IMAGE_TOKEN])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|im_end|>"
    )


def language(dtype: torch.dtype = torch.float32) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=END,
        pad_token_id=END,
        bos_token_id=END,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)


def trained(folder: Path) -> Path:
    """A folder as the data package holds it, with random weights."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    bridge, detector = Bridge(TOWER), WordDetector(TOWER)
    torch.nn.init.normal_(bridge.words.table)
    weights = {f"bridge.{n}": t for n, t in bridge.state_dict().items()}
    weights |= {f"detector.{n}": t for n, t in detector.state_dict().items()}
    layer = "model.layers.1.mlp.up_proj"
    weights |= {f"lora.{layer}.a": torch.randn(2, 32), f"lora.{layer}.b": torch.randn(48, 2)}
    save_file(weights, folder / build.WEIGHTS)
    digest = digest_file(folder / build.WEIGHTS)
    write_json(folder / build.CARD, {"tower": FIELDS, "sha256": digest})
    return folder


def use_stand_ins(monkeypatch: Any) -> list[str]:
    """Let the model be built of tiny parts; the list gets the name of each part that is read."""
    read: list[str] = []

    def weights_file(weights: Any, cache: Path) -> Path:
        read.append(weights.package)
        return Path(weights.member)

    def language_of(file: Path, **_: Any) -> tuple[Any, Any]:
        torch.manual_seed(7)
        return language(torch.bfloat16), tokenizer()

    def network_of(file: Path) -> EfficientNetLite0:
        torch.manual_seed(8)
        return EfficientNetLite0().eval()

    monkeypatch.setattr(build, "weights_file", weights_file)
    monkeypatch.setattr(build, "load_language", language_of)
    monkeypatch.setattr(build, "load_network", network_of)
    return read
