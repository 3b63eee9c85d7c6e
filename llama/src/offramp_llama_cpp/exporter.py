"""`offramp export --gguf FORMAT`: a decoder and its exits as GGUF files."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from offramp.cli.exporting import Exporter
from offramp.cli.loading import loaded
from offramp.cli.options import asked_again, name_option
from offramp.cli.output import say_next, show_result
from offramp.cli.parser import Parser
from offramp.core.errors import InputError, OfframpError

log = logging.getLogger(__name__)


def _options(parser: Parser) -> None:
    from offramp_llama_cpp.gguf_writing import FORMATS, VISION_FORMATS

    group = parser.add_argument_group("with --to gguf")
    name_option(
        group, "--gguf", FORMATS, "number format of the layers", shown="none; --to gguf needs one"
    )
    name_option(
        group,
        "--vision",
        VISION_FORMATS,
        "number format of the vision tower, which is "
        "written too, for --vision mtmd and llama.cpp's own programs",
        dest="vision_format",
        shown="it stays in PyTorch",
    )


def _write(arguments: argparse.Namespace) -> None:
    if arguments.gguf is None or arguments.adapter is None:
        raise InputError(
            "Files for llama.cpp are of an adapter, in a number format.",
            "Name it first and give --gguf q8_0; or another format with --to.",
        )
    if arguments.data:
        raise InputError(
            "Files for llama.cpp are made without data.",
            "Leave --data out; `offramp calibrate --lossless` times drafts in the files.",
        )
    from offramp.common.folders import check_writable
    from offramp_llama_cpp import ExportFormats, export_gguf

    formats = ExportFormats(arguments.gguf)
    check_writable(arguments.out, folder=True)
    opened = loaded(arguments, gguf=None, answers=0)  # here --gguf names a format
    adapter, processor = opened.adapter, opened.processor
    _check_out(adapter, arguments)
    if adapter.of_format not in (None, formats.layers):
        log.warning(
            "These exits learnt from the backbone in %s, and agree less with it in %s.",
            adapter.of_format,
            formats.layers,
        )
    files = export_gguf(
        adapter,
        arguments.out,
        formats,
        depths=arguments.depths,
        vision=arguments.vision_format,
        processor=processor,
    )
    sizes = {str(file): file.stat().st_size for file in files}
    show_result(sizes, "\n".join(sizes), as_json=arguments.json)
    for name, size in sizes.items():
        log.info("%s: %.1f MB", Path(name).name, size / 1e6)
    seen = "" if arguments.vision_format is None else " --vision mtmd"
    how = asked_again(arguments, "backbone", "revision", "dtype")
    say_next(
        f"offramp generate {arguments.adapter}{how} --engine llama.cpp "
        f"--gguf {arguments.out}{seen} --image dog.jpg"
    )


def _check_out(adapter: Any, arguments: argparse.Namespace) -> None:
    """Raise `InputError` where --out holds segments of another adapter."""
    from offramp_llama_cpp.gguf_files import read_segments

    if arguments.overwrite or not any(arguments.out.glob("segment-*.gguf")):
        return
    try:
        read_segments(arguments.out, adapter, check_digests=False)
    except OfframpError as error:
        raise InputError(
            f"{arguments.out} already holds segments that are not of this adapter.",
            "Give another --out, or --overwrite to replace them.",
        ) from error


GGUF = Exporter(
    "decoder and exits, for --engine llama.cpp",
    _write,
    _options,
    takes=("gguf", "vision_format", "depths", "data"),  # an error of its own
)
