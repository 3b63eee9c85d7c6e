"""A prompt that the backbone has read, and the arguments every later call of its stack takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from offramp.models.intercept import InterceptedModel

_STATIC = ("cache", "past_key_values", "encoder_hidden_states", "encoder_attention_mask")


class Prefill:
    """Runs the prefill of a prepared generation and keeps what the steps after it repeat."""

    def __init__(
        self, view: InterceptedModel, model: Any, ids: Tensor, model_kwargs: dict[str, Any]
    ) -> None:
        """Run the prompt; `ids` and `model_kwargs` are what HF's `generate` prepared."""
        with view.recording() as calls:
            inputs = model.prepare_inputs_for_generation(
                ids, is_first_iteration=True, next_sequence_length=None, **model_kwargs
            )
            self.logits: Tensor = model(**inputs, return_dict=True).logits[:, -1]
        self.prefill: dict[str, Any] = calls[-1]
        self._static = {n: self.prefill[n] for n in _STATIC if self.prefill.get(n) is not None}
        self._static |= {"use_cache": True, "return_dict": True}
        self.positions: Tensor | None = self.prefill.get("position_ids")
        # Some models hand their stack a mask made for the prompt; every stack takes the 2-D one,
        # from which it makes its own. In an encoder-decoder, `attention_mask` is the encoder's.
        decoder_only = "encoder_hidden_states" not in self._static
        mask = (model_kwargs if decoder_only else self.prefill).get("attention_mask")
        self._mask: Tensor | None = mask

    def extend(self, tokens: int, real: Tensor | None = None) -> dict[str, Any]:
        """Arguments for the stack's next call, on `tokens` new tokens for each row.

        real: which of them [B, tokens] are no padding; all of them when left out.
        """
        kw = dict(self._static)
        if self.positions is not None:
            ahead = torch.arange(1, tokens + 1, device=self.positions.device)
            self.positions = self.positions[..., -1:] + ahead
            kw["position_ids"] = self.positions
            if real is not None:  # a pad's position is never seen, but must be one that exists
                kw["position_ids"] = torch.where(real, self.positions, 0)
        if self._mask is not None:
            new = self._mask.new_ones(len(self._mask), tokens)
            self._mask = torch.cat([self._mask, new if real is None else real.to(new)], 1)
            kw["attention_mask"] = self._mask
        return kw

    def rollback(self, tokens: int) -> None:
        """Forget the last `tokens` tokens that `extend` counted."""
        if self.positions is not None:
            self.positions = self.positions[..., -1:] - tokens
        if self._mask is not None:
            self._mask = self._mask[:, : self._mask.shape[1] - tokens]


def without_inputs(kw: Mapping[str, Any]) -> dict[str, Any]:
    """Stack arguments less the tokens and the cache: what a call on other states can reuse."""
    dropped = ("input_ids", "inputs_embeds", "cache", "past_key_values", "use_cache")
    return {name: value for name, value in kw.items() if name not in dropped}


def cache_name(stack: Any) -> str:
    """The stack's argument for the KV cache; transformers 5.24 renamed `past_key_values`."""
    known = inspect.signature(type(stack).forward).parameters
    return "cache" if "cache" in known else "past_key_values"
