"""How many layers tide-inference runs for a token; rewrites tide.json in lab/records.

Its routers are made to fire at the first layer that has one, for every token, which is the most
that they could save. A small Llama with random weights: what counts is which layers are called.
tide-inference is no dependency of the lab: `pip install --no-build-isolation tide-inference`.
`python -m offramp_lab.records.tide` takes seconds.
"""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from offramp.errors import InputError
from offramp_lab.records.record import Record, asked

RECORD = Record("tide")
LAYERS, WIDTH, TOKENS = 16, 64, 20


def main() -> None:
    asked(__doc__)
    RECORD.write(layers_run())


def layers_run() -> dict[str, Any]:
    """Calls of a decoder layer for each decoded token, where every router fires.

    Raises:
        InputError: tide-inference is not installed.
    """
    try:
        import TIDE  # type: ignore[import-not-found]
        from TIDE.router import (  # type: ignore[import-not-found]
            RouterCheckpoint,
            TokenRouter,
        )
    except ImportError:
        raise InputError(
            "tide-inference is not installed.",
            "pip install --no-build-isolation tide-inference",
        ) from None
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train(False)
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    for layer in model.model.layers:
        layer.register_forward_hook(count)
    routers = {depth: TokenRouter(WIDTH) for depth in (3, 7, 11)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "routers.pt"
        RouterCheckpoint(routers, WIDTH, 128).save(file)
        settings = TIDE.TIDEConfig(exit_threshold=-1.0, min_layers=0)
        engine = TIDE.TIDE(model, router_path=file, config=settings)
    engine.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=TOKENS, temperature=0.0)
    tokens = engine.last_stats.total_tokens
    exited = sum(engine.last_stats.exits_per_layer.values())
    return {
        "version": version("tide-inference"),
        "layers": LAYERS,
        "exited": exited / tokens,
        "layers_per_token": (calls - LAYERS) / tokens,  # the prompt's pass runs each once too
    }


if __name__ == "__main__":
    main()
