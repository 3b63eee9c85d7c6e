"""Trained exits on disk: a folder with the trained tensors, and what they belong to.

adapter.json                format version, backbone, depths, policy, calibration, provenance
exits.safetensors           the exits' tensors, nothing of the backbone
checks.safetensors          shortlist and gates, if there are any (`offramp.checks`)
discriminators.safetensors  only needed for the discriminator score and for resuming
seen.json                   digests of the pictures that training and calibration used
README.md                   the model card
training/                   log, and the state that resuming needs; not pushed to the hub
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offramp.backbone import Backbone, same_backbone
from offramp.checks import Checks
from offramp.decode import generate
from offramp.discriminator import build_discriminators
from offramp.errors import AdapterError, DataError, InputError, StorageError
from offramp.exits import Exits
from offramp.policy import FULL, Generation, Policy
from offramp.records import atomic_folder, read_json, write_json
from offramp.scores import check_thresholds

FORMAT = 1
CONFIG, EXITS, CHECKS, DISCRIMINATORS, SEEN, CARD = (
    "adapter.json",
    "exits.safetensors",
    "checks.safetensors",
    "discriminators.safetensors",
    "seen.json",
    "README.md",
)


@dataclass
class Adapter:
    """Exits attached to a backbone, and the policy they leave by.

    provenance: versions, seed, data digest and command of the training run; `metrics`: agreement
    by depth on validation data.
    calibration: what is promised of the policy, by `offramp.calibrate`; None: nothing.
    seen: see `offramp.seen`; empty where it is not known.
    """

    backbone: Backbone
    exits: Exits
    policy: Policy = FULL
    discriminators: nn.ModuleDict | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] | None = None
    seen: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def generate(
        self, inputs: Mapping[str, Any], *, policy: Policy | None = None, **options: Any
    ) -> Generation:
        """Generate by the adapter's policy, or by another; see `offramp.decode.generate`."""
        return generate(
            self.backbone,
            inputs,
            exits=self.exits,
            policy=self.policy if policy is None else policy,
            discriminators=self.discriminators,
            **options,
        )

    def with_policy(self, policy: Policy, calibration: Mapping[str, Any] | None = None) -> Adapter:
        """The same exits, leaving by `policy`. Raise `InputError` if it names other depths.

        calibration: what is promised of it; a promise about another policy does not stay; one
            whose `drafts` differ is the same, for they change no output.
        """
        _check_depths(policy, self.exits.depths)
        if calibration is None and replace(policy, drafts=self.policy.drafts) == self.policy:
            calibration = self.calibration
        return replace(self, policy=policy, calibration=calibration)

    # -- disk ---------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write the folder; each file appears whole or not at all.

        Raises:
            StorageError: e.g. the disk is full; what was there before is untouched.
        """
        _check_depths(self.policy, self.exits.depths)
        if not list(self.exits.parameters()):
            raise InputError(
                "Lens exits have no tensors, so there is nothing to save.",
                "Build them where they are used: Exits(backbone, depths, lens=True).",
            )
        checks = self.exits.checks
        with atomic_folder(folder) as staging:
            _write(self.exits.state_dict(), staging / EXITS)
            if checks is not None:
                _write(checks.tensors(), staging / CHECKS)
            if self.discriminators is not None:
                _write(self.discriminators.state_dict(), staging / DISCRIMINATORS)
            if self.seen:
                write_json(staging / SEEN, {step: list(s) for step, s in self.seen.items()})
            write_json(staging / CONFIG, self._config())
            (staging / CARD).write_text(model_card(self), encoding="utf-8")
        parts = {
            CHECKS: checks is not None,
            DISCRIMINATORS: self.discriminators is not None,
            SEEN: bool(self.seen),
        }
        for name, written in parts.items():
            if not written:  # an earlier adapter's would not fit these exits
                (Path(folder) / name).unlink(missing_ok=True)

    def _config(self) -> dict[str, Any]:
        discriminators = None
        if self.discriminators is not None:
            some: Any = next(iter(self.discriminators.values()))
            discriminators = some.options
        return {
            "format": FORMAT,
            "backbone": {
                "name": self.backbone.name,
                "revision": self.backbone.revision,
                "fingerprint": self.backbone.fingerprint(),
            },
            "depths": list(self.exits.depths),
            "discriminators": discriminators,
            "checks": None if self.exits.checks is None else dict(self.exits.checks.found),
            "policy": policy_to_json(self.policy),
            "calibration": None if self.calibration is None else dict(self.calibration),
            "metrics": dict(self.metrics),
            "provenance": dict(self.provenance),
        }

    @classmethod
    def load(cls, folder: str | Path, backbone: Backbone) -> Adapter:
        """Read a folder written by `save`.

        Raises:
            AdapterError: no adapter, another format version, damaged, or trained for a backbone
                that differs from this one (the text says in what).
        """
        folder = Path(folder)
        config = _read_config(folder)
        try:
            saved = config["backbone"]
            difference = same_backbone(saved["fingerprint"], backbone.fingerprint())
            if difference is not None:
                raise AdapterError(
                    f"{folder} was trained for {saved['name']!r}, not for this backbone: "
                    f"{difference}.",
                    "Load it with its own backbone, or train exits for this one.",
                )
            exits = Exits(backbone, config["depths"])
            _fill(exits, folder / EXITS)
            exits.to(backbone.device, backbone.dtype).requires_grad_(False)
            exits.checks = _read_checks(folder, config, backbone)
            discriminators = None
            options = _discriminator_options(config)
            if options is not None and (folder / DISCRIMINATORS).is_file():
                discriminators = build_discriminators(backbone.width, exits.depths, **options)
                _fill(discriminators, folder / DISCRIMINATORS)
                discriminators.to(backbone.device).eval().requires_grad_(False)
            policy = policy_from_json(config["policy"])
            _check_depths(policy, exits.depths)
            provenance, metrics = dict(config["provenance"]), dict(config["metrics"])
            promised = config.get("calibration")
            calibration = None if promised is None else dict(promised)
            seen = _read_seen(folder)
        except AdapterError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise AdapterError(
                f"{folder / CONFIG} is damaged ({type(error).__name__}: {error}).",
                "Train the exits again, or restore the folder.",
            ) from error
        return cls(backbone, exits, policy, discriminators, provenance, metrics, calibration, seen)

    # -- hub ----------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, name: str | Path, backbone: Backbone, *, revision: str | None = None
    ) -> Adapter:
        """Load from a folder, or from the hub by name."""
        if Path(name).is_dir():
            return cls.load(name, backbone)
        from huggingface_hub import snapshot_download

        try:
            folder = snapshot_download(str(name), revision=revision)
        except Exception as error:  # offline, missing, private: hub errors share no useful base
            raise AdapterError(
                f"No adapter folder {str(name)!r}, and the hub gave none: {error}",
                "Correct the path or the name, or be online.",
            ) from error
        return cls.load(folder, backbone)

    def push_to_hub(self, repo_id: str, *, private: bool = True, token: str | None = None) -> str:
        """Upload the folder's files (no training state) and return the commit's address."""
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save(folder)
            return str(
                api.upload_folder(
                    repo_id=repo_id, folder_path=folder, commit_message="Add offramp exits"
                )
            )


_BY_DEPTH = ("thresholds", "drafts", "weights", "gates")


def _check_depths(policy: Policy, depths: tuple[int, ...]) -> None:
    for thresholds in (policy.thresholds, policy.drafts):
        check_thresholds(dict(thresholds), depths)


def policy_to_json(policy: Policy) -> dict[str, Any]:
    """A policy as JSON, whose keys are text."""
    by_depth = {n: getattr(policy, n) for n in _BY_DEPTH}
    return {
        **asdict(policy),
        **{name: {str(d): v for d, v in values.items()} for name, values in by_depth.items()},
    }


def policy_from_json(value: Mapping[str, Any]) -> Policy:
    """The policy that `policy_to_json` wrote."""
    by_depth = {"thresholds": value["thresholds"], **{n: value.get(n, {}) for n in _BY_DEPTH[1:]}}
    numbers = {name: {int(d): v for d, v in values.items()} for name, values in by_depth.items()}
    return Policy(**{**value, **numbers})


def model_card(adapter: Adapter) -> str:
    """The generated README.md of an adapter."""
    backbone, policy = adapter.backbone, adapter.policy
    agreement = adapter.metrics.get("agreement", {})
    rows = "\n".join(
        f"| {d} of {backbone.depth} | {agreement.get(str(d), float('nan')):.4f} "
        f"| {policy.thresholds.get(d, 'off')} | {policy.drafts.get(d, 'as the threshold')} |"
        for d in adapter.exits.depths
    )
    return f"""---
library_name: offramp
{_base_model(backbone.name)}tags: [early-exit, vision-language]
---
# Early exits for {backbone.name}

One decoder layer at each depth below, trained on the frozen backbone and read by its own final
norm and LM head.

| depth | agreement with the full model (validation, teacher-forced) | threshold | drafts |
|---|---|---|---|
{rows}

Score: `{policy.score}`; skipped keys and values: `{policy.kv}`. No threshold means that the exit
is off. Drafts: thresholds of the lossless mode.

{_promise(adapter)}

```python
from offramp import Adapter, Backbone
from transformers import AutoProcessor

backbone = Backbone.from_pretrained({backbone.name!r})
processor = AutoProcessor.from_pretrained({backbone.name!r})
adapter = Adapter.from_pretrained("this/folder", backbone)
answer = adapter.generate(processor(images=image, text=prompt, return_tensors="pt"))
```

## Provenance

```json
{json.dumps(dict(adapter.provenance), indent=2, ensure_ascii=False)}
```
"""


def _promise(adapter: Adapter) -> str:
    """The card's sentence on what these thresholds keep."""
    found = adapter.calibration
    if found is None:
        return "The thresholds are not calibrated: nothing is promised."
    what = f"risk `{found['risk']}` at most {found['target']:.3g}"
    if found["measured"] is None:
        return f"Calibration could not promise a {what}, so all exits are off."
    return (
        f"Calibrated: {what}, with {found['confidence']:.0%} confidence on data like those of the "
        f"calibration; measured {found['measured']:.3g}, at most {found['bound']:.3g}, on "
        f"n = {found['n']} (method `{found['method']}`, data digest `{found['data_digest'][:16]}`)."
    )


def _base_model(name: str) -> str:
    """The card's line on the backbone; the hub refuses a card that names a local folder there."""
    is_hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()
    return f"base_model: {name}\n" if is_hub_name else ""


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raise AdapterError(
            f"{folder} holds no adapter ({CONFIG} is missing).",
            "Give the folder that `offramp train --out` wrote.",
        )
    try:
        config = read_json(folder / CONFIG)
    except (DataError, StorageError) as error:
        raise AdapterError(
            error.problem, "Restore the folder, or train the exits again."
        ) from error
    found = config.get("format") if isinstance(config, dict) else None
    if found != FORMAT:
        raise AdapterError(
            f"{folder} has adapter format {found!r}; this version reads format {FORMAT}.",
            "Train the exits again, or install the version of offramp that wrote it.",
        )
    return config  # type: ignore[no-any-return]


def _discriminator_options(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """How the discriminators are built; None where there are none."""
    if "conditional_discriminators" in config:  # written when there was one option
        conditional = config["conditional_discriminators"]
        return None if conditional is None else {"conditional": bool(conditional)}
    options = config["discriminators"]
    return None if options is None else dict(options)


def _read_seen(folder: Path) -> dict[str, list[str]]:
    """What `seen.json` holds; nothing in an adapter from before there was one."""
    if not (folder / SEEN).is_file():
        return {}
    try:
        return {step: list(digests) for step, digests in read_json(folder / SEEN).items()}
    except (DataError, StorageError, AttributeError, TypeError) as error:
        raise AdapterError(
            f"{folder / SEEN} is damaged ({error.__class__.__name__}).",
            "Restore the file, or train the exits again.",
        ) from error


def _read_checks(folder: Path, config: Mapping[str, Any], backbone: Backbone) -> Checks | None:
    """Shortlist and gates; None where the adapter has none."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if config.get("checks") is None:
        return None
    try:
        tensors = load_file(folder / CHECKS, device=str(backbone.device))
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"{folder / CHECKS} cannot be read: {str(error).splitlines()[0]}",
            "Restore the folder, or train the exits again.",
        ) from error
    sizes = {"width": backbone.width, "vocabulary": backbone.vocabulary}
    return Checks.of(tensors, config["checks"], **sizes)


def _write(state: Mapping[str, Tensor], path: Path) -> None:
    """Tensors as safetensors; an OSError where they do not fit."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {n: t.detach().cpu().contiguous() for n, t in state.items()}
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # safetensors has its own error for a full disk
        raise OSError(str(error)) from error


def _fill(module: nn.Module, path: Path) -> None:
    """Load exactly the module's tensors from `path`, or raise `AdapterError`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for parameter in module.parameters():
        parameter.data = torch.full_like(parameter, float("nan"))  # nothing may stay as it was
    try:
        module.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise AdapterError(
            f"{path} cannot be read as the exits' tensors: {str(error).splitlines()[0]}",
            "Restore the folder, or train the exits again.",
        ) from error
