"""Laws of LayerSkip: deeper layers are dropped more often, a dropped layer leaves its row alone,
the loss reads the shared head after every layer, and drafts need no exit layer."""

from __future__ import annotations

import math
from typing import Any

import families
import pytest
import torch
from decoding import NEW
from families import WORDLESS

from offramp.adapter.adapter import Adapter
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits, ExitSet
from offramp_lab.methods.layerskip import dropout_rates, early_exit_loss, loss_weights


@pytest.mark.parametrize("layers", [2, 6, 32])
def test_rates_and_weights_are_the_papers(layers: int) -> None:
    rates = dropout_rates(layers, 0.2)
    assert rates[0] == 0 and math.isclose(rates[-1], 0.2) and rates == sorted(rates)
    for layer, rate in enumerate(rates):
        assert math.isclose(rate, 0.2 * (math.exp(layer * math.log(2) / (layers - 1)) - 1))
    weights = loss_weights(layers, 0.1)
    slow = [0.1 * sum(range(layer + 1)) for layer in range(layers - 1)]
    slow.append(layers - 1 + 0.1 * sum(range(layers - 1)))
    assert all(math.isclose(w, s / sum(slow)) for w, s in zip(weights, slow, strict=True))
    assert math.isclose(sum(weights), 1) and weights == sorted(weights)


def given(name: str, batch: Any, rows: int = 2) -> tuple[dict[str, Any], torch.Tensor]:
    inputs = batch(name, rows)
    labels = inputs["input_ids"].roll(-1, 1)
    labels[:, -1] = -100
    return inputs, labels


def test_the_loss_is_a_slow_sum_over_layers(backbone: Any, batch: Any) -> None:
    whole, (inputs, labels) = backbone("llava"), given("llava", batch)
    states = whole.model(**inputs, output_hidden_states=True).hidden_states[1:-1]
    total, weights = 0.0, loss_weights(whole.depth, 0.2)
    for weight, state in zip(weights, states, strict=False):  # the last has passed the norm
        logits = whole.logits(whole.final_norm(state)).double().log_softmax(-1)
        kept = [(r, c) for r, c in labels.ge(0).nonzero().tolist()]
        total += weight * sum(-float(logits[r, c, labels[r, c]]) for r, c in kept) / len(kept)
    last = whole.model(**inputs).logits.double().log_softmax(-1)
    total += weights[-1] * sum(-float(last[r, c, labels[r, c]]) for r, c in kept) / len(kept)
    found = early_exit_loss(whole, inputs, labels, largest=0.0)
    assert math.isclose(float(found), total, rel_tol=1e-4)


def test_a_dropped_layer_leaves_its_row_as_it_was(backbone: Any, batch: Any) -> None:
    """With a rate of 1 the last layer is dropped in every row, and the two deepest read alike."""
    whole, (inputs, labels) = backbone("llava"), given("llava", batch)
    seen: list[Any] = []
    hooks = [
        layer.register_forward_hook(
            lambda _, args, out: seen.append((args[0], out[0] if isinstance(out, tuple) else out))
        )
        for layer in whole.layers
    ]
    norm = whole.stack.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        early_exit_loss(whole, inputs, labels, largest=1.0)
    finally:
        for hook in (*hooks, norm):
            hook.remove()
    layers, entered = seen[: whole.depth], seen[whole.depth]
    assert not torch.equal(layers[-1][0], layers[-1][1])  # it would have changed the state
    assert torch.equal(entered, layers[-1][0])


def test_training_by_it_makes_shallow_layers_say_what_comes_next(batch: Any) -> None:
    whole, (inputs, labels) = Backbone(families.build("llava")), given("llava", batch)
    parameters = [*whole.stack.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    shallow = whole.depth // 2

    @torch.no_grad()
    def after() -> float:
        states = whole.model(**inputs, output_hidden_states=True).hidden_states[shallow]
        logits = whole.logits(whole.final_norm(states)).flatten(0, 1)
        return float(torch.nn.functional.cross_entropy(logits, labels.flatten()))

    before, optimizer = after(), torch.optim.Adam(parameters, 3e-3)
    draw = torch.Generator().manual_seed(0)
    for _ in range(10):
        optimizer.zero_grad()
        early_exit_loss(whole, inputs, labels, draw=draw).backward()
        optimizer.step()
    assert after() < 0.9 * before


@pytest.mark.parametrize("name", ["blip2-opt", "llava", "blip2-t5"])
def test_the_shared_head_drafts_and_answers_are_generates(
    name: str, backbone: Any, batch: Any
) -> None:
    whole, inputs = backbone(name), batch(name, 1)
    depth = families.depths(name)[0]
    parts = Exits(whole, (depth,), kind="lens")
    assert not [*parts.parameters()]
    policy = ExitPolicy({depth: 0.0}, lossless=True)
    options = {"max_new_tokens": NEW, "do_sample": False, "suppress_tokens": WORDLESS}
    made = Adapter(whole, ExitSet(parts), policy).generate(inputs, **options)
    own = whole.model.generate(**inputs, **options)
    assert torch.equal(made.sequences[:, -NEW:], own[:, -NEW:]) and made.rounds
