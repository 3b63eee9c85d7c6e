"""`offramp inspect`: an adapter, what a backbone could carry, and whether exits would pay."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path
from typing import Any

from offramp.cli.loading import check_exits, check_name, load_model, read_data
from offramp.cli.options import (
    ASKED,
    DATA,
    LOADED,
    LONGEST,
    add_command,
    asked_again,
    batch_option,
    data_options,
    depths_option,
    length_option,
    name_first,
    precision_options,
)
from offramp.cli.output import inline, plain, print_text, say_next, show_result
from offramp.cli.outputs import check_out_file, is_page, overwrite_option
from offramp.cli.parser import Parser
from offramp.core.errors import InputError

log = logging.getLogger(__name__)

FORECAST: dict[str, Any] = {
    "images": None,
    "split": None,
    "prompt": None,
    "group_by": "group",
    "limit": 200,
    "depths": None,
    "max_new_tokens": LONGEST,
    "batch_size": 32,
    "out": None,
}
"""Options that are of --data alone, and their defaults."""
LEVEL, PLANNED = 0.95, 2000
"""The share of tokens that is to stay the full model's; prompts that training would have."""


def add(commands: Any) -> None:
    add_command(
        commands,
        "inspect",
        "Describe an adapter, what exits a backbone could carry, or whether they would pay.",
        "offramp inspect tiny-opt\n  offramp inspect tiny-opt --data photos --out forecast.html",
        _inspect,
        _options,
        usual="data limit depths max-new-tokens out device json",
    )


def _options(parser: Parser) -> None:
    group = parser.add_argument_group("model")
    what = "adapter folder, or hub name or folder of a model"
    name_first(parser, group, "name", ("--adapter", "--backbone"), what)
    precision_options(group)
    data_options(
        parser,
        "prompts, without answers, from which to tell, before any training, how many tokens exits "
        "would settle, at which depth, and the speed to expect on this machine",
        limit=FORECAST["limit"],
        required=False,
    )
    group = parser.add_argument_group("would exits pay?")
    depths_option(group, "--depths", "depths to try (default: four, up to three quarters)")
    length_option(group)
    batch_option(group, FORECAST["batch_size"], "prompts at once")
    group.add_argument(
        "--out", type=Path, metavar="FILE", help="HTML page of the forecast (default: none)"
    )
    overwrite_option(group)


def _inspect(arguments: argparse.Namespace) -> None:
    check_name(arguments.name, exits=False)
    from offramp.core.save_and_load import CONFIG

    is_adapter = os.path.isfile(os.path.join(arguments.name, CONFIG))
    options = ("revision", "dtype", "device", "quantize", "data")
    named = [n for n in options if getattr(arguments, n) not in (None, "auto")]
    if is_adapter and named:
        raise InputError(
            f"{arguments.name} is an adapter, to which --{named[0]} says nothing.",
            f"Leave --{named[0]} out, or name a backbone.",
        )
    named = [n for n, default in FORECAST.items() if getattr(arguments, n) != default]
    if named and not arguments.data:
        flag = f"--{named[0].replace('_', '-')}"
        raise InputError(
            f"{flag} is of a forecast from prompts, and none were given.",
            f"Leave {flag} out, or name a backbone and give --data.",
        )
    if arguments.data and not is_adapter:
        _suitability(arguments)
        return
    shipped = None if is_adapter else _shipped(arguments.name)
    if shipped is not None and not arguments.json:
        print_text(_told(shipped, "exits", "thresholds", "guarantee"))
    description = _adapter(arguments.name) if is_adapter else _backbone(arguments)
    text = _told(description) if is_adapter else plain({n: inline(description[n]) for n in SHOWN})
    show_result(description | ({"exits": shipped} if shipped else {}), text, as_json=arguments.json)
    if is_adapter:
        say_next(f"offramp generate {arguments.name} --image dog.jpg")
        return
    depth = next(iter(description["proposed_depths"].values()), [1])[0]
    say_next(f"offramp train {arguments.name} --data photos --depths {depth} --out exits")


def _shipped(name: str) -> dict[str, Any] | None:
    """What is known of the exits that ship with a model; None: none do."""
    from offramp.adapter.shipped import shipped_exits

    try:
        folder = shipped_exits(name)
    except InputError:  # a model that ships alone, or a package that is not there
        return None
    return None if folder is None else _adapter(str(folder))


def _adapter(name: str) -> dict[str, Any]:
    """What adapter.json holds, without the digests."""
    from offramp.adapter.records import load_certificate, read_records
    from offramp.core.save_and_load import UNCHECKED, read_config

    config = read_config(name)
    if config.files is None:
        log.warning(UNCHECKED, name)
    read_records(config)  # refuses entries that are damaged
    entries = dict(config.raw)
    for digest in ("digest", "files"):
        entries.pop(digest, None)
    entries["backbone"] = {n: v for n, v in entries["backbone"].items() if n != "fingerprint"}
    certificate = load_certificate(config)
    entries["verified"] = [] if certificate is None else [run.words for run in certificate.runs]
    return entries


def _told(entries: dict[str, Any], *some: str) -> str:
    """The contents of adapter.json in ten lines, for people. some: only these lines."""
    from offramp.core.decoding.policy import policy_from_json
    from offramp.promises.conditions import Conditions, of_policy
    from offramp.promises.guarantee import standing

    policy, metrics, calibration = (
        entries.get(n) or {} for n in ("policy", "metrics", "calibration")
    )
    ways = calibration.get("ways") or ()
    here = Conditions(of_policy(policy_from_json(entries["policy"])))  # as is known of the folder
    if policy.get("trust") is not None:
        exits_by = {"trust": f"{policy['trust']:g}"}
    else:
        score = policy.get("score") or "max_probability"
        exits_by = {"thresholds": f"{inline(policy.get('thresholds')) or 'none'}, of {score}"}
    told = {
        "backbone": entries["backbone"].get("name"),
        "exits": f"{entries.get('exit_kind')} at {inline(entries.get('depths'))}",
        **exits_by,
        "lossless drafts": f"from {inline(policy.get('drafts'))}",
        "guarantee": standing(calibration, here).sentence.removeprefix("guaranteed "),
        "compared": inline({way["name"]: f"{way['times']:.2f}x" for way in ways}),
        "agreement": inline(metrics.get("agreement")),
        "made by": (entries.get("provenance") or {}).get("command"),
        "verified": entries["verified"],
        "all": "with --json",
    }
    return plain({n: value or "none" for n, value in told.items() if not some or n in some})


SHOWN = (
    "name",
    "text_model_type",
    "layers",
    "width",
    "vocabulary",
    "dtype",
    "weight_bytes",
    "exit_bytes",
    "decoding",
    "proposed_depths",
)
"""What is printed of a backbone; the rest with --json."""


def _backbone(arguments: argparse.Namespace) -> dict[str, Any]:
    from PIL import Image

    from offramp.core.models.exits import propose_depths
    from offramp.features.description import describe
    from offramp.inputs.example import Example

    backbone, processor = load_model(arguments, arguments.name)
    description = describe(backbone)
    blank = (
        Example.of_text("Who are you?", key="blank")
        if backbone.text_only
        else Example(Image.new("RGB", (64, 64)), "Describe the image.", (), "blank")
    )
    description["decoding"] = check_exits(backbone, processor, blank)
    description["proposed_depths"] = {
        n: list(propose_depths(backbone.depth, n)) for n in (1, 2, 3) if n < backbone.depth
    }
    return description


# -- would exits pay? --------------------------------------------------------------------------


def _suitability(arguments: argparse.Namespace) -> None:
    from offramp.calibration.suitability import suitability
    from offramp.common.progress import progress
    from offramp.core.storage import write_atomic
    from offramp.features.input_processor import InputProcessor
    from offramp.report.report import of_forecast, report

    if arguments.out is not None:
        check_out_file(arguments.out, arguments, is_page, "page of this command")
    examples = [item.example for item in read_data(arguments, require_answers=False)]
    backbone, processor = load_model(arguments, arguments.name)
    if examples:
        check_exits(backbone, processor, examples[0])
    steps = (f"{n} of {len(STEPS)}: {what}" for n, what in enumerate(STEPS, 1))
    found = suitability(
        InputProcessor(backbone, processor),
        examples,
        depths=arguments.depths or (),
        planned=max(PLANNED, len(examples)),
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
        progress=lambda items: progress(items, next(steps)),
    )
    how = asked_again(arguments, "data", *LOADED, *ASKED, *DATA)
    best = found.best(LEVEL)
    train = f"offramp train {arguments.name}{how} --depths {best.depth} --out exits"
    told = {
        **found.to_json(),
        "backbone": backbone.name,
        "level": LEVEL,
        "best": best.depth,
        "verdict": found.verdict(LEVEL),
        "answers": found.answers(LEVEL),
        "seconds_with": found.seconds_with(LEVEL),
        "next": train if found.pays(LEVEL) else "",
    }
    if arguments.out is not None:
        tokenizer = getattr(processor, "tokenizer", processor)
        page = report([of_forecast(told)], examples, tokenizer_of=lambda _: tokenizer)
        write_atomic(arguments.out, page.encode(errors="backslashreplace"))
    show_result(told, _forecast(found), as_json=arguments.json)
    opened = [] if arguments.out is None else [f"open {arguments.out}"]
    if after := [*opened, *([train] if found.pays(LEVEL) else [])]:
        say_next(*after)


STEPS = ("answers", "speed")


def _forecast(found: Any) -> str:
    """The forecast in five lines, for people."""
    now, after = found.seconds[0], found.seconds_with(LEVEL)
    return "\n".join(
        [
            found.verdict(LEVEL),
            plain(
                {
                    "1,000 answers": f"{1000 * now / 60:.1f} minutes of this machine now, "
                    f"{1000 * after / 60:.1f} with the exit",
                    "by depth": ", ".join(
                        f"{p.depth}: {p.agreement:.0%} of words, {p.speedup[LEVEL]:.1f}x, "
                        f"lossless {p.lossless:.1f}x"
                        for p in found.prospects
                    ),
                    "from": f"{found.tokens:,} tokens of answers to {found.prompts} prompts, "
                    f"followed to {found.planned:,}",
                }
            ),
        ]
    )
