"""What is known of exits, in an adapter's folder: how they were trained, what is guaranteed of
them, and what `offramp verify` found."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.core.decoding.policy import FULL, ExitPolicy
from offramp.core.errors import AdapterError, DataError, OfframpError, StorageError
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import ExitSet
from offramp.core.models.fingerprint import held_as
from offramp.core.save_and_load import (
    ATTEMPTS,
    CHECKS,
    DISCRIMINATORS,
    EXITS,
    LARGEST_SEEN,
    SEEN,
    exits_digest,
    is_there,
    load_exits,
)
from offramp.core.save_and_load.config import RESTORE, AdapterConfig
from offramp.core.storage import atomic_folder, read_json, schema, write_json
from offramp.core.storage.json_text import read_bytes

if TYPE_CHECKING:  # who answers needs none
    from offramp.adapter.certificate import Certificate

CARD, CERTIFICATE = "README.md", "certificate.json"
LARGEST_ATTEMPTS = 2**26
"""Bytes of the largest attempts.json that is read."""
log = logging.getLogger(__name__)
_OWNED = (CHECKS, DISCRIMINATORS, SEEN, ATTEMPTS, CERTIFICATE)


@dataclass(kw_only=True)
class Records:
    """The records that are stored beside exits.

    provenance: versions, seed, data digest and command of the training run. metrics: agreement by
    depth on validation data.
    calibration: the guarantee for the policy by `offramp.calibration.calibrate`, if any.
    elsewhere: guarantees for the same policy in other engines, by
    `offramp.promises.conditions.place`.
    seen: digests of training images, see `offramp.data.decontamination`; empty: unknown.
    attempts: at a guarantee, as JSON; see `offramp.calibration.attempts`.
    certificate: findings of `offramp verify` on the exits; None: none yet.
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
    """The content of an adapter's folder besides the name of its backbone."""

    exits: ExitSet
    policy: ExitPolicy = FULL


def save_parts(folder: str | Path, backbone: Backbone, parts: AdapterParts, card: str) -> None:
    """Write an adapter's folder; all of it appears, or nothing.

    Raises:
        InputError: the exits have no tensors, or the policy names other depths than theirs.
        StorageError: e.g. the disk is full; what was there before is untouched.
    """
    from offramp.adapter.saving import write_config, write_exits

    # An earlier adapter's files that this one lacks go: they would not fit these exits.
    with atomic_folder(folder, owns=_OWNED) as staging:
        write_exits(staging, parts.exits)
        if parts.seen:
            write_json(staging / SEEN, {step: list(s) for step, s in parts.seen.items()})
        if parts.attempts:
            write_json(staging / ATTEMPTS, list(parts.attempts))
        files = write_config(staging, backbone, parts.exits, parts.policy, **_entries(parts))
        (staging / CARD).write_text(card, encoding="utf-8")
        # No file of the adapter's own: it comes and goes without the exits being written anew.
        kept = parts.certificate and parts.certificate.of_exits(files[EXITS])
        if kept:
            kept.write(staging / CERTIFICATE)


def _entries(parts: AdapterParts) -> dict[str, Any]:
    """What adapter.json says besides the exits and their policy."""
    return {
        "calibration": None if parts.calibration is None else dict(parts.calibration),
        **({"elsewhere": dict(parts.elsewhere)} if parts.elsewhere else {}),
        "metrics": dict(parts.metrics),
        "provenance": dict(parts.provenance),
    }


def read_records(config: AdapterConfig) -> Records:
    """Return the records in an adapter.json."""
    said = config.raw
    elsewhere = said.get("elsewhere") or {}
    return Records(
        provenance=dict(config.provenance),
        metrics={name: value for name, value in said["metrics"].items() if value is not None},
        calibration=said.get("calibration"),
        elsewhere={name: found for name, found in elsewhere.items() if found is not None},
    )


def calibrations(config: AdapterConfig) -> list[Mapping[str, Any]]:
    """Return the calibrations of all engines in an adapter.json."""
    known = read_records(config)
    own = [] if known.calibration is None else [known.calibration]
    return [*own, *known.elsewhere.values()]


def load_parts(config: AdapterConfig, backbone: Backbone) -> AdapterParts:
    """Load the parts of a folder with a read adapter.json; raise `AdapterError` as `load_exits`
    does."""
    known, exits = read_records(config), load_exits(config, backbone)
    known.seen, known.attempts = _load_seen(config), _load_attempts(config)
    known.certificate = load_certificate(config)
    was, held_in = config.fingerprint.get("quantized"), held_as(backbone)
    if was != held_in:
        known.calibration, known.elsewhere = None, {}  # measured on other logits
        warnings.warn(
            f"{config.folder} was trained beside a backbone in {was or 'float'}, this one is in "
            f"{held_in or 'float'}: calibrate again, its guarantees do not hold here.",
            stacklevel=3,
        )
    return AdapterParts(exits=exits, policy=config.policy, **vars(known))


def _load_seen(config: AdapterConfig) -> dict[str, list[str]]:
    """What `seen.json` holds; nothing in an adapter from before there was one."""
    seen: dict[str, list[str]] = _load_list(config, SEEN, schema.Seen, LARGEST_SEEN) or {}
    return seen


def _load_attempts(config: AdapterConfig) -> list[dict[str, Any]]:
    """What `attempts.json` holds; nothing where none was made."""
    found = _load_list(config, ATTEMPTS, schema.Attempts, LARGEST_ATTEMPTS)
    return [] if found is None else read_json(config.folder / ATTEMPTS)


def _load_list(config: AdapterConfig, name: str, kind: Any, largest: int) -> Any:
    """Return what a file of the adapter lists, as a type of the schema; None without the file."""
    path = config.folder / name
    if not is_there(config, name):
        return None
    try:
        return schema.decoded(read_bytes(path, largest), kind)
    except (DataError, StorageError) as error:
        raise AdapterError(error.problem, RESTORE) from error
    except ValueError as error:
        what = name.removesuffix(".json")
        raise AdapterError(f"{path} is damaged, and lists no {what}: {error}.", RESTORE) from error


def load_certificate(config: AdapterConfig) -> Certificate | None:
    """Return the findings of `offramp verify` on these exits; None without any. A damaged file is
    only logged, because it changes no answer."""
    path = config.folder / CERTIFICATE
    if not path.exists():
        return None
    from offramp.adapter.certificate import Certificate

    try:
        return Certificate.read(path).of_exits(exits_digest(config))
    except OfframpError as error:
        log.warning("%s %s", error.problem, error.remedy)
        return None
