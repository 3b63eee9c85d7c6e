"""Lossless decoding: the exits draft, the remaining layers verify all drafts in one batch.

A token that an exit is sure of is a draft; its state waits at the exit. The first token that no
exit is sure of, or that ends the draft, takes the waiting states through the deeper layers with it
(nothing is computed twice), and the full model's choices at all these positions come out at once.
Drafts are kept as far as the full model agrees; the first it does not is replaced by its own
choice, and what was computed beyond is cropped from the cache.

Greedy output is the full model's, token for token. Sampled output has the full model's
distribution, by the acceptance rule of speculative sampling (Leviathan et al. 2023; Chen et al.
2023): keep a draft x with probability min(1, p(x) / q(x)), else draw from the positive part of
p - q. Both hold up to rounding: a layer over several tokens and over one may differ in the last
bits, so in half precision two tokens whose logits tie to within that may change places.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offramp.engine.model_runner import ModelRunner
from offramp.engine.prefill import Prefill
from offramp.engine.sampling import SequenceState


@dataclass(frozen=True)
class Draft:
    """A drafted token for each row: ids, depths, scores [B], and what it was sampled from [B, V].

    probabilities: None where tokens are not sampled but chosen.
    """

    tokens: Tensor
    depths: Tensor
    scores: Tensor
    probabilities: Tensor | None


def speculate(
    run: ModelRunner, loop: SequenceState, model: Any, prepared: dict[str, Any]
) -> list[tuple[int, int]]:
    """Decode until every row is finished; return (drafted, accepted) of each round.

    In a batch a round ends where the first unfinished row disagrees, for all rows.
    """
    run.begin(loop.unfinished, check=False)
    reading = Prefill(run.view, model, loop.ids, prepared)
    run.cache.activate_past_recording()  # sliding windows keep what a crop may need
    run.crop(0)
    loop.emit(loop.choose(reading.logits), run.depths, run.scores)
    rounds = []
    while live := loop.live:
        run.keep(loop.written, live)
        drafts, states = _draft(run, loop, reading)
        logits = run.backbone.logits(states)
        position, accepted, agreed = 0, 0, True
        while agreed and loop.live and position < logits.shape[1]:
            scores = loop.process(logits[:, position])
            if position < len(drafts):
                draft = drafts[position]
                tokens, kept = verify(draft, scores)
                agreed = bool((kept | ~loop.unfinished).all())
                accepted += agreed
                depths = torch.where(kept, draft.depths, run.backbone.depth)
                loop.emit(tokens, depths, draft.scores)
            else:
                loop.emit(
                    loop.draw(scores), torch.full_like(run.depths, run.backbone.depth), run.scores
                )
            position += 1
        rounds.append((len(drafts), accepted))
        undone = logits.shape[1] - position
        run.crop(undone)
        reading.rollback(undone)
    return rounds


def _draft(run: ModelRunner, loop: SequenceState, reading: Prefill) -> tuple[list[Draft], Tensor]:
    """Draft while the exits are sure; then the full model's states [B, n, D] at all n positions."""
    ids = loop.ids
    drafts: list[Draft] = []
    run.constrain = loop.constraints(lambda: ids)
    while True:
        kw = reading.extend(1)
        run.begin(loop.unfinished, check=len(drafts) < run.policy.max_draft)
        states = run.call(input_ids=ids[:, -1:], **kw)
        if not run.everybody_left:
            return drafts, states
        assert run.logits is not None
        scores = loop.process(run.logits, ids)
        tokens = loop.draw(scores)
        probabilities = scores.softmax(-1) if loop.samples else None
        drafts.append(Draft(tokens, run.depths, run.scores, probabilities))
        ids = torch.cat([ids, tokens[:, None]], 1)
        if loop.would_end(ids):
            return drafts, run.flush(kw)


def verify(draft: Draft, scores: Tensor) -> tuple[Tensor, Tensor]:
    """The full model's tokens [B], and which rows kept their draft [B]."""
    if draft.probabilities is None:
        tokens = scores.argmax(-1)
        return tokens, tokens == draft.tokens
    p, q, drafted = scores.softmax(-1), draft.probabilities, draft.tokens[:, None]
    ratio = p.gather(1, drafted) / q.gather(1, drafted)
    kept = (torch.rand_like(ratio) < ratio).squeeze(1)
    rest = (p - q).clamp(min=0)
    # Where p == q nothing is left, and nothing was rejected either.
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)
    redrawn = torch.multinomial(rest, 1).squeeze(1)
    return torch.where(kept, draft.tokens, redrawn), kept
