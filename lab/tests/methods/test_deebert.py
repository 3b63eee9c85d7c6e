"""Laws of DeeBERT's off-ramps: a token leaves where the entropy of the exit's own classifier is low
enough, and the classifier is the exit's alone."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from decoding import NEW
from families import WORDLESS
from reference import of_steps, probe

from offramp.core.decoding.policy import ExitPolicy
from offramp.core.engine.generate import generate
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits, ExitSet

OPTIONS = {"max_new_tokens": NEW, "do_sample": False, "suppress_tokens": WORDLESS}


def off_ramps(whole: Backbone, *depths: int) -> Exits:
    """Off-ramps whose classifiers differ, as trained ones do."""
    import offramp_lab.methods  # noqa: F401  it registers them

    made = Exits(whole, depths, kind="off_ramp")
    with torch.no_grad():
        for place, exit in enumerate(made.values()):
            exit.own.weight.add_(torch.randn_like(exit.own.weight), alpha=0.1 * (1 + place))
    return made


@pytest.mark.parametrize("name", ["blip2-opt", "llava"])
def test_a_token_leaves_by_the_entropy_of_the_exits_own_classifier(name: str, batch: Any) -> None:
    whole, inputs = Backbone(families.build(name)), batch(name, 1)
    first, second = families.depths(name)
    parts = off_ramps(whole, first, second)

    def entropies(sequences: Any) -> dict[int, Any]:
        """Of each exit's logits, written out: W h through the backbone's norm and head."""
        found = {}
        for depth, logits in probe(whole, inputs, sequences, parts).logits.items():
            said = of_steps(logits, NEW)[0].double()
            said[:, WORDLESS] = float("-inf")
            p = said.softmax(-1)
            terms = torch.where(p > 0, p * p.log(), torch.zeros(()).double())
            found[depth] = 1 + terms.sum(-1) / torch.tensor(float(said.shape[-1])).log()
        return found

    free = generate(whole, inputs, exits=ExitSet(parts), policy=ExitPolicy({}), **OPTIONS)
    level = float(entropies(free.sequences)[first].quantile(0.6))
    policy = ExitPolicy({first: level, second: level}, score="entropy", first={})
    made = generate(whole, inputs, exits=ExitSet(parts), policy=policy, **OPTIONS)
    seen = entropies(made.sequences)
    opening = 0 if whole.is_encoder_decoder else 1
    for step in range(opening, NEW):
        leaves = (d for d in (first, second) if float(seen[d][step]) >= level)
        assert int(made.depths[0, step]) == next(leaves, whole.depth)
    assert {first} < {*made.depths[0].tolist()}


def test_before_training_it_is_the_logit_lens_and_has_weights_of_its_own(backbone: Any) -> None:
    whole = backbone("llava")
    import offramp_lab.methods  # noqa: F401

    parts = Exits(whole, (1, 2), kind="off_ramp")
    hidden = torch.randn(2, 3, whole.width)
    for exit in parts.values():
        assert torch.equal(exit(hidden), hidden)
    one, two = ({id(p) for p in exit.parameters()} for exit in parts.values())
    assert one and two and not one & two
