"""Decoding ahead of the layers above an exit: lossless drafts, and guesses between early exits.

**Lossless**: the exits draft, the remaining layers verify all drafts in one batch.

A token of which an exit is confident is a draft; its state is pending at the exit. The first token
of which no exit is, or that ends the draft, takes the pending states through the deeper layers
(nothing is computed twice), and the full model's choices at all these positions come out at once.
Drafts are kept as far as the full model agrees; the first it does not is replaced by its own
choice, and what was computed beyond is cropped from the cache.

Greedy output is the full model's, token for token. Sampled output has the full model's
distribution, by the acceptance rule of speculative sampling (Leviathan et al. 2023; Chen et al.
2023): keep a draft x with probability min(1, p(x) / q(x)), else draw from the positive part of
p - q. Both hold up to rounding: a layer over several tokens and over one may differ in the last
bits, so in half precision two tokens whose logits tie to within that may change places.

**Guesses**: in early exit a token of which the exit is not confident goes on as a guess of the
exit's, and the layers above run a few tokens later, once over all that is pending: they confirm
each guess, or replace it and drop what was written behind it. What comes out is what the thresholds
alone say: a confirmed guess is the full model's token, and counts at full depth. It pays because
most tokens of which an exit is not confident are right, and because several tokens in one call cost
hardly more than one where reading weights is the cost. (Kin: BiLD, Kim et al. 2023, of two models.)
For single greedy answers with one exit: a guess that is sampled would need other random numbers
than the token it stands for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.engine.kv_cache import check_croppable
from offramp.engine.model_runner import ModelRunner, Step
from offramp.engine.prefill import Prefill, Prepared
from offramp.engine.sampling import SequenceState


@dataclass(frozen=True)
class Draft:
    """A token for each row that is not given out yet: ids, depths, scores [B], and what it was
    sampled from [B, V].

    probabilities: None where tokens are not sampled but chosen. final: whether it stands without
    the full model's word, as a token that exited behind a guess does.
    """

    tokens: Tensor
    depths: Tensor
    scores: Tensor
    probabilities: Tensor | None = None
    final: bool = False


def speculate(
    run: ModelRunner, sequence: SequenceState, prepared: Prepared, max_draft: int
) -> list[tuple[int, int]]:
    """Decode until every row is finished; return (drafted, accepted) of each round.

    In a batch a round ends where the first unfinished row disagrees, for all rows.
    """
    full = run.backbone.depth
    run.begin(sequence.unfinished, sequence.ids, check=False)
    prefill = Prefill(run.intercepted, prepared)
    check_croppable(run.cache)
    allow_crops(run)
    last = run.prompt_step(prefill.positions, sequence.unfinished)
    sequence.emit(sequence.choose(prefill.logits), last.depths, last.scores)
    rounds = []
    while live := sequence.live:
        run.keep_rows(sequence.written, live)
        drafts, last = _draft(run, sequence, prefill, max_draft)
        assert last.states is not None
        logits = run.backbone.logits(last.states)
        position, accepted, agreed = 0, 0, True
        while agreed and sequence.live and position < logits.shape[1]:
            scores = sequence.process(logits[:, position])
            if position < len(drafts):
                draft = drafts[position]
                tokens, accepts = verify(draft, scores)
                agreed = bool((accepts | ~sequence.unfinished).all())
                accepted += agreed
                sequence.emit(tokens, torch.where(accepts, draft.depths, full), draft.scores)
            else:
                depths = torch.full_like(last.depths, full)
                sequence.emit(sequence.draw(scores), depths, last.scores)
            position += 1
        rounds.append((len(drafts), accepted))
        undone = logits.shape[1] - position
        run.crop(undone)
        prefill.rollback(undone)
    return rounds


def allow_crops(run: ModelRunner) -> None:
    """Have sliding windows keep what a crop may need, from the prompt on."""
    run.cache.activate_past_recording()
    run.crop(0)


def _draft(
    run: ModelRunner, sequence: SequenceState, prefill: Prefill, max_draft: int
) -> tuple[list[Draft], Step]:
    """Draft while the exits are confident; then the step that takes all of it to full depth."""
    ids = sequence.ids
    drafts: list[Draft] = []
    run.constrain = sequence.constraints(lambda: ids)
    while True:
        kw = prefill.extend(1)
        run.begin(sequence.unfinished, ids, check=len(drafts) < max_draft)
        step = run.step(input_ids=ids[:, -1:], **kw)
        if step.states is not None:
            return drafts, step
        assert step.exit_logits is not None
        scores = sequence.process(step.exit_logits, ids)
        tokens = sequence.draw(scores)
        probabilities = scores.softmax(-1) if sequence.samples else None
        drafts.append(Draft(tokens, step.depths, step.scores, probabilities))
        ids = torch.cat([ids, tokens[:, None]], 1)
        if sequence.would_end(ids):
            return drafts, run.catch_up(kw)


def verify(draft: Draft, scores: Tensor) -> tuple[Tensor, Tensor]:
    """The full model's tokens [B], and which rows kept their draft [B]."""
    if draft.probabilities is None:
        tokens = scores.argmax(-1)
        return tokens, tokens == draft.tokens
    p, q, drafted = scores.softmax(-1), draft.probabilities, draft.tokens[:, None]
    ratio = p.gather(1, drafted) / q.gather(1, drafted)
    accepts = (torch.rand_like(ratio) < ratio).squeeze(1)
    residual = (p - q).clamp(min=0)
    # Where p == q nothing is left, and nothing was rejected either.
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, p)
    redrawn = torch.multinomial(residual, 1).squeeze(1)
    return torch.where(accepts, draft.tokens, redrawn), accepts


# -- guesses ---------------------------------------------------------------------------------------

OPEN_GUESSES = 5
"""Guesses between two calls of the layers above the exit: of more, one is likely wrong."""


def write_with_guesses(
    run: ModelRunner, sequence: SequenceState, prefill: Prefill, above: float
) -> None:
    """Write on behind the first token until the answer is over.

    above: score from which an exit's token is worth a guess.
    """
    allow_crops(run)
    while sequence.live:
        held, fed, last = _guess(run, sequence, prefill, above)
        undone = 0 if last is None else _rule(run, sequence, held, fed, last)
        if undone and sequence.live:
            run.crop(undone)
            prefill.rollback(undone)


def _guess(
    run: ModelRunner, sequence: SequenceState, prefill: Prefill, above: float
) -> tuple[list[Draft], int, Step | None]:
    """Write until something must be known of the layers above.

    Returns what is held from the first guess on, the tokens fed since, and the step that took them
    through these layers; None where the answer is over without.
    """
    assert run.decider is not None
    ids = sequence.ids
    held: list[Draft] = []
    run.constrain = sequence.constraints(lambda: ids)
    while True:
        free = sum(not one.final for one in held) < OPEN_GUESSES
        run.decider.guess_above = above if free else None
        kw = prefill.extend(1)
        run.begin(sequence.unfinished, ids)
        step = run.step(input_ids=ids[:, -1:], **kw)
        if step.states is not None:
            return held, len(held) + 1, step
        assert step.exit_logits is not None
        token = sequence.draw(sequence.process(step.exit_logits, ids))
        if not held and not run.decider.guessed:
            sequence.emit(token, step.depths, step.scores)
            ids = sequence.ids
            if not sequence.live:
                return [], 0, None
            continue
        ids = torch.cat([ids, token[:, None]], 1)
        held.append(Draft(token, step.depths, step.scores, final=not run.decider.guessed))
        if sequence.would_end(ids):
            return held, len(held), run.catch_up(kw)


def _rule(
    run: ModelRunner, sequence: SequenceState, held: list[Draft], fed: int, last: Step
) -> int:
    """Give out what stands, with the full model's token in the place of each guess and behind all;
    how many of the tokens fed came to nothing."""
    assert last.states is not None
    states = last.states[:, -fed:]
    asked = [place for place in range(fed) if place == len(held) or not held[place].final]
    logits = dict(zip(asked, run.backbone.logits(states[:, asked]).unbind(1), strict=True))
    full = torch.full_like(last.depths, run.backbone.depth)
    for place in range(fed):
        draft, wrong = held[place] if place < len(held) else None, False
        if draft is not None and draft.final:
            sequence.emit(draft.tokens, draft.depths, draft.scores)
        else:
            token = sequence.draw(sequence.process(logits[place]))
            sequence.emit(token, full, last.scores if draft is None else draft.scores)
            wrong = draft is not None and not torch.equal(token, draft.tokens)
        if wrong or not sequence.live:
            return fed - place - 1
    return 0
