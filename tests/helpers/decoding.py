"""What laws of decoding share: policies, HF's own answer, and counts of what ran."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import families
from families import FIRST_WORD, WORDLESS
from reference import Noted, of_steps, probe
from torch import Tensor

from offramp.core.decoding.policy import ExitPolicy, GenerationOutput
from offramp.core.engine.generate import generate
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits

NEW = 8
CALM = 0.1
"""Scale of the weights where rounding is measured: wilder ones blow it up, in HF's own cached
decoding against its uncached one to 8e-6. A wrong key or value shows as 1e-2 and more."""
EXACT = 2e-6


def never(name: str, **more: Any) -> ExitPolicy:
    """No token exits early: at no exit is the confidence of these models 1."""
    return ExitPolicy(dict.fromkeys(families.depths(name), 1.0), **more)


def always(name: str, **more: Any) -> ExitPolicy:
    """Every token exits at the first exit."""
    return ExitPolicy({families.depths(name)[0]: 0.0}, **more)


def lossless(
    name: str, threshold: float = 0.0, depths: tuple[int, ...] | None = None, **more: Any
) -> ExitPolicy:
    """The first exit, or those at `depths`, draft at `threshold`; the full model verifies."""
    chosen = depths or families.depths(name)[:1]
    return ExitPolicy(dict.fromkeys(chosen, threshold), lossless=True, **more)


def agreeing(whole: Backbone) -> Exits:
    """Exits that always agree: a copy of the last layer, at the depth before it."""
    return Exits(whole, (whole.depth - 1,))


def greedy(model: Any, inputs: dict[str, Tensor], **options: Any) -> Any:
    """What stock `generate` of Hugging Face gives."""
    return model.generate(**inputs, **{"max_new_tokens": NEW, "do_sample": False, **options})


def tokens_by_layer(whole: Backbone, call: Callable[[], Any]) -> tuple[Any, list[int]]:
    """What `call` returns, and for each layer the tokens that went all the way through it."""
    counts = [0] * whole.depth
    handles = []
    for index, layer in enumerate(whole.layers):

        def count(_module: Any, args: Any, _out: Any, index: int = index) -> None:
            counts[index] += args[0].shape[1]

        handles.append(layer.register_forward_hook(count))
    try:
        return call(), counts
    finally:
        for handle in handles:
            handle.remove()


def errors_by_depth(
    whole: Backbone,
    exits: Exits,
    inputs: dict[str, Tensor],
    policy: ExitPolicy,
    answer: Callable[..., GenerationOutput] | None = None,
) -> tuple[GenerationOutput, dict[int, float]]:
    """A generation, and by depth the largest error of its logits against an uncached forward.

    answer: what generates, by backbone, exits, inputs and policy; None: `generate`."""
    noted = Noted()
    answer = answer or (lambda *a, **kw: generate(a[0], a[2], exits=a[1], policy=a[3], **kw))
    made = answer(
        whole,
        exits,
        inputs,
        policy,
        max_new_tokens=NEW,
        do_sample=False,
        suppress_tokens=WORDLESS,
        observer=noted,
    )
    uncached = probe(whole, inputs, made.sequences, exits)
    errors = {}
    for depth in sorted(set(made.depths.flatten().tolist())):
        true = of_steps(uncached.logits[depth], NEW)
        off = (noted.of(len(made.sequences), NEW) - true)[..., FIRST_WORD:][made.depths == depth]
        errors[depth] = (off.abs().max() / true.abs().max()).item()
    return made, errors
