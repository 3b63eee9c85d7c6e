"""An adapter's folder as `offramp export --to vllm` writes it, read without PyTorch models.

adapter.json         what `offramp` wrote (format 1): depths, policy, guarantee
exits.safetensors    the exits' tensors
checks.safetensors   the shortlist, where there is one
vllm.json            layers of the backbone, the layer that each exit is a copy of, names of the
                     weights that adapter.json has a sample of, and prompts with the answers that
                     `offramp.generate` gave, for the check at start
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from offramp_vllm import schema
from offramp_vllm.policy import Rule
from offramp_vllm.refuse import Refused, check_policy

ADAPTER, VLLM, EXITS, CHECKS = (
    "adapter.json",
    "vllm.json",
    "exits.safetensors",
    "checks.safetensors",
)
FORMATS = {ADAPTER: 1, VLLM: 2}
DRAFTS = "drafts."
"""Names of what an exit of kind "drafting" drafts on with start so; early exit does not read it."""
_AGAIN = "Write it again: offramp export exits --to vllm --out FOLDER."


@dataclass(frozen=True)
class Checked:
    """A prompt with the answers that offramp wrote.

    prompt: token ids, with a placeholder where an image stands. tokens: the early answer.
    depths: layers run for each of these. full: the answer of all layers. image: name of the
    picture's file; None: the prompt is of text alone.
    """

    prompt: Sequence[int]
    tokens: Sequence[int]
    depths: Sequence[int]
    full: Sequence[int]
    image: str | None = None


@dataclass(frozen=True)
class Exported:
    """What the plug-in knows of an adapter.

    layers: L of the backbone. depths: where exits stand, ascending. copied: for each exit the index
    of the backbone's layer that it is built like. rule: when tokens leave. policy: of what that was
    made, as adapter.json has it. calibrations: what is guaranteed, one an engine. dtype: in which
    the checked answers were written. sample: bits of some bfloat16 values of some of the backbone's
    tensors, by their name within its layers. digest: SHA-256 of the exits' file.
    """

    folder: Path
    layers: int
    depths: tuple[int, ...]
    copied: tuple[int, ...]
    rule: Rule
    policy: Mapping[str, Any]
    shortlist: bool
    calibrations: tuple[Mapping[str, Any], ...]
    checked: tuple[Checked, ...]
    dtype: str
    sample: Mapping[str, Sequence[int]]
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


def exits_at(name: str) -> Path:
    """A folder, or what the hub keeps under a name such as OWNER/NAME, which is fetched once.

    Raises:
        Refused: there is no such folder, and the hub gave none.
    """
    if Path(name).is_dir() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.png"]))
    except Exception as error:  # offline, missing, private: hub errors share no useful base
        raise Refused(
            f"There is no folder {name!r}, and the hub gave none: {' '.join(str(error).split())}",
            "Correct the name, be online, or give the folder of offramp export exits --to vllm.",
        ) from error


def read_exported(folder: str | Path) -> Exported:
    """Read a folder, and check its digests.

    Raises:
        Refused: a file is missing, of another version or damaged, or the policy asks for what the
            plug-in does not do.
    """
    folder = Path(folder)
    plain, adapter = _read(folder / ADAPTER, schema.Adapter)
    _, more = _read(folder / VLLM, schema.Vllm)
    return _exported(folder, plain, adapter, more)


def _exported(
    folder: Path, plain: Mapping[str, Any], adapter: schema.Adapter, more: schema.Vllm
) -> Exported:
    if adapter.files is None:
        raise Refused(f"{folder / ADAPTER} has no digests of its files.", _AGAIN)
    for name, digest in adapter.files.items():
        if name in (EXITS, CHECKS) and _sha256(folder / name) != digest:
            raise Refused(f"{folder / name} is not the file that {ADAPTER} is of.", _AGAIN)
    digest = _sha256(folder / EXITS)
    if more.exits != digest:
        raise Refused(f"{folder / VLLM} was written for other exits than {EXITS}.", _AGAIN)
    policy = plain["policy"]
    check_policy(adapter.exit_kind, policy)
    depths, layers = tuple(adapter.depths), more.layers
    copied = tuple(more.copied.get(str(depth), layers) for depth in depths)
    if depths[-1] >= layers or max(copied) >= layers:
        _refuse(folder / VLLM, f"depths {depths}, copies of {copied}, of {layers} layers")
    standing = {*map(str, depths)}
    named = [*policy["thresholds"], *policy.get("first", {})]
    if not standing.issuperset(named):
        _refuse(folder / ADAPTER, f"thresholds at {named[:8]}, exits at {depths}")
    calibrations = [plain.get("calibration"), *(plain.get("elsewhere") or {}).values()]
    return Exported(
        folder=folder,
        layers=layers,
        depths=depths,
        copied=copied,
        rule=Rule.of(policy, depths, first=more.first_may_exit),
        policy=policy,
        shortlist=adapter.policy.shortlist,
        calibrations=tuple(dict(one) for one in calibrations if one),
        checked=tuple(_checked(one) for one in more.checked),
        dtype=more.dtype,
        sample=_sample(folder / VLLM, more.sampled, adapter.backbone.fingerprint.weights),
        digest=digest,
    )


def _checked(one: schema.Checked) -> Checked:
    image = None if one.image is None else Path(one.image).name
    return Checked(one.prompt, one.tokens, one.depths, one.full, image)


def _sample(
    path: Path, names: Mapping[str, int], values: Sequence[int]
) -> dict[str, Sequence[int]]:
    """The backbone's fingerprint by names of tensors; `names` has how many values each gave."""
    found, at = {}, 0
    for name, count in names.items():
        found[name], at = values[at : at + count], at + count
    if at > len(values):
        _refuse(path, f"names of {at} values, of which {ADAPTER} has {len(values)}")
    return found


def _read(path: Path, kind: Any) -> tuple[dict[str, Any], Any]:
    """A file's entries, plain and as a type of the schema."""
    if not path.is_file():
        raise Refused(f"{path} is missing.", _AGAIN)
    try:
        return schema.read(path, kind)
    except (OSError, ValueError) as error:
        other = f"is not of format {FORMATS[path.name]}, which this version reads"
        what = other if "'format'" in str(error) else f"is damaged: {error}"
        raise Refused(f"{path} {what}.", _AGAIN) from error


def _refuse(path: Path, problem: str) -> NoReturn:
    raise Refused(f"{path} is damaged: {problem}.", _AGAIN)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Refused(f"{path} cannot be read: {error}.", _AGAIN) from error
