"""`offramp export NAME FILE.gguf`: a file from the hub, cut at exits, without PyTorch."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from offramp.cli.options import add_command, depths_option
from offramp.cli.output import say_next, show_result
from offramp.cli.parser import Parser
from offramp.core.errors import InputError

log = logging.getLogger(__name__)


def add(commands: Any) -> None:
    add_command(
        commands,
        "export",
        "Cut a GGUF file from the hub at an adapter's exits: tensors as they are stored.",
        "offramp export exits model-q4_k_m.gguf --out sliced\n"
        "  offramp generate sliced --prompt 'Caption:'",
        _slice,
        _options,
        usual="depths out json",
    )


def _options(parser: Parser) -> None:
    group = parser.add_argument_group("files")
    group.add_argument(
        "adapter", type=Path, metavar="NAME", help="folder of the exits, as `offramp train` wrote"
    )
    group.add_argument(
        "file",
        type=Path,
        nargs="?",
        metavar="FILE",
        help="GGUF file of their backbone, in one piece",
    )
    depths_option(
        group,
        "--depths",
        "exits to write (default: those at which the adapter's policy has thresholds)",
    )
    group.add_argument("--out", type=Path, required=True, help="folder for the files")


def _slice(arguments: argparse.Namespace) -> None:
    from offramp.common.folders import check_writable
    from offramp_llama_cpp.slicing import slice_gguf

    adapter, file = arguments.adapter, arguments.file
    if file is None:
        raise InputError(
            "No GGUF file was named.",
            "Name it after the exits: export NAME FILE.gguf. Other exports need PyTorch.",
        )
    check_writable(arguments.out, folder=True)
    files = slice_gguf(file, adapter, arguments.out, depths=arguments.depths)
    sizes = {str(file): file.stat().st_size for file in files}
    show_result(sizes, "\n".join(sizes), as_json=arguments.json)
    for name, size in sizes.items():
        log.info("%s: %.1f MB", Path(name).name, size / 1e6)
    log.info(
        "The exits were trained on other weights than these: choose thresholds on them, "
        "offramp calibrate %s --engine llama.cpp --gguf %s --data held_out.",
        adapter,
        arguments.out,
    )
    say_next(f"offramp generate {arguments.out} --prompt 'A dog'")
