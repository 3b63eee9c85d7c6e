"""The options of commands that generate: which engine runs the decoder, and what it reads."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from offramp.cli.loading import own_vision
from offramp.cli.options import RUNTIMES
from offramp.cli.parser import Parser, threads, whole
from offramp.errors import InputError

log = logging.getLogger(__name__)


def runtime_options(parser: Parser, *, sized: bool = True) -> Any:
    """What goes with --engine. sized: threads and context too; returns the group."""
    group = parser.add_argument_group("runtime")
    group.add_argument(
        "--gguf", type=Path, metavar="FOLDER", help="what `offramp export --out` wrote"
    )
    if not sized:
        return group
    group.add_argument(
        "--threads", type=threads, default=1, metavar="N",
        help="threads of llama.cpp's decoder (default: 1)",
    )  # fmt: skip
    group.add_argument(
        "--context", type=whole(1), default=2048, metavar="N",
        help="longest prompt with its answer, in tokens, of a runtime other than torch "
        "(default: 2048)",
    )  # fmt: skip
    return group


def check_runtime(arguments: argparse.Namespace) -> None:
    """Raise `InputError` for a mistake that should not wait for the model."""
    if (arguments.engine == "llama.cpp") != (arguments.gguf is not None):
        raise InputError(
            "--engine llama.cpp and --gguf FOLDER go together.",
            "Write the folder: offramp export --adapter FOLDER --gguf q8_0 --out FOLDER.",
        )
    own_vision(arguments)
    if arguments.gguf is not None and arguments.quantize is not None:
        raise InputError(
            f"--quantize {arguments.quantize} is for PyTorch; llama.cpp's files hold the weights.",
            "Leave it out, and choose their format: offramp export --gguf q4_1.",
        )


def load_runtime(
    arguments: argparse.Namespace, adapter: Any, *, alone: bool = False, **sizes: int
) -> Any:
    """What generates in the adapter's place; None: it does that itself.

    alone: nothing else decodes by the adapter, or saves it: what is held twice is freed. sizes:
    threads and context, where the command has other options for them; sequences, at a time.
    """
    check_runtime(arguments)
    if arguments.engine != "llama.cpp" and (kind := getattr(adapter, "of_format", None)):
        log.warning(
            "These exits learnt from the backbone in %s, and agree less with it as it is here: "
            "export them (--gguf %s) and use --engine llama.cpp.", kind, kind,
        )  # fmt: skip
    if arguments.engine not in RUNTIMES:
        return None
    context, threads = (
        sizes.get(name) or getattr(arguments, name) for name in ("context", "threads")
    )
    if arguments.engine == "cuda-graphs":
        return _graphs(adapter, context)
    from offramp.runtimes.llama_cpp import EngineOptions, LlamaCppRuntime

    engine = EngineOptions(context, threads, sequences=sizes.get("sequences", 1))
    runtime = LlamaCppRuntime(adapter, arguments.gguf, engine=engine)
    if alone:
        runtime.release_decoder()
    return runtime


def _graphs(adapter: Any, context: int) -> Any:
    from offramp.runtimes.graphs import GraphRuntime

    if adapter.backbone.device.type != "cuda":
        raise InputError(
            f"CUDA graphs need an NVIDIA GPU, and the model is on {adapter.backbone.device}.",
            "Leave --engine out, or name the GPU with --device cuda.",
        )
    return GraphRuntime(adapter, context=context)
