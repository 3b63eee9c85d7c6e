"""adapter.json: what it holds, and how it is checked before anything is made of it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offramp.core.decoding.policy import FULL, ExitPolicy, policy_from_json, policy_to_json
from offramp.core.errors import AdapterError, DataError, InputError, StorageError
from offramp.core.storage import digest_rows, read_json, schema

FORMAT = 1
EXITS, CHECKS = "exits.safetensors", "checks.safetensors"
CONFIG = "adapter.json"
RESTORE = "Restore the folder, or train the exits again."
LEARNT = ("causal_prompt", "in_parts", "lossless")
"""What decoding shows of a backbone without tests of its own; see `Backbone.learn`."""


@dataclass(frozen=True)
class AdapterConfig:
    """adapter.json, read and checked.

    fingerprint: of the backbone; see `offramp.core.models.fingerprint`. exit_kind: of
    `offramp.core.models.exit_kinds.kinds_of_exit`; "layer" in adapters of early versions.
    checks: measurements of the shortlist; None: there is none. files: SHA-256 of the other files by
    name; None in adapters of early versions.
    """

    folder: Path
    backbone: str
    revision: str | None
    fingerprint: Mapping[str, Any]
    depths: tuple[int, ...]
    exit_kind: str
    checks: Mapping[str, Any] | None
    policy: ExitPolicy
    decoding: Mapping[str, Any] | None
    provenance: Mapping[str, Any]
    files: Mapping[str, str] | None
    raw: Mapping[str, Any]


def sealed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of adapter.json with a digest of all of them."""
    plain: dict[str, Any] = json.loads(json.dumps(config))  # keys as text, tuples as lists
    return {**plain, "digest": digest_rows([plain])}


def read_config(folder: str | Path) -> AdapterConfig:
    """Read and check a folder's adapter.json.

    Raises:
        AdapterError: no adapter, another format version, or damaged.
    """
    folder = Path(folder)
    raw = _read(folder)
    path = folder / CONFIG
    _check_format(path, raw)
    _check_digest(path, raw)
    try:
        said: schema.Adapter = schema.shaped(raw, schema.Adapter)
    except ValueError as error:
        raise AdapterError(f"{path} is damaged: {error}.", RESTORE) from error
    return AdapterConfig(
        folder=folder,
        backbone=said.backbone.name,
        revision=said.backbone.revision,
        fingerprint=raw["backbone"]["fingerprint"],
        depths=tuple(said.depths),
        exit_kind=said.exit_kind,
        checks=said.checks,
        policy=read_policy(raw["policy"], path),
        decoding=_decoding(raw.get("decoding")),
        provenance=said.provenance,
        files=said.files,
        raw=raw,
    )


def read_policy(values: Any, path: Path) -> ExitPolicy:
    """Return the policy from a file's JSON values.

    Raises:
        AdapterError: it is damaged, or of a newer version.
    """
    try:
        schema.shaped(values, schema.Policy)
        # Fields that older adapters do not have are at their defaults.
        return policy_from_json({**policy_to_json(FULL), **values})
    except InputError as error:
        raise AdapterError(f"{path}: {error.problem}", error.remedy) from error
    except ValueError as error:
        raise AdapterError(f"The policy in {path} is damaged: {error}.", RESTORE) from error


def _read(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not os.path.isfile(path):
        raise AdapterError(
            f"{folder} holds no adapter ({CONFIG} is missing).",
            "Give the folder that `offramp train --out` wrote.",
        )
    try:
        config = read_json(path, largest=schema.LARGEST, unique=True)
    except (DataError, StorageError) as error:
        raise AdapterError(error.problem, RESTORE) from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path} is damaged: it holds {brief(config)}.", RESTORE)
    return config


def _check_format(path: Path, raw: Mapping[str, Any]) -> None:
    if (version := raw.get("format")) != FORMAT or isinstance(version, bool):
        raise AdapterError(
            f"{path.parent} has adapter format {brief(version)}; this version reads "
            f"format {FORMAT}.",
            "Train the exits again, or install the version of offramp that wrote it.",
        )


def _check_digest(path: Path, raw: Mapping[str, Any]) -> None:
    if "digest" not in raw:
        return
    try:
        same = raw["digest"] == digest_rows([{n: v for n, v in raw.items() if n != "digest"}])
    except InputError as error:
        problem = f"{path} is damaged: {error.problem}"
        raise AdapterError(problem, RESTORE) from error
    if not same:
        raise AdapterError(
            f"{path} was changed after it was written: its digest does not fit.",
            "Restore it; to change a policy, use Adapter.with_policy and Adapter.save.",
        )


def _decoding(shown: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What decoding showed of a discovered backbone; see `Backbone.learn`."""
    if shown is None:
        return None
    return {name: value for name, value in shown.items() if name in LEARNT}


def brief(value: Any) -> str:
    """Return a value as text of a few words."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):
        text = f"a {type(value).__name__} that is too deep or too long to show"
    return text if len(text) <= 60 else text[:57] + "..."
