"""Trained exits on disk: a folder with the trained tensors, and what they belong to.

adapter.json                format version, backbone, depths, policy, provenance
exits.safetensors           the exits' tensors, nothing of the backbone
discriminators.safetensors  only needed for the discriminator score and for resuming
README.md                   the model card
training/                   log, and the state that resuming needs; not pushed to the hub
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offramp.backbone import Backbone, same_backbone
from offramp.decode import generate
from offramp.discriminator import build_discriminators
from offramp.errors import AdapterError, DataError, StorageError
from offramp.exits import Exits
from offramp.policy import FULL, Generation, Policy
from offramp.records import atomic_folder, read_json, write_json
from offramp.scores import check_thresholds

FORMAT = 1
CONFIG, EXITS, DISCRIMINATORS, CARD = (
    "adapter.json",
    "exits.safetensors",
    "discriminators.safetensors",
    "README.md",
)


@dataclass
class Adapter:
    """Exits attached to a backbone, and the policy they leave by.

    provenance: versions, seed, data digest and command of the training run; `metrics`: agreement
    by depth on validation data.
    """

    backbone: Backbone
    exits: Exits
    policy: Policy = FULL
    discriminators: nn.ModuleDict | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)

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

    def with_policy(self, policy: Policy) -> Adapter:
        """The same exits, leaving by `policy`. Raise `InputError` if it names other depths."""
        check_thresholds(dict(policy.thresholds), self.exits.depths)
        return replace(self, policy=policy)

    # -- disk ---------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write the folder; each file appears whole or not at all.

        Raises:
            StorageError: e.g. the disk is full; what was there before is untouched.
        """
        check_thresholds(dict(self.policy.thresholds), self.exits.depths)
        with atomic_folder(folder) as staging:
            _write(self.exits, staging / EXITS)
            if self.discriminators is not None:
                _write(self.discriminators, staging / DISCRIMINATORS)
            write_json(staging / CONFIG, self._config())
            (staging / CARD).write_text(model_card(self), encoding="utf-8")
        if self.discriminators is None:  # an earlier adapter's would not fit these exits
            (Path(folder) / DISCRIMINATORS).unlink(missing_ok=True)

    def _config(self) -> dict[str, Any]:
        conditional = None
        if self.discriminators is not None:
            some: Any = next(iter(self.discriminators.values()))
            conditional = some.conditional
        return {
            "format": FORMAT,
            "backbone": {
                "name": self.backbone.name,
                "revision": self.backbone.revision,
                "fingerprint": self.backbone.fingerprint(),
            },
            "depths": list(self.exits.depths),
            "conditional_discriminators": conditional,
            "policy": policy_to_json(self.policy),
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
            discriminators = None
            conditional = config["conditional_discriminators"]
            if conditional is not None and (folder / DISCRIMINATORS).is_file():
                discriminators = build_discriminators(
                    backbone.width, exits.depths, conditional=bool(conditional)
                )
                _fill(discriminators, folder / DISCRIMINATORS)
                discriminators.to(backbone.device).requires_grad_(False)
            policy = policy_from_json(config["policy"])
            check_thresholds(dict(policy.thresholds), exits.depths)
            provenance, metrics = dict(config["provenance"]), dict(config["metrics"])
        except AdapterError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise AdapterError(
                f"{folder / CONFIG} is damaged ({type(error).__name__}: {error}).",
                "Train the exits again, or restore the folder.",
            ) from error
        return cls(backbone, exits, policy, discriminators, provenance, metrics)

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


def policy_to_json(policy: Policy) -> dict[str, Any]:
    """A policy as JSON; thresholds are keyed by depth."""
    return {**asdict(policy), "thresholds": {str(d): t for d, t in policy.thresholds.items()}}


def policy_from_json(value: Mapping[str, Any]) -> Policy:
    """The policy that `policy_to_json` wrote."""
    thresholds = {int(d): t for d, t in value["thresholds"].items()}
    return Policy(**{**value, "thresholds": thresholds})


def model_card(adapter: Adapter) -> str:
    """The generated README.md of an adapter."""
    backbone, policy = adapter.backbone, adapter.policy
    agreement = adapter.metrics.get("agreement", {})
    rows = "\n".join(
        f"| {d} of {backbone.depth} | {agreement.get(str(d), float('nan')):.4f} "
        f"| {policy.thresholds.get(d, 'off')} |"
        for d in adapter.exits.depths
    )
    return f"""---
library_name: offramp
{_base_model(backbone.name)}tags: [early-exit, vision-language]
---
# Early exits for {backbone.name}

One decoder layer at each depth below, trained on the frozen backbone and read by its own final
norm and LM head.

| depth | agreement with the full model (validation, teacher-forced) | threshold |
|---|---|---|
{rows}

Score: `{policy.score}`; skipped keys and values: `{policy.kv}`. No threshold means that the exit
is off.

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


def _write(module: nn.Module, path: Path) -> None:
    """The module's tensors as safetensors; an OSError where they do not fit."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {n: t.detach().cpu().contiguous() for n, t in module.state_dict().items()}
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
