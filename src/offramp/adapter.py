"""Trained exits on disk: a folder with the trained tensors, and what they belong to.

adapter.json                format version, backbone, depths, policy, calibration, provenance
exits.safetensors           the exits' tensors, nothing of the backbone
checks.safetensors          shortlist and gates, if there are any (`offramp.models.shortlist`)
discriminators.safetensors  only needed for the discriminator score and for resuming
seen.json                   digests of the pictures that training and calibration used
README.md                   the model card
training/                   log, and the state that resuming needs; not pushed to the hub
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from offramp.engine.confidence import check_thresholds
from offramp.engine.generate import generate
from offramp.engine.policy import (
    FULL,
    ExitPolicy,
    GenerationOutput,
    policy_from_json,
    policy_to_json,
)
from offramp.errors import AdapterError, InputError
from offramp.model_card import model_card
from offramp.models.backbone import Backbone, same_backbone
from offramp.models.discriminator import build_discriminators
from offramp.models.exits import Exits, ExitSet
from offramp.save_and_load import (
    _discriminator_options,
    _fill,
    _read_checks,
    _read_config,
    _read_seen,
    _write,
    checks_tensors,
)
from offramp.storage import atomic_folder, write_json

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
    calibration: what is promised of the policy, by `offramp.calibration.calibrate`; None: nothing.
    seen: see `offramp.data.decontamination`; empty where it is not known.
    """

    backbone: Backbone
    exits: ExitSet
    policy: ExitPolicy = FULL
    provenance: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] | None = None
    seen: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.exits = ExitSet.of(self.exits)

    def generate(
        self, inputs: Mapping[str, Any], *, policy: ExitPolicy | None = None, **options: Any
    ) -> GenerationOutput:
        """Generate by the adapter's policy, or by another; see `offramp.generate`."""
        return generate(
            self.backbone,
            inputs,
            exits=self.exits,
            policy=self.policy if policy is None else policy,
            **options,
        )

    def with_policy(
        self, policy: ExitPolicy, calibration: Mapping[str, Any] | None = None
    ) -> Adapter:
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
        exits = self.exits
        if not list(exits.modules.parameters()):
            raise InputError(
                "Lens exits have no tensors, so there is nothing to save.",
                "Build them where they are used: Exits(backbone, depths, lens=True).",
            )
        with atomic_folder(folder) as staging:
            _write(exits.modules.state_dict(), staging / EXITS)
            if exits.measured:
                _write(checks_tensors(exits), staging / CHECKS)
            if exits.discriminators is not None:
                _write(exits.discriminators.state_dict(), staging / DISCRIMINATORS)
            if self.seen:
                write_json(staging / SEEN, {step: list(s) for step, s in self.seen.items()})
            write_json(staging / CONFIG, self._config())
            (staging / CARD).write_text(model_card(self), encoding="utf-8")
        parts = {
            CHECKS: bool(exits.measured),
            DISCRIMINATORS: exits.discriminators is not None,
            SEEN: bool(self.seen),
        }
        for name, written in parts.items():
            if not written:  # an earlier adapter's would not fit these exits
                (Path(folder) / name).unlink(missing_ok=True)

    def _config(self) -> dict[str, Any]:
        discriminators = None
        if self.exits.discriminators is not None:
            some: Any = next(iter(self.exits.discriminators.values()))
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
            "checks": dict(self.exits.measured) or None,
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
            shortlist, gates = _read_checks(folder, config, backbone)
            discriminators = None
            options = _discriminator_options(config)
            if options is not None and (folder / DISCRIMINATORS).is_file():
                discriminators = build_discriminators(backbone.width, exits.depths, **options)
                _fill(discriminators, folder / DISCRIMINATORS)
                discriminators.to(backbone.device).eval().requires_grad_(False)
            attached = ExitSet(
                exits, shortlist, gates, discriminators, dict(config.get("checks") or {})
            )
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
        return cls(backbone, attached, policy, provenance, metrics, calibration, seen)

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


def _check_depths(policy: ExitPolicy, depths: tuple[int, ...]) -> None:
    for thresholds in (policy.thresholds, policy.drafts):
        check_thresholds(dict(thresholds), depths)
