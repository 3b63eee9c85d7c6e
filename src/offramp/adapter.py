"""Exits attached to a backbone, with the policy they exit early by; `offramp.save_and_load` stores
them in a folder."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, overload

from torch import Tensor, nn

from offramp.conditions import TORCH, Conditions, exits_digest, note_loaded, of_policy
from offramp.engine.decoding.plan import Plan
from offramp.engine.generate import generate, generate_prepared
from offramp.engine.plan import plan_of
from offramp.engine.policy import FULL, ExitPolicy, GenerationOutput, check_policy_depths
from offramp.engine.prefill import IMAGES, Prepared
from offramp.engine.prompt import PromptMemory
from offramp.engine.stamp import Stamp
from offramp.errors import InputError
from offramp.guarantee import GuaranteeStatus, standing
from offramp.likeness import Likeness
from offramp.model_card import model_card
from offramp.models.backbone import Backbone
from offramp.models.exits import Exits, ExitSet
from offramp.models.shipped import load_named, shipped_exits
from offramp.prompt_kinds import kind_of
from offramp.save_and_load import (
    AdapterConfig,
    AdapterParts,
    Records,
    fetched,
    load_parts,
    read_config,
    save_parts,
)
from offramp.save_and_load.custom_generate import write_custom_generate

PLANS = 4
"""Plans that an adapter keeps, one for each policy that was asked for last."""
NO_THRESHOLDS = (
    "These exits have no thresholds, so every layer runs for every token. Find thresholds with "
    "`offramp calibrate`, or give some: exit_policy=ExitPolicy({%d: 0.95}). mode='lossless' needs "
    "none where they were trained."
)
"""With the depth of an exit that there is."""


def _by_engine(calibration: Mapping[str, Any] | None) -> dict[str, Mapping[str, Any]]:
    """A calibration by the name of its engine; {} where it names none."""
    engine = Conditions.of_calibration(calibration).get("engine")
    return {} if calibration is None or engine is None else {engine: calibration}


def attach(
    model: Backbone | nn.Module, exits: str | Path | Adapter | ExitSet | Exits, **hub: Any
) -> Adapter:
    """Attach exits to a Hugging Face model, which is not changed.

    exits: a folder or a hub name; or exits made for this model, with no thresholds yet. hub: as of
        `Adapter.from_pretrained`.

    Raises:
        AdapterError: no such exits, or they do not fit the model.
        InputError: an adapter that is attached to another model, or what is no exits.
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


class CalledAsModel:
    """The base of what is called as a Hugging Face model's `generate` is, and exits early by a
    policy: an adapter, or a runtime in PyTorch's place."""

    backbone: Backbone

    @overload
    def generate(
        self,
        inputs: Mapping[str, Any],
        *,
        mode: str | None = None,
        policy: ExitPolicy | None = None,
        exit_policy: ExitPolicy | None = None,
        **options: Any,
    ) -> GenerationOutput: ...

    @overload
    def generate(
        self,
        inputs: Tensor | None = None,
        *,
        mode: str | None = None,
        policy: ExitPolicy | None = None,
        exit_policy: ExitPolicy | None = None,
        **options: Any,
    ) -> Any: ...

    def generate(
        self,
        inputs: Any = None,
        *,
        mode: str | None = None,
        policy: ExitPolicy | None = None,
        exit_policy: ExitPolicy | None = None,
        **options: Any,
    ) -> Any:
        """Generate with early exits, called as a Hugging Face model's `generate`.

        `generate(**inputs, max_new_tokens=40)` returns the sequences [B, T], a LongTensor; with
        `return_dict_in_generate=True` a `GenerationOutput`, which has depths and scores besides.
        `generate(inputs, ...)`, with what the processor returned as one argument, always does.

        inputs: what the processor returned; or ids [B, T]; or nothing, where all has a name.
        mode: "early_exit", "lossless" or "full", by the same thresholds; None: as the policy says.
        policy, exit_policy: two names of one thing; None: the adapter's policy.
        options: see `offramp.generate`.

        Raises:
            InputError: an option that is not supported, a prompt without its image, or what cannot
                be done by whatever writes the answer.
        """
        chosen = self._exits_of.chosen_policy(mode, policy, exit_policy)
        if isinstance(inputs, Mapping):
            return self._write(inputs, chosen, **options)
        returns_dict = options.pop("return_dict_in_generate", None)
        if returns_dict is None:
            config = options.get("generation_config")
            config = config or getattr(self.backbone.model, "generation_config", None)
            returns_dict = getattr(config, "return_dict_in_generate", False)
        # Recognised by type or name: a processor's output may have any names.
        read = {n: v for n, v in options.items() if isinstance(v, Tensor) or n.startswith(IMAGES)}
        if inputs is not None:
            read["input_ids"] = inputs
        settings = {name: value for name, value in options.items() if name not in read}
        made = self._write(read, chosen, **settings)
        return made if returns_dict else made.sequences.clone()

    @property
    def _exits_of(self) -> Adapter:
        """The adapter whose exits are used."""
        raise NotImplementedError

    def _write(
        self, inputs: Mapping[str, Any], policy: ExitPolicy, **options: Any
    ) -> GenerationOutput:
        """Write the answers to a processor's output."""
        raise NotImplementedError


@dataclass(repr=False)
class Adapter(CalledAsModel, Records):
    """Exits attached to a backbone, and the policy they exit early by; what is known of them is
    named after those three (see `offramp.save_and_load.Records`).

    As `custom_generate` of the model's own `generate` it decodes in its place:
    `model.generate(**inputs, custom_generate=adapter)`.
    """

    backbone: Backbone
    exits: ExitSet
    policy: ExitPolicy = FULL

    def __post_init__(self) -> None:
        self.backbone = Backbone.of(self.backbone)
        self.exits = ExitSet.of(self.exits)
        self._plans: tuple[tuple[ExitPolicy, Plan], ...] = ()
        self._stamp: Stamp | None = None
        note_loaded(self.backbone)
        if self.calibration is not None:  # before weights are laid out for a processor
            exits_digest(self.exits.modules)

    def __repr__(self) -> str:
        depths = ", ".join(map(str, self.exits.depths))
        ends = str(self.policy.thresholds) or "none"
        found = self.standing()
        bound = f"guarantee: {found.promise.claim}" if found.promise else found.sentence
        runs = () if self.certificate is None else self.certificate.runs
        verified = "".join(f"; verified: {run.words}" for run in runs)
        return (
            f"Adapter(exits at {depths} of {self.backbone.depth} layers of {self.backbone.name}; "
            f"thresholds: {ends}; {bound or 'guarantee: none'}{verified})"
        )

    @property
    def of_format(self) -> str | None:
        """The GGUF format whose answers the exits learnt from; None: the backbone's own."""
        said = self.provenance.get("of_format")
        return said if isinstance(said, str) else None

    def standing(self, *, engine: str | None = None, **known: Any) -> GuaranteeStatus:
        """Return what is guaranteed of its answers on this backbone, or why nothing is.

        engine: the name of a runtime that answers in its place. known: of requests: see
            `offramp.guarantee.Conditions`.
        """
        here = Conditions.of(self.backbone, self.policy, engine=engine, exits=self.exits, **known)
        return standing(self.of_engine(engine or TORCH).calibration, here)

    def of_engine(self, name: str) -> Adapter:
        """Return this adapter with the calibration that was made in an engine of this name, or,
        where none was, as it is."""
        if name not in self.elsewhere:
            return self
        others = {**self.elsewhere, **_by_engine(self.calibration)}
        return replace(self, calibration=others.pop(name), elsewhere=others)

    @property
    def likeness(self) -> Likeness:
        """Return what is known of its calibrated answers, to tell requests that are unlike them."""
        return Likeness.from_json((self.calibration or {}).get("likeness"))

    def kind_of(self, prompt: str) -> str:
        """The kind of a prompt among the calibrated ones; see `offramp.prompt_kinds.kind_of`."""
        frames = Conditions.of_calibration(self.calibration).get("prompts") or ()
        return kind_of(prompt, frames)

    # -- generating -----------------------------------------------------------------------------

    def _write(
        self, inputs: Mapping[str, Any], policy: ExitPolicy, **options: Any
    ) -> GenerationOutput:
        return generate(self.backbone, inputs, planned=partial(self.plan, policy), **options)

    def plan(self, policy: ExitPolicy | None = None) -> Plan:
        """Return the plan by which answers under a policy, or the adapter's own, are written.

        The newest `PLANS` are kept, as long as backbone and exits are what they were
        (`offramp.engine.stamp`).

        Raises:
            InputError: the policy does not fit the exits.
        """
        policy = self.policy if policy is None else policy
        if self._stamp is None or not self._stamp.holds(self.backbone, self.exits):
            self.exits.forget_head()
            self._plans, self._stamp = (), Stamp(self.backbone, self.exits)
        for known, plan in self._plans:
            if known == policy:
                return plan
        plan = plan_of(self.backbone, self.exits, policy)
        self._plans = ((policy, plan), *self._plans[: PLANS - 1])
        return plan

    @property
    def _exits_of(self) -> Adapter:
        return self

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        *,
        mode: str | None = None,
        policy: ExitPolicy | None = None,
        exit_policy: ExitPolicy | None = None,
        prefix_cache: PromptMemory | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """Decode in place of the model's own loop, as `custom_generate`; see `generate`.

        `model.generate` hands neither a streamer nor the tokenizer of `stop_strings` to a
        `custom_generate`: for these, call `generate` of the adapter.

        Raises:
            InputError: the exits are attached to another model, or an option is not supported.
        """
        rules = (logits_processor, stopping_criteria, generation_config)
        made = generate_prepared(
            self.backbone,
            Prepared(model, input_ids, *rules, model_kwargs),
            partial(self.plan, self.chosen_policy(mode, policy, exit_policy)),
            prefix_cache=prefix_cache,
        )
        asked = getattr(generation_config, "return_dict_in_generate", False)
        return made if asked else made.sequences.clone()

    def chosen_policy(
        self, mode: str | None, policy: ExitPolicy | None, exit_policy: ExitPolicy | None
    ) -> ExitPolicy:
        """Return the policy of a call. Raise `InputError` where both policies are given, or neither
        is one."""
        if policy is not None and exit_policy is not None:
            raise InputError("policy and exit_policy were both given.", "Give one of them.")
        given = exit_policy if policy is None else policy
        if not isinstance(given, ExitPolicy | None):
            thresholds = {self.exits.depths[0]: 0.95}
            raise InputError(
                f"An exit policy cannot be {given!r}.",
                f"Give exit_policy=ExitPolicy({thresholds}), or a mode: mode='lossless'.",
            )
        chosen = (self.policy if given is None else given).in_mode(mode)
        if given is None and mode != "full" and not self.spares_layers(chosen):
            warnings.warn(NO_THRESHOLDS % self.exits.depths[0], stacklevel=3)
        return chosen

    def spares_layers(self, policy: ExitPolicy) -> bool:
        """Return True if some token may leave early or be drafted by a policy."""
        known = bool(policy.thresholds or policy.drafts)
        return known or (policy.lossless and self.exits.draft_on)

    def with_policy(
        self, policy: ExitPolicy, calibration: Mapping[str, Any] | None = None
    ) -> Adapter:
        """The same exits with another policy. Raise `InputError` if it names other depths.

        calibration: what is guaranteed of it. A guarantee about another policy does not stay; a
            policy that only drafts otherwise is the same, for that changes no output. Of the same
            policy those in other engines stay.
        """
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
        """Write the folder; each file appears whole or not at all.

        Raises:
            InputError: the exits have no tensors.
            StorageError: e.g. the disk is full; what was there before is untouched.
        """
        parts = AdapterParts(**{f.name: getattr(self, f.name) for f in fields(AdapterParts)})
        save_parts(save_directory, self.backbone, parts, model_card(self.backbone, parts))

    def save(self, folder: str | Path) -> None:
        """`save_pretrained` by a shorter name."""
        self.save_pretrained(folder)

    @classmethod
    def load(cls, folder: str | Path | AdapterConfig, backbone: Backbone | nn.Module) -> Adapter:
        """Read a folder written by `save_pretrained`; or one whose adapter.json `read_config` has
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
        """Load exits by name: of a model that is there, in the order of PEFT's arguments; or by the
        name alone, on the backbone that they were trained for.

        The name is a folder, a hub name, or photo or tiny-opt, which ship. revision: of the exits.
        hub: token, cache_dir, local_files_only, force_download; see `snapshot_download`.

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
        folder = shipped_exits(str(name)) or fetched(name, revision=revision, **hub)
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
