"""An adapter's folder: what is in it, and how exits are read from it.

adapter.json                format version, backbone, depths, policy, calibration, provenance, and
                            the SHA-256 of each of the other files that loading reads
exits.safetensors           the exits' tensors, nothing of the backbone
checks.safetensors          the shortlist, if there is one (`offramp.features.shortlist`)
seen.json                   digests of the images that training and calibration used
attempts.json               every attempt at a guarantee (`offramp.calibration.attempts`)
certificate.json            what `offramp verify` found (`offramp.adapter.certificate`)
README.md                   the model card; may be edited
training/                   log, answers that were learnt from, the state that resuming needs; not
                            pushed to the hub
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor, nn

from offramp.core.decoding.policy import check_policy_depths
from offramp.core.errors import AdapterError, InputError, StorageError
from offramp.core.models.backbone import Backbone
from offramp.core.models.exit_kinds import kinds_of_exit
from offramp.core.models.exits import Exits, ExitSet, check_depths, copied_index
from offramp.core.models.fingerprint import fingerprint, same_backbone
from offramp.core.models.sharding import unread
from offramp.core.models.weights import scheme
from offramp.core.save_and_load.config import (
    CHECKS,
    CONFIG,
    EXITS,
    FORMAT,
    LEARNT,
    RESTORE,
    AdapterConfig,
    read_config,
)
from offramp.core.save_and_load.tensors import check_shapes, read_shapes, read_tensors
from offramp.core.storage import digest_file

__all__ = [
    "ATTEMPTS",
    "CHECKS",
    "CONFIG",
    "DISCRIMINATORS",
    "EXITS",
    "FORMAT",
    "LARGEST_SEEN",
    "SEEN",
    "AdapterConfig",
    "exits_digest",
    "load_exits",
    "read_config",
]

SEEN, ATTEMPTS = "seen.json", "attempts.json"
DISCRIMINATORS = "discriminators.safetensors"
"""A file of earlier adapters that nothing reads."""
UNCHECKED = "%s holds no digests: its files are unchecked, whoever changed them."
log = logging.getLogger(__name__)
LARGEST_SEEN = 2**28
"""Bytes of the largest seen.json that is read: 13 million images."""


# -- loading ----------------------------------------------------------------------------------


def load_exits(config: AdapterConfig, backbone: Backbone) -> ExitSet:
    """Load the exits of a folder; the backbone takes over the folder's findings on decoding.

    Raises:
        AdapterError: trained for a backbone that differs from this one (the text says in what), or
            a file is missing, damaged, or not the one that adapter.json was written with.
    """
    _check_digests(config)
    difference = same_backbone(config.fingerprint, fingerprint(backbone))
    if difference is not None:
        raise AdapterError(
            f"{config.folder} was trained for {config.backbone!r}, not for this backbone: "
            f"{difference}.",
            "Load it with its own backbone, or train exits for this one.",
        )
    try:
        check_depths(config.depths, backbone.depth)
        check_policy_depths(config.policy, config.depths)
    except InputError as error:
        raise AdapterError(f"{config.folder / CONFIG}: {error.problem}", RESTORE) from error
    if config.decoding is not None and not backbone.tested:
        found = {"causal_prompt": False, "lossless": True, **config.decoding}
        backbone.learn(**{name: found[name] for name in LEARNT if name in found})
    return ExitSet(
        _load_exits(config, backbone), _load_checks(config, backbone), dict(config.checks or {})
    )


def _check_digests(config: AdapterConfig) -> None:
    """Raise `AdapterError` where a file is not the one that adapter.json was written with."""
    if config.files is None:
        log.warning(UNCHECKED, config.folder)
    for name, digest in (config.files or {}).items():
        if name == DISCRIMINATORS:
            continue
        if name not in (EXITS, CHECKS, SEEN, ATTEMPTS):
            raise AdapterError(f"{config.folder / CONFIG} names a file {name[:60]!r}.", RESTORE)
        path = config.folder / name
        try:
            if path.is_file() and path.stat().st_size > LARGEST_SEEN:
                _check_size(path)
            actual = digest_file(path)
        except StorageError as error:
            raise AdapterError(error.problem, RESTORE) from error
        if actual != digest:
            raise AdapterError(
                f"{path} is not the file that {CONFIG} was written with: its SHA-256 differs. It "
                "is damaged, or a save was interrupted.",
                RESTORE,
            )


def _check_size(path: Path) -> None:
    """Raise `AdapterError` where a large file is larger than it says: a hole of terabytes costs
    whoever made it nothing, and whoever reads it hours."""
    if path.suffix == ".json":
        raise AdapterError(f"{path} has more than {LARGEST_SEEN} bytes.", RESTORE)
    read_shapes(path, whole=("shortlist",))


def is_there(config: AdapterConfig, name: str) -> bool:
    """Return True if this file is there and adapter.json lists it."""
    return (config.files is None or name in config.files) and (config.folder / name).is_file()


def _load_exits(config: AdapterConfig, backbone: Backbone) -> Exits:
    path = config.folder / EXITS
    if config.exit_kind not in kinds_of_exit():
        raise AdapterError(
            f"{config.folder} holds exits of kind {config.exit_kind!r}, which is not registered.",
            "Import the package that calls offramp.register_exit for it, then load again.",
        )
    copied = {d: backbone.layers[copied_index(backbone, d)] for d in config.depths}
    # Compared before memory is taken; of quantised layers the copies alone show it.
    if config.exit_kind == "layer" and not any(map(scheme, copied.values())):
        layers = {d: layer.state_dict() for d, layer in copied.items()}
        shapes = {
            f"{d}.{n}": tuple(t.shape) for d, state in layers.items() for n, t in state.items()
        }
        check_shapes(path, shapes)
    with unread():
        exits = Exits(backbone, config.depths, kind=config.exit_kind)
    check_shapes(path, {n: tuple(t.shape) for n, t in exits.state_dict().items()})
    _fill(exits, path, backbone.dtype)
    exits.place(backbone)
    return exits.requires_grad_(False)


def _fill(module: nn.Module, path: Path, dtype: torch.dtype | None) -> None:
    """Put a file's tensors, whose names and shapes were checked, in place of the module's."""
    module.load_state_dict(read_tensors(path, dtype), assign=True)


def _load_checks(config: AdapterConfig, backbone: Backbone) -> Tensor | None:
    """The shortlist, where the adapter has one. Gates of earlier versions are left out."""
    if config.checks is None:
        return None
    path = config.folder / CHECKS
    shapes = read_shapes(path, whole=("shortlist",))
    gates = {int(d) for d in map(str, config.depths) if f"gates.{d}.weight" in shapes}
    expected: dict[str, tuple[int, ...]] = {}
    for depth in gates:
        expected |= {f"gates.{depth}.weight": (backbone.width,), f"gates.{depth}.bias": ()}
    if "shortlist" in shapes:
        expected["shortlist"] = (min(shapes["shortlist"][:1] or (0,)),)
    check_shapes(path, expected, whole=("shortlist",))
    tensors = {n: t.to(backbone.device) for n, t in read_tensors(path).items()}
    shortlist = tensors.get("shortlist")
    if shortlist is not None and not _is_shortlist(shortlist, backbone.vocabulary):
        raise AdapterError(
            f"{path}: the shortlist does not fit this backbone.",
            "Restore the folder, or learn it again: offramp train --shortlist N.",
        )
    if config.policy.shortlist and shortlist is None:
        raise AdapterError(f"{path} has no shortlist, which the policy needs.", RESTORE)
    return shortlist


def _is_shortlist(ids: Tensor, vocabulary: int) -> bool:
    """Whether these are ascending token ids."""
    rising = bool((ids[1:] > ids[:-1]).all())
    return len(ids) > 0 and rising and bool(ids[0] >= 0) and bool(ids[-1] < vocabulary)


def exits_digest(config: AdapterConfig) -> str:
    """SHA-256 of the exits' file. Raise `StorageError` where it cannot be read."""
    return (config.files or {}).get(EXITS) or digest_file(config.folder / EXITS)
