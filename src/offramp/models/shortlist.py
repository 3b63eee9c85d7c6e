"""Cheaper exit checks: a shortlist of the vocabulary, and gates before the exits.

Over a large vocabulary one LM head costs as much as several decoder layers. A shortlist holds the
tokens that the task's own answers are made of; an exit that reads only their rows of the head can
say nothing else, and how often that would be wrong is bounded from held-out answers. A gate
predicts, from the state that enters an exit, the score that the exit would give. Where that is too
low to exit, the exit is not run: only its keys and values are computed, for later tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offramp.errors import InputError


@dataclass(frozen=True, eq=False)
class Gate:
    """sigmoid(weight . state + bias): a linear prediction of an exit's score.

    weight: [D], float32. bias: a scalar.
    """

    weight: Tensor
    bias: Tensor

    def __call__(self, state: Tensor) -> Tensor:
        """Predicted scores [...] for states [..., D] that enter the exit."""
        return (state.float() @ self.weight + self.bias).sigmoid()


def places_of(ids: Tensor, vocabulary: int) -> Tensor:
    """The place of each token [V] in a shortlist of ids [S]; -1 of those that it lacks."""
    places = ids.new_full((vocabulary,), -1)
    places[ids] = torch.arange(len(ids), device=ids.device)
    return places


def shortlist_of(
    answers: Sequence[Sequence[int]],
    held_out: Sequence[Sequence[int]],
    size: int,
    *,
    confidence: float = 0.95,
) -> tuple[Tensor, dict[str, Any]]:
    """The `size` most frequent tokens of `answers`, and how often those of `held_out` are missed.

    The bound is Clopper and Pearson's (1934), over tokens, and holds for answers drawn like the
    held-out ones. Tokens of one answer are not independent, so it is a guide; the guarantee about
    whole answers is that of calibration, in which every miss counts as a difference.

    Returns ids [S], ascending, and `tokens`, `missed`, `miss_rate`, `miss_bound`, `confidence`.

    Raises:
        InputError: no answers on one of the sides, or a size below 2.
    """
    from scipy.stats import beta

    counts = Counter(i for ids in answers for i in ids)
    spoken = [i for ids in held_out for i in ids]
    if size < 2 or not counts or not spoken:
        raise InputError(
            f"A shortlist of {size} tokens cannot be made from {len(answers)} answers, with "
            f"{len(held_out)} held out.",
            "Ask for at least 2 tokens, and give answers of at least two images.",
        )
    ids = sorted(token for token, _ in counts.most_common(size))
    known = set(ids)
    missed = sum(token not in known for token in spoken)
    n = len(spoken)
    bound = 1.0 if missed == n else float(beta.ppf(confidence, missed + 1, n - missed))
    return torch.tensor(ids), {
        "size": len(ids),
        "tokens": n,
        "missed": missed,
        "miss_rate": missed / n,
        "miss_bound": bound,
        "confidence": confidence,
    }


def fit_gate(states: Tensor, scores: Tensor, *, decay: float = 1e-3) -> Gate:
    """A gate by logistic regression on scores in [0, 1], which count as soft labels.

    states: [N, D] entering the exit; scores: [N] that it gave. Each column is standardised for the
    fit, as a few of a decoder's are a hundred times larger than the rest, and the scaling is then
    folded into the weight. Deterministic.
    """
    x = states.double()
    centre, scale = x.mean(0), x.std(0, correction=0).clamp(min=1e-6)
    x, y = (x - centre) / scale, scores.double()
    weight = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    share = y.mean().clamp(1e-4, 1 - 1e-4)
    bias = torch.logit(share).detach().requires_grad_()
    descent: Any = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        descent.zero_grad()
        entropy = torch.nn.functional.binary_cross_entropy_with_logits(x @ weight + bias, y)
        total: Tensor = entropy + decay * weight.square().sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    with torch.enable_grad(), torch.inference_mode(False):
        descent.step(loss)
    folded = (weight / scale).detach()
    return Gate(folded.float(), (bias.detach() - folded @ centre).float())


def gate_level(guesses: Tensor, scores: Tensor, *, sure: float, lost: float) -> float:
    """The highest threshold of a gate that shuts out at most a share `lost` of the tokens whose
    score [N] is at least `sure`; 0 (always open) where no token is that sure."""
    leaving = guesses[scores >= sure].sort().values
    if not len(leaving):
        return 0.0
    # Rounded down, or the token that decides could itself be shut out.
    return max(0.0, float(leaving[int(lost * len(leaving))]) - 1e-6)
