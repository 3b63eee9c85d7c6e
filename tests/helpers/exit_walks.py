"""What exits see along an answer, and a slow walk over them: what policies are held to."""

from __future__ import annotations

import families
import torch
from families import WORDLESS
from reference import of_steps, probe

from offramp.core.decoding.policy import ExitPolicy
from offramp.core.engine.generate import generate
from offramp.core.models.exits import ExitSet

NEW = 12
DEPTHS = (1, 2, 3, 5)
KINDS = ("llava", "blip2-t5")


def decoded(whole, parts, inputs, policy, **options):
    """What `generate` writes with exits at `DEPTHS`. parts: an `ExitSet`, or its modules."""
    return generate(
        whole,
        inputs,
        exits=ExitSet.of(parts),
        policy=policy,
        **{"max_new_tokens": NEW, "do_sample": False, "suppress_tokens": WORDLESS, **options},
    )


class Seen:
    """What the exits at `depths` had before them at one token of one row."""

    def __init__(self, recorded, row, step, depths):
        self.logits = [recorded.logits[d][row, step] for d in depths]
        self.states = [[recorded.outputs[d - k][row, step] for k in (1, 0)] for d in depths]


def record(whole, inputs, made, parts):
    """A plain forward over the whole answer: states and logits of the steps that wrote it.

    Logits are of what may be said, as `decode` has it.
    """
    entered = []
    handle = whole.layers[0].register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    try:
        seen = probe(whole, inputs, made.sequences, parts)
    finally:
        handle.remove()
    seen.outputs[0] = entered[-1]
    for by_depth in (seen.logits, seen.outputs):
        by_depth.update({d: of_steps(x, NEW).clone() for d, x in by_depth.items()})
    for logits in seen.logits.values():
        logits[..., WORDLESS] = float("-inf")
    return seen


def walk(slow, threshold, recorded, row, step):
    """Depth and score at which a token exits, exit by exit. slow: the score of a `Seen`."""
    for place, depth in enumerate(DEPTHS):
        found = slow(Seen(recorded, row, step, DEPTHS[: place + 1]))
        if found >= threshold:
            return depth, found
    return families.LAYERS, found


def check_walks(slow, score, threshold, whole, parts, inputs):
    """Assert that depths and scores of an answer are those of the slow walk."""
    policy = ExitPolicy(dict.fromkeys(DEPTHS, threshold), score=score)
    made = decoded(whole, parts, inputs, policy)
    recorded = record(whole, inputs, made, ExitSet.of(parts).modules)
    rows = len(made.depths)
    walks = [[walk(slow, threshold, recorded, r, step) for step in range(NEW)] for r in range(rows)]
    assert made.depths.tolist() == [[depth for depth, _ in steps] for steps in walks]
    expected = torch.tensor([[found for _, found in steps] for steps in walks])
    assert torch.allclose(made.scores, expected, atol=1e-4)
    assert len(made.depths.unique()) >= 3


def check_finished_rows(score, threshold, whole, parts, inputs):
    """Assert that a row of several that has ended keeps no score."""
    policy = ExitPolicy(dict.fromkeys(DEPTHS, threshold), score=score)
    free = decoded(whole, parts, inputs, policy)
    made = decoded(whole, parts, inputs, policy, eos_token_id=int(free.new_tokens[0, 3]))
    done = made.depths == 0
    assert done.any() and made.scores[done].isnan().all()
    assert torch.equal(made.scores[:, 1:].isnan(), done[:, 1:])


def counted(whole, call):
    """What `call` returns, and how often the LM head ran."""
    runs = []
    handle = whole.head.register_forward_hook(lambda *_: runs.append(1))
    try:
        return call(), len(runs)
    finally:
        handle.remove()
