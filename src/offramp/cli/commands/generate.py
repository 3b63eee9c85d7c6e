"""`offramp generate`: an answer, and how deep each token ran."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from offramp.cli.commands.runtime import check_runtime, load_runtime, runtime_options
from offramp.cli.loading import load_adapter, policy_of
from offramp.cli.options import (
    add_command,
    length_option,
    model_options,
    name_option,
    policy_options,
)
from offramp.cli.output import print_json, print_text, tell
from offramp.cli.parser import Parser
from offramp.errors import InputError

MODES = ("early_exit", "lossless", "full")
log = logging.getLogger(__name__)


def add(commands: Any) -> None:
    add_command(
        commands,
        "generate",
        "Answer a prompt about an image, and show how deep each token ran.",
        "offramp generate --adapter exits --image dog.jpg --prompt 'Caption:'",
        _generate,
        _options,
    )


def _options(parser: Parser) -> None:
    model_options(parser, required=False, adapter=True)
    group = parser.add_argument_group("question")
    group.add_argument(
        "--image", type=Path, nargs="+", default=[], metavar="FILE", help="one or several files"
    )
    group.add_argument("--prompt", default="Caption:", help="what is asked (default: Caption:)")
    length_option(group)
    group.add_argument("--json", action="store_true", help="one JSON object for each image")
    exits = policy_options(parser, threshold=True)
    name_option(
        exits, "--mode", MODES,
        "exits end a token; only draft it, and the full model verifies; or are off",
        default="early_exit",
    )  # fmt: skip
    runtime_options(parser)


def _generate(arguments: argparse.Namespace) -> None:
    from dataclasses import replace

    from offramp.data.example import Example
    from offramp.engine.policy import FULL
    from offramp.models.input_processor import InputProcessor

    if not arguments.image:
        raise InputError("The prompt came without its image.", "Add --image FILE.")
    check_runtime(arguments)
    adapter, processor = load_adapter(arguments)
    runtime = load_runtime(arguments, adapter) or adapter
    policy = replace(policy_of(arguments, adapter), lossless=arguments.mode == "lossless")
    if arguments.mode == "full":
        policy = FULL
    elif not policy.effective.thresholds:
        log.warning(
            "The adapter has no thresholds, so every layer runs for every token; give --threshold, "
            "or find thresholds with `offramp calibrate`."
        )
    encoder = InputProcessor(adapter.backbone, processor)
    for image in arguments.image:
        example = Example(image, arguments.prompt, (), key=str(image))
        result = runtime.generate(
            encoder.prompts([example]),
            policy=policy,
            max_new_tokens=arguments.max_new_tokens,
            do_sample=False,
        )
        _show(image, result, encoder, as_json=arguments.json)


def _show(image: Path, result: Any, encoder: Any, *, as_json: bool) -> None:
    ids = result.new_tokens[0].tolist()
    depths, scores = result.depths[0].tolist(), result.scores[0].tolist()
    tokens = [encoder.tokenizer.decode([i]) for i in ids]
    if as_json:
        steps = [
            {"token": t, "id": i, "depth": d, "score": None if s != s else round(s, 6)}
            for t, i, d, s in zip(tokens, ids, depths, scores, strict=True)
        ]
        text = encoder.texts(result.new_tokens)[0]
        row = {"image": str(image), "answer": text, "layers": result.layers,
               "mean_depth": result.mean_depth, "steps": steps}  # fmt: skip
        print_json(row)
        return
    color = sys.stdout is not None and sys.stdout.isatty()
    words = [_paint(t, d, result.layers, color) for t, d in zip(tokens, depths, strict=True)]
    print_text(f"{image}: {' '.join(words)}")
    tell(f"mean depth {result.mean_depth:.1f} of {result.layers}")


def _paint(token: str, depth: int, layers: int, color: bool) -> str:
    """A token with its depth: green where it exited early, plain at full depth."""
    if not color:
        return f"{token.strip()}/{depth}"
    shade = 46 if depth <= layers / 3 else 190 if depth < layers else 250
    return f"\033[38;5;{shade}m{token.strip()}\033[0m\033[2m/{depth}\033[0m"
