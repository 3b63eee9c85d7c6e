"""`offramp bench`: what decoding costs on this machine, predicted and measured."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from offramp.cli.options import add_command, backbone_options, load_adapter, load_model
from offramp.errors import InputError


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "bench",
        "Measure the parts of decoding on this machine, predict the speed of exits from them, and "
        "measure it.",
        "offramp bench --shape smollm2-135m --depths 8 15\n"
        "  offramp bench --backbone Salesforce/blip2-opt-2.7b --dtype bfloat16 --out bench.json\n"
        "  offramp bench --adapter exits --peers --data questions.jsonl",
        _bench,
    )
    parser.add_argument(
        "--shape", metavar="NAME",
        help="a decoder with random weights: opt-2.7b, flan-t5-xl, llava-7b, smollm2-135m, "
        "mini-opt, mini-t5 or mini-llava",
    )  # fmt: skip
    backbone_options(parser, required=False)
    parser.add_argument("--adapter", help="folder or hub name of trained exits")
    parser.add_argument(
        "--depths", type=int, nargs="+", metavar="DEPTH",
        help="where to force exits (default: the adapter's; else a quarter and half of the depth)",
    )  # fmt: skip
    parser.add_argument(
        "--rates", type=float, nargs="*", metavar="SHARE",
        help="shares of tokens that leave (default: 0.5 0.75 0.9); 0: a check that never fires",
    )  # fmt: skip
    parser.add_argument(
        "--acceptance", type=float, nargs="*", metavar="SHARE", default=(0.8,),
        help="lossless: shares of drafts that are right (default: 0.8)",
    )  # fmt: skip
    parser.add_argument(
        "--policy", nargs="+", metavar="POLICY", default=("recompute", "propagate", "lossless"),
        help="recompute, propagate or lossless (default: all three; lossless at batch 1)",
    )  # fmt: skip
    parser.add_argument(
        "--shortlist", type=int, metavar="TOKENS",
        help="tokens that exits read (default: the adapter's shortlist, or all)",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, default=1, help="rows decoded together (default: 1)")
    parser.add_argument(
        "--independent", action="store_true", help="rows leave by plans of their own"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--tokens", type=int, default=40, help="decoded by each (default: 40)")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument(
        "--peers", action="store_true",
        help="race the adapter against what else HF offers, on the prompts of --data",
    )  # fmt: skip
    parser.add_argument(
        "--data", nargs="+", metavar="FILE",
        help="prompts for --peers, as in offramp eval (default for tiny-opt and tiny-t5: their "
        "world's)",
    )  # fmt: skip
    parser.add_argument("--limit", type=int, default=20, help="at most so many (default: 20)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="everything measured")


def _bench(arguments: argparse.Namespace) -> None:
    import sys

    import torch

    from offramp.provenance import provenance
    from offramp.research.report.plots import speeds
    from offramp.storage import write_atomic, write_json

    if sum(map(bool, (arguments.shape, arguments.backbone or arguments.adapter))) != 1:
        raise InputError(
            "What is to be measured is not clear.", "Give --shape, or --backbone or --adapter."
        )
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise InputError(f"{arguments.threads} threads cannot run.", "Give at least 1.")
        torch.set_num_threads(arguments.threads)
    found = _race(arguments) if arguments.peers else _force(arguments)
    if arguments.out is not None:
        write_json(arguments.out, {**found, "provenance": provenance(0, sys.argv, None)})
        print(f"record: {arguments.out}", file=sys.stderr)
        if arguments.peers:
            write_atomic(arguments.out.with_suffix(".svg"), speeds(found["peers"]))


def _force(arguments: argparse.Namespace) -> dict[str, Any]:
    """Costs and forced exits."""
    from dataclasses import replace

    from offramp.calibration.profiler import measure_costs
    from offramp.models.exits import Exits, ExitSet, check_depths
    from offramp.research.benchmark.bench import RATES, Case, any_shortlist, bench, table

    backbone, inputs, exits = _subject(arguments)
    if exits is None:
        quarters = (max(1, backbone.depth // 4), max(1, backbone.depth // 2))
        depths = check_depths(arguments.depths or sorted(set(quarters)), backbone.depth)
        exits = Exits(backbone, depths).requires_grad_(False)
    rates = RATES if arguments.rates is None else arguments.rates
    cases = [
        Case(depth, rate, policy)
        for depth in arguments.depths or exits.depths
        for policy in arguments.policy
        if policy != "lossless" or arguments.batch == 1
        for rate in (arguments.acceptance if policy == "lossless" else rates)
    ]
    if arguments.shortlist is not None:
        exits = replace(ExitSet.of(exits), shortlist=any_shortlist(backbone, arguments.shortlist))
    costs = measure_costs(
        backbone, inputs, exits, repeats=arguments.rounds, progress=_bar("unit costs"),
        shortlist=exits.shortlist is not None,
    )  # fmt: skip
    entries = bench(
        backbone, inputs, cases, costs, exits=exits, tokens=arguments.tokens,
        rounds=arguments.rounds, independent=arguments.independent, progress=_bar("rounds"),
        shortlist=arguments.shortlist,
    )  # fmt: skip
    print(table(costs, entries))
    return {"costs": costs.to_json(), "entries": entries}


def _race(arguments: argparse.Namespace) -> dict[str, Any]:
    """The adapter and its peers."""
    from offramp.data.formats import read_items
    from offramp.models.input_processor import InputProcessor
    from offramp.research.benchmark.peers import table, time_peers
    from offramp.research.scenes.tasks import captions, questions

    if arguments.adapter is None:
        raise InputError("Peers are raced against trained exits.", "Give --adapter.")
    adapter, processor = load_adapter(arguments)
    if arguments.data is not None:
        examples = [item.example for item in read_items(arguments.data, limit=arguments.limit)]
    elif adapter.backbone.name.startswith("offramp/tiny-"):
        some = max(1, arguments.limit // 3)
        examples = captions("test", some).examples + questions("test", some).examples
    else:
        raise InputError("There are no prompts to race on.", "Give --data.")
    encoder = InputProcessor(adapter.backbone, processor)
    inputs = [encoder.prompts([example]) for example in examples]
    peers = time_peers(adapter, inputs, rounds=arguments.rounds, progress=_bar("rounds"))
    print(table(peers))
    return {"peers": {adapter.backbone.name: peers}}


def _subject(arguments: argparse.Namespace) -> tuple[Any, Any, Any]:
    """The backbone, a prompt for each row of the batch, and trained exits if there are."""
    if arguments.batch < 1:
        raise InputError(f"A batch of {arguments.batch} is none.", "Give --batch from 1.")
    if arguments.shape is not None:
        import torch

        from offramp.research.benchmark.shapes import shape

        known = shape(arguments.shape)
        # What such decoders are run in; the minis are there to try things, which float32 is not.
        dtype = torch.bfloat16 if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
        backbone = known.build(dtype)
        backbone.model.to(arguments.device)
        rows = known.inputs(backbone, arguments.batch)
        return backbone, {n: v.to(arguments.device) for n, v in rows.items()}, None
    from PIL import Image

    from offramp.data.example import Example
    from offramp.models.input_processor import InputProcessor

    exits = None
    if arguments.adapter is not None:
        adapter, processor = load_adapter(arguments)
        backbone, exits = adapter.backbone, adapter.exits
    else:
        backbone, processor = load_model(arguments)
    prompt = "Question: what is in the picture and what is it doing there? Answer:"
    example = Example(Image.new("RGB", (224, 224), "gray"), prompt, (), "bench")
    return backbone, InputProcessor(backbone, processor).prompts([example] * arguments.batch), exits


def _bar(title: str) -> Any:
    from tqdm import tqdm

    return lambda things: tqdm(things, title, disable=None, leave=False)
