"""Exits attached to a backbone, with the policy they exit early by; `offramp.save_and_load` stores
them in a folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from offramp.engine.generate import generate
from offramp.engine.policy import FULL, ExitPolicy, GenerationOutput
from offramp.errors import AdapterError
from offramp.model_card import model_card
from offramp.models.backbone import Backbone
from offramp.models.exits import ExitSet
from offramp.save_and_load import (
    AdapterConfig,
    AdapterParts,
    check_policy_depths,
    load_parts,
    read_config,
    save_parts,
)


@dataclass
class Adapter:
    """Exits attached to a backbone, and the policy they exit early by.

    provenance: versions, seed, data digest and command of the training run; `metrics`: agreement
    by depth on validation data.
    calibration: the guarantee that `offramp.calibration.calibrate` gives of the policy, if any.
    seen: see `offramp.data.decontamination`; empty where it is not known.
    attempts: at a guarantee, as JSON; see `offramp.calibration.attempts`.
    """

    backbone: Backbone
    exits: ExitSet
    policy: ExitPolicy = FULL
    provenance: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] | None = None
    seen: Mapping[str, Sequence[str]] = field(default_factory=dict)
    attempts: Sequence[Mapping[str, Any]] = ()

    def __post_init__(self) -> None:
        self.backbone = Backbone.of(self.backbone)
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
        """The same exits with another policy. Raise `InputError` if it names other depths.

        calibration: what is guaranteed of it. A guarantee about another policy does not stay; a
            policy whose `drafts` alone differ is the same, for they change no output.
        """
        check_policy_depths(policy, self.exits.depths)
        if calibration is None and replace(policy, drafts=self.policy.drafts) == self.policy:
            calibration = self.calibration
        return replace(self, policy=policy, calibration=calibration)

    # -- disk ---------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write the folder; each file appears whole or not at all.

        Raises:
            InputError: the exits have no tensors.
            StorageError: e.g. the disk is full; what was there before is untouched.
        """
        parts = AdapterParts(**{f.name: getattr(self, f.name) for f in fields(AdapterParts)})
        save_parts(folder, self.backbone, parts, model_card(self.backbone, parts))

    @classmethod
    def load(cls, folder: str | Path | AdapterConfig, backbone: Backbone | nn.Module) -> Adapter:
        """Read a folder written by `save`; or one whose adapter.json `read_config` has read.

        Raises:
            AdapterError: no adapter, another format version, damaged, or trained for a backbone
                that differs from this one (the text says in what).
        """
        config = folder if isinstance(folder, AdapterConfig) else read_config(folder)
        backbone = Backbone.of(backbone)
        return cls(backbone, **vars(load_parts(config, backbone)))

    # -- hub ----------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, name: str | Path, backbone: Backbone | nn.Module, *, revision: str | None = None
    ) -> Adapter:
        """Load from a folder, or from the hub by name."""
        if os.path.isdir(name):
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
