"""FREE training: exits against discriminators, on a frozen backbone.

Each step runs the exits over one recorded batch, asks the discriminators, and updates first the
exits (generator) and then the discriminators. Runs on several processes under `accelerate launch`:
each reads its own share of the batches (those that compute each layer together read the same) and
gradients are averaged.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from offramp.adapter.adapter import Adapter
from offramp.common.folders import locked_folder
from offramp.common.jsonl_log import JsonlLog
from offramp.common.progress import progress_bar as steps_bar
from offramp.common.provenance import provenance
from offramp.core.decoding.policy import DRAFT, ExitPolicy, Thresholds, resolved
from offramp.core.errors import InputError, OfframpError, TrainingError
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits, ExitSet, propose_depths
from offramp.core.models.fingerprint import dump_fingerprint, fingerprint
from offramp.core.models.sharding import unread
from offramp.core.save_and_load import CONFIG, EXITS
from offramp.data.decontamination import picture_digests
from offramp.features.input_processor import InputProcessor
from offramp.features.self_check import check_untested
from offramp.features.shortlist import MISSED, shortlist_of, usual_size
from offramp.features.teacher_forcing import Batch
from offramp.inputs.example import Example, examples_digest
from offramp.training.adversarial import AdversarialObjective
from offramp.training.checkpoint import (
    FOLDER,
    HISTORY,
    Progress,
    check_out,
    check_uncalibrated,
    forget_run,
    load_state,
    restored,
    save_state,
    trim_history,
    undisturbed,
)
from offramp.training.config import TrainConfig
from offramp.training.drafting import DraftingStage, check_kind
from offramp.training.feature_dataset import Stores, Teacher, TrainingStates
from offramp.training.feature_store import FeatureStore
from offramp.training.losses import LossInputs
from offramp.training.optimization import average_gradients, build_optimizers, set_learning_rate

log = logging.getLogger(__name__)

T = TypeVar("T")
LEARNS_ON = 0.2
"""Share of the rate with which exits that have learnt learn on: by all of it they first forget."""


def train(
    backbone: Backbone | nn.Module,
    processor: Any,
    examples: Sequence[Example],
    config: TrainConfig,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    command: Sequence[str] = (),
    teacher: Teacher | None = None,
) -> Adapter:
    """Train exits and return the best adapter by validation agreement; it is also saved in `out`.

    Ctrl-C leaves a checkpoint. `resume` continues from it, to the same result as an uninterrupted
    run (on another number of processes batches differ). `overwrite` replaces an existing adapter or
    checkpoint.

    teacher: the model that exits learn from, if not the backbone itself, such as
    `offramp_llama_cpp.Dequantised`; its name is stored in the adapter.

    Raises:
        InputError: `out` holds an adapter or a checkpoint, and neither was asked for.
        StorageError: another run is writing to `out`, or it cannot be written.
        DataError: too few examples, no labels where the regime needs them, or an answer longer than
            the backbone's positions.
        TrainingError: a loss that is not finite (the last good adapter and checkpoint stay), or a
            checkpoint that cannot be resumed with this configuration and data.
        UnsupportedBackboneError: a backbone without tests of its own, found or registered by you,
            does not decode as the model itself does.
    """
    out, backbone = Path(out), Backbone.of(backbone)
    check_out(out, resume=resume, overwrite=overwrite)
    check_untested(InputProcessor(backbone, processor), examples[:1], config.depths or ())
    drafts = config.exit_kind == "drafting"
    first = replace(config, exit_kind="layer") if drafts else config
    trainer = Trainer(backbone, processor, examples, first, out, command, teacher)
    if not trainer.accelerator.is_main_process:  # the main one holds the folder for all
        return trainer.run_stages(resume, drafts=drafts)
    with locked_folder(out / FOLDER):
        if not resume:
            forget_run(out)
        return trainer.run_stages(resume, drafts=drafts)


def train_drafting(
    adapter: Adapter,
    processor: Any,
    examples: Sequence[Example],
    config: TrainConfig,
    out: str | Path,
    *,
    overwrite: bool = False,
    teacher: Teacher | None = None,
) -> Adapter:
    """Teach the exits of an adapter to draft on, with unchanged predictions, and save them in
    `out`.

    config: of this stage: steps, batches, learning rate, and the regime of the answers. teacher: as
    of `train`. Exits that learnt from another teacher are first trained from this one, by as many
    steps, and lose their guarantee.

    Raises:
        InputError: `out` holds an adapter, and `overwrite` was not asked for; exits that are no
            copied layers, or that learnt from a number format where there is no teacher.
        DataError, StorageError, TrainingError, UnsupportedBackboneError: as of `train`.
    """
    out = Path(out)
    check_out(out, resume=False, overwrite=overwrite)
    check_kind(adapter.exits)
    if teacher is None and (kind := adapter.of_format) is not None:
        raise InputError(
            f"These exits learnt from the backbone in {kind}, and their drafts would not.",
            f"Give --of-format {kind}.",
        )
    config = replace(config, exit_kind="layer", depths=adapter.exits.depths)
    encoder = InputProcessor(adapter.backbone, processor)
    check_untested(encoder, examples[:1], adapter.exits.depths)
    trainer = Trainer(adapter.backbone, processor, examples, config, out, teacher=teacher)
    with locked_folder(out / FOLDER):
        stores = trainer.states.record()
        if teacher is not None and teacher.name != adapter.of_format:
            rate = LEARNS_ON * config.learning_rate
            on = replace(config, learning_rate=rate, patience=None, shortlist=0)  # it has one
            learner = Trainer(adapter.backbone, processor, examples, on, out, teacher=teacher)
            adapter = learner.learn_on(adapter, stores)
        return trainer.teach_drafts(adapter, stores)


class Trainer:
    """One training run, in one of its processes."""

    def __init__(
        self,
        backbone: Backbone | nn.Module,
        processor: Any,
        examples: Sequence[Example],
        config: TrainConfig,
        out: Path,
        command: Sequence[str] = (),
        teacher: Teacher | None = None,
    ) -> None:
        backbone = Backbone.of(backbone)
        self.examples: list[Example] = list(examples)
        if config.shortlist is not None and config.shortlist > backbone.vocabulary:
            raise InputError(
                f"A shortlist of {config.shortlist} out of {backbone.vocabulary} tokens cannot be.",
                f"Give a number from 2 to {backbone.vocabulary}.",
            )
        self.accelerator: Any = Accelerator(cpu=backbone.device.type == "cpu")
        self.backbone: Backbone = backbone
        self.config: TrainConfig = config
        self.out: Path = out
        self.objective: AdversarialObjective = AdversarialObjective(
            backbone, config.depths or propose_depths(backbone.depth), config
        )
        self.exits: Exits = self.objective.exits
        self.discriminators: nn.ModuleDict = self.objective.discriminators
        self.states: TrainingStates = TrainingStates(
            InputProcessor(backbone, processor),
            self.examples,
            config,
            self.exits.depths,
            self.accelerator,
            out,
            nullcontext() if teacher is None else teacher,
        )
        self.generator_steps, self.discriminator_steps = build_optimizers(
            self.exits, self.discriminators, config
        )
        digest = examples_digest(self.examples)
        self.seen: dict[str, list[str]] = {"train": sorted(picture_digests(self.examples))}
        self.provenance: dict[str, Any] = provenance(config.seed, list(command) or sys.argv, digest)
        of_format = None if teacher is None else teacher.name
        if of_format is not None:
            self.provenance["of_format"] = of_format
        self.made_of: dict[str, Any] = {
            **asdict(config),
            "of_format": of_format,
            "examples": digest,
            "backbone": dump_fingerprint(fingerprint(backbone)),
        }
        self.progress = Progress()
        self._log: JsonlLog | None = None
        self.best: dict[str, dict[str, Tensor]] = {}
        self.agreement: dict[str, float] = {}
        self.shortlist: Tensor | None = None
        self.measured: dict[str, Any] = {}

    # -- the run ------------------------------------------------------------------------------

    def run(self, resume: bool = False, recorded: dict[Any, Stores] | None = None) -> Adapter:
        """Train to the last step, or until validation stops improving.

        recorded: states shared by runs on the same examples and backbone. The states of this run
        are read from there, or recorded and added; None: recorded for this run alone.
        """
        if resume:
            self._restore()
            if self._is_over():
                return self._saved()
            self._of_main(lambda: check_uncalibrated(self.out))
        shared = {} if recorded is None else recorded
        if (key := self.states.key) not in shared:
            shared[key] = self.states.record()
        stores = shared[key]
        self._learn_shortlist(*stores)
        with self._history() as history:
            try:
                self._follow(*stores, history)
            except KeyboardInterrupt:
                if self.accelerator.is_main_process:
                    self._checkpoint()
                raise
        for store in stores if recorded is None else ():
            store.clear()
        return self._best_adapter()

    def run_stages(self, resume: bool = False, *, drafts: bool) -> Adapter:
        """Train as `run` does. drafts: whether the exits then learn to draft on, from the same
        states."""
        if not drafts:
            return self.run(resume)
        recorded: dict[Any, Stores] = {}
        adapter = self.run(resume, recorded)
        if self._of_main(lambda: adapter.exits.draft_on):  # it was taught before
            return adapter
        return self.teach_drafts(adapter, recorded.get(self.states.key) or self.states.record())

    def _saved(self) -> Adapter:
        """The adapter of a run that is over: as it is in `out`, with all that was found out since;
        saved anew where it is gone."""
        found = [self._best_adapter()]

        def load() -> None:
            if all((self.out / name).is_file() for name in (CONFIG, EXITS)):
                found[0] = Adapter.load(self.out, self.backbone)
                return
            check_uncalibrated(self.out)
            found[0].save(self.out)

        self._of_main(load)
        return found[0]

    def learn_on(self, adapter: Adapter, stores: Stores) -> Adapter:
        """Return the adapter with its exits trained further on recorded states; saved, without its
        guarantee."""
        exits = adapter.exits
        drafting = self.exits.load_state_dict(exits.modules.state_dict(), strict=False)
        assert not drafting.missing_keys, "an exit that drafts on is a layer with more"
        if (ids := exits.shortlist) is not None:
            self.shortlist, self.measured = ids, dict(exits.measured)
            self.objective.narrow(ids)
        made = self.run(recorded={self.states.key: stores})
        seen = {*adapter.seen.get("train", ()), *self.seen["train"]}
        return replace(
            made,
            exits=replace(exits, modules=made.exits.modules),
            policy=adapter.policy,
            seen={**adapter.seen, "train": sorted(seen)},
        )

    def teach_drafts(self, adapter: Adapter, stores: Stores) -> Adapter:
        """Return the adapter with exits that draft on, saved."""
        made = DraftingStage(adapter, self.config, self.accelerator).run(stores)
        for store in stores:
            store.clear()
        if self.accelerator.is_main_process:
            made.save(self.out)
        return made

    def _follow(
        self, train_store: FeatureStore, validation: FeatureStore, history: JsonlLog | None
    ) -> None:
        with self._bar() as bar:
            while True:
                if self._is_due():
                    self._validate(validation, history)
                    bar.set_postfix(best_agreement=f"{self.progress.best:.4f}", refresh=False)
                if self._is_over():
                    return
                step = self.progress.step
                batch = train_store[self._order(step, len(train_store))]
                with undisturbed():
                    terms = self._step(batch, step)
                    if history is not None:
                        history.append({"step": step, **terms})
                    self.progress.step += 1
                bar.update()

    def _is_due(self) -> bool:
        step = self.progress.step
        now = step % self.config.evaluate_every == 0 or step >= self.config.steps
        return now and self.progress.validated < step

    def _is_over(self) -> bool:
        patience = self.config.patience
        stopped = patience is not None and self.progress.stale >= patience
        return not self._is_due() and (stopped or self.progress.step >= self.config.steps)

    def _order(self, step: int, batches: int) -> int:
        """The batch of a step: a fresh permutation each epoch, a function of the seed alone."""
        epoch, place = divmod(step, batches)
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
        return int(torch.randperm(batches, generator=generator)[place])

    def _step(self, batch: Batch, step: int) -> dict[str, float]:
        """One generator and one discriminator step; the logged terms by depth."""
        set_learning_rate(self.generator_steps, self.config, step)
        inputs = self.objective.loss_inputs(batch)
        loss, report = self.objective.generator_loss(inputs)
        report["loss"] = self._agreed(loss)
        self._check_finite("loss", report["loss"], batch, step)
        self.generator_steps.zero_grad()
        self.accelerator.backward(loss)
        average_gradients(self.accelerator, self.exits)
        norm = float(nn.utils.clip_grad_norm_(self.exits.parameters(), 1.0))
        self._check_finite("gradient's norm", norm, batch, step)
        self.generator_steps.step()
        if self.config.has_discriminator:
            report |= self._discriminate(batch, inputs, step)
        return report

    def _agreed(self, loss: Tensor) -> float:
        """The mean over processes: one that is not finite stops them all, so that none hangs."""
        return float(self.accelerator.reduce(loss.detach().clone(), "mean"))

    def _check_finite(self, what: str, value: float, batch: Batch, step: int) -> None:
        if not math.isfinite(value):
            more = ", ..." if len(batch.keys) > 4 else ""
            raise TrainingError(
                f"The {what} is {value} at step {step}, on the batch of examples "
                f"{', '.join(batch.keys[:4])}{more}.",
                f"The last good adapter is in {self.out}; lower the learning rate, or look at "
                "these examples.",
            )

    def _discriminate(
        self, batch: Batch, inputs: Mapping[int, LossInputs], step: int
    ) -> dict[str, float]:
        loss, report = self.objective.discriminator_loss(inputs)
        self._check_finite("discriminators' loss", self._agreed(loss), batch, step)
        self.discriminator_steps.zero_grad()  # also of what the generator's loss left there
        self.accelerator.backward(loss)
        average_gradients(self.accelerator, self.discriminators)
        self.discriminator_steps.step()
        return report

    # -- before the first step -------------------------------------------------------------------

    def _learn_shortlist(self, train_store: FeatureStore, validation: FeatureStore) -> None:
        """Of all processes' answers, whose misses are counted on the validation answers."""
        asked, began = self.config.shortlist, self.progress.step > 0
        size = usual_size(self.backbone) if asked is None else asked
        if not size or (began and self.shortlist is None):
            return
        stores, leads = (train_store, validation), self.states.share.leads
        learn, held_out = (gather_object(s.answers if leads else []) for s in stores)
        ids, misses = shortlist_of(learn, held_out, size)
        if asked is None and misses["miss_rate"] > MISSED:
            self._say(f"no shortlist: it would miss {misses['miss_rate']:.2%} of held-out tokens")
            return
        ids = ids.to(self.backbone.device)
        self.shortlist, self.measured = ids, {"shortlist": misses}
        self.objective.narrow(ids)
        self._say(f"shortlist: {len(ids)} tokens, {misses['miss_rate']:.2%} of others missed")

    # -- validation, checkpoints ----------------------------------------------------------------

    def _validate(self, store: FeatureStore, history: JsonlLog | None) -> None:
        """Measure agreement; keep the best exits, and checkpoint."""
        agreement = self._agreement(store)
        mean = sum(agreement.values()) / len(agreement)
        with undisturbed():
            now = self.progress
            now.validated = now.step
            better = mean > now.best
            if better:
                now.best, now.best_step, now.stale = mean, now.step, 0
                self.agreement, self.best = agreement, self._copies()
            else:
                now.stale += 1
            if history is not None:
                if better:
                    self._best_adapter().save(self.out)
                history.append({"step": now.step, "agreement": agreement})
                self._checkpoint()

    def _agreement(self, store: FeatureStore) -> dict[str, float]:
        """Share of answer tokens on which exit and final layer agree, by depth, all processes'."""
        counts = torch.tensor([self.objective.agreeing(store[i]) for i in range(len(store))]).sum(0)
        counts = self.accelerator.reduce(counts.to(self.backbone.device), "sum")
        *same, tokens = counts.tolist()
        return {str(d): n / tokens for d, n in zip(self.exits.depths, same, strict=True)}

    def _copies(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of the exits as they are."""
        state = self.exits.state_dict()
        return {"exits": {n: t.detach().clone() for n, t in state.items()}}

    def _best_adapter(self) -> Adapter:
        with unread():
            exits = Exits(self.backbone, self.exits.depths, kind=self.config.exit_kind)
        exits.load_state_dict(self.best["exits"])
        exits.to(self.backbone.dtype).requires_grad_(False)
        return Adapter(
            self.backbone,
            ExitSet(exits, self.shortlist, self.measured),
            resolved(self._policy(), self.backbone),
            provenance={**self.provenance, "config": asdict(self.config)},
            metrics={"agreement": self.agreement, "step": self.progress.best_step},
            seen=self.seen,
        )

    def _policy(self) -> ExitPolicy:
        """No thresholds yet; lossless drafts from the start, where they can be taken back."""
        depths = self.exits.depths if self.backbone.lossless else ()
        return ExitPolicy(
            shortlist=self.shortlist is not None, drafts=Thresholds.shared(depths, DRAFT)
        )

    def _checkpoint(self) -> None:
        state = {
            "progress": asdict(self.progress),
            "agreement": self.agreement,
            "best": self.best,
            "checks": None
            if self.shortlist is None
            else {"ids": self.shortlist, "found": self.measured},
            **{name: part.state_dict() for name, part in self._moving().items()},
        }
        if self._log is not None:
            self._log.sync()
        save_state(self.out, self.made_of, state)

    def _restore(self) -> None:
        """Continue from the checkpoint in `out`, if there is one; on several machines from the main
        process's, which alone wrote one."""
        state = self._of_main(lambda: load_state(self.out, self.made_of, self.backbone.device))
        if state is None:
            return
        with restored(self.out):
            self.progress = Progress(**state["progress"])
            self.best, self.agreement = state["best"], state["agreement"]
            if (checks := state["checks"]) is not None:
                self.shortlist, self.measured = checks["ids"], checks["found"]
            for name, part in self._moving().items():
                part.load_state_dict(state[name])

    def _of_main(self, read: Callable[[], T]) -> T:
        """What `read` returns, or the mistake that it raises, in the main process; in all."""
        found: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                found[0] = read()
            except OfframpError as error:
                found[1] = error
        broadcast_object_list(found)
        if found[1] is not None:
            raise found[1]
        return cast(T, found[0])

    def _moving(self) -> dict[str, Any]:
        return {
            "exits": self.exits,
            "discriminators": self.discriminators,
            "generator_steps": self.generator_steps,
            "discriminator_steps": self.discriminator_steps,
        }

    @contextmanager
    def _history(self) -> Iterator[JsonlLog | None]:
        """The log, for the process that writes it."""
        if not self.accelerator.is_main_process:
            yield None
            return
        trim_history(self.out, self.progress)
        # Steps after the last checkpoint are done again, so that only those before it matter.
        with JsonlLog(self.out / HISTORY, synced=False) as self._log:
            yield self._log

    def _say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            log.info(text)

    def _bar(self) -> Any:
        quiet = not self.accelerator.is_main_process
        return steps_bar("train", total=self.config.steps, done=self.progress.step, tell=not quiet)
