"""What is learnt beside the bridge, by which loss, and the state that is kept."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.photo_vlm.rows import Batch
from offramp.core.errors import DataError, InputError
from offramp.core.storage import write_atomic

STATE = ("step", "seconds", "settings", "bridge", "lora", "optimizer", "best")
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class FrozenHead(torch.autograd.Function):
    """Weighted mean cross-entropy of `hidden @ head.T`, its gradient computed along the way; the
    weights may be negative, and their absolute values are what the mean divides by.

    In chunks that stay in cache, since logits of a whole batch over a large vocabulary cost more
    to move than to compute. The head gets no gradient.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """hidden [N, D], head [V, D], targets [N], weights [N] to a scalar."""
        share = weights / weights.abs().sum().clamp(min=1e-9)  # none: no gradient
        gradient = torch.empty_like(hidden)
        loss = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), 64):
            here = slice(start, start + 64)
            logs = (hidden[here] @ head.T).float().log_softmax(-1)
            picked = targets[here, None]
            loss -= (logs.gather(1, picked).squeeze(1) * share[here]).sum()
            slope = logs.exp_()
            slope.scatter_add_(1, picked, slope.new_full(picked.shape, -1.0))
            gradient[here] = (slope * share[here, None]).to(head.dtype) @ head
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None, None


def fast_dtype() -> torch.dtype:
    """bfloat16 where the processor multiplies it, else float32, which is then ten times as fast."""
    fast = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return torch.bfloat16 if fast else torch.float32


def add_lora(lm: Any, rank: int) -> dict[str, nn.Parameter]:
    """Low-rank updates (Hu et al. 2021) on all linear layers of a language model, in float32, by
    their names; nothing else of it is trained."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(LINEAR))
    inject_adapter_in_model(config, lm.model)
    parameters = {name: p for name, p in lm.named_parameters() if "lora_" in name}
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
    return parameters


def low_rank(lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The updates of `add_lora` as the photo model holds them: LAYER.a, LAYER.b with its factor."""
    held = {name: _held_as(name) for name in lora}
    return {held[name][0]: tensor.detach() * held[name][1] for name, tensor in lora.items()}


def _held_as(name: str) -> tuple[str, float]:
    """The name of an update as the photo model holds it, and its factor."""
    layer, _, rest = name.partition(".lora_")
    # Alpha is twice the rank.
    return (f"{layer}.b", 2.0) if rest.startswith("B") else (f"{layer}.a", 1.0)


@torch.no_grad()
def set_low_rank(lora: Mapping[str, Tensor], updates: Mapping[str, Tensor]) -> None:
    """Set the parameters of `add_lora` to updates as the photo model holds them: `low_rank` gives
    these again."""
    for name, now in low_rank(lora).items():
        if name not in updates or updates[name].shape != now.shape:
            raise InputError(
                f"The weights to start from have no update of {name} in {tuple(now.shape)}.",
                "Start from weights of the same language model and rank.",
            )
    for name, parameter in lora.items():
        held, factor = _held_as(name)
        parameter.copy_(updates[held] / factor)


def text_loss(lm: Any, visual: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy over the answers' tokens, among the whole vocabulary: over a part of it, what
    lies outside costs nothing and is soon all that the model says."""
    words = lm.get_input_embeddings()(batch.ids[:, visual.shape[1] :])
    inputs = torch.cat((visual.to(words.dtype), words), 1)
    with torch.autocast("cpu", torch.bfloat16, enabled=words.dtype == torch.bfloat16):
        hidden = lm.model(
            inputs_embeds=inputs,
            attention_mask=batch.mask,
            position_ids=batch.positions,
            use_cache=False,
        ).last_hidden_state.flatten(0, 1)[batch.sources]
    head = lm.lm_head.weight
    loss: Tensor = FrozenHead.apply(hidden.to(head.dtype), head, batch.targets, batch.weights)  # type: ignore[no-untyped-call]
    return loss


WARMUP, DECAY = 30, 0.4
"""Steps in which the learning rate rises, and the share of all in which it falls."""


def rate_at(step: int, steps: int) -> float:
    """Share of the learning rate: up, level, and in the end down to a hundredth by half a cosine,
    so that the number of steps can still change while it is level."""
    up = min(1.0, (step + 1) / WARMUP)
    left = (steps - step) / max(1.0, DECAY * steps)
    if left >= 1:
        return up
    down = 0.5 - 0.5 * torch.cos(torch.tensor(max(0.0, left) * torch.pi)).item()
    return up * (0.01 + 0.99 * down)


def save_state(path: Path, state: Any) -> None:
    """One file, replaced whole."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomic(path, buffer.getvalue())


def load_state(path: Path) -> dict[str, Any]:
    """Raise `DataError` where the file is not a whole state."""
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
        return {name: state[name] for name in STATE}
    except Exception as error:
        raise DataError(
            f"{path} is not a whole training state.",
            "Remove it to start from the beginning, or put a whole copy in its place.",
        ) from error
