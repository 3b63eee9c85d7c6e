"""`offramp-lab bench`: what decoding costs on this machine, predicted and measured."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from offramp.cli.loading import choose_device, laid_out, load_adapter, load_model
from offramp.cli.options import (
    add_command,
    depths_option,
    model_options,
    name_option,
)
from offramp.cli.output import show_result
from offramp.cli.outputs import check_out_file, overwrite_option
from offramp.cli.parser import Parser, one_of, share, whole
from offramp.errors import InputError

log = logging.getLogger(__name__)


def add(commands: Any) -> None:
    add_command(
        commands,
        "bench",
        "Measure the parts of decoding on this machine, predict the speed of exits from them, and "
        "measure it.",
        "offramp-lab bench --shape smollm2-135m --depths 8,15\n"
        "  offramp-lab bench --backbone Salesforce/blip2-opt-2.7b --dtype bfloat16 "
        "--out bench.json\n"
        "  offramp-lab bench --shape smollm2-135m --batch-engine --slots 8 --shortlist 4096\n"
        "  offramp-lab bench --adapter exits --peers --data questions.jsonl",
        _bench,
        _options,
    )


def _options(parser: Parser) -> None:
    from offramp_lab.inputs.shapes import SHAPES

    engines = ("torch", "compiled", "packed")
    model = model_options(parser, required=False, adapter=False, engines=engines)
    name_option(model, "--shape", SHAPES, "a decoder with random weights")
    _case_options(parser)
    _engine_options(parser)
    group = parser.add_argument_group("timing and output")
    group.add_argument(
        "--threads", type=whole(1), metavar="N", help="CPU threads (default: torch's choice)"
    )
    for flag, default, help in (
        ("--batch", 1, "rows decoded together"),
        ("--tokens", 40, "tokens decoded in each"),
        ("--rounds", 5, "rounds of timing"),
        ("--limit", 20, "prompts to time, at most"),
    ):
        group.add_argument(
            flag, type=whole(1), default=default, metavar="N", help=f"{help} (default: {default})"
        )
    group.add_argument(
        "--peers",
        action="store_true",
        help="time the adapter beside what transformers offers, on the prompts of --data",
    )
    group.add_argument(
        "--data",
        nargs="+",
        metavar="FILE",
        help="prompts for --peers, as in offramp eval (default for tiny-opt and tiny-t5: drawn "
        "scenes)",
    )
    group.add_argument("--out", type=Path, metavar="FILE.json", help="everything measured")
    overwrite_option(group)


def _case_options(parser: Parser) -> None:
    from offramp_lab.experiments.benchmark.cases import POLICIES, RATES

    group = parser.add_argument_group("scripted exits")
    depths_option(
        group,
        "--depths",
        "where to script exits (default: the adapter's; else a quarter and half of the depth)",
    )
    rates = " ".join(map(str, RATES))
    group.add_argument(
        "--rates", type=share, nargs="*", metavar="SHARE",
        help=f"shares of tokens that exit (default: {rates}); 0: a check that never fires",
    )  # fmt: skip
    group.add_argument(
        "--acceptance", type=share, nargs="*", metavar="SHARE", default=(0.8,),
        help="lossless: shares of drafts that are right (default: 0.8)",
    )  # fmt: skip
    group.add_argument(
        "--policy", nargs="+", metavar="NAME", default=tuple(POLICIES), choices=POLICIES,
        help=f"{one_of(POLICIES)} (default: all; lossless at batch 1)",
    )  # fmt: skip
    group.add_argument(
        "--shortlist",
        type=whole(2),
        metavar="N",
        help="tokens that exits read (default: the adapter's shortlist, or all)",
    )
    group.add_argument(
        "--independent", action="store_true", help="rows exit at depths of their own"
    )


def _engine_options(parser: Parser) -> None:
    group = parser.add_argument_group("batch engine")
    group.add_argument(
        "--batch-engine",
        action="store_true",
        help="many requests at once: tokens a second against full depth and against HF's static "
        "batch, and the gaps between a row's tokens; --rates, --acceptance, --shortlist, --rounds",
    )
    group.add_argument(
        "--slots", type=whole(1), default=8, metavar="N", help="rows at once (default: 8)"
    )
    group.add_argument(
        "--right", type=share, default=0.7, metavar="SHARE",
        help="share of guesses that the full model confirms (default: 0.7)",
    )  # fmt: skip
    group.add_argument(
        "--lengths", type=whole(2), nargs=2, default=(30, 60), metavar="N",
        help="shortest and longest answer, in tokens (default: 30 60)",
    )  # fmt: skip


def _bench(arguments: argparse.Namespace) -> None:
    import sys

    import torch

    from offramp.provenance import provenance
    from offramp.storage import write_atomic, write_result
    from offramp_lab.experiments.drawing import speeds

    if sum(map(bool, (arguments.shape, arguments.backbone or arguments.adapter))) != 1:
        raise InputError(
            "Nothing to measure was named, or too much.",
            "Give --shape, or --backbone or --adapter.",
        )
    if arguments.out is not None:
        check_out_file(arguments.out, arguments, lambda _: False, "record that may be replaced")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    if arguments.batch_engine:
        arguments.batch, measure = 1, _bench_of_engine
    else:
        measure = _time_peers if arguments.peers else _force
    result, text = measure(arguments)
    show_result(result, text, as_json=arguments.json)
    if arguments.out is not None:
        write_result(arguments.out, {**result, "provenance": provenance(0, sys.argv, None)})
        log.info("record: %s", arguments.out)
        if arguments.peers:
            write_atomic(arguments.out.with_suffix(".svg"), speeds(result["peers"]))


def _force(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Costs and forced exits, and their table."""
    from offramp.calibration.profiler import measure_costs
    from offramp_lab.experiments.benchmark.bench import bench, shortlisted, table, untrained
    from offramp_lab.experiments.benchmark.cases import RATES, Case

    backbone, inputs, exits = _subject(arguments)
    if exits is None:
        quarters = {max(1, backbone.depth // 4), max(1, backbone.depth // 2)}
        exits = untrained(backbone, arguments.depths or sorted(quarters))
    exits = shortlisted(backbone, exits, arguments.shortlist)
    rates = RATES if arguments.rates is None else arguments.rates
    cases = [
        Case(depth, rate, policy)
        for depth in arguments.depths or exits.depths
        for policy in arguments.policy
        if policy != "lossless" or arguments.batch == 1
        for rate in (arguments.acceptance if policy == "lossless" else rates)
    ]
    costs = measure_costs(
        backbone, inputs, exits, repeats=arguments.rounds, progress=_bar("unit costs"),
        shortlist=exits.shortlist is not None,
    )  # fmt: skip
    entries = bench(
        backbone, inputs, cases, costs, exits, tokens=arguments.tokens, rounds=arguments.rounds,
        independent=arguments.independent, progress=_bar("rounds"),
    )  # fmt: skip
    return {"costs": costs.to_json(), "entries": entries}, table(costs, entries)


def _bench_of_engine(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Costs of calls, and each case predicted and measured; and their table."""
    from offramp.serving.engine_config import EngineConfig
    from offramp_lab.experiments.benchmark.bench import shortlisted, untrained
    from offramp_lab.experiments.benchmark.engine_bench import EngineCase, bench_engine, table

    backbone, inputs, exits = _subject(arguments)
    if exits is None or arguments.depths:
        depths = arguments.depths or [max(1, backbone.depth // 4)]
        exits = untrained(backbone, depths[:1])
    exits = shortlisted(backbone, exits, arguments.shortlist)
    rates = (0.75, 0.9) if arguments.rates is None else arguments.rates
    cases = [EngineCase("early_exit", rate, arguments.right) for rate in rates]
    cases += [EngineCase("lossless", right=right) for right in arguments.acceptance]
    prompt = 1 if backbone.is_encoder_decoder else inputs["input_ids"].shape[1]
    config = EngineConfig(slots=arguments.slots, limit=prompt + arguments.lengths[1] + 1)
    costs, entries = bench_engine(
        backbone, exits, inputs, cases, config, rounds=arguments.rounds,
        lengths=tuple(arguments.lengths),
    )  # fmt: skip
    return {"costs": costs.to_json(), "entries": entries}, table(costs, entries)


def _time_peers(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The adapter and its peers, and their table."""
    from offramp.data.formats import read_items
    from offramp.data.scenes.tasks import captions_and_questions
    from offramp.models.input_processor import InputProcessor
    from offramp_lab.experiments.benchmark.peers import table, time_peers

    if arguments.adapter is None:
        raise InputError("Peers are timed against trained exits.", "Give --adapter.")
    adapter, processor = load_adapter(arguments)
    if arguments.data is not None:
        examples = [item.example for item in read_items(arguments.data, limit=arguments.limit)]
    elif adapter.backbone.name.startswith("offramp/tiny-"):
        scenes = max(1, arguments.limit // 3)
        examples = captions_and_questions("test", scenes)
    else:
        raise InputError("There are no prompts to time.", "Give --data.")
    encoder = InputProcessor(adapter.backbone, processor)
    inputs = [encoder.prompts([example]) for example in examples]
    peers = time_peers(adapter, inputs, rounds=arguments.rounds, progress=_bar("rounds"))
    return {"peers": {adapter.backbone.name: peers}}, table(peers)


def _subject(arguments: argparse.Namespace) -> tuple[Any, Any, Any]:
    """The backbone, a prompt for each row of the batch, and trained exits if there are."""
    if arguments.shape is not None:
        import torch

        from offramp.models.quantized.linears import check_quantize, quantize_layers
        from offramp_lab.inputs.shapes import shape

        quantize = arguments.quantize
        if quantize is not None:
            check_quantize(quantize, arguments.dtype)
        known = shape(arguments.shape)
        device = choose_device(arguments.device, quantize=quantize)
        # What such decoders are run in; the minis are there to try things, which float32 is not.
        dtype = torch.bfloat16 if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
        backbone = known.build(dtype)
        if quantize is not None:
            quantize_layers(backbone.layers, quantize)
        backbone = backbone.with_decoding(compiled=arguments.engine == "compiled")
        backbone.model.to(device)
        rows = known.inputs(backbone, arguments.batch)
        return laid_out(arguments, backbone), {n: v.to(device) for n, v in rows.items()}, None
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
    from offramp.progress import progress

    return lambda iterable: progress(iterable, title)
