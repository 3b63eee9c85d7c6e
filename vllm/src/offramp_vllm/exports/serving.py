"""The engine "vllm", which serves: `offramp serve NAME --engine vllm`.

The exits are written beside the answers that vLLM is checked by, once for each adapter, and vLLM
takes this process's place. vLLM pins an older transformers, so it is mostly installed in another
environment, whose Python the variable `PYTHON` names.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from offramp.adapter.shipped import PHOTOS, exits_folder
from offramp.cli.commands.serve import server_config
from offramp.cli.loading import loaded
from offramp.cli.output import print_json, tell
from offramp.common.folders import cache_folder
from offramp.core.errors import InputError
from offramp.core.storage import digest_file, digest_rows, write_json
from offramp.engines import register_engine
from offramp_vllm.exports.exporters import DRAFTS, checkpoint_of, template_options

PYTHON = "OFFRAMP_VLLM_PYTHON"
MODULES = ("vllm", "offramp_vllm")
PHOTO_CLASS = "offramp_photo"
"""The package that brings vLLM the class of the models of photographs."""
GIBIBYTES = "2"
"""Of keys and values on a processor, where the environment names no other size: vLLM would take
92% of the free memory."""
UNKNOWN = ("gguf", "quantize", "threads", "cors", "allowed_hosts")
"""Options of our own server that vLLM's does not have."""


def serve(arguments: argparse.Namespace) -> None:
    """Write the exits of the adapter that is asked for, and become vLLM's server.

    Raises:
        InputError: vLLM or its plug-in is not installed where it is looked for; an option that vLLM
            does not have, or a mode in which it would not answer; exits that vLLM cannot run.
    """
    if named := [name for name in UNKNOWN if getattr(arguments, name, None)]:
        option = named[0].replace("_", "-")
        raise InputError(f"vLLM's server has no --{option}.", "Leave it out.")
    if arguments.mode == "full":
        raise InputError(
            "Exits in vLLM draft or answer early, and --mode full wants neither.",
            "Leave it out: requests that say offramp_mode full are answered so.",
        )
    python, config = python_with_vllm(), server_config(arguments)
    opened = loaded(arguments, name=arguments.name, engine="torch")
    model = checked_model(opened, python)
    exits = _exported(opened, exits_folder(arguments.name), arguments.mode)
    settings = _settings(arguments, config, opened, exits) | {"model": model}
    command, environment = server_of(
        python, settings, exits.with_name(f"{exits.name}-{arguments.port}.yaml")
    )
    url = f"http://{arguments.host}:{settings['port']}/v1"
    if arguments.json:
        print_json({"model": config.name, "url": url})
    mode = arguments.mode or "lossless"
    tell(f"vLLM starts, and will serve {config.name} in mode {mode}: {url} (OpenAI's API)")
    sys.stdout.flush()
    os.execve(python, command, environment)


def server_of(
    python: str, settings: dict[str, Any], file: Path
) -> tuple[list[str], dict[str, str]]:
    """The command of a server by these settings, and its environment. Keys would be seen in the
    list of processes, so vLLM reads all from a file of this user's."""
    file.unlink(missing_ok=True)  # which others may read, or a link
    file.touch(0o600, exist_ok=False)
    write_json(file, settings, follow=False)
    command = [python, "-P", "-m", "vllm.entrypoints.openai.api_server", "--config", str(file)]
    return command, {"VLLM_CPU_KVCACHE_SPACE": GIBIBYTES, **os.environ}


def checked_model(opened: Any, python: str) -> str:
    """The folder or hub name of the weights of an opened adapter's backbone.

    Raises:
        InputError: vLLM has no class for it, or lacks the package with that class.
    """
    model = _checkpoint(opened.adapter.backbone)
    if opened.adapter.backbone.name in PHOTOS.values():
        _check(python, [PHOTO_CLASS])
    return model


def python_with_vllm() -> str:
    """The Python of vLLM's environment: this one, or the one that the variable names."""
    found = [importlib.util.find_spec(name) for name in MODULES]
    here = all(one is not None and one.origin for one in found)  # a folder of that name is none
    python = os.environ.get(PYTHON) or (sys.executable if here else "")
    if not python:
        raise InputError(
            "vLLM is not installed here.",
            f"Name the Python of the environment that has it: {PYTHON}=VENV/bin/python.",
        )
    _check(python, MODULES)
    return python


def _check(python: str, modules: Sequence[str]) -> None:
    """Raise `InputError` where another Python cannot be run, or has not all of some modules."""
    looks = f"import importlib.util as u; [u.find_spec(n) or exit(n) for n in {[*modules]}]"
    try:
        asked = subprocess.run(
            [python, "-P", "-c", looks], capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise InputError(
            f"{python} cannot be run: {error.strerror}.", f"Name a Python in {PYTHON}."
        ) from error
    if asked.returncode:
        missing = asked.stderr.split()[-1] if asked.stderr.strip() else modules[0]
        raise InputError(
            f"{python} has no {missing}.",
            f"Install it there: pip install {missing.replace('_', '-')} (docs/vllm.md).",
        )


def _checkpoint(backbone: Any) -> str:
    """The folder or hub name of the model's own weights.

    Raises:
        InputError: vLLM has no class for the model.
    """
    if backbone.is_encoder_decoder:
        raise InputError(
            f"vLLM has no class for {backbone.name}.",
            "Serve it by another engine: leave --engine out.",
        )
    return checkpoint_of(backbone)


def _exported(opened: Any, source: Path, mode: str | None) -> Path:
    """The folder of an adapter's exits, written at first use. source: the adapter's folder.

    Raises:
        InputError: there are no exits, or none that answers in this mode.
    """
    if not opened.has_exits:
        raise InputError("Without exits there is nothing to add to vLLM.", "Name an adapter.")
    opened.adapter.policy.asked(mode, None, opened.adapter.exits.depths)
    from offramp.core.save_and_load import CONFIG  # PyTorch, of which no help needs any
    from offramp_vllm.exports.vllm import FORMAT, VLLM

    told = [digest_file(source / CONFIG), str(opened.adapter.backbone.dtype), FORMAT]
    place = cache_folder("vllm") / digest_rows(told)[:32]
    if not (place / VLLM).is_file():
        tell("The exits are written for vLLM; this is done once.")
        write_exits(opened.adapter, opened.encoder, place)
    return place


def write_exits(adapter: Any, encoder: Any, folder: Path) -> None:
    """Write an adapter's exits, with the answers that vLLM is checked by at its start."""
    from offramp_vllm.exports.vllm import PROMPTS, export_vllm

    prompts = [encoder.tokenizer(text)["input_ids"] for text in PROMPTS]
    export_vllm(adapter, folder, prompts, encoder=encoder)


def model_settings(opened: Any, limit: int) -> dict[str, Any]:
    """vLLM's options of a model. limit: of tokens in a prompt with its answer."""
    backbone = opened.adapter.backbone
    most = getattr(backbone.text_config, "max_position_embeddings", limit)
    return {
        "max-model-len": min(limit, most),
        "dtype": str(backbone.dtype).removeprefix("torch."),  # else float32 is served in halves
    }


def _settings(
    arguments: argparse.Namespace, config: Any, opened: Any, exits: Path
) -> dict[str, Any]:
    """vLLM's options, by their names."""
    watch = arguments.watch.get("share")
    ours = {"exits": str(exits)} | ({} if watch is None else {"watch": watch})
    if arguments.mode is not None:
        ours["mode"] = arguments.mode
    settings = {
        **model_settings(opened, arguments.limit),
        "host": arguments.host,
        "port": arguments.port,
        "served-model-name": config.name,
        "additional-config": json.dumps({"offramp": ours}),
    }
    if arguments.slots is not None:
        settings["max-num-seqs"] = arguments.slots
    if arguments.chat_template is None:
        settings |= template_options(opened, exits)
    else:
        settings["chat-template"] = str(arguments.chat_template)
    if config.keys:
        settings["api-key"] = list(config.keys)
    if arguments.mode in (None, "lossless") or opened.adapter.policy.trust is not None:
        settings["speculative-config"] = json.dumps(DRAFTS)
    return settings


def asks(opened: Any, arguments: argparse.Namespace) -> AbstractContextManager[Any]:
    """A server that calibration asks; see `offramp_vllm.exports.asking`."""
    from offramp_vllm.exports import asking

    return asking.asks(opened, arguments)


register_engine(
    "vllm",
    lambda model, **sizes: model,
    "a server of vLLM's, where it is installed",
    serves=serve,
    asks=asks,
)
