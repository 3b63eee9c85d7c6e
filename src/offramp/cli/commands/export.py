"""`offramp export`: exits as files of another program, in the formats that packages bring."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from offramp.cli.exporting import Exporter, refuse_others
from offramp.cli.options import (
    add_command,
    data_options,
    depths_option,
    length_option,
    model_options,
    name_option,
)
from offramp.cli.outputs import overwrite_option
from offramp.cli.parser import Parser
from offramp.core.errors import InputError
from offramp.core.plugins import PACKAGES, brought

DEFAULT = "gguf"


def add(commands: Any) -> None:
    add_command(
        commands,
        "export",
        "Write exits for another program: GGUF files for --engine llama.cpp, exits for vLLM's "
        "plug-in, an exit as a draft model, or an EAGLE-3 drafter.",
        "offramp export exits --gguf q8_0 --out exits-q8_0\n"
        "  offramp export exits model-q4_k_m.gguf --out sliced    a file from the hub, cut\n"
        "  offramp export exits --to vllm --out exits-vllm\n"
        "  offramp export exits --to draft-model --out draft",
        _export,
        _options,
        usual="to gguf vision depths data out overwrite",
    )


def _options(parser: Parser) -> None:
    exporters: dict[str, Exporter] = brought("exporters")
    model_options(parser, adapter=False, engines="none")
    group = parser.add_argument_group("files")
    said = "; ".join(f"{name}: {one.said}" for name, one in exporters.items())
    missing = [name for name in PACKAGES if name in _FORMATS and name not in exporters]
    if missing:
        said = "; ".join(filter(None, [said, *(f"{n}: needs {PACKAGES[n]}" for n in missing)]))
    default = DEFAULT if DEFAULT in exporters else next(iter(exporters), DEFAULT)
    name_option(group, "--to", [*exporters], f"what is written ({said})", default=default)
    group.add_argument("--out", type=Path, required=True, help="folder for the files")
    overwrite_option(group)
    depths_option(
        group,
        "--depths",
        "exits to write (default: those at which the adapter's policy has thresholds)",
    )
    data = data_options(
        parser,
        "prompts like those to come, for formats that are checked or trained by answers",
        required=False,
    )
    length_option(data)
    for one in exporters.values():
        one.options(parser)


_FORMATS = ("gguf", "vllm", "draft-model", "speculators")
"""Formats of this project's packages, named where their package is not installed."""


def _export(arguments: argparse.Namespace) -> None:
    exporters: dict[str, Exporter] = brought("exporters")
    if not exporters:
        raise InputError(
            "No installed package writes files.",
            "Install offramp-llama-cpp or offramp-vllm, which do.",
        )
    refuse_others(arguments, exporters)
    exporters[arguments.to].write(arguments)
