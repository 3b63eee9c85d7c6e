"""An adapter's folder as `offramp export --to vllm` writes it, read without PyTorch models.

adapter.json         what `offramp` wrote (format 1): depths, policy, guarantee
exits.safetensors    the exits' tensors
checks.safetensors   the shortlist, where there is one
vllm.json            layers of the backbone, the layer that each exit is a copy of, and prompts with
                     the answers that `offramp.generate` gave, for the check at start
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offramp_vllm.policy import Rule
from offramp_vllm.refuse import Refused, check_policy

ADAPTER, VLLM, EXITS, CHECKS = (
    "adapter.json", "vllm.json", "exits.safetensors", "checks.safetensors"
)  # fmt: skip
DRAFTS = "drafts."
"""Names of what an exit of kind "drafting" drafts on with start so; early exit does not read it."""
FORMAT = 1
"""Of adapter.json and of vllm.json."""
_AGAIN = "Write it again: offramp export exits --to vllm --out FOLDER."


@dataclass(frozen=True)
class Checked:
    """A prompt with the answer that offramp wrote, early exits on.

    prompt, tokens: ids. depths: layers run for each token.
    """

    prompt: Sequence[int]
    tokens: Sequence[int]
    depths: Sequence[int]


@dataclass(frozen=True)
class Exported:
    """What the plug-in knows of an adapter.

    layers: L of the backbone. depths: where exits stand, ascending. copied: for each exit the index
    of the backbone's layer that it is built like. rule: when tokens leave. guarantee: the entry
    "calibration" of adapter.json, or None. dtype: in which the checked answers were written.
    digest: SHA-256 of the exits' file.
    """

    folder: Path
    layers: int
    depths: tuple[int, ...]
    copied: tuple[int, ...]
    rule: Rule
    shortlist: bool
    guarantee: Mapping[str, Any] | None
    checked: tuple[Checked, ...]
    dtype: str
    digest: str

    @property
    def all_layers(self) -> int:
        """Layers of the model that vLLM builds: the backbone's, then the exits."""
        return self.layers + len(self.depths)

    def tensors(self) -> Iterator[tuple[int, str, Any]]:
        """Place of the exit from 0, name in its layer, and tensor."""
        from safetensors import safe_open

        with safe_open(self.folder / EXITS, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                depth, inner = name.split(".", 1)
                if not inner.startswith(DRAFTS):
                    yield self.depths.index(int(depth)), inner, file.get_tensor(name)

    def draft_input(self) -> dict[str, Any]:
        """Return the tensors that the first exit drafts on with, by name; none unless it is of kind
        "drafting"."""
        from safetensors import safe_open

        start = f"{self.depths[0]}.{DRAFTS}"
        with safe_open(self.folder / EXITS, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(start)]  # noqa: SIM118
            return {name.removeprefix(start): file.get_tensor(name) for name in names}

    def shortlist_ids(self) -> Any:
        """Token ids [S], ascending, that exits can say; None: all."""
        if not self.shortlist:
            return None
        from safetensors import safe_open

        with safe_open(self.folder / CHECKS, framework="pt") as file:
            return file.get_tensor("shortlist")


def read_exported(folder: str | Path) -> Exported:
    """Read a folder, and check its digests.

    Raises:
        Refused: a file is missing, of another version or damaged, or the policy asks for what the
            plug-in does not do.
    """
    folder = Path(folder)
    adapter, more = _read(folder / ADAPTER), _read(folder / VLLM)
    for name, digest in (adapter.get("files") or {}).items():
        if name in (EXITS, CHECKS) and _sha256(folder / name) != digest:
            raise Refused(f"{folder / name} is not the file that {ADAPTER} is of.", _AGAIN)
    digest = _sha256(folder / EXITS)
    if more["exits"] != digest:
        raise Refused(f"{folder / VLLM} was written for other exits than {EXITS}.", _AGAIN)
    policy = adapter["policy"]
    check_policy(adapter.get("exit_kind", "layer"), policy)
    depths = tuple(adapter["depths"])
    return Exported(
        folder=folder,
        layers=more["layers"],
        depths=depths,
        copied=tuple(more["copied"][str(depth)] for depth in depths),
        rule=Rule.of(policy, depths, first=more.get("first_may_exit", True)),
        shortlist=bool(policy.get("shortlist")),
        guarantee=adapter.get("calibration"),
        checked=tuple(Checked(**one) for one in more["checked"]),
        dtype=more["dtype"],
        digest=digest,
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise Refused(f"{path} is missing.", _AGAIN) from error
    except (OSError, ValueError) as error:
        raise Refused(f"{path} cannot be read: {error}.", _AGAIN) from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise Refused(f"{path} is not of format {FORMAT}, which this version reads.", _AGAIN)
    return found


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Refused(f"{path} cannot be read: {error}.", _AGAIN) from error
