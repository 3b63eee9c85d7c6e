"""Laws of compiled decoding: the same tokens at the same depths, and nothing left behind."""

from __future__ import annotations

import pytest
import torch

from offramp.engine.generate import generate
from offramp.engine.policy import ExitPolicy
from offramp.models.compile import compiled
from offramp.models.exits import Exits, ExitSet
from offramp.models.shortlist import Gate
from offramp.research.benchmark.shapes import shape

GREEDY = {"max_new_tokens": 6, "do_sample": False}


def test_compiled_layers_say_what_the_eager_ones_say(backbone, exits, batch):
    """On the encoder-decoder whose layers hand most on, and with a gate: tracing is slow."""
    name = "blip2-t5"
    whole, modules, inputs = backbone(name, wide=4.0), exits(name, wide=4.0), batch(name, 1)
    depth = modules.depths[0]
    gate = Gate(torch.randn(whole.width), torch.tensor(0.0))
    parts = ExitSet(modules, gates={depth: gate})
    rule = ExitPolicy({depth: 0.05}, gates={depth: 0.5})
    run = {"exits": parts, "policy": rule, **GREEDY}
    eager = generate(whole, inputs, **run)
    with compiled(whole, parts, backend="eager") as done:
        assert done
        ours = generate(whole, inputs, **run)
    assert torch.equal(ours.sequences, eager.sequences)
    assert torch.equal(ours.depths, eager.depths)
    assert all(layer._compiled_call_impl is None for layer in (*whole.layers, *modules.values()))


def test_a_machine_without_a_compiler_decodes_as_before(backbone, batch, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    import torch._inductor.cpp_builder as builder

    def none():
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(builder, "get_cpp_compiler", none)
    whole, inputs = backbone("llava"), batch("llava", 1)
    with compiled(whole) as done:
        assert not done
        made = generate(whole, inputs, **GREEDY)
    assert "not compiled: RuntimeError: No working C++ compiler" in caplog.text
    assert torch.equal(made.sequences, generate(whole, inputs, **GREEDY).sequences)


def test_code_made_by_inductor_leaves_at_the_same_depths():
    """With freezing, on two layers and an exit: the real thing, as far as a test can wait."""
    from offramp.models.compile import _missing

    small = shape("mini-llava")
    config = small.config()
    config.num_hidden_layers = 2
    whole = type(small)("two", lambda: config, small.wrap).build()
    if reason := _missing(whole):
        pytest.skip(f"no C++ compiler here ({reason})")
    parts, inputs = Exits(whole, (1,)).requires_grad_(False), small.inputs(whole)
    policy = ExitPolicy({1: 0.002})
    eager = generate(whole, inputs, exits=parts, policy=policy, **GREEDY)
    with compiled(whole, parts):
        ours = generate(whole, inputs, exits=parts, policy=policy, **GREEDY)
    assert torch.equal(ours.sequences, eager.sequences)
    torch.testing.assert_close(ours.scores, eager.scores, equal_nan=True, atol=1e-4, rtol=1e-3)
