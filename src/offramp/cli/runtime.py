"""The options of commands that generate: which runtime, and its files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from offramp.errors import InputError, did_you_mean

RUNTIMES = ("torch", "llama.cpp")


def runtime_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runtime", default="torch", metavar="NAME",
        help=f"{' or '.join(RUNTIMES)}, which runs the decoder from --gguf (default: torch)",
    )  # fmt: skip
    parser.add_argument(
        "--gguf", type=Path, metavar="FOLDER", help="what `offramp export --out` wrote"
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="of llama.cpp's decoder (default: 1)"
    )
    parser.add_argument(
        "--context", type=int, default=2048,
        help="longest prompt with its answer for llama.cpp, in tokens (default: 2048)",
    )  # fmt: skip


def check_runtime(arguments: argparse.Namespace) -> None:
    """Raise `InputError` for a mistake that should not wait for the model."""
    if arguments.runtime not in RUNTIMES:
        raise InputError(
            f"Runtime {arguments.runtime!r} is not known.",
            did_you_mean(arguments.runtime, RUNTIMES),
        )
    if (arguments.runtime == "torch") != (arguments.gguf is None):
        raise InputError(
            "--runtime llama.cpp and --gguf FOLDER go together.",
            "Write the folder: offramp export --adapter FOLDER --gguf q8_0 --out FOLDER.",
        )


def load_runtime(arguments: argparse.Namespace, adapter: Any) -> Any:
    """What generates for `adapter`: itself, or the llama.cpp runtime."""
    check_runtime(arguments)
    if arguments.runtime == "torch":
        return adapter
    from offramp.runtimes.llama_cpp import EngineOptions, LlamaCppRuntime

    engine = EngineOptions(context=arguments.context, threads=arguments.threads)
    return LlamaCppRuntime(adapter, arguments.gguf, engine=engine)
