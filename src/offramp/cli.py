"""The command line: data on stdout, everything else on stderr, two lines for a user's mistake."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from offramp import __version__
from offramp.config import TrainConfig
from offramp.errors import InputError, OfframpError

EXAMPLES = """\
examples:
  offramp demo                                   train, calibrate and race exits on a tiny model
  offramp inspect Salesforce/blip2-opt-2.7b      what exits could be attached to a model
  offramp train --backbone Salesforce/blip2-opt-2.7b --data photos.jsonl --out exits
  offramp generate --adapter exits --image dog.jpg --prompt "Question: what is it? Answer:"
  offramp eval --adapter exits --task captions --data captions_val2014.json --images val2014
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if it did what was asked, 1 on a user's mistake."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "huggingface_hub", "accelerate"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    run: Callable[[argparse.Namespace], None] = arguments.run
    try:
        run(arguments)
    except OfframpError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="offramp",
        description="Early exits for frozen Hugging Face vision-language models that really skip "
        "layers.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"offramp {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    for add in (_add_demo, _add_train, _add_generate, _add_eval, _add_inspect):
        add(commands)
    return parser


def _command(
    commands: Any, name: str, help: str, example: str, run: Any
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=help,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _backbone_options(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument(
        "--backbone",
        required=required,
        metavar="NAME",
        help="hub name or folder of the VLM, or tiny-opt or tiny-t5, which ship with offramp",
    )
    parser.add_argument("--revision", help="hub revision of the backbone")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
        help="precision of the backbone (default: as saved)",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="e.g. cpu or cuda (default: cpu)")


def _load(arguments: argparse.Namespace, name: str | None = None) -> tuple[Any, Any]:
    """The backbone and its processor."""
    import torch
    from transformers import AutoProcessor

    from offramp.backbone import Backbone
    from offramp.tiny import TINY, load_tiny

    name = name or arguments.backbone
    kind = name.removeprefix("offramp/").removeprefix("tiny-")
    if kind in TINY and kind != name:
        return load_tiny(kind)
    dtype = "auto" if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    backbone = Backbone.from_pretrained(
        name, revision=arguments.revision, dtype=dtype, device=arguments.device
    )
    try:
        processor = AutoProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            name, revision=arguments.revision
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"No processor could be loaded from {name!r}: {str(error).strip().splitlines()[0]}",
            "Save the model's processor beside it: processor.save_pretrained(folder).",
        ) from error
    return backbone, processor


# -- demo ----------------------------------------------------------------------------------------


def _add_demo(commands: Any) -> None:
    parser = _command(
        commands,
        "demo",
        "Train exits on a tiny VLM, calibrate them, and race them against the full model.",
        "offramp demo --backbone t5",
        _demo,
    )
    parser.add_argument("--backbone", default="opt", choices=("opt", "t5"), help="default: opt")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="default: runs/demo")
    parser.add_argument(
        "--target",
        type=float,
        default=0.0075,
        help="share of answers that may differ from the full model's (default: 0.0075)",
    )
    parser.add_argument("--seed", type=int, default=0)


def _demo(arguments: argparse.Namespace) -> None:
    from offramp.demo import demo, table

    report = demo(arguments.backbone, arguments.out, target=arguments.target, seed=arguments.seed)
    print(table(report))
    print(f"report: {arguments.out / 'report.json'}", file=sys.stderr)


# -- train ---------------------------------------------------------------------------------------


def _add_train(commands: Any) -> None:
    parser = _command(
        commands,
        "train",
        "Train exits on a frozen VLM from images with captions, questions, or nothing but prompts.",
        "offramp train --backbone tiny-opt --data photos.jsonl --out exits --steps 400",
        _train,
    )
    _backbone_options(parser, required=True)
    parser.add_argument(
        "--data", required=True, metavar="SOURCE",
        help="JSONL file (image with captions, question and answer, or dialogue), or a datasets "
        "name or folder",
    )  # fmt: skip
    parser.add_argument("--split", help="only rows of this split")
    parser.add_argument("--prompt", help="prompt for captions, or a template with {question}")
    parser.add_argument("--limit", type=int, help="read at most so many examples")
    parser.add_argument("--out", type=Path, required=True, help="folder for the adapter")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    hints = typing.get_type_hints(TrainConfig)
    for option in fields(TrainConfig):
        _add_option(parser, option.name, hints[option.name], option.default, dict(option.metadata))


def _add_option(
    parser: argparse.ArgumentParser, name: str, hint: Any, default: Any, metadata: dict[str, Any]
) -> None:
    """A flag from a field of the configuration."""
    flag = f"--{name.replace('_', '-')}"
    shown = f"{metadata['help']} (default: {'none' if default is None else default})"
    if hint is bool:
        parser.add_argument(
            flag, action=argparse.BooleanOptionalAction, default=default, help=shown
        )
        return
    parse: Any = _depths if name == "depths" else hint if isinstance(hint, type) else _whole_or_none
    parser.add_argument(
        flag, type=parse, default=default, choices=metadata.get("choices"), help=shown
    )


def _depths(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _whole_or_none(text: str) -> int | None:
    return None if text.lower() == "none" else int(text)


def _train(arguments: argparse.Namespace) -> None:
    from accelerate import PartialState

    from offramp.data import read_examples
    from offramp.train import train

    config = TrainConfig(**{f.name: getattr(arguments, f.name) for f in fields(TrainConfig)})
    examples = read_examples(
        arguments.data,
        split=arguments.split,
        prompt_template=arguments.prompt,
        limit=arguments.limit,
        require_answers=config.regime == "supervised",
    )
    backbone, processor = _load(arguments)
    adapter = train(backbone, processor, examples, config, arguments.out, resume=arguments.resume)
    if PartialState().is_main_process:
        print(json.dumps({"adapter": str(arguments.out), **adapter.metrics}))


# -- generate ------------------------------------------------------------------------------------


def _add_generate(commands: Any) -> None:
    parser = _command(
        commands,
        "generate",
        "Answer a prompt about an image, and show how deep each token ran.",
        "offramp generate --adapter exits --image dog.jpg --prompt 'Caption:'",
        _generate,
    )
    parser.add_argument("--adapter", required=True, help="folder or hub name of trained exits")
    _backbone_options(parser, required=False)
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


def _generate(arguments: argparse.Namespace) -> None:
    from dataclasses import replace

    from offramp.encode import Encoder
    from offramp.examples import Example
    from offramp.policy import FULL

    if not arguments.image:
        raise InputError("The prompt came without its image.", "Add --image FILE.")
    adapter, processor = _load_adapter(arguments)
    policy = replace(_policy(arguments, adapter), lossless=arguments.mode == "lossless")
    if arguments.mode == "full":
        policy = FULL
    elif not policy.thresholds:
        logging.warning(
            "The adapter has no thresholds, so no token leaves early; give --threshold."
        )
    encoder = Encoder(adapter.backbone, processor)
    for image in arguments.image:
        example = Example(image, arguments.prompt, (), key=str(image))
        result = adapter.generate(
            encoder.prompts([example]),
            policy=policy,
            max_new_tokens=arguments.max_new_tokens,
            do_sample=False,
        )
        _show(image, result, encoder, as_json=arguments.json)


def _load_adapter(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The adapter on its own backbone, or on the one that --backbone names; and the processor."""
    from offramp.adapter import CONFIG, Adapter
    from offramp.records import read_json

    name = arguments.backbone
    if name is None:
        config = Path(arguments.adapter) / CONFIG
        if not config.is_file():
            raise InputError(
                f"{arguments.adapter} is not an adapter folder on this machine.",
                "Correct --adapter, or name the --backbone of an adapter on the hub.",
            )
        name = read_json(config)["backbone"]["name"]
    backbone, processor = _load(arguments, name)
    return Adapter.from_pretrained(arguments.adapter, backbone), processor


def _policy(arguments: argparse.Namespace, adapter: Any) -> Any:
    """The adapter's policy, with what --threshold, --score and --kv change."""
    from dataclasses import replace

    policy = adapter.policy
    if arguments.threshold is not None:
        policy = replace(
            policy, thresholds=dict.fromkeys(adapter.exits.depths, arguments.threshold)
        )
    changes = {n: v for n in ("score", "kv") if (v := getattr(arguments, n)) is not None}
    return replace(policy, **changes)


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


# -- eval ----------------------------------------------------------------------------------------


def _add_eval(commands: Any) -> None:
    parser = _command(
        commands,
        "eval",
        "Measure quality, depth and latency on a data set, with the full model and early exits.",
        "offramp eval --adapter exits --task captions --data photos.jsonl --out runs/captions\n"
        "  offramp eval --adapter exits --task vqa --images val2014 --out runs/vqa \\\n"
        "      --data v2_OpenEnded_mscoco_val2014_questions.json\n"
        "  offramp eval --adapter exits --task vqa --data ... --out runs/vqa --resume\n"
        "  offramp eval --backbone tiny-opt --mode full --task gqa --data questions.jsonl "
        "--out runs/gqa",
        _eval,
    )
    parser.add_argument("--adapter", help="folder or hub name of trained exits")
    _backbone_options(parser, required=False)
    parser.add_argument(
        "--task", required=True, metavar="TASK", help="captions, vqa, okvqa, gqa or dialogue"
    )
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        metavar="FILE",
        help="JSONL file, datasets name or folder, or the data set's official file (VQA: the "
        "questions; annotations beside them are found)",
    )
    parser.add_argument(
        "--format",
        default="auto",
        metavar="FORMAT",
        help="auto, jsonl, coco, karpathy, nocaps, vqav2, okvqa, gqa or visdial (default: auto)",
    )
    parser.add_argument(
        "--images", metavar="FOLDER", help="folder of the pictures (default: that of the data)"
    )
    parser.add_argument("--split", help="only this split (Karpathy's files; default there: test)")
    parser.add_argument("--prompt", help="prompt for captions, or a template with {question}")
    parser.add_argument("--limit", type=int, help="evaluate at most so many examples")
    parser.add_argument(
        "--mode",
        metavar="MODE",
        help="full, early_exit or both (default: both; without --adapter full)",
    )
    parser.add_argument(
        "--threshold", type=float, help="one threshold for all exits, instead of the adapter's"
    )
    parser.add_argument("--score", help="confidence score, instead of the adapter's")
    parser.add_argument("--kv", help="recompute or propagate, instead of the adapter's")
    parser.add_argument(
        "--metrics", nargs="+", metavar="METRIC", help="only these (default: all of the task's)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=1, help="more than 1 measures quality only (default: 1)"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        help="default: 40 for captions, 20 for dialogue, 10 for questions",
    )
    parser.add_argument(
        "--ranking",
        default="sum",
        metavar="HOW",
        help="candidates' log-likelihood: sum, or mean per token (default: sum)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the intervals (default: 0)")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for rows.jsonl (an answer a line) and result.json",
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument(
        "--rescore",
        action="store_true",
        help="score the answers in --out again; no model is loaded",
    )


def _eval(arguments: argparse.Namespace) -> None:
    from tqdm import tqdm

    from offramp.encode import Encoder
    from offramp.evaluate import evaluate, rescore
    from offramp.official import read_items
    from offramp.tasks import Settings

    names = ("batch_size", "max_new_tokens", "ranking", "seed")
    settings = {name: getattr(arguments, name) for name in names}
    alone = arguments.adapter is None and not arguments.rescore
    settings["mode"] = arguments.mode or ("full" if alone else "both")
    settings["metrics"] = None if arguments.metrics is None else tuple(arguments.metrics)
    Settings(arguments.task, **settings)  # a mistake should not wait for data and model
    if alone and arguments.backbone is None:
        raise InputError("Nothing to evaluate was named.", "Give --adapter, or --backbone.")
    items = read_items(
        arguments.data,
        arguments.images,
        arguments.format,
        split=arguments.split,
        prompt=arguments.prompt,
        limit=arguments.limit,
    )
    if arguments.rescore:
        result = rescore(arguments.out, items, arguments.task, **settings)
    else:
        model, processor = _load(arguments) if alone else _load_adapter(arguments)
        backbone = model if alone else model.backbone
        result = evaluate(
            model,
            Encoder(backbone, processor),
            items,
            arguments.task,
            None if alone else _policy(arguments, model),
            out=arguments.out,
            resume=arguments.resume,
            progress=lambda batches: tqdm(batches, "evaluate", disable=None),
            **settings,
        )
    print(json.dumps(result, ensure_ascii=False))


# -- inspect -------------------------------------------------------------------------------------


def _add_inspect(commands: Any) -> None:
    parser = _command(
        commands,
        "inspect",
        "Describe an adapter, or what exits could be attached to a backbone.",
        "offramp inspect tiny-opt",
        _inspect,
    )
    parser.add_argument("name", help="adapter folder, or hub name or folder of a VLM")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--revision", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="auto", help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cpu", help=argparse.SUPPRESS)


def _inspect(arguments: argparse.Namespace) -> None:
    from offramp.adapter import CONFIG
    from offramp.records import read_json

    config = Path(arguments.name) / CONFIG
    if config.is_file():
        found = read_json(config)
        found["backbone"].pop("fingerprint", None)
    else:
        from offramp.backbone import describe
        from offramp.exits import propose_depths

        backbone, _ = _load(arguments, arguments.name)
        found = describe(backbone)
        found["proposed_depths"] = {
            n: list(propose_depths(backbone.depth, n)) for n in (1, 2, 3) if n < backbone.depth
        }
    if arguments.json:
        print(json.dumps(found, ensure_ascii=False))
        return
    for key, value in found.items():
        print(
            f"{key}: {json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value}"
        )


if __name__ == "__main__":
    sys.exit(main())
