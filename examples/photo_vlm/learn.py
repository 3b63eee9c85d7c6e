"""The bridge in training: what is learnt, by which losses, and the state that is kept."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.photo_vlm.rows import Batch
from offramp.errors import DataError
from offramp.storage import write_atomic

_STATE = ("step", "bridge", "optimizer", "settings", "seconds")


class FrozenHead(torch.autograd.Function):
    """Weighted mean cross-entropy of `hidden @ head.T`, its gradient computed along the way.

    In chunks that stay in cache, since logits of a whole batch over a large vocabulary cost more
    to move than to compute. The head gets no gradient.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """hidden [N, D], head [V, D], targets [N], weights [N] to a scalar."""
        share = weights / weights.sum()
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


class Bridge(nn.Module):
    """Neck and projector: everything that is trained, in float32, computed in bfloat16."""

    def __init__(self, neck: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.neck, self.projector = neck, projector

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, 49, 1280] to visual tokens [B, tokens, width of the language model]."""
        with torch.autocast("cpu", torch.bfloat16):
            return self.projector(self.neck(features))  # type: ignore[no-any-return]


def text_loss(bridge: Bridge, lm: Any, features: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy over the answers' tokens, among the whole vocabulary: over a part of it, what
    lies outside costs nothing and is soon all that the model says."""
    visual = bridge(features)
    embedding = lm.get_input_embeddings()
    words = embedding(batch.ids[:, visual.shape[1] :])
    inputs = torch.cat((visual.to(words.dtype), words), 1)
    hidden = lm.model(
        inputs_embeds=inputs,
        attention_mask=batch.mask,
        position_ids=batch.positions,
        use_cache=False,
    ).last_hidden_state.flatten(0, 1)[batch.sources]
    head = lm.lm_head.weight
    loss: Tensor = FrozenHead.apply(hidden, head, batch.targets, batch.weights)  # type: ignore[no-untyped-call]
    return loss


class WordDetector(nn.Module):
    """Which words a photograph's captions have, read from its visual tokens as the language model
    would: by the cosine to each word's embedding, the best token counting.

    Training starts with it, because it costs a hundredth of a step through the language model
    (multiple-instance word detection as in Fang et al. 2015). Not part of the model.
    """

    def __init__(self, embeddings: Tensor, rates: Tensor) -> None:
        """embeddings [W, D] of the words; rates [W]: the share of photographs that have each."""
        super().__init__()
        embeddings = embeddings.float()
        self.centre = embeddings.mean(0)
        self.words = F.normalize(embeddings - self.centre, dim=1)
        self.length = embeddings.norm(dim=1).mean()
        self.bias = nn.Parameter(torch.logit(rates.clamp(1e-3, 0.9)) - 2.0)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, visual: Tensor) -> Tensor:
        """Visual tokens [B, N, D] to logits [B, W]."""
        tokens = F.normalize(visual.float() - self.centre, dim=2)
        logits: Tensor = (tokens @ self.words.T).amax(1) * self.scale.exp() + self.bias
        return logits

    def loss(self, visual: Tensor, present: Tensor) -> Tensor:
        """present [B, W]: 1 where a caption has the word. A small term keeps tokens as long as
        words are."""
        off = visual.float().norm(dim=2) / self.length - 1
        entropies = F.binary_cross_entropy_with_logits(self(visual), present, reduction="none")
        loss: Tensor = entropies.sum(1).mean() + 10 * off.square().mean()
        return loss


def rate_at(step: int, steps: int, peak: float, warmup: int = 30, decay: float = 0.4) -> float:
    """Learning rate: up in `warmup` steps, level, and over the last `decay` share of the steps down
    to a hundredth by half a cosine, so that the number of steps can still change while it is level.
    """
    up = min(1.0, (step + 1) / warmup)
    left = (steps - step) / max(1.0, decay * steps)
    if left >= 1:
        return peak * up
    down = 0.5 - 0.5 * torch.cos(torch.tensor(max(0.0, left) * torch.pi)).item()
    return peak * up * (0.01 + 0.99 * down)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """One file, replaced whole."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomic(path, buffer.getvalue())


def load_state(path: Path) -> dict[str, Any]:
    """Raise `DataError` where the file is not a whole state."""
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
        return {name: state[name] for name in _STATE}
    except Exception as error:
        raise DataError(
            f"{path} is not a whole training state.",
            "Remove it to start from the beginning, or put a whole copy in its place.",
        ) from error
