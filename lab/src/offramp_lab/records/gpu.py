"""What recorded programs are worth on a GPU: LLaVA-7B and OPT-2.7B shapes with random weights;
rewrites lab/records/gpu.json.

`python -m offramp_lab.records.gpu`, on a machine with one NVIDIA GPU of 24 GB or more: under ten
minutes. Single answers in half precision: Hugging Face's `generate` as it is and compiled over a
static cache, our loop, and CUDA graphs; at full depth and with exits that fire at the rates asked
for (the threshold is the score that so many tokens reach; random weights say nothing about
quality).

Beside tokens a second, the share of the memory's bandwidth that reading the weights takes: the
bytes of the layers and heads that the tokens ran, against what copying a large tensor reaches.
--shapes, --device: smaller ones, to try it out (--device cpu runs the programs unrecorded).
--no-compile: no compiled `generate`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from typing import Any

import torch

from offramp.adapter import Adapter
from offramp.engine.policy import FULL, ExitPolicy
from offramp.evaluation.scripted_exits import OPTIONS
from offramp.evaluation.timing import (
    GenerateFn,
    exit_generate_fn,
    generate_fn,
    stock_generate_fn,
    time_interleaved,
)
from offramp.models.backbone import Backbone
from offramp.models.exits import Exits, ExitSet
from offramp.runtimes.graphs import GraphRuntime
from offramp_lab.experiments.experiment import bar
from offramp_lab.inputs.shapes import shape
from offramp_lab.records.record import Record, asked

RECORD = Record("gpu")
DEPTHS = {"llava-7b": 8, "opt-2.7b": 8, "mini-llava": 2}
RATES = (0.75, 0.9, 1.0)
COPIED = 1 << 28
"""Numbers of two bytes that are copied to see how fast the memory is."""


def main() -> None:
    arguments = asked(
        __doc__, out=RECORD.path, tokens=128, rounds=5, shapes=("llava-7b", "opt-2.7b"),
        device="cuda", no_compile=False,
    )  # fmt: skip
    device = torch.device(arguments.device)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    bandwidth = bytes_per_second(device)
    entries = [e for name in arguments.shapes for e in measure(name, device, bandwidth, arguments)]
    print(card, *entries, sep="\n")
    found = {"card": card, "copied_bytes_per_second": bandwidth, "entries": entries}
    RECORD.write(found, arguments.out)


def measure(
    name: str, device: torch.device, bandwidth: float, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Entries of one shape; see the module."""
    known = shape(name)
    backbone = Backbone(known.build(torch.bfloat16).model.to(device), name=name)
    exits = Exits(backbone, (DEPTHS[name],)).requires_grad_(False)
    inputs = {key: value.to(device) for key, value in known.inputs(backbone).items()}
    options = {"max_new_tokens": 1 + arguments.tokens, **OPTIONS}
    adapter = Adapter(backbone, ExitSet(exits), ExitPolicy({exits.depths[0]: 1.0}))
    thresholds = thresholds_by_rate(adapter, inputs, options)
    runtime = GraphRuntime(adapter, context=256 + arguments.tokens)
    methods: dict[tuple[str, str], GenerateFn] = {
        ("generate", "full"): stock_generate_fn(backbone, **options)
    }
    if not arguments.no_compile:
        static = stock_generate_fn(backbone, cache_implementation="static", **options)
        methods["generate, compiled", "full"] = static
    for mode, policy in {"full": FULL, **thresholds}.items():
        methods["offramp", mode] = exit_generate_fn(backbone, exits, policy, **options)
        methods["offramp, CUDA graphs", mode] = generate_fn(
            runtime.generate, policy=policy, **options
        )
    timings = time_interleaved(methods, [inputs], rounds=arguments.rounds, progress=bar(name))
    entries = []
    for runtime_name, mode in methods:
        timed = timings[runtime_name, mode]
        policy = thresholds.get(mode, FULL)
        depth = adapter.generate(inputs, policy=policy, **options).depths[0, 1:].float().mean()
        read = bytes_read(backbone, exits, float(depth), exiting=mode != "full")
        entries.append(
            {
                "shape": name,
                "runtime": runtime_name,
                "mode": mode,
                "format": "bfloat16",
                "mean_depth": float(depth),
                "tokens": arguments.tokens,
                "tokens_per_second": timed.tokens_per_second,
                "bandwidth_share": read * timed.tokens_per_second / bandwidth,
            }
        )
    return entries


def thresholds_by_rate(
    adapter: Adapter, inputs: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, ExitPolicy]:
    """Policies at which about so many tokens exit; at a rate of 1 all do."""
    depth = adapter.exits.depths[0]
    scores = adapter.generate(inputs, **options).scores[0, 1:]
    policies = {}
    for rate in RATES:
        threshold = 0.0 if rate == 1.0 else float(scores.float().quantile(1.0 - rate))
        policies[f"{rate:.0%} exit"] = ExitPolicy({depth: threshold})
    return policies


def bytes_read(backbone: Backbone, exits: Exits, depth: float, *, exiting: bool) -> float:
    """Bytes of weights that a token reads: its layers and the head, and with exits the exit and a
    head once more where it went deeper."""

    def size(module: torch.nn.Module) -> int:
        return sum(p.numel() * p.itemsize for p in module.parameters())

    layer, head = size(backbone.layers[0]), size(backbone.head)
    if not exiting:
        return layer * depth + head
    deeper = (depth - exits.depths[0]) / (backbone.depth - exits.depths[0])
    return layer * (depth + 1) + head * (1 + deeper)


def bytes_per_second(device: torch.device) -> float:
    """What copying a large tensor reads and writes in a second; the best of ten."""
    size = COPIED if device.type == "cuda" else COPIED >> 4
    source = torch.zeros(size, dtype=torch.bfloat16, device=device)
    target, took = torch.empty_like(source), []
    for _ in range(10):
        begin = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took.append(time.perf_counter() - begin)
    return 2 * source.nbytes / min(took)


if __name__ == "__main__":
    main()
