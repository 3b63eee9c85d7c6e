"""EAGLE-3's drafter (Li et al. 2025), by the names that other engines read: a small model beside
the language model, which drafts tokens from three of its states.

Slot p is given the state at token p and the embedding of token p+1, and says token p+2. A file of
its tensors names them as speculators, vLLM, SGLang and llama.cpp's converter do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from offramp.core.errors import UnsupportedBackboneError
from offramp.core.models.backbone import Backbone
from offramp.core.models.weights import float_parameters

LAYERS = 4
"""Fewest layers of a language model whose states are read at three depths."""
_COPIED = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
"""Of a layer that is built like Llama's."""
_NORMS = {"hidden_norm": "input_layernorm", "post_attention_layernorm": "post_attention_layernorm"}
"""The drafter's, by the names that they have in such a layer."""


def read_depths(layers: int) -> tuple[int, int, int]:
    """Depths whose states the drafter reads, low, middle and high: EAGLE-3's own, where a model of
    so many layers has them."""
    return (2, layers // 2, layers - 3) if layers > 6 else (1, layers // 2, layers - 1)


def check_drafter(backbone: Backbone) -> None:
    """Raise `UnsupportedBackboneError` where no engine could run a drafter beside the backbone."""
    embedding = backbone.stack.get_input_embeddings()
    reasons = {
        "an encoder reads its prompt": backbone.is_encoder_decoder,
        f"it has {backbone.depth} decoder layers": backbone.depth < LAYERS,
        "its positions are not rotary": not hasattr(backbone.stack, "rotary_emb"),
        "its embeddings are not as wide as its states": int(embedding.weight.shape[1])
        != backbone.width,
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        raise UnsupportedBackboneError(
            f"No EAGLE-3 drafter can be made for {backbone.name}: {' and '.join(found)}.",
            f"It takes a decoder of {LAYERS} layers and more, with rotary positions. "
            "`offramp train --drafting` teaches exits to draft for it.",
        )


class _Attention(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        assert config.head_dim is not None and config.num_key_value_heads is not None
        self.size: int = config.head_dim
        width = config.hidden_size
        heads, shared = config.num_attention_heads, config.num_key_value_heads
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(2 * width, n * self.size, bias=False) for n in (heads, shared, shared)
        )
        self.o_proj: nn.Linear = nn.Linear(heads * self.size, width, bias=False)

    def forward(
        self, given: Tensor, rotary: Any, held: list[tuple[Tensor, Tensor]], seen: Tensor
    ) -> Tensor:
        query, key, value = (
            read(given).unflatten(-1, (-1, self.size)).transpose(1, 2)
            for read in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *rotary)
        held.append((key, value))
        keys, values = (torch.cat([pair[i] for pair in held], 2) for i in (0, 1))
        out = F.scaled_dot_product_attention(query, keys, values, seen, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class _Layer(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn: _Attention = _Attention(config)
        self.mlp: LlamaMLP = LlamaMLP(config)  # type: ignore[no-untyped-call]
        self.input_layernorm, self.hidden_norm, self.post_attention_layernorm = (
            LlamaRMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(3)
        )

    def forward(self, embedded: Tensor, state: Tensor, *attended: Any) -> Tensor:
        given = torch.cat([self.input_layernorm(embedded), self.hidden_norm(state)], -1)
        state = state + self.self_attn(given, *attended)
        return state + self.mlp(self.post_attention_layernorm(state))  # type: ignore[no-any-return]


class Eagle3Drafter(nn.Module):
    """The drafter of a backbone, in float32.

    depths: of the states it reads. words: token ids [S] that it can say, ascending.

    Untrained its layer is the backbone's last one, where that is built like Llama's, and it reads
    the highest state alone.
    """

    d2t: Tensor
    """[S]: what is added to a token's place among `words` to have its id."""
    t2d: Tensor
    """[V]: which tokens are among `words`."""

    def __init__(self, backbone: Backbone, words: Tensor) -> None:
        super().__init__()
        check_drafter(backbone)
        self.depths: tuple[int, int, int] = read_depths(backbone.depth)
        self.config = config = drafter_config(backbone)
        width = config.hidden_size
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they were
            torch.manual_seed(0)
            self.fc: nn.Linear = nn.Linear(len(self.depths) * width, width, bias=False)
            self.layer: _Layer = _Layer(config)
        self.norm: LlamaRMSNorm = LlamaRMSNorm(width, config.rms_norm_eps)
        self.lm_head: nn.Linear = nn.Linear(width, len(words), bias=False)
        self.register_buffer("d2t", words - torch.arange(len(words), device=words.device))
        said = torch.zeros(config.vocab_size, dtype=torch.bool)
        said[words.cpu()] = True
        self.register_buffer("t2d", said)
        self.rotary: LlamaRotaryEmbedding = LlamaRotaryEmbedding(config)
        self._begin(backbone, words)
        self.to(backbone.device)
        self.lm_head.requires_grad_(False)

    @property
    def words(self) -> Tensor:
        """Token ids [S] that it can say."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    @torch.no_grad()
    def _begin(self, backbone: Backbone, words: Tensor) -> None:
        width = self.config.hidden_size
        self.lm_head.weight.copy_(float_parameters(backbone.head)[0]()[words])
        self.fc.weight.zero_()
        self.fc.weight[:, -width:] = torch.eye(width)
        if backbone.norm is not None:
            self.norm.weight.copy_(_scale_of(backbone.norm, width))
        own, theirs = self.layer, backbone.layers[backbone.depth - 1]
        try:
            found = {name: float_parameters(theirs.get_submodule(name))[0]() for name in _COPIED}
        except AttributeError:
            return  # a layer of another build
        weights = {name: own.get_parameter(f"{name}.weight") for name in _COPIED}
        if any(len(found[name]) != len(weight) for name, weight in weights.items()):
            return
        for name, weight in weights.items():
            weight.zero_()
            weight[:, -found[name].shape[1] :].copy_(found[name])  # the half that reads the state
        for name, source in _NORMS.items():
            if (norm := getattr(theirs, source, None)) is not None:
                own.get_parameter(f"{name}.weight").copy_(_scale_of(norm, width))

    def tensors(self) -> dict[str, Tensor]:
        """Return what a file of it holds, by the names that other engines read."""
        state = self.state_dict()
        return {f"layers.0.{n[6:]}" if n.startswith("layer.") else n: t for n, t in state.items()}

    def fuse(self, states: Sequence[Tensor]) -> Tensor:
        """Return what a slot is given of the backbone's states [..., D] at `depths`: [..., D]."""
        return self.fc(torch.cat(list(states), -1))  # type: ignore[no-any-return]

    def forward(
        self,
        embedded: Tensor,
        state: Tensor,
        positions: Tensor,
        held: list[tuple[Tensor, Tensor]],
        seen: Tensor,
    ) -> Tensor:
        """States [B, T, D] after the layer, which the next draft is given.

        embedded, state: [B, T, D]. positions: [T]. held: keys and values of earlier calls; this
        call's are added. seen: which of all keys each slot sees [B or 1, 1, T, K].
        """
        rotary = self.rotary(state, positions[None])
        return self.layer(embedded, state, rotary, held, seen)  # type: ignore[no-any-return]

    def logits(self, states: Tensor) -> Tensor:
        """Logits [..., S] of states [..., D]."""
        return self.lm_head(self.norm(states))  # type: ignore[no-any-return]


def _scale_of(norm: nn.Module, width: int) -> Tensor:
    """What an RMS norm multiplies by [D], however it keeps that: what it makes of ones."""
    weight = next(norm.parameters())
    made: Tensor = norm(torch.ones(width, dtype=weight.dtype, device=weight.device))
    return made


def drafter_config(backbone: Backbone) -> LlamaConfig:
    """Return the configuration of the drafter's layer: Llama's, with the sizes of the backbone's
    own."""
    text = backbone.text_config
    width, heads = backbone.width, int(text.num_attention_heads)
    parameters = getattr(text, "rope_parameters", None) or {}
    theta = parameters.get("rope_theta", getattr(text, "rope_theta", None))
    return LlamaConfig(
        vocab_size=int(backbone.stack.get_input_embeddings().weight.shape[0]),
        hidden_size=width,
        intermediate_size=int(getattr(text, "intermediate_size", None) or 4 * width),
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(text, "head_dim", None) or width // heads),
        rms_norm_eps=float(getattr(text, "rms_norm_eps", None) or 1e-6),
        max_position_embeddings=int(getattr(text, "max_position_embeddings", None) or 8192),
        rope_parameters={"rope_type": "default", "rope_theta": float(theta or 10_000.0)},
        tie_word_embeddings=False,
    )
