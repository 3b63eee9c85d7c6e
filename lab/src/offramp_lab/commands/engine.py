"""`offramp-lab bench --batch-engine`: the batch engine, predicted and measured."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from offramp.cli.parser import Parser, share, whole


def engine_options(parser: Parser) -> None:
    """The flags of the engine's benchmark."""
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


def bench_of_engine(
    arguments: argparse.Namespace, subject: tuple[Any, Any, Any]
) -> tuple[dict[str, Any], str]:
    """Costs of calls, and each case predicted and measured; and their table."""
    from offramp.models.exits import Exits, ExitSet
    from offramp.serving.engine_config import EngineConfig
    from offramp_lab.experiments.benchmark.bench import any_shortlist
    from offramp_lab.experiments.benchmark.engine_bench import EngineCase, bench_engine, table

    backbone, inputs, exits = subject
    if exits is None or arguments.depths:
        depths = arguments.depths or [max(1, backbone.depth // 4)]
        exits = ExitSet(Exits(backbone, depths[:1]).requires_grad_(False))
    if arguments.shortlist is not None:
        exits = replace(exits, shortlist=any_shortlist(backbone, arguments.shortlist))
    rates = (0.75, 0.9) if arguments.rates is None else arguments.rates
    cases = [EngineCase("early_exit", rate, arguments.right) for rate in rates]
    cases += [EngineCase("lossless", right=right) for right in arguments.acceptance]
    prompt = 1 if backbone.is_encoder_decoder else inputs["input_ids"].shape[1]
    config = EngineConfig(slots=arguments.slots, limit=prompt + arguments.lengths[1] + 1)
    costs, entries = bench_engine(
        backbone, exits, inputs, cases, config, rounds=arguments.rounds,
        lengths=tuple(arguments.lengths), shortlist=exits.shortlist is not None,
    )  # fmt: skip
    return {"costs": costs.to_json(), "entries": entries}, table(costs, entries)
