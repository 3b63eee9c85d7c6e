"""adapter.json: what it holds, and how it is checked before anything is made of it."""

from __future__ import annotations

import json
import os
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offramp.core.decoding.policy import (
    ENTRIES,
    FULL,
    ExitPolicy,
    policy_from_json,
    policy_to_json,
)
from offramp.core.errors import AdapterError, DataError, InputError, StorageError
from offramp.core.storage import digest_rows, read_json

FORMAT = 1
EXITS, CHECKS = "exits.safetensors", "checks.safetensors"
_DIGEST = re.compile("[0-9a-f]{64}")
CONFIG = "adapter.json"
RESTORE = "Restore the folder, or train the exits again."
_LARGEST = 64 * 2**20
"""Bytes of the largest adapter.json that is read."""

_REQUIRED = ("backbone", "depths", "policy", "metrics", "provenance")
_OPTIONAL = (
    "format", "exit_kind", "discriminators", "conditional_discriminators", "checks", "calibration",
    "files", "digest", "decoding", "elsewhere",
)  # fmt: skip
LEARNT = ("causal_prompt", "in_parts", "lossless")
"""What decoding shows of a backbone without tests of its own; see `Backbone.learn`."""
PROVEN = ("engine", "transformers", "prompts")
"""Which executor was found to be exact, with which version of transformers, for which prompts."""
NUMBER = (int, float)


@dataclass(frozen=True)
class AdapterConfig:
    """adapter.json, read and checked.

    fingerprint: of the backbone; see `offramp.core.models.fingerprint`. exit_kind: of
    `offramp.core.models.exit_kinds.kinds_of_exit`; "layer" in adapters written before there were
    others.
    checks: what was measured of the shortlist; None: there is none. files: SHA-256 of the other
    files by name; None in adapters written before there were.
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
    config = Entries(folder / CONFIG, _read(folder))
    config.check_format()
    config.check_known((*_REQUIRED, *_OPTIONAL))
    config.check_digest()
    backbone = config.part("backbone")
    return AdapterConfig(
        folder=folder,
        backbone=backbone.get("name", str),
        revision=backbone.get("revision", str, type(None)),
        fingerprint=_fingerprint(backbone.part("fingerprint")),
        depths=_depths(config),
        exit_kind=config.get("exit_kind", str) if "exit_kind" in config.values else "layer",
        checks=config.optional("checks"),
        policy=_policy(config.part("policy")),
        decoding=_decoding(config),
        provenance=config.get("provenance", dict),
        files=_files(config),
        raw=config.values,
    )


@dataclass(frozen=True)
class Entries:
    """An object in a JSON file, whose entries are checked as they are taken.

    where: its place in the file, such as "policy."; empty: the file itself.
    """

    path: Path
    values: Mapping[str, Any]
    where: str = ""

    def fail(self, problem: str) -> typing.NoReturn:
        raise AdapterError(f"{self.path} is damaged: {problem}.", RESTORE)

    def get(self, name: str, *kinds: type) -> Any:
        if name not in self.values:
            self.fail(f"it has no {self.where + name!r}")
        value = self.values[name]
        # True is an int to Python, and would silently be depth 1.
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            self.fail(f"{self.where + name!r} is {brief(value)}")
        return value

    def part(self, name: str) -> Entries:
        return Entries(self.path, self.get(name, dict), f"{self.where}{name}.")

    def optional(self, name: str) -> dict[str, Any] | None:
        """An object, or None where it is null or missing."""
        if self.values.get(name) is None:
            return None
        entry: dict[str, Any] = self.get(name, dict)
        return entry

    def check_kinds(self, kinds: Mapping[str, tuple[type, ...]]) -> None:
        """Check the kinds of the entries that are present and not null."""
        for name, wanted in kinds.items():
            if self.values.get(name) is not None:
                self.get(name, *wanted)

    def check_numbers(self) -> None:
        """Check that every entry is a number."""
        for name in self.values:
            self.get(name, *NUMBER)

    def check_known(self, names: Iterable[str]) -> None:
        known = set(names)
        for name in self.values:
            if name not in known:
                self.fail(f"{(self.where + name)[:60]!r} is not known")

    def check_format(self) -> None:
        if (version := self.values.get("format")) != FORMAT:
            raise AdapterError(
                f"{self.path.parent} has adapter format {brief(version)}; this version reads "
                f"format {FORMAT}.",
                "Train the exits again, or install the version of offramp that wrote it.",
            )

    def check_digest(self) -> None:
        if "digest" not in self.values:
            return
        signed = {n: v for n, v in self.values.items() if n != "digest"}
        try:
            same = self.values["digest"] == digest_rows([signed])
        except InputError as error:
            self.fail(error.problem.rstrip("."))
        if not same:
            raise AdapterError(
                f"{self.path} was changed after it was written: its digest does not fit.",
                "Restore it; to change a policy, use Adapter.with_policy and Adapter.save.",
            )


def _read(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not os.path.isfile(path):
        raise AdapterError(
            f"{folder} holds no adapter ({CONFIG} is missing).",
            "Give the folder that `offramp train --out` wrote.",
        )
    try:
        config = read_json(path, largest=_LARGEST, unique=True)
    except (DataError, StorageError) as error:
        raise AdapterError(error.problem, RESTORE) from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path} is damaged: it holds {brief(config)}.", RESTORE)
    return config


def _depths(config: Entries) -> tuple[int, ...]:
    depths = config.get("depths", list)
    rising = all(type(d) is int and d > 0 for d in depths) and sorted(set(depths)) == depths
    if not depths or not rising:
        config.fail(f"'depths' is {brief(depths)}")
    return tuple(depths)


def _decoding(config: Entries) -> dict[str, Any] | None:
    """What decoding showed of a discovered backbone; see `Backbone.learn`."""
    if config.values.get("decoding") is None:
        return None
    shown = config.part("decoding")
    shown.check_known((*LEARNT, *PROVEN))
    found: dict[str, Any] = {name: shown.get(name, bool) for name in LEARNT if name in shown.values}
    if all(name in shown.values for name in PROVEN):  # else it is found out again
        found |= {name: shown.get(name, str) for name in ("engine", "transformers")}
        prompts = found["prompts"] = shown.get("prompts", list)
        if not all(isinstance(p, list) and all(isinstance(n, str) for n in p) for p in prompts):
            shown.fail(f"'decoding.prompts' is {brief(prompts)}")
    return found


def _policy(policy: Entries) -> ExitPolicy:
    policy.check_known(ENTRIES)
    policy.get("thresholds", dict)
    for name in policy.values:
        kind = ENTRIES[name]
        if kind is not dict:
            policy.get(name, *((int, float) if kind is float else (kind,)))
            continue
        for depth, number in policy.get(name, dict).items():
            # Ten digits, because a number of thousands takes Python seconds to read, or is refused.
            plain = isinstance(number, int | float) and not isinstance(number, bool)
            # "2" and "02" are one depth, of which only one threshold would count.
            number_of = depth.isascii() and depth.isdigit() and len(depth) < 10
            known = number_of and str(int(depth)) == depth
            known = known or (name == "drafts" and depth.isidentifier())  # a drafter
            if not (known and plain):
                policy.fail(f"'{policy.where}{name}' holds {depth[:60]!r}: {brief(number)}")
    defaults = policy_to_json(FULL)  # of fields that older adapters do not have
    try:
        return policy_from_json({**defaults, **policy.values})
    except InputError as error:
        raise AdapterError(f"{policy.path}: {error.problem}", error.remedy) from error


def _fingerprint(entries: Entries) -> dict[str, Any]:
    names = ("model_type", "layers", "width", "vocabulary", "tensors", "weights")
    entries.check_known((*names, "parts", "quantized"))
    entries.get("model_type", str)
    if "quantized" in entries.values:
        entries.get("quantized", str)
    for name in names[1:5]:
        entries.get(name, int)
    parts = entries.values.get("parts", {})
    samples = [("weights", entries.get("weights", list))]
    for name, rows in (entries.get("parts", dict) if parts else {}).items():
        if not isinstance(rows, list):
            entries.fail(f"the sample {name[:60]!r} is {brief(rows)}")
        samples += [(name, row) for row in rows]
    for name, sample in samples:
        bits = isinstance(sample, list) and all(
            type(value) is int and -(2**15) <= value < 2**15 for value in sample
        )
        if not bits:
            entries.fail(f"the sample {name[:60]!r} is {brief(sample)}")
    return dict(entries.values)


def _files(config: Entries) -> dict[str, str] | None:
    files = config.optional("files")
    if files is None:
        return None
    if not all(isinstance(d, str) and _DIGEST.fullmatch(d) for d in files.values()):
        config.fail(f"'files' is {brief(files)}")
    needed = [EXITS] if config.values.get("checks") is None else [EXITS, CHECKS]
    for name in needed:
        if name not in files:
            config.fail(f"'files' has no SHA-256 of {name}")
    return files


def brief(value: Any) -> str:
    """A value in a few words."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):
        text = f"a {type(value).__name__} that is too deep or too long to show"
    return text if len(text) <= 60 else text[:57] + "..."
