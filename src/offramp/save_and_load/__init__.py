"""An adapter's folder: parts to files, and files to parts.

adapter.json                format version, backbone, depths, policy, calibration, provenance, and
                            the SHA-256 of each of the other files that loading reads
exits.safetensors           the exits' tensors, nothing of the backbone
checks.safetensors          the shortlist, if there is one (`offramp.models.shortlist`)
seen.json                   digests of the images that training and calibration used
attempts.json               every attempt at a guarantee (`offramp.calibration.attempts`)
certificate.json            what `offramp verify` found (`offramp.certificate`)
README.md                   the model card; may be edited
training/                   log, answers that were learnt from, the state that resuming needs; not
                            pushed to the hub
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from offramp.certificate import CERTIFICATE, Certificate
from offramp.engine.policy import FULL, ExitPolicy, check_policy_depths, policy_to_json
from offramp.errors import AdapterError, DataError, InputError, OfframpError, StorageError
from offramp.models.backbone import Backbone
from offramp.models.exit_kinds import EXIT_KINDS
from offramp.models.exits import Exits, ExitSet, check_depths, copied_index
from offramp.models.fingerprint import fingerprint, same_backbone
from offramp.models.sharding import unread
from offramp.models.shipped import close_shipped
from offramp.models.weights import scheme
from offramp.save_and_load.config import (
    CHECKS,
    CONFIG,
    EXITS,
    FORMAT,
    LEARNT,
    PROVEN,
    RESTORE,
    AdapterConfig,
    read_config,
    sealed,
)
from offramp.save_and_load.tensors import check_shapes, read_shapes, read_tensors, write_tensors
from offramp.storage import atomic_folder, digest_file, read_json, write_json
from offramp.storage.places import close_name, is_hub_name

__all__ = [
    "ATTEMPTS", "CARD", "CERTIFICATE", "CHECKS", "CONFIG", "EXITS", "FORMAT",
    "SEEN", "AdapterConfig", "AdapterParts", "Records", "exits_digest",
    "fetched",
    "load_certificate", "load_parts", "read_config", "save_parts",
]  # fmt: skip

SEEN, ATTEMPTS, CARD = "seen.json", "attempts.json", "README.md"
DISCRIMINATORS = "discriminators.safetensors"
"""A file of earlier adapters that nothing reads."""
UNCHECKED = "%s holds no digests: its files are unchecked, whoever changed them."
log = logging.getLogger(__name__)
_OWNED = (CHECKS, DISCRIMINATORS, SEEN, ATTEMPTS, CERTIFICATE)
_LARGEST_SEEN = 2**30
"""Bytes of the largest seen.json that is read: 50 million images."""


@dataclass(kw_only=True)
class Records:
    """Records that are stored beside exits.

    provenance: versions, seed, data digest and command of the training run. metrics: agreement by
    depth on validation data.
    calibration: the guarantee that `offramp.calibration.calibrate` gives of the policy, if any.
    elsewhere: the same of the same policy in other engines, by their names.
    seen: see `offramp.data.decontamination`; empty where it is not known.
    attempts: at a guarantee, as JSON; see `offramp.calibration.attempts`.
    certificate: what `offramp verify` found of the exits; None: nothing yet.
    """

    provenance: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] | None = None
    elsewhere: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seen: Mapping[str, Sequence[str]] = field(default_factory=dict)
    attempts: Sequence[Mapping[str, Any]] = ()
    certificate: Certificate | None = None


@dataclass
class AdapterParts(Records):
    """The content of a folder besides the name of its backbone; see `offramp.adapter.Adapter`."""

    exits: ExitSet
    policy: ExitPolicy = FULL


# -- saving -----------------------------------------------------------------------------------


def save_parts(folder: str | Path, backbone: Backbone, parts: AdapterParts, card: str) -> None:
    """Write the folder; all of it appears, or nothing.

    Raises:
        InputError: the exits have no tensors, or the policy names other depths than theirs.
        StorageError: e.g. the disk is full; what was there before is untouched.
    """
    check_policy_depths(parts.policy, parts.exits.depths)
    if not list(parts.exits.modules.parameters()):
        raise InputError(
            "Lens exits have no tensors, so there is nothing to save.",
            "Build them where they are used: Exits(backbone, depths, kind='lens').",
        )
    tensors = {EXITS: parts.exits.modules.state_dict()}
    if parts.exits.measured:
        tensors[CHECKS] = _checks_tensors(parts.exits)
    # An earlier adapter's files that this one lacks go: they would not fit these exits.
    with atomic_folder(folder, owns=_OWNED) as staging:
        for name, state in tensors.items():
            write_tensors(state, staging / name)
        if parts.seen:
            write_json(staging / SEEN, {step: list(s) for step, s in parts.seen.items()})
        if parts.attempts:
            write_json(staging / ATTEMPTS, list(parts.attempts))
        files = {file.name: digest_file(file) for file in sorted(staging.iterdir())}
        write_json(staging / CONFIG, sealed({**_entries(backbone, parts), "files": files}))
        (staging / CARD).write_text(card, encoding="utf-8")
        # No file of the adapter's own: it comes and goes without the exits being written anew.
        kept = parts.certificate and parts.certificate.of_exits(files[EXITS])
        if kept:
            kept.write(staging / CERTIFICATE)


def _entries(backbone: Backbone, parts: AdapterParts) -> dict[str, Any]:
    """adapter.json without the digests."""
    return {
        "format": FORMAT,
        "backbone": {
            "name": backbone.name,
            "revision": backbone.revision,
            "fingerprint": fingerprint(backbone),
        },
        "depths": list(parts.exits.depths),
        "exit_kind": parts.exits.modules.kind,
        "checks": dict(parts.exits.measured) or None,
        "policy": policy_to_json(parts.policy),
        "calibration": None if parts.calibration is None else dict(parts.calibration),
        **({"elsewhere": dict(parts.elsewhere)} if parts.elsewhere else {}),
        "metrics": dict(parts.metrics),
        "provenance": dict(parts.provenance),
        **({"decoding": _learnt(backbone, parts.exits.depths)} if not backbone.tested else {}),
    }


def _learnt(backbone: Backbone, depths: Sequence[int]) -> dict[str, Any]:
    values = (backbone.family.causal_prompt, backbone.reads_in_parts, backbone.lossless)
    found: dict[str, Any] = dict(zip(LEARNT, values, strict=True))
    proven = [list(p) for p, at in backbone.proven.items() if at.issuperset(depths)]
    if proven:
        how = (backbone.engine, transformers.__version__, proven)
        found |= dict(zip(PROVEN, how, strict=True))
    return found


def _checks_tensors(exits: ExitSet) -> dict[str, Tensor]:
    """The shortlist by name, for a file."""
    return {} if exits.shortlist is None else {"shortlist": exits.shortlist}


# -- loading ----------------------------------------------------------------------------------


def fetched(name: str | Path, **hub: Any) -> Path:
    """Return the adapter's folder: on this machine, or fetched from the hub by name.

    hub: revision, token, cache_dir and others of `snapshot_download`.

    Raises:
        AdapterError: there is no such folder, or the hub gave none.
    """
    if os.path.isdir(name):
        return Path(name)
    if not is_hub_name(str(name)):
        raise AdapterError(
            f"There is no adapter folder {str(name)!r}.",
            f"{close_name(name) or close_shipped(str(name))}Give a folder of `offramp train`, a "
            "name of the hub as OWNER/NAME, or photo or tiny-opt, which ship.",
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), **hub))
    except Exception as error:  # offline, missing, private: hub errors share no useful base
        raise AdapterError(
            f"No adapter folder {str(name)!r}, and the hub gave none: {error}",
            "Correct the path or the name, or be online.",
        ) from error


def load_parts(config: AdapterConfig, backbone: Backbone) -> AdapterParts:
    """The parts of a folder whose adapter.json is read.

    Raises:
        AdapterError: trained for a backbone that differs from this one (the text says in what), or
            a file is missing, damaged, or not the one that adapter.json was written with.
    """
    _check_digests(config)
    now = fingerprint(backbone)
    difference = same_backbone(config.fingerprint, now)
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
        version, engine = found.pop("transformers", None), found.pop("engine", None)
        prompts = [tuple(prompt) for prompt in found.pop("prompts", ())]
        if version != transformers.__version__ or engine not in ("slots", "stack"):
            engine = None  # it is found out again
        if not backbone.stock:
            engine = None  # as well: code that no version is of may have changed since
        backbone.learn(**found, engine=engine, depths=config.depths, prompts=prompts)
    calibration, elsewhere = config.calibration, config.elsewhere
    was, held_in = config.fingerprint.get("quantized"), now.get("quantized")
    if was != held_in:
        calibration, elsewhere = None, {}  # what was guaranteed was measured on other logits
        warnings.warn(
            f"{config.folder} was trained beside a backbone in {was or 'float'}, this one is in "
            f"{held_in or 'float'}: calibrate again, its guarantees do not hold here.",
            stacklevel=3,
        )
    return AdapterParts(
        exits=ExitSet(
            _load_exits(config, backbone),
            _load_checks(config, backbone),
            dict(config.checks or {}),
        ),
        policy=config.policy,
        provenance=dict(config.provenance),
        metrics=dict(config.metrics),
        calibration=None if calibration is None else dict(calibration),
        elsewhere=dict(elsewhere),
        seen=_load_seen(config),
        attempts=_load_attempts(config),
        certificate=load_certificate(config),
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
            if path.is_file() and path.stat().st_size > _LARGEST_SEEN:
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
        raise AdapterError(f"{path} has more than {_LARGEST_SEEN} bytes.", RESTORE)
    read_shapes(path, whole=("shortlist",))


def _is_there(config: AdapterConfig, name: str) -> bool:
    """Whether the adapter has this file; one that adapter.json does not list is another's."""
    return (config.files is None or name in config.files) and (config.folder / name).is_file()


def _load_exits(config: AdapterConfig, backbone: Backbone) -> Exits:
    path = config.folder / EXITS
    if config.exit_kind not in EXIT_KINDS:
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


def _load_seen(config: AdapterConfig) -> dict[str, list[str]]:
    """What `seen.json` holds; nothing in an adapter from before there was one."""
    path = config.folder / SEEN
    if not _is_there(config, SEEN):
        return {}
    try:
        seen = read_json(path, largest=_LARGEST_SEEN)
    except (DataError, StorageError) as error:
        raise AdapterError(error.problem, RESTORE) from error
    lists = list(seen.values()) if isinstance(seen, dict) else [None]
    if not all(isinstance(d, list) and all(isinstance(x, str) for x in d) for d in lists):
        raise AdapterError(f"{path} is damaged: it does not list digests by step.", RESTORE)
    return dict(seen)


def _load_attempts(config: AdapterConfig) -> list[dict[str, Any]]:
    """What `attempts.json` holds; nothing where none was made."""
    path = config.folder / ATTEMPTS
    if not _is_there(config, ATTEMPTS):
        return []
    try:
        attempts = read_json(path, largest=_LARGEST_SEEN)
    except (DataError, StorageError) as error:
        raise AdapterError(error.problem, RESTORE) from error
    kinds = {"asked": str, "settings": dict, "number": int, "images": list, "path": list,
             "outcome": dict}  # fmt: skip
    # Since images are known by more than their names, and first looks have a test of their own.
    later = {"members": list, "looked": int}
    if not isinstance(attempts, list) or not all(
        isinstance(attempt, dict)
        and kinds.keys() <= attempt.keys() <= kinds.keys() | later.keys()
        and all(isinstance(value, {**kinds, **later}[name]) for name, value in attempt.items())
        and _is_counted(attempt)
        for attempt in attempts
    ):
        raise AdapterError(f"{path} is damaged: it does not list attempts.", RESTORE)
    return attempts


def _is_counted(attempt: Mapping[str, Any]) -> bool:
    """Whether an attempt has a number, names of images, and a path of thresholds by depth: with
    others it would use no share of the error budget."""
    names = [*attempt["images"], *attempt.get("members", ())]
    return (
        type(attempt["number"]) is int
        and attempt["number"] > 0
        and all(isinstance(name, str) for name in names)
        and all(isinstance(point, dict) and _are_thresholds(point) for point in attempt["path"])
    )


def _are_thresholds(point: Mapping[str, Any]) -> bool:
    depths = all(depth.isascii() and depth.isdigit() and len(depth) < 10 for depth in point)
    return depths and all(type(t) in (int, float) and 0 <= t <= 1 for t in point.values())


def exits_digest(config: AdapterConfig) -> str:
    """SHA-256 of the exits' file. Raise `StorageError` where it cannot be read."""
    return (config.files or {}).get(EXITS) or digest_file(config.folder / EXITS)


def load_certificate(config: AdapterConfig) -> Certificate | None:
    """Return what `offramp verify` found of these exits; None where nothing is known of them. One
    that is damaged says so in the log: it changes no answer."""
    path = config.folder / CERTIFICATE
    if not path.exists():
        return None
    try:
        return Certificate.read(path).of_exits(exits_digest(config))
    except OfframpError as error:
        log.warning("%s %s", error.problem, error.remedy)
        return None
