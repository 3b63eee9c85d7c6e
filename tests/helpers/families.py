"""Tiny random models of every supported family, and what they are called in the tests."""

from collections.abc import Sequence

import torch
from tiny_families import (
    CAUSAL_PROMPT,
    FURTHER,
    KINDS,
    LOOKS_AHEAD,
    NAMES,
    WORDLESS,
    Kind,
    build,
    depths,
    kind_of,
    perturb,
)
from tiny_families.models import blip2
from tiny_families.text import (
    BOS,
    EOS,
    FIRST_WORD,
    IMAGE,
    LAYERS,
    PAD,
    VOCABULARY,
    WIDTH,
    opt_config,
)
from tiny_families.text import llama as llama_config
from torch import Tensor
from transformers import CONFIG_MAPPING

__all__ = [
    "BOS",
    "CAUSAL_PROMPT",
    "EOS",
    "FIRST_WORD",
    "FURTHER",
    "IMAGE",
    "KINDS",
    "LAYERS",
    "LOOKS_AHEAD",
    "NAMES",
    "PAD",
    "VOCABULARY",
    "WIDTH",
    "WORDLESS",
    "Kind",
    "blip2",
    "build",
    "depths",
    "kind_of",
    "known",
    "llama_config",
    "longer",
    "one_row",
    "opt_config",
    "perturb",
]


def known(*types: str) -> list[str]:
    """Those of these `model_type`s that the installed transformers has."""
    return [name for name in types if name in CONFIG_MAPPING]


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


def longer(inputs: dict[str, Tensor], ids: Sequence[int]) -> dict[str, Tensor]:
    """The prompt with more text behind it."""
    more = torch.tensor([[*ids]])
    fills = {"attention_mask": 1, "token_type_ids": 0, "mm_token_type_ids": 0}
    added = {name: torch.full_like(more, fill) for name, fill in fills.items() if name in inputs}
    added["input_ids"] = more
    return {**inputs, **{name: torch.cat([inputs[name], new], 1) for name, new in added.items()}}
