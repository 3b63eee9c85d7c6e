"""Lossless drafts by the first exit itself: no second model, no second cache, and it sees images.

`--speculative-config '{"model": "offramp_vllm.drafts.ExitDrafts", "num_speculative_tokens": 4}'`
beside the exits. The exit drafts on, token by token, in the cache of the model: one of kind
"drafting" from its own state, another behind the layers below it. vLLM verifies the drafts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offramp_vllm.refuse import Refused

NAME = "offramp_vllm.drafts.ExitDrafts"
ON_A_CPU = ((1, 3, 7), (4, 8, 5), (9, 32, 2), (33, 256, 1))
"""How many tokens are drafted while from so many to so many requests run, on a processor, where
further rows of a call are no longer free: what was fastest with the photo model's decoder, measured
up to 24."""


def exits_draft(config: Any) -> bool:
    """Whether drafts are this module's. config: vLLM's whole."""
    speculative = config.speculative_config
    return speculative is not None and speculative.model == NAME


class Join:
    """What enters an exit's layer where it drafts on: W_e norm(embedding) + W_s norm(state), of the
    token just written and of what the layer made of the token before."""

    def __init__(self, weights: Mapping[str, Tensor], like: Tensor) -> None:
        """weights: as the exits' file names them. like: of the dtype and device wanted."""
        own = {name: weight.to(like) for name, weight in weights.items()}
        self._words, self._states = own["embedding.weight"], own["state.weight"]
        self._norms = own["embedding_norm.weight"], own["state_norm.weight"]

    def __call__(self, embedded: Tensor, state: Tensor) -> Tensor:
        """[N, D] of embeddings [N, E] and states [N, D]."""
        words, states = (
            nn.functional.rms_norm(one, one.shape[-1:], norm)
            for one, norm in zip((embedded, state), self._norms, strict=True)
        )
        return words @ self._words.T + states @ self._states.T

    @staticmethod
    def whole(parts: Mapping[str, Tensor]) -> Tensor:
        """A state [N, D] of the parts that a model's layers hand on: their sum."""
        return torch.stack([*parts.values()]).sum(0)

    @staticmethod
    def parted(state: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the parts of a state [N, D], by the names of `like`: the first holds all of it."""
        first, *others = like
        return {first: state, **{name: torch.zeros_like(state) for name in others}}


class ExitDrafts:
    """What vLLM asks for drafts.

    runner: the model runner with exits, once the model is loaded.
    """

    runner: Any = None

    def __init__(self, config: Any) -> None:
        if "offramp" not in (config.additional_config or {}):
            raise Refused(
                f"{NAME} drafts by exits, and the server has none.",
                'Give --additional-config \'{"offramp": {"exits": FOLDER}}\' too.',
            )

    def load_model(self, model: Any) -> None:
        """Nothing: the exits are loaded with the model."""

    def propose(
        self, sampled: Sequence[Sequence[int]], lengths: Any, ids: Any, slot_mappings: Any = None
    ) -> list[list[int]]:
        """Drafts of each request. sampled: its new tokens; none where its prompt is not whole yet.
        lengths: its tokens, those included."""
        made: list[list[int]] = self.runner.drafts(sampled, lengths)
        return made
