"""The files of an adapter's folder: how each is written, read and checked.

adapter.json                format version, backbone, depths, policy, calibration, provenance
exits.safetensors           the exits' tensors, nothing of the backbone
checks.safetensors          shortlist and gates, if there are any (`offramp.models.shortlist`)
discriminators.safetensors  only needed for the discriminator score and for resuming
seen.json                   digests of the images that training and calibration used
README.md                   the model card
training/                   log, and the state that resuming needs; not pushed to the hub
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offramp.errors import AdapterError, DataError, StorageError
from offramp.models.backbone import Backbone
from offramp.models.exits import ExitSet
from offramp.models.shortlist import Gate
from offramp.storage import read_json

FORMAT = 1
CONFIG, EXITS, CHECKS, DISCRIMINATORS, SEEN, CARD = (
    "adapter.json",
    "exits.safetensors",
    "checks.safetensors",
    "discriminators.safetensors",
    "seen.json",
    "README.md",
)


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raise AdapterError(
            f"{folder} holds no adapter ({CONFIG} is missing).",
            "Give the folder that `offramp train --out` wrote.",
        )
    try:
        config = read_json(folder / CONFIG)
    except (DataError, StorageError) as error:
        raise AdapterError(
            error.problem, "Restore the folder, or train the exits again."
        ) from error
    found = config.get("format") if isinstance(config, dict) else None
    if found != FORMAT:
        raise AdapterError(
            f"{folder} has adapter format {found!r}; this version reads format {FORMAT}.",
            "Train the exits again, or install the version of offramp that wrote it.",
        )
    return config  # type: ignore[no-any-return]


def _discriminator_options(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """How the discriminators are built; None where there are none."""
    if "conditional_discriminators" in config:  # written when there was one option
        conditional = config["conditional_discriminators"]
        return None if conditional is None else {"conditional": bool(conditional)}
    options = config["discriminators"]
    return None if options is None else dict(options)


def _read_seen(folder: Path) -> dict[str, list[str]]:
    """What `seen.json` holds; nothing in an adapter from before there was one."""
    if not (folder / SEEN).is_file():
        return {}
    try:
        return {step: list(digests) for step, digests in read_json(folder / SEEN).items()}
    except (DataError, StorageError, AttributeError, TypeError) as error:
        raise AdapterError(
            f"{folder / SEEN} is damaged ({error.__class__.__name__}).",
            "Restore the file, or train the exits again.",
        ) from error


def checks_tensors(exits: ExitSet) -> dict[str, Tensor]:
    """Shortlist and gates by name, for a file."""
    named = {} if exits.shortlist is None else {"shortlist": exits.shortlist}
    for depth, gate in exits.gates.items():
        named |= {f"gates.{depth}.weight": gate.weight, f"gates.{depth}.bias": gate.bias}
    return named


def _read_checks(
    folder: Path, config: Mapping[str, Any], backbone: Backbone
) -> tuple[Tensor | None, dict[int, Gate]]:
    """Shortlist and gates, where the adapter has them.

    Raises:
        AdapterError: the file cannot be read, or does not fit the backbone's sizes.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if config.get("checks") is None:
        return None, {}
    try:
        tensors = load_file(folder / CHECKS, device=str(backbone.device))
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"{folder / CHECKS} cannot be read: {str(error).splitlines()[0]}",
            "Restore the folder, or train the exits again.",
        ) from error
    shortlist = tensors.get("shortlist")
    depths = sorted({int(name.split(".")[1]) for name in tensors if name != "shortlist"})
    gates = {d: Gate(tensors[f"gates.{d}.weight"], tensors[f"gates.{d}.bias"]) for d in depths}
    fits = all(gate.weight.shape == (backbone.width,) for gate in gates.values())
    if shortlist is not None:
        fits = fits and bool(((shortlist >= 0) & (shortlist < backbone.vocabulary)).all())
    if not fits:
        raise AdapterError(
            "The adapter's shortlist or gates do not fit this backbone.",
            "Restore the folder, or learn them again: offramp train --shortlist N --gates.",
        )
    return shortlist, gates


def _write(state: Mapping[str, Tensor], path: Path) -> None:
    """Tensors as safetensors; an OSError where they do not fit."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {n: t.detach().cpu().contiguous() for n, t in state.items()}
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # safetensors has its own error for a full disk
        raise OSError(str(error)) from error


def _fill(module: nn.Module, path: Path) -> None:
    """Load exactly the module's tensors from `path`, or raise `AdapterError`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for parameter in module.parameters():
        parameter.data = torch.full_like(parameter, float("nan"))  # nothing may stay as it was
    try:
        module.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise AdapterError(
            f"{path} cannot be read as the exits' tensors: {str(error).splitlines()[0]}",
            "Restore the folder, or train the exits again.",
        ) from error
