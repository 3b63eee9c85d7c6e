"""Adapters: attached exits and what is known of them, which `offramp.core.save_and_load` stores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from offramp.adapter.records import AdapterParts, Records, load_parts, save_parts
from offramp.adapter.shipped import exits_folder, load_named
from offramp.core.decoding.policy import ExitPolicy, check_policy_depths
from offramp.core.engine.attached import AttachedExits
from offramp.core.errors import InputError
from offramp.core.models.as_loaded import exits_digest, note_loaded
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits, ExitSet
from offramp.core.save_and_load import AdapterConfig, read_config

if TYPE_CHECKING:  # who answers alone needs no promises
    from PIL.Image import Image

    from offramp.core.decoding.policy import GenerationOutput
    from offramp.promises.guarantee import GuaranteeStatus
    from offramp.promises.likeness import Likeness
    from offramp.promises.verdict import Verdict


def _by_engine(calibration: Mapping[str, Any] | None) -> dict[str, Mapping[str, Any]]:
    """A calibration by its `place`; {} where it names no engine."""
    from offramp.promises.conditions import Conditions, place

    then = Conditions.of_calibration(calibration)
    if calibration is None or then.get("engine") is None:
        return {}
    return {place(then["engine"], then.get("vision")): calibration}


def attach(
    model: Backbone | nn.Module, exits: str | Path | Adapter | ExitSet | Exits, **hub: Any
) -> Adapter:
    """Attach exits to a Hugging Face model, which is not changed.

    exits: a folder or a hub name; or exits made for this model, without thresholds yet. hub: as of
    `Adapter.from_pretrained`.

    Raises:
        AdapterError: no such exits, or they do not fit the model.
        InputError: an adapter that is attached to another model, or an object that is no exits.
    """
    if isinstance(exits, ExitSet | Exits):
        return Adapter(Backbone.of(model), ExitSet.of(exits))
    if not isinstance(exits, Adapter):
        return Adapter.from_pretrained(model, exits, **hub)
    ours = exits.backbone
    if model is not ours and Backbone.of(model).model is not ours.model:
        raise InputError(
            f"These exits are attached to another model, {ours.name}.",
            "Save them, and attach the folder: offramp.attach(model, folder).",
        )
    return exits


@dataclass(repr=False)
class Adapter(AttachedExits, Records):
    """Exits attached to a backbone, the policy they exit early by, and the records of both. Further
    attributes are those of `offramp.adapter.records`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        note_loaded(self.backbone)
        if self.calibration is not None:  # before weights are laid out for a processor
            exits_digest(self.exits.modules)

    def __repr__(self) -> str:
        depths = ", ".join(map(str, self.exits.depths))
        by, level = self.policy.decides
        found = self.standing()
        bound = f"guarantee: {found.promise.claim}" if found.promise else found.sentence
        runs = () if self.certificate is None else self.certificate.runs
        verified = "".join(f"; verified: {run.words}" for run in runs)
        return (
            f"Adapter(exits at {depths} of {self.backbone.depth} layers of {self.backbone.name}; "
            f"{by}: {level or 'none'}; {bound or 'guarantee: none'}{verified})"
        )

    @property
    def of_format(self) -> str | None:
        """The GGUF format whose answers the exits learnt from; None: the backbone's own."""
        said = self.provenance.get("of_format")
        return said if isinstance(said, str) else None

    def standing(self, *, engine: str | None = None, **known: Any) -> GuaranteeStatus:
        """Return what is guaranteed of answers on this backbone, or why nothing is.

        engine: the name of a runtime in PyTorch's place. known: conditions of requests; see
        `offramp.promises.guarantee.Conditions`.
        """
        from offramp.promises.conditions import TORCH, Conditions
        from offramp.promises.guarantee import standing

        here = Conditions.of(self.backbone, self.policy, engine=engine, exits=self.exits, **known)
        return standing(self.of_engine(engine or TORCH).calibration, here)

    def verdict(
        self,
        output: GenerationOutput,
        processor: Any,
        prompt: str,
        image: Image | None = None,
        *,
        policy: ExitPolicy | None = None,
        engine: str | None = None,
        **known: Any,
    ) -> Verdict:
        """Return what is promised of one generated answer to a prompt about one image, or about
        none for a language model.

        policy: of the answer; None: `policy_of` the prompt. engine: as of `standing`. known:
        conditions of the request, such as sampling and longest.
        """
        from offramp.promises.conditions import TORCH, Conditions, of_processor
        from offramp.promises.guarantee import standing
        from offramp.promises.likeness import look_of
        from offramp.promises.prompt_kinds import OTHER
        from offramp.promises.verdict import decide

        policy = self.policy_of(prompt) if policy is None else policy
        about_one = self.backbone.text_only if image is None else True
        here = Conditions.of(
            self.backbone,
            policy,
            engine=engine,
            exits=self.exits,
            prompts=[[prompt if about_one else OTHER]],
            **of_processor(processor),
            **known,
        )
        exact = policy.own_mode != "early_exit"
        likeness = self.likeness
        looked = image is not None and likeness.looks_at_images and not exact
        kind = self.kind_of(prompt)
        return decide(
            standing(self.of_engine(engine or TORCH).calibration, here, kind),
            exact=exact,
            kind=kind,
            likeness=likeness,
            scores=output.scores[0].tolist(),
            look=look_of(image) if looked and image is not None else None,
        )

    def of_engine(self, name: str) -> Adapter:
        """Return this adapter with the calibration made in the engine of this name with the same
        vision tower, or else with the model's own; unchanged without one."""
        from offramp.promises.conditions import place

        known = {**self.elsewhere, **_by_engine(self.calibration)}
        places = (place(name, self.backbone.vision_engine), name)
        here = next((one for one in places if one in known), None)
        if here is None or known[here] is self.calibration:
            return self
        return replace(self, calibration=known.pop(here), elsewhere=known)

    @property
    def likeness(self) -> Likeness:
        """Return the likeness of the calibrated answers, by which unlike requests are found."""
        from offramp.promises.likeness import Likeness

        return Likeness.from_json((self.calibration or {}).get("likeness"))

    def kind_of(self, prompt: str) -> str:
        """Return the kind of a prompt among the calibrated kinds; see `prompt_kinds.kind_of`."""
        from offramp.promises.conditions import Conditions
        from offramp.promises.prompt_kinds import kind_of

        frames = Conditions.of_calibration(self.calibration).get("prompts") or ()
        return kind_of(prompt, frames)

    def policy_of(self, prompt: str, *, engine: str | None = None) -> ExitPolicy:
        """Return the policy for a prompt: at the thresholds of its kind, if kinds were calibrated.
        `generate`, which reads tokens, uses one policy that all kinds passed.

        engine: as of `standing`.
        """
        from offramp.promises.conditions import TORCH

        return self.policy.moved(self.of_engine(engine or TORCH).point_of(prompt))

    def point_of(self, prompt: str) -> dict[int, float] | None:
        """Return the point of the calibrated path that prompts of this kind are answered by; None:
        that of all."""
        from offramp.promises.prompt_kinds import OTHER, point_of

        return None if prompt == OTHER else point_of(self.calibration, self.kind_of(prompt))

    def with_policy(
        self, policy: ExitPolicy, calibration: Mapping[str, Any] | None = None
    ) -> Adapter:
        """Return the same exits with another policy. Raise `InputError` if the policy names other
        depths.

        calibration: of the new policy. A guarantee about another policy is dropped; policies that
        differ in drafts alone count as the same, because drafts change no output. Guarantees of the
        same policy in other engines stay.
        """
        from offramp.promises.conditions import of_policy

        check_policy_depths(policy, self.exits.depths)
        alike = of_policy(policy) == of_policy(self.policy)
        if not (alike and policy.lossless == self.policy.lossless):
            return replace(self, policy=policy, calibration=calibration, elsewhere={})
        if calibration is None:
            return replace(self, policy=policy)
        others = {**self.elsewhere, **_by_engine(self.calibration)}
        for name in _by_engine(calibration):
            others.pop(name, None)
        return replace(self, policy=policy, calibration=calibration, elsewhere=others)

    # -- disk ---------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the adapter to a folder; each file appears whole or not at all.

        Raises:
            InputError: the exits have no tensors.
            StorageError: e.g. the disk is full; what was there before is untouched.
        """
        from offramp.adapter.model_card import model_card

        parts = AdapterParts(**{f.name: getattr(self, f.name) for f in fields(AdapterParts)})
        save_parts(save_directory, self.backbone, parts, model_card(self.backbone, parts))

    def save(self, folder: str | Path) -> None:
        """Do as `save_pretrained`, by a shorter name."""
        self.save_pretrained(folder)

    @classmethod
    def load(cls, folder: str | Path | AdapterConfig, backbone: Backbone | nn.Module) -> Adapter:
        """Read a folder that `save_pretrained` wrote, or an adapter.json that `read_config` has
        read.

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
        cls,
        model: Backbone | nn.Module | str | Path,
        pretrained_model_name_or_path: str | Path | None = None,
        *,
        revision: str | None = None,
        **hub: Any,
    ) -> Adapter:
        """Load exits by name for a given model, in the order of PEFT's arguments; or, by the name
        alone, with the backbone that they were trained for.

        The name is a folder, a hub name, or one that ships: photo, photo-chat or tiny-opt.
        revision: of the exits. hub: token, cache_dir, local_files_only, force_download; see
        `snapshot_download`.

        Raises:
            InputError: the arguments came in the other order, or name no folder.
            AdapterError: as for `load`, or there is no such adapter.
        """
        name = pretrained_model_name_or_path
        if isinstance(model, str | Path) and name is not None:
            raise InputError(
                f"from_pretrained got {str(model)!r} where the model goes.",
                "The model comes first: Adapter.from_pretrained(model, folder_or_name).",
            )
        name = model if isinstance(model, str | Path) else name
        if not isinstance(name, str | Path):
            raise InputError(
                f"Exits cannot be {name!r}.",
                "Give a folder or a hub name, such as offramp.attach(model, 'exits').",
            )
        folder = exits_folder(name, revision=revision, **hub)
        if not isinstance(model, str | Path):
            return cls.load(folder, model)
        config = read_config(folder)
        return cls.load(config, load_named(config.backbone, revision=config.revision)[0])

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Add offramp exits",
        commit_description: str | None = None,
        private: bool | None = True,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool | None = None,
    ) -> str:
        """Upload the folder's files (no training state) and return the commit's address.

        `model.generate(..., custom_generate=repo_id, trust_remote_code=True)` then decodes with
        these exits wherever offramp is installed.

        private: of a repository that is created; unlike with transformers it is, unless you say
            otherwise. revision: a branch, created if need be.
        """
        import tempfile

        from huggingface_hub import HfApi

        from offramp.adapter.custom_generate import write_custom_generate

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            write_custom_generate(folder, repo_id)
            return str(
                api.upload_folder(
                    repo_id=repo_id,
                    folder_path=folder,
                    commit_message=commit_message,
                    commit_description=commit_description,
                    revision=revision,
                    create_pr=create_pr,
                )
            )
