"""`offramp export`: the decoder and its exits as GGUF files for llama.cpp, exits for vLLM, an exit
as a draft model, or a drafter for engines that speak of speculators."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

from offramp.cli.loading import load_adapter, load_model, read_data
from offramp.cli.options import (
    add_command,
    asked_again,
    data_options,
    depths_option,
    field_option,
    length_option,
    model_options,
    name_option,
)
from offramp.cli.output import say_next, show_result
from offramp.cli.outputs import overwrite_option
from offramp.cli.parser import Parser
from offramp.engines import MTMD
from offramp.errors import InputError, OfframpError

log = logging.getLogger(__name__)

TO = GGUF, VLLM, DRAFT_MODEL, SPECULATORS = ("gguf", "vllm", "draft-model", "speculators")
CHECKED = 8
"""Prompts whose answers vLLM is checked by, where --limit names no other number."""
SHORTLIST = 8192


def add(commands: Any) -> None:
    add_command(
        commands,
        "export",
        "Write a decoder and its exits as GGUF files for --engine llama.cpp, exits for vLLM's "
        "plug-in, or an exit as a draft model for any engine; or train an EAGLE-3 drafter for "
        "vLLM, SGLang and llama.cpp's own programs.",
        "offramp export exits --gguf q8_0 --out exits-q8_0\n"
        "  offramp generate exits --engine llama.cpp --gguf exits-q8_0 "
        "--image dog.jpg\n"
        "  offramp export exits --to vllm --out exits-vllm\n"
        "  offramp export exits --to draft-model --out draft\n"
        "  offramp export --to speculators --backbone NAME --data prompts.txt --out drafter",
        _export,
        _options,
        usual="to gguf vision depths data out overwrite",
    )


def _options(parser: Parser) -> None:
    from offramp.runtimes.llama_cpp.gguf_writing import FORMATS, VISION_FORMATS
    from offramp.training.config import TrainConfig

    model_options(parser, adapter=False, engines=())
    group = parser.add_argument_group("files")
    name_option(group, "--to", TO, "what is written", default=GGUF)
    name_option(group, "--gguf", FORMATS, "number format of the layers")
    name_option(
        group, "--exit-format", FORMATS, "number format of the exits' layers and of the head",
        default="", shown="the layers', or q8_0 where that has fewer bits",
    )  # fmt: skip
    name_option(
        group, "--vision", VISION_FORMATS, "number format of the vision tower, which is "
        "written too, for --vision mtmd and llama.cpp's own programs", dest="vision_format",
        shown="it stays in PyTorch",
    )  # fmt: skip
    depths_option(
        group,
        "--depths",
        "exits to write (default: those at which the adapter's policy has thresholds)",
    )
    group.add_argument("--out", type=Path, required=True, help="folder for the files")
    overwrite_option(group)
    data = data_options(
        parser, f"with --to {VLLM} a few prompts like those to come, whose answers it is checked "
        f"by; with --to {SPECULATORS} hundreds, from whose answers the drafter learns",
        required=False,
    )  # fmt: skip
    length_option(data)
    drafter = parser.add_argument_group(f"with --to {SPECULATORS}")
    field_option(drafter, TrainConfig, "steps", "training steps of the drafter")
    field_option(
        drafter, TrainConfig, "shortlist",
        "tokens that the drafter can say, the most frequent of the answers", default=SHORTLIST,
    )  # fmt: skip


def _export(arguments: argparse.Namespace) -> None:
    ways = {
        GGUF: _export_gguf, VLLM: _export_vllm, DRAFT_MODEL: _export_draft_model,
        SPECULATORS: _export_drafter,
    }  # fmt: skip
    ways[arguments.to](arguments)


def _export_vllm(arguments: argparse.Namespace) -> None:
    from offramp.models.input_processor import InputProcessor
    from offramp.runtimes.vllm import PROMPTS, check_out, export_vllm

    _check_adapter_alone(arguments, ("gguf", "exit_format", "vision_format", "depths"))
    if not arguments.overwrite:
        check_out(arguments.out)
    texts = list(PROMPTS)
    if arguments.data:
        items = read_data(arguments, require_answers=False)
        texts = [item.example.prompt for item in items][: arguments.limit or CHECKED]
    adapter, processor = load_adapter(arguments)
    tokenizer = InputProcessor(adapter.backbone, processor).tokenizer
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    checked = export_vllm(
        adapter, arguments.out, prompts, max_new_tokens=min(arguments.max_new_tokens, 16)
    )  # fmt: skip
    show_result(
        {"exits": str(arguments.out), "checked": checked},
        f"{arguments.out}: exits for vLLM, with {checked} answers for the check at start",
        as_json=arguments.json,
    )
    added = json.dumps({"offramp": {"exits": str(arguments.out)}})
    say_next(f"vllm serve {adapter.backbone.name} --additional-config '{added}'")


def _export_draft_model(arguments: argparse.Namespace) -> None:
    from offramp.runtimes.draft_model import check_out, save_draft_model

    _check_adapter_alone(arguments, ("gguf", "exit_format", "vision_format", "data"))
    if len(arguments.depths or ()) > 1:
        raise InputError("A draft model is of one exit.", "Give one depth with --depths.")
    if not arguments.overwrite:
        check_out(arguments.out)
    adapter, processor = load_adapter(arguments)
    depth = arguments.depths[0] if arguments.depths else None
    layers = save_draft_model(adapter, processor, arguments.out, depth)
    show_result(
        {"draft_model": str(arguments.out), "layers": layers},
        f"{arguments.out}: a model of {layers} layers, for {adapter.backbone.depth}",
        as_json=arguments.json,
    )
    told = {"method": "draft_model", "model": str(arguments.out), "num_speculative_tokens": 4}
    say_next(f"vllm serve {adapter.backbone.name} --speculative-config '{json.dumps(told)}'")


def _check_adapter_alone(arguments: argparse.Namespace, others: tuple[str, ...]) -> None:
    """Raise `InputError` without an adapter, or with what does not go with --to."""
    from offramp.storage.folders import check_writable

    if arguments.adapter is None:
        raise InputError(f"--to {arguments.to} writes an adapter's exits.", "Name it first.")
    for name in others:
        if getattr(arguments, name):
            shown = name.removesuffix("_format").replace("_", "-")
            raise InputError(f"--{shown} does not go with --to {arguments.to}.", "Leave it out.")
    check_writable(arguments.out, folder=True)


def _export_drafter(arguments: argparse.Namespace) -> None:
    from offramp.save_and_load.speculators import check_out, save_drafter, vllm_config
    from offramp.storage.folders import check_writable
    from offramp.training.config import TrainConfig
    from offramp.training.drafting import UNROLLED
    from offramp.training.eagle3 import train_eagle3

    given = [f for f in ("gguf", "exit_format", "vision_format", "depths") if getattr(arguments, f)]
    if given or not arguments.data:
        raise InputError(
            "A drafter learns from the model's answers to your prompts."
            if not given
            else f"--{given[0].removesuffix('_format')} is of GGUF files, not of a drafter.",
            "Give --data, and --steps and --shortlist if you like; or leave --to out.",
        )
    check_writable(arguments.out, folder=True)
    if not arguments.overwrite:
        check_out(arguments.out)
    items = read_data(arguments, require_answers=False)
    if arguments.adapter is None:
        backbone, processor = load_model(arguments)
    else:
        adapter, processor = load_adapter(arguments)
        backbone = adapter.backbone
    config = TrainConfig(
        steps=arguments.steps, shortlist=arguments.shortlist,
        max_new_tokens=arguments.max_new_tokens,
    )  # fmt: skip
    examples = [item.example for item in items]
    drafter, found = train_eagle3(backbone, processor, examples, config, arguments.out)
    measured = found.to_json | {"tokens_a_round": round(1 + found.tokens, 3)}
    save_drafter(drafter, backbone, arguments.out, drafts=UNROLLED, measured=measured)
    shown = ", ".join(f"{share:.0%}" for share in measured["acceptance"][:UNROLLED])
    show_result(
        {"drafter": str(arguments.out), **measured},
        f"{arguments.out}: drafts are right {shown}; {1 + found.tokens:.2f} tokens a round",
        as_json=arguments.json,
    )
    told = vllm_config(str(arguments.out), UNROLLED)
    say_next(f"vllm serve {backbone.name} --speculative-config '{told}'")


def _export_gguf(arguments: argparse.Namespace) -> None:
    if arguments.gguf is None or arguments.adapter is None:
        raise InputError(
            "Files for llama.cpp are of an adapter, in a number format.",
            f"Name it first and give --gguf q8_0; or --to {VLLM}, {DRAFT_MODEL} or {SPECULATORS}.",
        )
    if arguments.data:
        raise InputError(
            "Files for llama.cpp are made without data.",
            "Leave --data out; `offramp draft --engine llama.cpp` times drafts in the files.",
        )
    from offramp.runtimes.llama_cpp import ExportFormats, export_gguf
    from offramp.storage.folders import check_writable

    formats = ExportFormats(arguments.gguf, arguments.exit_format, arguments.exit_format)
    check_writable(arguments.out, folder=True)
    adapter, processor = load_adapter(arguments)
    _check_out(adapter, arguments)
    if adapter.of_format not in (None, formats.layers):
        log.warning(
            "These exits learnt from the backbone in %s, and agree less with it in %s.",
            adapter.of_format, formats.layers,
        )  # fmt: skip
    files = export_gguf(
        adapter, arguments.out, formats,
        depths=arguments.depths, vision=arguments.vision_format, processor=processor,
    )  # fmt: skip
    sizes = {str(file): file.stat().st_size for file in files}
    show_result(sizes, "\n".join(sizes), as_json=arguments.json)
    for name, size in sizes.items():
        log.info("%s: %.1f MB", Path(name).name, size / 1e6)
    seen = "" if arguments.vision_format is None else f" --vision {MTMD}"
    how = asked_again(arguments, "backbone", "revision", "dtype")
    say_next(
        f"offramp generate {arguments.adapter}{how} --engine llama.cpp "
        f"--gguf {arguments.out}{seen} --image dog.jpg"
    )


def _check_out(adapter: Any, arguments: argparse.Namespace) -> None:
    """Raise `InputError` where --out holds segments of another adapter."""
    from offramp.runtimes.llama_cpp.gguf_files import read_segments

    if arguments.overwrite or not any(arguments.out.glob("segment-*.gguf")):
        return
    try:
        read_segments(arguments.out, adapter, check_digests=False)
    except OfframpError as error:
        raise InputError(
            f"{arguments.out} already holds segments that are not of this adapter.",
            "Give another --out, or --overwrite to replace them.",
        ) from error
