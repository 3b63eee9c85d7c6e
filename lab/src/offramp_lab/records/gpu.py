"""What a token would take on a GPU: calculated, not measured; rewrites gpu.json.

`python -m offramp_lab.records.gpu` takes a minute, and no GPU. Operators and waits are counted on a
device with memory of its own (tests/helpers/second_device.py). The host's share of a step of vLLM
is the record vllm's (part host), bytes are the shapes', and the rest are published figures.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from offramp.adapter.adapter import Adapter
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits, ExitSet
from offramp_lab.places import ROOT
from offramp_lab.records.record import Record

RECORD = Record("gpu")
CARDS = {"H100 SXM": 3.35e12, "RTX 4090 Laptop": 0.576e12}
"""Bytes a second from memory, as NVIDIA states them."""
LAUNCH, GRAPH, WAIT, KERNEL = 5e-6, 10e-6, 10e-6, 2e-6
"""Seconds of the host to launch an operator and a captured graph, and to notice that the device is
done; and of the device for its smallest kernel."""
FUSED = 6
"""Small kernels of a compiled layer: two norms, positions with the cache's writing, attention and
its reduction, and the activation."""
SHORTLIST = 32768
"""Tokens that an exit chooses among, as many as FR-Spec (Zhao et al. 2025) drafts with."""
FULL, BEST = "vLLM, full depth", "vLLM, early exit, with a shortlist"
SHARES = 0.0, 0.1, 0.2
WANTED = 2.5


@dataclass(frozen=True)
class Shape:
    """wide, inner, keys: widths of states, of the feed-forward part, and of keys. words: tokens in
    the vocabulary. All weights have two bytes."""

    layers: int
    wide: int
    inner: int
    keys: int
    words: int

    def layer(self, card: float, small: int, *, fused: bool) -> list[float]:
        """Seconds of a layer's kernels on one row. small: kernels that read no weights."""
        wide, inner, keys = self.wide, self.inner, self.keys
        parts = [[wide, keys, keys], [wide], [inner, inner], [inner]]
        sizes = [[sum(part)] if fused else part for part in parts]
        read = [2 * wide * rows for part in sizes for rows in part]
        return [*(kernel(size, card) for size in read), *[KERNEL] * small]

    def head(self, card: float, words: int) -> float:
        return kernel(2 * self.wide * words, card)


SHAPES = {
    "Qwen2.5-3B": Shape(36, 2048, 11008, 256, 151936),
    "Qwen2.5-7B": Shape(28, 3584, 18944, 512, 152064),
}


def kernel(size: float, card: float) -> float:
    return max(KERNEL, size / card)


Kernels = Sequence[float]
"""Seconds of each."""


@dataclass
class Clocks:
    """Seconds on the clocks of the host, which queues work, and of the device, which runs it."""

    host: float = 0.0
    device: float = 0.0

    def run(self, launch: float, *kernels: float) -> None:
        """Queue kernels that one launch starts."""
        self.host += launch
        self.device = max(self.host, self.device) + sum(kernels)

    def run_each(self, kernels: Kernels, waits: int = 1) -> None:
        """Launch kernels one by one; the host then stands, so often, until all are done."""
        for one in kernels:
            self.run(LAUNCH, one)
        self.host = max(self.host, self.device) + waits * WAIT


@dataclass(frozen=True)
class Counts:
    """Operators of a layer, of a full step beside its layers, and of a step that ends at an exit
    beside its layers and the exit's own; and waits of that step."""

    layer: int
    full: int
    exit: int
    waits: int


def count() -> Counts:
    """By answers of a tiny random Qwen2 in PyTorch, of 6 and 12 layers with an exit at 2."""
    sys.path.append(str(ROOT / "tests" / "helpers"))
    import second_device

    def token(layers: int, mode: str) -> tuple[int, int]:
        """Operators and waits of a token behind the first four."""
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        model: Any = Qwen2ForCausalLM(config)
        backbone = Backbone(model.eval().to(second_device.device()))
        exits = ExitSet(Exits(backbone, (2,)).requires_grad_(False))
        adapter, found = Adapter(backbone, exits, ExitPolicy({2: 0.0})), list[Any]()
        for new in (24, 4, 24):  # the first makes what is kept for later answers
            options: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "mode": mode}
            with second_device.counted() as counts:
                made = adapter.generate(torch.arange(5, 17)[None], eos_token_id=None, **options)
            assert made.new_tokens.shape[1] == new
            found.append((counts.launches, counts.waits))
        launches, waits = ((b - a) // 20 for a, b in zip(*found[1:], strict=True))
        return launches, waits

    (few, _), (many, _) = token(6, "full"), token(12, "full")
    launches, waits = token(12, "early_exit")
    layer = (many - few) // 6
    return Counts(layer, many - 12 * layer, launches - 3 * layer, waits)


Step = Callable[[Clocks, bool], Any]
"""A token on both clocks; whether it goes to the full depth."""


def seconds(step: Step, share: float) -> float:
    """A token takes so long where this share of tokens goes to the full depth, evenly spread."""
    tokens, clocks = 1000, Clocks()
    deep = [int(share * n) for n in range(tokens + 1)]
    for before, after in pairwise(deep):
        step(clocks, after > before)
    return max(clocks.host, clocks.device) / tokens


def steps(shape: Shape, card: float, depth: int, counts: Counts, host: Any) -> dict[str, Step]:
    """By engine and mode. host: seconds of vLLM's step at full depth, and of ours."""
    eager = shape.layer(card, counts.layer - 7, fused=False)
    fused = shape.layer(card, FUSED, fused=True)
    above, head = shape.layers - depth, shape.head(card, shape.words)

    def eagerly(layers: int, beside: int) -> list[float]:
        return [*eager * layers, head, *[KERNEL] * (beside - 1)]

    def ahead(clocks: Clocks, _: bool) -> None:
        clocks.host += host[False]  # for the next step, while the device runs this one
        clocks.run(GRAPH, *fused * shape.layers, head)

    def early(clocks: Clocks, deep: bool, *, own: float, first: Kernels, rest: Kernels) -> None:
        clocks.host += own
        clocks.run_each(first, counts.waits)
        if deep:
            clocks.run_each(rest)

    # Stages are compiled, and in no graph.
    staged = partial(early, own=host[True], rest=[*fused * above, head])
    below, short = fused * (depth + 1), shape.head(card, SHORTLIST)
    whole = eagerly(shape.layers, counts.full)
    return {
        "PyTorch, full depth": lambda clocks, _: clocks.run_each(whole),
        "PyTorch, early exit": partial(
            early, own=0.0, first=eagerly(depth + 1, counts.exit), rest=eagerly(above, counts.full)
        ),
        FULL: ahead,
        "vLLM, early exit": partial(staged, first=[*below, head]),
        BEST: partial(staged, first=[*below, short]),
    }


def entries(counts: Counts, host: Any) -> Iterator[dict[str, Any]]:
    for card, speed in CARDS.items():
        for name, shape in SHAPES.items():
            made = steps(shape, speed, shape.layers // 4, counts, host)
            took = {
                way: {str(s): 1e3 * seconds(step, s) for s in SHARES} for way, step in made.items()
            }
            full = seconds(made[FULL], 0.0)
            shares = (share / 100 for share in range(101))
            allowed = [share for share in shares if seconds(made[BEST], share) * WANTED <= full]
            yield {
                "card": card,
                "shape": name,
                "depth": shape.layers // 4,
                "layers": shape.layers,
                "milliseconds": took,
                "deeper_at_2.5x": max(allowed, default=None),
            }


def figures(arguments: Namespace) -> dict[str, Any]:
    ways = Record("vllm").read()["host"]["ways"]
    host = {way["exits"]: way["seconds_a_step"] for way in ways if way["at_once"] == 1}
    counts = count()
    return {
        "counts": vars(counts),
        "host_milliseconds": {"full depth": 1e3 * host[False], "early exit": 1e3 * host[True]},
        "entries": [*entries(counts, host)],
    }


if __name__ == "__main__":
    RECORD.run(__doc__, figures)
