"""Laws of compiled decoding: the same tokens at the same depths, and nothing left behind.

What inductor makes is tried in `tests/benchmarks/test_inductor.py`: it takes half a minute.
"""

from __future__ import annotations

import torch
from compiling import two_layers
from torch._dynamo.utils import counters

from offramp.engine.generate import generate
from offramp.engine.policy import ExitPolicy
from offramp.models.compile import compiled
from offramp.models.exits import ExitSet
from offramp.models.shortlist import Gate

GREEDY = {"max_new_tokens": 6, "do_sample": False}


def test_compiled_layers_say_what_the_eager_ones_say():
    """On the encoder-decoder whose layers hand most on, and with a gate."""
    whole, modules, inputs = two_layers("mini-t5")
    parts = ExitSet(modules, gates={1: Gate(torch.randn(whole.width), torch.tensor(0.0))})
    rule = ExitPolicy({1: 0.003}, gates={1: 0.5})
    run = {"exits": parts, "policy": rule, **GREEDY}
    eager = generate(whole, inputs, **run)
    with compiled(whole, parts, backend="eager") as done:
        assert done
        ours = generate(whole, inputs, **run)
        graphs = counters["stats"]["unique_graphs"]
        generate(whole, inputs, **{**run, "max_new_tokens": 12})
        assert 0 < graphs == counters["stats"]["unique_graphs"]  # a length is no other code
    assert torch.equal(ours.sequences, eager.sequences)
    assert torch.equal(ours.depths, eager.depths) and len(eager.depths.unique()) == 2
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
