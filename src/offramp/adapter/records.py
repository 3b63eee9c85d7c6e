"""What is known of exits, in an adapter's folder: how they were trained, what is guaranteed of
them, and what `offramp verify` found."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offramp.adapter.certificate import CERTIFICATE, Certificate
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
    write_config,
    write_exits,
)
from offramp.core.save_and_load.config import CONFIG, NUMBER, RESTORE, AdapterConfig, Entries, brief
from offramp.core.storage import atomic_folder, read_json, write_json

CARD = "README.md"
log = logging.getLogger(__name__)
_OWNED = (CHECKS, DISCRIMINATORS, SEEN, ATTEMPTS, CERTIFICATE)
_CALIBRATION: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("risk", "method", "unit", "data_digest"), (str,)),
    **dict.fromkeys(("target", "confidence", "measured", "bound", "level"), NUMBER),
    **dict.fromkeys(("n", "answers", "attempt"), (int,)),
    **dict.fromkeys(("conditions", "likeness", "watched", "qualities"), (dict,)),
    "kinds": (list,),
    "largest": (int,),
}
"""Kinds of the entries of a guarantee that are read and not only shown."""
_CONDITIONS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("dtype", "quantized", "engine", "kernels", "device"), (str,)),
    **dict.fromkeys(("sampling", "template", "score", "kv"), (str,)),
    **dict.fromkeys(("tokens", "exits", "parameters", "autocast", "matmul"), (str,)),
    "pixels": (dict,),
    "any_prompt": (bool,),
    **dict.fromkeys(("exit_in_prefill", "shortlist"), (bool,)),
    **dict.fromkeys(("thresholds", "first", "gates", "weights"), (dict,)),
    "visual_keep": NUMBER,
    "visual_ranking": (str,),
    "longest": (int,),
    "prompts": (list,),
}


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
    """The content of an adapter's folder besides the name of its backbone."""

    exits: ExitSet
    policy: ExitPolicy = FULL


def save_parts(folder: str | Path, backbone: Backbone, parts: AdapterParts, card: str) -> None:
    """Write the folder; all of it appears, or nothing.

    Raises:
        InputError: the exits have no tensors, or the policy names other depths than theirs.
        StorageError: e.g. the disk is full; what was there before is untouched.
    """
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
    """Return what an adapter.json that is read says of its exits.

    Raises:
        AdapterError: an entry is damaged.
    """
    said = Entries(config.folder / CONFIG, config.raw)
    return Records(
        provenance=dict(config.provenance),
        metrics=_metrics(said),
        calibration=_calibration(said, "calibration"),
        elsewhere=_elsewhere(said),
    )


def calibrations(config: AdapterConfig) -> list[Mapping[str, Any]]:
    """Return the calibrations in all engines."""
    known = read_records(config)
    own = [] if known.calibration is None else [known.calibration]
    return [*own, *known.elsewhere.values()]


def load_parts(config: AdapterConfig, backbone: Backbone) -> AdapterParts:
    """The parts of a folder whose adapter.json is read; raise `AdapterError` as `load_exits`."""
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


def _elsewhere(config: Entries) -> dict[str, dict[str, Any]]:
    """What is guaranteed in other engines, by their names."""
    if config.optional("elsewhere") is None:
        return {}
    told = config.part("elsewhere")
    found = {name: _calibration(told, name) for name in told.values}
    return {name: calibration for name, calibration in found.items() if calibration is not None}


def _calibration(config: Entries, name: str) -> dict[str, Any] | None:
    """What is guaranteed; an adapter of an earlier version may say less, or null."""
    if config.optional(name) is None:
        return None
    said = config.part(name)
    said.check_kinds(_CALIBRATION)
    _check_claim(said)
    if said.optional("conditions") is not None:
        then = said.part("conditions")
        then.check_kinds(_CONDITIONS)
        for name in ("thresholds", "first", "gates", "weights"):
            if then.optional(name) is not None:
                then.part(name).check_numbers()
        frames = then.values.get("prompts") or []
        if not all(
            isinstance(f, list) and f and all(isinstance(t, str) for t in f) for f in frames
        ):
            then.fail(f"'{then.where}prompts' is {brief(frames)}")
    return dict(said.values)


def _check_claim(said: Entries) -> None:
    """Check that a guarantee's numbers are possible, and its measured risk within its bound."""
    values = said.values
    for name in ("target", "confidence", "level"):
        if values.get(name) is not None and not 0 <= values[name] <= 1:
            said.fail(f"{said.where + name!r} is {brief(values[name])}")
    for name in ("n", "answers", "attempt"):
        if values.get(name) is not None and values[name] < 0:
            said.fail(f"{said.where + name!r} is {brief(values[name])}")
    target = values.get("target")
    for name in () if values.get("reason") or target is None else ("measured", "bound"):
        if values.get(name) is not None and not values[name] <= target:
            said.fail(f"{said.where + name!r} is {brief(values[name])}, above the target {target}")


def _metrics(config: Entries) -> dict[str, Any]:
    """What training measured: agreement by depth, and how often drafts were right."""
    said = config.part("metrics")
    for name in ("agreement", "drafting"):
        if said.optional(name) is None:
            continue
        rows = said.part(name)
        if name == "agreement":
            rows.check_numbers()
            continue
        for depth in rows.values:
            found = rows.part(depth)
            found.get("first_draft", *NUMBER)
            shares = found.get("acceptance", list)
            if not all(type(share) in NUMBER for share in shares):
                found.fail(f"'{found.where}acceptance' is {brief(shares)}")
    return {name: value for name, value in said.values.items() if value is not None}


def _load_seen(config: AdapterConfig) -> dict[str, list[str]]:
    """What `seen.json` holds; nothing in an adapter from before there was one."""
    path = config.folder / SEEN
    if not is_there(config, SEEN):
        return {}
    try:
        seen = read_json(path, largest=LARGEST_SEEN)
    except (DataError, StorageError) as error:
        raise AdapterError(error.problem, RESTORE) from error
    lists = list(seen.values()) if isinstance(seen, dict) else [None]
    if not all(isinstance(d, list) and all(isinstance(x, str) for x in d) for d in lists):
        raise AdapterError(f"{path} is damaged: it does not list digests by step.", RESTORE)
    return dict(seen)


def _load_attempts(config: AdapterConfig) -> list[dict[str, Any]]:
    """What `attempts.json` holds; nothing where none was made."""
    path = config.folder / ATTEMPTS
    if not is_there(config, ATTEMPTS):
        return []
    try:
        attempts = read_json(path, largest=LARGEST_SEEN)
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
