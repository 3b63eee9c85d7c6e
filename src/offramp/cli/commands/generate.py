"""`offramp generate`: an answer, and how deep each token ran."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

from offramp.cli.options import add_command, backbone_options, load_adapter, policy_of
from offramp.cli.runtime import check_runtime, load_runtime, runtime_options
from offramp.errors import InputError


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "generate",
        "Answer a prompt about an image, and show how deep each token ran.",
        "offramp generate --adapter exits --image dog.jpg --prompt 'Caption:'",
        _generate,
    )
    parser.add_argument("--adapter", required=True, help="folder or hub name of trained exits")
    backbone_options(parser, required=False)
    parser.add_argument("--image", type=Path, nargs="+", default=[], help="one or several files")
    parser.add_argument("--prompt", default="Caption:", help="default: Caption:")
    parser.add_argument(
        "--mode",
        default="early_exit",
        choices=("early_exit", "lossless", "full"),
        help="lossless: exits draft and the full model verifies; full: exits off",
    )
    parser.add_argument("--threshold", type=float,
                        help="one threshold for all exits, instead of the adapter's")  # fmt: skip
    parser.add_argument("--score", help="confidence score, instead of the adapter's")
    parser.add_argument("--kv", help="recompute or propagate, instead of the adapter's")
    parser.add_argument("--max-new-tokens", type=int, default=40, help="default: 40")
    parser.add_argument("--json", action="store_true", help="one JSON object for each image")
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
    runtime = load_runtime(arguments, adapter)
    policy = replace(policy_of(arguments, adapter), lossless=arguments.mode == "lossless")
    if arguments.mode == "full":
        policy = FULL
    elif not policy.effective.thresholds:
        logging.warning(
            "The adapter has no thresholds, so no token leaves early; give --threshold."
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
        print(json.dumps(row, ensure_ascii=False))
        return
    color = sys.stdout.isatty()
    words = [_paint(t, d, result.layers, color) for t, d in zip(tokens, depths, strict=True)]
    print(f"{image}: {' '.join(words)}")
    print(f"mean depth {result.mean_depth:.1f} of {result.layers}", file=sys.stderr)


def _paint(token: str, depth: int, layers: int, color: bool) -> str:
    """A token with its depth: green where it left early, plain at full depth."""
    if not color:
        return f"{token.strip()}/{depth}"
    shade = 46 if depth <= layers / 3 else 190 if depth < layers else 250
    return f"\033[38;5;{shade}m{token.strip()}\033[0m\033[2m/{depth}\033[0m"
