"""A short prompt that any language decoder can read: a few ordinary ids, no image."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor

LENGTH = 6


def prompt_ids(model: Any) -> Tensor:
    """Ids [1, LENGTH] from the upper half of the vocabulary, none of them special."""
    words, device = vocabulary(model)
    special = set(special_ids(model))
    spread = (i % words for i in range(words // 2, 4 * words, max(1, words // 2 // LENGTH)))
    free = [*islice((i for i in spread if i not in special), LENGTH)]
    return torch.tensor([free], device=device)


def vocabulary(model: Any) -> tuple[int, torch.device]:
    """Return the number of ids that the decoder knows, and their device."""
    try:
        embedded = model.get_input_embeddings().weight
    except (AttributeError, NotImplementedError):  # a wrapper that does not say
        config = model.config.get_text_config(decoder=True)
        return int(config.vocab_size), next(model.parameters()).device
    return int(embedded.shape[0]), embedded.device


def special_ids(model: Any) -> list[int]:
    """Return the ids that mark an image, padding or an end, by their names in the configuration."""
    return sorted(set(_special(model.config.to_dict())))


def _special(config: Mapping[Any, Any]) -> Iterator[int]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _special(value)
        elif str(name).endswith(("_id", "_index")) and isinstance(value, int):
            yield value


def text_prompt(model: Any) -> dict[str, Any]:
    """Inputs for `generate` without an image."""
    ids = prompt_ids(model)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def encoder_states(config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Return made-up states of an encoder [1, 4, D], for a decoder whose encoder reads images."""
    from transformers.modeling_outputs import BaseModelOutput

    encoder = getattr(config, "encoder", config)
    width = getattr(encoder, "hidden_size", None) or config.get_text_config().hidden_size
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(1, 4, width, generator=draw).to(device, dtype)
    return BaseModelOutput(last_hidden_state=states)


def accepts(module: Any, name: str) -> bool:
    """Return True if the module's `forward` names this argument."""
    return name in inspect.signature(type(module).forward).parameters
