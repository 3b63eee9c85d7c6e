"""`offramp export`: the decoder and its exits as GGUF files for llama.cpp."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from offramp.cli.options import add_command, backbone_options, load_adapter
from offramp.errors import InputError


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "export",
        "Write a backbone's decoder and its exits as GGUF files, for --runtime llama.cpp.",
        "offramp export --adapter exits --gguf q8_0 --out exits-q8_0\n"
        "  offramp generate --adapter exits --runtime llama.cpp --gguf exits-q8_0 "
        "--image dog.jpg",
        _export,
    )
    parser.add_argument("--adapter", required=True, help="folder or hub name of trained exits")
    backbone_options(parser, required=False)
    parser.add_argument(
        "--gguf", required=True, metavar="FORMAT",
        help="number format of the layers: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0",
    )  # fmt: skip
    parser.add_argument(
        "--exit-format", default="", metavar="FORMAT",
        help="of the exits' layers (default: the layers', but q8_0 where that has fewer bits)",
    )  # fmt: skip
    parser.add_argument(
        "--head-format", default="", metavar="FORMAT", help="of the head (default: the same)"
    )
    parser.add_argument(
        "--depths", type=_depths, metavar="D,D",
        help="exits to write (default: those where the adapter's policy lets tokens leave)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")


def _depths(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _export(arguments: argparse.Namespace) -> None:
    from offramp.runtimes.llama_cpp import ExportFormats, export_gguf

    formats = ExportFormats(arguments.gguf, arguments.exit_format, arguments.head_format)
    if arguments.out.exists() and not arguments.out.is_dir():
        raise InputError(f"{arguments.out} is a file.", "Name a folder: --out FOLDER.")
    adapter, _ = load_adapter(arguments)
    for file in export_gguf(adapter, arguments.out, formats, depths=arguments.depths):
        print(file)
        logging.info("%.1f MB", file.stat().st_size / 1e6)
