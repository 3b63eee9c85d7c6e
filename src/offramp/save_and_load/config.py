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

from offramp.engine.policy import (
    ENTRIES,
    FULL,
    ExitPolicy,
    policy_from_json,
    policy_to_json,
)
from offramp.errors import AdapterError, DataError, InputError, StorageError
from offramp.storage import digest_rows, read_json

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
_NUMBER = (int, float)
_CALIBRATION: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("risk", "method", "unit", "data_digest"), (str,)),
    **dict.fromkeys(("target", "confidence", "measured", "bound", "level"), _NUMBER),
    **dict.fromkeys(("n", "answers", "attempt"), (int,)),
    **dict.fromkeys(("conditions", "likeness", "watched"), (dict,)),
    "kinds": (list,),
    "largest": (int,),
}
"""What is said of a guarantee, and is more than shown to people as it stands."""
_CONDITIONS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("dtype", "quantized", "engine", "kernels", "device"), (str,)),
    **dict.fromkeys(("sampling", "template", "score", "kv"), (str,)),
    **dict.fromkeys(("tokens", "exits", "parameters", "autocast", "matmul"), (str,)),
    "pixels": (dict,),
    "any_prompt": (bool,),
    **dict.fromkeys(("exit_in_prefill", "shortlist"), (bool,)),
    **dict.fromkeys(("thresholds", "first", "gates", "weights"), (dict,)),
    "visual_keep": _NUMBER,
    "visual_ranking": (str,),
    "longest": (int,),
    "prompts": (list,),
}


@dataclass(frozen=True)
class AdapterConfig:
    """adapter.json, read and checked.

    fingerprint: of the backbone; see `offramp.models.fingerprint`. exit_kind: of
    `offramp.models.exit_kinds.EXIT_KINDS`; "layer" in adapters written before there were others.
    elsewhere: calibrations in other engines; see `Adapter`.
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
    calibration: Mapping[str, Any] | None
    elsewhere: Mapping[str, Mapping[str, Any]]
    decoding: Mapping[str, Any] | None
    metrics: Mapping[str, Any]
    provenance: Mapping[str, Any]
    files: Mapping[str, str] | None
    raw: Mapping[str, Any]

    @property
    def calibrations(self) -> list[Mapping[str, Any]]:
        """Return the calibrations in all engines."""
        own = [] if self.calibration is None else [self.calibration]
        return [*own, *self.elsewhere.values()]


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
    config = _Entries(folder / CONFIG, _read(folder))
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
        calibration=_calibration(config, "calibration"),
        elsewhere=_elsewhere(config),
        decoding=_decoding(config),
        metrics=_metrics(config),
        provenance=config.get("provenance", dict),
        files=_files(config),
        raw=config.values,
    )


@dataclass(frozen=True)
class _Entries:
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
            self.fail(f"{self.where + name!r} is {_shown(value)}")
        return value

    def part(self, name: str) -> _Entries:
        return _Entries(self.path, self.get(name, dict), f"{self.where}{name}.")

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
            self.get(name, *_NUMBER)

    def check_known(self, names: Iterable[str]) -> None:
        known = set(names)
        for name in self.values:
            if name not in known:
                self.fail(f"{(self.where + name)[:60]!r} is not known")

    def check_format(self) -> None:
        if (version := self.values.get("format")) != FORMAT:
            raise AdapterError(
                f"{self.path.parent} has adapter format {_shown(version)}; this version reads "
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
        raise AdapterError(f"{path} is damaged: it holds {_shown(config)}.", RESTORE)
    return config


def _depths(config: _Entries) -> tuple[int, ...]:
    depths = config.get("depths", list)
    rising = all(type(d) is int and d > 0 for d in depths) and sorted(set(depths)) == depths
    if not depths or not rising:
        config.fail(f"'depths' is {_shown(depths)}")
    return tuple(depths)


def _decoding(config: _Entries) -> dict[str, Any] | None:
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
            shown.fail(f"'decoding.prompts' is {_shown(prompts)}")
    return found


def _elsewhere(config: _Entries) -> dict[str, dict[str, Any]]:
    """What is guaranteed in other engines, by their names."""
    if config.optional("elsewhere") is None:
        return {}
    told = config.part("elsewhere")
    found = {name: _calibration(told, name) for name in told.values}
    return {name: calibration for name, calibration in found.items() if calibration is not None}


def _calibration(config: _Entries, name: str) -> dict[str, Any] | None:
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
            then.fail(f"'{then.where}prompts' is {_shown(frames)}")
    return dict(said.values)


def _check_claim(said: _Entries) -> None:
    """Check that a guarantee's numbers are possible, and its measured risk within its bound."""
    values = said.values
    for name in ("target", "confidence", "level"):
        if values.get(name) is not None and not 0 <= values[name] <= 1:
            said.fail(f"{said.where + name!r} is {_shown(values[name])}")
    for name in ("n", "answers", "attempt"):
        if values.get(name) is not None and values[name] < 0:
            said.fail(f"{said.where + name!r} is {_shown(values[name])}")
    target = values.get("target")
    for name in () if values.get("reason") or target is None else ("measured", "bound"):
        if values.get(name) is not None and not values[name] <= target:
            said.fail(f"{said.where + name!r} is {_shown(values[name])}, above the target {target}")


def _metrics(config: _Entries) -> dict[str, Any]:
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
            found.get("first_draft", *_NUMBER)
            shares = found.get("acceptance", list)
            if not all(type(share) in _NUMBER for share in shares):
                found.fail(f"'{found.where}acceptance' is {_shown(shares)}")
    return {name: value for name, value in said.values.items() if value is not None}


def _policy(policy: _Entries) -> ExitPolicy:
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
                policy.fail(f"'{policy.where}{name}' holds {depth[:60]!r}: {_shown(number)}")
    defaults = policy_to_json(FULL)  # of fields that older adapters do not have
    try:
        return policy_from_json({**defaults, **policy.values})
    except InputError as error:
        raise AdapterError(f"{policy.path}: {error.problem}", error.remedy) from error


def _fingerprint(entries: _Entries) -> dict[str, Any]:
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
            entries.fail(f"the sample {name[:60]!r} is {_shown(rows)}")
        samples += [(name, row) for row in rows]
    for name, sample in samples:
        bits = isinstance(sample, list) and all(
            type(value) is int and -(2**15) <= value < 2**15 for value in sample
        )
        if not bits:
            entries.fail(f"the sample {name[:60]!r} is {_shown(sample)}")
    return dict(entries.values)


def _files(config: _Entries) -> dict[str, str] | None:
    files = config.optional("files")
    if files is None:
        return None
    if not all(isinstance(d, str) and _DIGEST.fullmatch(d) for d in files.values()):
        config.fail(f"'files' is {_shown(files)}")
    needed = [EXITS] if config.values.get("checks") is None else [EXITS, CHECKS]
    for name in needed:
        if name not in files:
            config.fail(f"'files' has no SHA-256 of {name}")
    return files


def _shown(value: Any) -> str:
    """A value in a few words."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):
        text = f"a {type(value).__name__} that is too deep or too long to show"
    return text if len(text) <= 60 else text[:57] + "..."
