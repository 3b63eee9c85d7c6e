"""`offramp env`: what a bug report needs to know of this machine."""

from __future__ import annotations

import argparse
import os
import re
from importlib import metadata
from typing import Any

from offramp import __version__
from offramp.cli.options import add_command
from offramp.cli.output import show_result
from offramp.cli.parser import Parser
from offramp.common.provenance import provenance, version_of
from offramp.common.pytorch import has_pytorch
from offramp.core.missing import install_command
from offramp.engines import all_engines

PACKAGES = ("torch", "transformers", "huggingface_hub", "safetensors", "numpy", "pillow")
VARIABLES = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_OFFLINE")
# Not by `packaging`, which the distribution without PyTorch does not bring.
_NAME, _EXTRA = re.compile(r"[\w.-]+"), re.compile(r"""extra == ["']([\w-]+)["']""")


def add(commands: Any) -> None:
    add_command(
        commands,
        "env",
        "Show versions, devices, threads, optional packages and the fastest engine of each model "
        "that was measured here, as a bug report needs them.",
        "offramp env",
        _env,
        _options,
    )


def _options(parser: Parser) -> None:
    parser.add_argument(
        "forget",
        nargs="?",
        choices=("forget",),
        help="forget which engines were the fastest: each model is then measured anew",
    )


def _env(arguments: argparse.Namespace) -> None:
    engines: list[str] = []
    gpus: dict[str, str] = {}
    torch_version = "not installed: what `offramp export` cut runs without it"
    if has_pytorch():
        import torch

        from offramp.engines import auto

        if arguments.forget:
            auto.forget()
        engines = auto.remembered()
        count = torch.cuda.device_count()
        gpus = {f"cuda:{n}": torch.cuda.get_device_name(n) for n in range(count)}
        torch_version = torch.__version__
    here = provenance(None, "", None)  # which asks PyTorch how many threads there are
    environment = {
        "offramp": __version__,
        "commit": here["versions"]["commit"],
        "python": here["versions"]["python"],
        "platform": here["platform"],
        "packages": {name: version_of(name) for name in PACKAGES} | {"torch": torch_version},
        "optional": optional_packages(),
        **{name: one.said_here() for name, one in all_engines().items() if one.said_here},
        "engines": engines,
        "devices": {"cpu": here["processor"], **gpus},
        "cores": here["cores"],
        "threads": here["threads"],
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }
    show_result(environment, as_json=arguments.json)


def optional_packages() -> dict[str, str]:
    """Return the packages of the extras by name, with the version or how to install it."""
    try:
        named = metadata.requires("offramp") or ()
    except metadata.PackageNotFoundError:  # run from a source tree that was not installed
        return {}
    packages = {}
    for requirement in named:
        name, extra = _NAME.match(requirement), _EXTRA.search(requirement)
        if name and extra and extra[1] not in ("all", "dev", "docs"):
            version = version_of(name[0])
            packages[name[0]] = version or f"not installed: {install_command(extra[1])}"
    return packages
