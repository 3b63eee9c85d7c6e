"""`offramp draft`: where lossless decoding drafts fastest."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from offramp.cli.options import (
    adapter_folder,
    add_command,
    backbone_options,
    data_options,
    load_adapter,
    read_data,
)
from offramp.errors import InputError


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "draft",
        "Find the exits and the threshold that lossless decoding drafts fastest by on this "
        "machine, and store them in the adapter. Any choice gives the full model's output. Raced "
        "on ten prompts, or as many as --limit says.",
        "offramp draft --adapter exits --data held_out.jsonl",
        _draft,
    )
    parser.add_argument("--adapter", required=True, help="folder or hub name of trained exits")
    backbone_options(parser, required=False)
    data_options(parser, "pictures that training has not seen, like those to come")
    parser.set_defaults(limit=10)
    parser.add_argument("--rounds", type=int, default=3, help="of the race (default: 3)")
    parser.add_argument("--max-new-tokens", type=int, default=40, help="default: 40")
    parser.add_argument("--out", type=Path, help="folder for the adapter (default: its own)")
    parser.add_argument("--json", action="store_true", help="all that was tried, as JSON")


def _draft(arguments: argparse.Namespace) -> None:
    from tqdm import tqdm

    from offramp.calibration.draft_thresholds import draft_speeds, with_drafts
    from offramp.models.input_processor import InputProcessor

    if arguments.rounds < 1 or arguments.max_new_tokens < 2:
        raise InputError(
            f"{arguments.rounds} rounds of {arguments.max_new_tokens} tokens cannot be raced.",
            "Give at least one round and two tokens.",
        )
    out = adapter_folder(arguments)
    items = read_data(arguments, require_answers=False)
    adapter, processor = load_adapter(arguments)
    encoder = InputProcessor(adapter.backbone, processor)
    found = draft_speeds(
        adapter,
        [encoder.prompts([item.example]) for item in items],
        rounds=arguments.rounds,
        progress=lambda rounds: tqdm(rounds, "timing", disable=None, leave=False),
        max_new_tokens=arguments.max_new_tokens,
        do_sample=False,
    )
    chosen = with_drafts(adapter, found)
    if chosen is not adapter:
        chosen.save(out)
    if arguments.json:
        rows = [{"drafts": d.thresholds, "speedup_decode": d.speedup} for d in found]
        print(json.dumps(rows))
    else:
        print(_table(found, None if chosen is adapter else out))


def _table(found: Any, out: Path | None) -> str:
    """What was tried and what was chosen, as a person reads it on a terminal."""
    lines = [f"{'drafts':<40}{'decoding':>10}"]
    for one in found:
        lines.append(f"{_words(one.thresholds):<40}{one.speedup:>9.2f}x")
    best = found[0]
    said = (
        "No way to draft is faster than the full model; nothing was written."
        if out is None
        else f"Lossless decoding drafts by {_words(best.thresholds)} from here on, "
        f"{best.speedup:.2f}x as fast as the full model. Written to {out}."
    )
    return "\n".join([*lines, "", said])


def _words(thresholds: Any) -> str:
    return ", ".join(f"{t:g} at depth {d}" for d, t in thresholds.items())
