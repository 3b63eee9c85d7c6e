"""Exits and their shortlist, as an adapter's folder holds them, read without PyTorch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from offramp.core.decoding.policy import ExitPolicy, policy_from_json
from offramp.core.errors import AdapterError, OfframpError
from offramp.core.storage import digest_file, schema
from offramp_llama_cpp.graphs import DRAFTS, Array

_RESTORE = "Restore the folder, or train the exits again."
_NUMBERS = {
    "F32": np.float32,
    "F16": np.float16,
    "F64": np.float64,
    "I64": np.int64,
    "I32": np.int32,
}
_LONGEST_HEADER = 1 << 24


@dataclass(frozen=True, eq=False)
class ExitFiles:
    """The files that `Adapter.save` wrote.

    config: of adapter.json. states: each exit's tensors, by depth. shortlist: token ids [S]; None:
    there is none. digest: as `digest_of` has it.
    """

    config: Mapping[str, Any]
    states: Mapping[int, Mapping[str, Array]]
    shortlist: npt.NDArray[np.int64] | None
    digest: str

    def draft_input(self, depth: int) -> dict[str, Array]:
        """Return what enters the exit at a depth where it drafts on, by name; empty where it does
        not."""
        return {
            name.removeprefix(DRAFTS): array
            for name, array in self.states[depth].items()
            if name.startswith(DRAFTS)
        }

    @property
    def policy(self) -> dict[str, Any]:
        """Return the policy as it runs: a first token exits only where decoding showed that it
        may."""
        policy, decoding = dict(self.config["policy"]), dict(self.config.get("decoding") or {})
        if not decoding.get("causal_prompt", True):
            policy |= {"exit_in_prefill": False, "first": {}}
        return policy


def known_policy(values: Any, where: Path) -> ExitPolicy:
    """The policy that is written in a file.

    Raises:
        AdapterError: it is of a newer version, or damaged.
    """
    try:
        schema.shaped(values, schema.Policy)
        return policy_from_json(values)
    except ValueError as error:
        if isinstance(values, dict) and (new := set(values) - set(schema.Policy.__struct_fields__)):
            raise AdapterError(
                f"The policy in {where} holds {min(new)[:60]!r}, which this version does not know: "
                "a newer version of offramp wrote it.",
                "Install that version, or make the files again with this one.",
            ) from error
        said = error.problem if isinstance(error, OfframpError) else str(error)
        raise AdapterError(f"The policy in {where} is damaged: {said}.", _RESTORE) from error


def read_exits(folder: str | Path) -> ExitFiles:
    """Read an adapter's folder.

    Raises:
        AdapterError: there is no adapter, or it is damaged.
    """
    folder = Path(folder)
    if not (folder / "adapter.json").is_file():
        raise AdapterError(f"{folder} holds no adapter (adapter.json is missing).", _RESTORE)
    try:
        config, said = schema.read(folder / "adapter.json", schema.Adapter)
    except (OSError, ValueError) as error:
        raise AdapterError(f"{folder / 'adapter.json'} is damaged: {error}.", _RESTORE) from error
    files, depths = said.files or {}, said.depths
    known_policy(config["policy"], folder / "adapter.json")
    for name, digest in files.items():
        if name.endswith(".safetensors") and digest_file(folder / name) != digest:
            raise AdapterError(f"{folder / name} is not the file that was saved.", _RESTORE)
    raw = _read_raw(folder / "exits.safetensors")
    checks = _read_raw(folder / "checks.safetensors") if config.get("checks") else {}
    shortlist = _numbers(*checks["shortlist"]) if "shortlist" in checks else None
    states: dict[int, dict[str, Array]] = {depth: {} for depth in depths}
    for name, (kind, data) in raw.items():
        depth, _, inner = name.partition(".")
        if not depth.isdigit() or int(depth) not in states:
            raise AdapterError(f"{folder} holds the tensor {name[:60]!r} of no exit.", _RESTORE)
        states[int(depth)][inner] = _numbers(kind, data).astype(np.float32)
    return ExitFiles(
        config,
        states,
        None if shortlist is None else shortlist.astype(np.int64),
        _digest(raw, shortlist),
    )


def digest_of(adapter: Any) -> str:
    """Return which exits an `Adapter` has: SHA-256 over their tensors and the shortlist, the same
    in float32 and bfloat16."""
    state, shortlist = adapter.exits.modules.state_dict(), adapter.exits.shortlist
    raw = {name: ("F32", tensor.detach().float().cpu().numpy()) for name, tensor in state.items()}
    return _digest(raw, None if shortlist is None else shortlist.cpu().numpy())


def _digest(raw: Mapping[str, tuple[str, Any]], shortlist: Any) -> str:
    digest = hashlib.sha256()
    for name, (kind, data) in sorted(raw.items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(_bfloat16(kind, data)).tobytes())
    if shortlist is not None:
        digest.update(shortlist.astype(np.int64).tobytes())
    return digest.hexdigest()


def _bfloat16(kind: str, data: Any) -> Any:
    """The bits of floats in bfloat16, rounded to the nearest even."""
    if kind == "BF16":
        return data
    bits = _numbers(kind, data).astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _numbers(kind: str, data: Any) -> Any:
    if kind == "BF16":
        return (data.astype(np.uint32) << 16).view(np.float32)
    return data


def _read_raw(path: Path) -> dict[str, tuple[str, Any]]:
    """Tensors of a safetensors file by name: their kind and, in bfloat16 as bits, their numbers."""
    try:
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        if not 2 <= size <= min(_LONGEST_HEADER, len(data) - 8):
            raise ValueError("its header is cut off")
        header = json.loads(data[8 : 8 + size])
        found = {}
        for name, about in header.items():
            if name == "__metadata__":
                continue
            start, stop = (8 + size + int(n) for n in about["data_offsets"])
            kind = np.uint16 if about["dtype"] == "BF16" else _NUMBERS[about["dtype"]]
            found[name] = (
                about["dtype"],
                np.frombuffer(data[start:stop], kind).reshape(about["shape"]),
            )
    except FileNotFoundError:
        raise AdapterError(f"{path} is missing.", _RESTORE) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"{path} cannot be read as tensors: {error}.", _RESTORE) from error
    return found
