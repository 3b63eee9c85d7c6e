"""The options of commands that generate: which engine runs the decoder, and what it reads."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from offramp.cli.parser import Parser, threads, whole
from offramp.engines import AUTO, MTMD, TORCH

log = logging.getLogger(__name__)


def runtime_options(parser: Parser, *, sized: bool = True) -> Any:
    """Add what goes with --engine. sized: threads and context too; returns the group."""
    group = parser.add_argument_group("runtime")
    group.add_argument(
        "--gguf", type=Path, metavar="FOLDER", help="what `offramp export --out` wrote"
    )
    if not sized:
        return group
    group.add_argument(
        "--threads", type=threads, metavar="N",
        help="threads of llama.cpp's decoder (default: 1, or PyTorch's number with --engine auto)",
    )  # fmt: skip
    group.add_argument(
        "--context", type=whole(1), default=2048, metavar="N",
        help="longest prompt with its answer, in tokens, of a runtime other than torch "
        "(default: 2048)",
    )  # fmt: skip
    return group


def check_runtime(arguments: argparse.Namespace) -> None:
    """Raise `InputError` for a mistake that should not wait for the model."""
    from offramp.engines import check_asked

    check_asked(arguments.engine, arguments.gguf, arguments.quantize)
    if getattr(arguments, "vision", TORCH) == MTMD:
        from offramp.engines.loading import own_vision

        named = arguments.engine == AUTO and arguments.gguf is not None
        own_vision(arguments.vision, "llama.cpp" if named else arguments.engine)


def load_runtime(
    arguments: argparse.Namespace, adapter: Any, *, alone: bool = False, **sizes: int
) -> Any:
    """Return what generates in the adapter's place; None: it does that itself.

    alone: nothing else decodes by the adapter, or saves it: what is held twice is freed. sizes:
    threads and context, where the command has other options for them; sequences, at a time.
    """
    from offramp.engines import engine_named

    check_runtime(arguments)
    if arguments.engine != "llama.cpp" and (kind := getattr(adapter, "of_format", None)):
        log.warning(
            "These exits learnt from the backbone in %s, and agree less with it as it is here: "
            "export them (--gguf %s) and use --engine llama.cpp.", kind, kind,
        )  # fmt: skip
    engine = engine_named(arguments.engine)
    if not engine.replaces:
        return None
    asked = {name: sizes.get(name) or getattr(arguments, name) for name in ("context", "threads")}
    own = {**asked, "threads": asked["threads"] or 1}
    runtime = engine.open(adapter, gguf=arguments.gguf, **own, sequences=sizes.get("sequences", 1))
    if alone and hasattr(runtime, "release_decoder"):
        runtime.release_decoder()
    return runtime
