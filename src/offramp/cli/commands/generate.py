"""`offramp generate`: an answer as text; how deep each token ran, if asked."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from offramp.adapter.shipped import close_shipped
from offramp.cli.loading import check_engine, check_name, loaded, policy_of
from offramp.cli.options import (
    LONGEST,
    NAMED_EXITS,
    adapter_options,
    add_command,
    length_option,
    model_options,
    name_option,
    runtime_options,
    threshold_option,
    vision_options,
)
from offramp.cli.output import print_json, print_text, tell
from offramp.cli.parser import Parser, number, seed, share, whole
from offramp.cli.pictures import picture, unfolded
from offramp.common.folders import check_writable
from offramp.core.errors import DataError, InputError, printable

log = logging.getLogger(__name__)
ASK = "Ask by `offramp generate`."
COLDEST = 1e-4
"""Below, logits that are divided by a temperature are infinite."""


def add(commands: Any) -> None:
    add_command(
        commands,
        "generate",
        "Answer a prompt about an image: text on stdout, all else on stderr.",
        "offramp generate photo --image dog.jpg\n"
        "  offramp generate exits --image dog.jpg 'What is shown?'\n"
        "  offramp generate exits --image dog.jpg --temperature 0.7 --seed 1",
        generate,
        question_options,
        usual=USUAL,
    )


USUAL = "image model prompt stream max-new-tokens mode depths engine gguf out json"


def question_options(parser: Parser, *, captions: bool = False, chat: bool = False) -> None:
    """Add the options of questions about images.

    captions: the images come first, and the model is photo unless it is named. chat: without the
    options that a chat sets.
    """
    from offramp.core.decoding.policy import MODES

    if captions:
        group = parser.add_argument_group("model")
        name = f"{NAMED_EXITS} (default: photo)"
        group.add_argument("--model", dest="adapter", default="photo", metavar="NAME", help=name)
        adapter_options(parser, group, "all", auto=True)
    else:
        model_options(parser, adapter=True, engines="all", auto=True)
    group = parser.add_argument_group("question")
    named = "files, folders or addresses, - for stdin"
    images: dict[str, Any] = {"type": picture, "nargs": "+", "metavar": "FILE"}
    if captions:
        group.add_argument("image", help=named, **images)
    else:
        without = f"{named} (default: none, where the model also answers text alone)"
        group.add_argument("--image", default=[], help=without, **images)
    if not chat:
        group.add_argument(
            "--prompt",
            help="what is asked; it may also stand alone, as the last word; control tokens count "
            "where no chat template wraps it (default: the caption's prompt that the exits know)",
        )
        parser.question = None if captions else "prompt"
        parser.set_defaults(interactive=False)
        group.add_argument(
            "--stream", action="store_true", help="print the answer as it is written"
        )
        group.add_argument(
            "--out",
            type=Path,
            metavar="FILE",
            help="also add each answer to this file as a line of JSON; images that it holds are "
            "not answered again (default: none)",
        )
    vision_options(parser.add_argument_group("images"))
    group = parser.add_argument_group("answer")
    group.add_argument(
        "--depths",
        action="store_true",
        help="show on stderr after how many layers each token was written",
    )
    length_option(group, default=None, shown=f"{LONGEST}, or as calibrated")
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--temperature",
        type=number(0, 100),
        metavar="X",
        help="sample, at this temperature (default: no sampling; with --top-p or --top-k the "
        "model's own)",
    )
    group.add_argument(
        "--top-p",
        type=share,
        metavar="X",
        help="sample from the likeliest tokens that together have this probability "
        "(default: the model's own)",
    )
    group.add_argument(
        "--top-k",
        type=whole(1),
        metavar="N",
        help="sample from this many of the likeliest tokens (default: the model's own)",
    )
    group.add_argument(
        "--seed", type=seed, default=0, metavar="N", help="seed of sampling (default: 0)"
    )
    name_option(
        threshold_option(parser),
        "--mode",
        MODES,
        "what exits do: write tokens, draft tokens that the full model verifies, or nothing",
        default="early_exit",
    )
    runtime_options(parser)


def generate(arguments: argparse.Namespace) -> None:
    options = _generation_options(arguments)
    check_engine(arguments)
    check_name(arguments.adapter, exits=True)
    if arguments.out is not None:
        check_writable(arguments.out)
    _check_images(arguments)
    opened = loaded(arguments, answers=max(1, len(arguments.image)))
    from offramp.engines.loading import usual_prompt  # PyTorch, which takes seconds
    from offramp.features.input_processor import turn_of

    adapter, runtime, encoder = opened.adapter, opened.model, opened.encoder
    if options["max_new_tokens"] is None:
        options["max_new_tokens"] = opened.longest
    asked = usual_prompt(adapter) if arguments.prompt is None else arguments.prompt
    where = None if runtime is adapter else runtime.name
    policy = policy_of(arguments, adapter, asked, where).in_mode(arguments.mode)
    if opened.has_exits and arguments.mode != "full" and not adapter.spares_layers(policy):
        log.warning(
            "The adapter has no thresholds, so every layer runs for every token; give --threshold, "
            "or find thresholds with `offramp calibrate`."
        )
    if adapter.backbone.family.vision and (arguments.interactive or len(arguments.image) > 1):
        from offramp.features.vision_cache import VisionCache

        options["vision_cache"] = VisionCache()
    if arguments.interactive and getattr(runtime, "keeps_prompts", False):
        from offramp.features.prefix_cache import PrefixCache

        options["prefix_cache"] = PrefixCache(1)
    if arguments.stream:
        options["streamer"] = _streamer(encoder.tokenizer)
    turns: list[dict[str, Any]] = []  # of a chat so far, where the model has a form for them
    with _kept(arguments) as (before, keep):
        for name, prompt in _questions(arguments, asked):
            how = _asked_by(arguments, prompt)
            if (row := before.get(_key(name, how))) is not None:
                _show(row, arguments)
                continue
            question = turn_of("user", prompt, sees=name is not None and not turns)
            image, inputs, read = _opened(name, prompt, encoder, [*turns, question])
            policy = policy_of(arguments, adapter, read, where).in_mode(arguments.mode)
            result = _answer(runtime, encoder.backbone, inputs, policy, arguments.seed, options)
            verdict = adapter.verdict(
                result,
                encoder.processor,
                read,
                image,
                policy=policy,
                engine=where,
                longest=options["max_new_tokens"],
                sampling="sampled" if options["do_sample"] else "greedy",
            )
            row = _row(name, result, verdict, encoder)
            if arguments.interactive and encoder.has_template:
                turns += [question, turn_of("assistant", row["answer"])]
            keep({**row, "asked": how})
            if not arguments.stream:
                _show(row, arguments)
            if not arguments.json:
                _tell(row, verdict, arguments)


SAMPLING = ("temperature", "top_p", "top_k", "seed")
ASKED_BY = ("adapter", "backbone", "mode", "threshold", "max_new_tokens", *SAMPLING)
"""Options on which an answer depends."""


def _asked_by(arguments: argparse.Namespace, prompt: str) -> dict[str, Any]:
    """What an answer depends on beside its image, as a row of --out names it."""
    given = {name: getattr(arguments, name) for name in ASKED_BY}
    return {"prompt": prompt, **{name: value for name, value in given.items() if value is not None}}


def _key(image: Any, asked: dict[str, Any]) -> str:
    return f"{image} {sorted(asked.items())}"


@contextmanager
def _kept(arguments: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Callable[..., None]]]:
    """The rows of --out by image and what was asked, and a function that adds one."""
    if arguments.out is None:
        yield {}, lambda row: None
        return
    from offramp.common.jsonl_log import JsonlLog

    rows = JsonlLog.read(arguments.out) if arguments.out.exists() else []
    if strange := [row for row in rows if not {"image", "answer", "asked"} <= row.keys()]:
        raise DataError(
            f"{arguments.out} holds other rows than answers: {', '.join(strange[0])[:80]}.",
            "Give another --out.",
        )
    with JsonlLog(arguments.out) as log_file:
        yield {_key(row["image"], row["asked"]): row for row in rows}, log_file.append


def _generation_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of `generate`. Raise `InputError` for settings that cannot be sampled by."""
    drawn = {n: getattr(arguments, n) for n in ("temperature", "top_p", "top_k")}
    sampling = {name: value for name, value in drawn.items() if value is not None}
    wrong = [
        name
        for name in ("temperature", "top_p")
        if name in sampling and not sampling[name] >= COLDEST
    ]
    if wrong:
        raise InputError(
            f"--{wrong[0].replace('_', '-')} is {sampling[wrong[0]]:g}, from which nothing can be "
            "drawn.",
            f"Give a number above 0, at least {COLDEST:g}; without sampling options the likeliest "
            "token is taken.",
        )
    if arguments.stream and arguments.json:
        raise InputError("--stream prints text, and --json none.", "Give one of them.")
    return {"max_new_tokens": arguments.max_new_tokens, "do_sample": bool(sampling), **sampling}


def _check_images(arguments: argparse.Namespace) -> None:
    """Find the images. Raise `DataError` or `InputError` for some that should not wait for the
    model."""
    _take_question(arguments)
    arguments.image = [*unfolded(arguments.image)]
    if arguments.interactive and len(arguments.image) > 1:
        raise InputError(
            f"A chat is about one image, and {len(arguments.image)} were given.",
            "Give one --image.",
        )
    asks = arguments.image or arguments.prompt is not None or arguments.interactive
    if not asks and not close_shipped(arguments.adapter):
        raise InputError(
            "There is neither an image to caption nor a prompt.",
            "Add --image FILE, or --prompt TEXT where the model also answers text alone.",
        )
    from offramp.inputs.example import Example

    for image in arguments.image:
        Example(image, "", (), key=str(image)).open_image()


def _take_question(arguments: argparse.Namespace) -> None:
    """Take what follows the files as the prompt, where it reads as one and is no file."""
    from offramp.inputs.image import SUFFIXES  # Pillow, of which no help needs any

    if arguments.prompt is None and len(arguments.image) > 1:
        last = arguments.image[-1]
        if not isinstance(last, Path) or last.exists() or last.suffix.lower() in SUFFIXES:
            return
        if " " in (text := str(last)) or text.endswith("?"):
            arguments.image.pop()
            arguments.prompt = text


def _questions(arguments: argparse.Namespace, asked: str) -> Iterator[tuple[Any, str]]:
    """Images, None for text alone, with their prompts. asked: where none are typed."""
    for prompt in _typed() if arguments.interactive else [asked]:
        for name in arguments.image or [None]:
            yield name, prompt


def _opened(
    name: Any, prompt: str, encoder: Any, turns: Sequence[dict[str, Any]]
) -> tuple[Any, dict[str, Any], str]:
    """The image, opened, what `generate` takes, and what is asked. turns: the last is the prompt;
    behind others it is read with them."""
    from offramp.inputs.example import Example

    image = None
    if name is not None:
        image = Example(name, prompt, (), key=str(name)).open_image(encoder.smallest_side)
    if len(turns) > 1:
        images = [] if image is None else [image]
        text = encoder.conversation_text(turns)
        read = text.removeprefix(encoder.placed("", len(images)))
        return image, encoder.of_text(text, images), read
    if image is None:
        return None, encoder.text_prompt(prompt), prompt
    return image, encoder.prompts([Example(image, prompt, (), key=str(name))]), prompt


def _typed() -> Iterator[str]:
    """Lines of stdin, up to an empty one."""
    if sys.stdin is None or sys.stdin.closed:
        raise InputError("Questions are read from stdin, which is closed.", ASK)
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline().strip()
        except UnicodeDecodeError as error:
            raise InputError(
                f"What came on stdin is no text in {sys.stdin.encoding}.", "Send it as UTF-8."
            ) from error
        except (OSError, ValueError) as error:
            said = getattr(error, "strerror", None) or error
            raise InputError(f"stdin cannot be read: {said}.", ASK) from error
        if not line:
            tell("")
            return
        yield line


def _answer(
    runtime: Any,
    backbone: Any,
    inputs: dict[str, Any],
    policy: Any,
    seed: int,
    options: dict[str, Any],
) -> Any:
    """One answer; each starts from the seed anew."""
    from offramp.core.executors.prefill import check_inputs

    try:
        check_inputs(inputs, backbone.model)
    except InputError as error:
        raise InputError(error.problem, "Add --image FILE.") from error
    return runtime.generate(inputs, policy=policy, seed=seed, **options)


def _streamer(tokenizer: Any) -> Any:
    """Prints words as soon as they are whole."""
    from transformers import TextStreamer

    class Printer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            print_text(text, "\n" if stream_end else "")

    return Printer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _row(name: Any, result: Any, verdict: Any, encoder: Any) -> dict[str, Any]:
    """An answer, as --json prints it."""
    ids = result.new_tokens[0].tolist()
    depths, scores = result.depths[0].tolist(), result.scores[0].tolist()
    tokens = [encoder.tokenizer.decode([i]) for i in ids]
    steps = [
        {"token": t, "id": i, "depth": d, "score": None if s != s else round(s, 6)}
        for t, i, d, s in zip(tokens, ids, depths, scores, strict=True)
    ]
    return {
        "image": None if name is None else str(name),
        "answer": encoder.texts(result.new_tokens)[0],
        "layers": result.layers,
        "mean_depth": result.mean_depth,
        "verdict": verdict.to_json(),
        "steps": steps,
    }


def _show(row: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Print an answer on stdout."""
    if arguments.json:
        print_json({name: value for name, value in row.items() if name != "asked"})
    else:
        image = f"{printable(row['image'])}: " if len(arguments.image) > 1 else ""
        print_text(f"{image}{printable(row['answer'])}")


def _tell(row: dict[str, Any], verdict: Any, arguments: argparse.Namespace) -> None:
    """Print on stderr how deep an answer ran and what is promised of it."""
    if arguments.depths:
        paint = painter()
        steps = [(printable(s["token"]), s["depth"], row["layers"]) for s in row["steps"]]
        tell(" ".join(paint(*step) for step in steps))
    log.info("mean depth %.1f of %d", row["mean_depth"], row["layers"])
    more = ""
    if verdict.promise is not None:
        more = f" More: offramp inspect {arguments.adapter}"
    elif not verdict.exact:
        more = " The full model's words: --mode lossless."
    log.info("%s%s", verdict.brief, more)


def painter() -> Callable[[str, int, int], str]:
    """Return a function that shows a token with its depth, from token, depth and number of layers:
    in colour on a terminal, unless NO_COLOR (no-color.org) is set."""
    known = sys.stderr is not None and sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    return _paint if known else lambda token, depth, layers: f"{token.strip()}/{depth}"


def _paint(token: str, depth: int, layers: int) -> str:
    """A token with its depth: green where it exited early, plain at full depth."""
    shade = 46 if depth <= layers / 3 else 190 if depth < layers else 250
    return f"\033[38;5;{shade}m{token.strip()}\033[0m\033[2m/{depth}\033[0m"
