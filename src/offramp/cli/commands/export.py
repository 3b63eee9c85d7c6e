"""`offramp export`: the decoder and its exits as GGUF files for llama.cpp."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from offramp.cli.commands.runtime import check_not_quantized
from offramp.cli.loading import load_adapter
from offramp.cli.options import add_command, depths_option, model_options, name_option
from offramp.cli.output import say_next, show_result
from offramp.cli.outputs import overwrite_option
from offramp.cli.parser import Parser
from offramp.errors import InputError, OfframpError

log = logging.getLogger(__name__)


def add(commands: Any) -> None:
    add_command(
        commands,
        "export",
        "Write a backbone's decoder and its exits as GGUF files, for --engine llama.cpp.",
        "offramp export --adapter exits --gguf q8_0 --out exits-q8_0\n"
        "  offramp generate --adapter exits --engine llama.cpp --gguf exits-q8_0 "
        "--image dog.jpg",
        _export,
        _options,
    )


def _options(parser: Parser) -> None:
    from offramp.runtimes.llama_cpp.gguf_writing import FORMATS

    model_options(parser, required=False, adapter=True, engines=())
    group = parser.add_argument_group("files")
    name_option(group, "--gguf", FORMATS, "number format of the layers", required=True)
    name_option(
        group, "--exit-format", FORMATS, "number format of the exits' layers", default="",
        shown="the layers', or q8_0 where that has fewer bits",
    )  # fmt: skip
    name_option(
        group, "--head-format", FORMATS, "number format of the head", default="", shown="the exits'"
    )
    depths_option(
        group,
        "--depths",
        "exits to write (default: those at which the adapter's policy has thresholds)",
    )
    group.add_argument("--out", type=Path, required=True, help="folder for the files")
    overwrite_option(group)


def _export(arguments: argparse.Namespace) -> None:
    from offramp.runtimes.llama_cpp import ExportFormats, export_gguf
    from offramp.storage import check_writable

    check_not_quantized(arguments)
    formats = ExportFormats(arguments.gguf, arguments.exit_format, arguments.head_format)
    check_writable(arguments.out, folder=True)
    adapter, _ = load_adapter(arguments)
    _check_out(adapter, arguments)
    files = export_gguf(adapter, arguments.out, formats, depths=arguments.depths)
    sizes = {str(file): file.stat().st_size for file in files}
    show_result(sizes, "\n".join(sizes), as_json=arguments.json)
    for name, size in sizes.items():
        log.info("%s: %.1f MB", Path(name).name, size / 1e6)
    say_next(
        f"offramp generate --adapter {arguments.adapter} --engine llama.cpp "
        f"--gguf {arguments.out} --image dog.jpg"
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
