"""FREE training: exits against discriminators, on a backbone that never moves.

Each step runs the exits over one recorded batch, asks the discriminators, and moves first the
exits (generator) and then the discriminators. Runs under `accelerate launch` on several processes:
each reads its own share of the batches and gradients are averaged.
"""

from __future__ import annotations

import io
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from offramp.adapter import Adapter
from offramp.backbone import Backbone
from offramp.config import TrainConfig
from offramp.discriminator import build_discriminators
from offramp.encode import Encoder
from offramp.errors import DataError, TrainingError
from offramp.examples import Example, examples_digest, split_examples
from offramp.exits import Exits, propose_depths
from offramp.features import Answered, Batch, FeatureStore, exit_features, self_written
from offramp.losses import LOSSES, Terms, discriminator_loss, masked_mean
from offramp.records import JsonlLog, provenance, write_atomic

log = logging.getLogger(__name__)

STATE, HISTORY, FEATURES = "training/state.pt", "training/log.jsonl", "training/features"


def train(
    backbone: Backbone,
    processor: Any,
    examples: Sequence[Example],
    config: TrainConfig,
    out: str | Path,
    *,
    resume: bool = False,
    command: Sequence[str] = (),
) -> Adapter:
    """Train exits and return the best adapter by validation agreement; it is also saved in `out`.

    Raises:
        DataError: too few examples, or no labels where the regime needs them.
        TrainingError: a loss that is not finite (the last good adapter and checkpoint stay), or a
            checkpoint that cannot be resumed with this configuration and data.
    """
    return Trainer(backbone, processor, examples, config, Path(out), command).run(resume)


@dataclass
class Progress:
    """How far a run is: everything that resuming needs besides tensors."""

    step: int = 0
    best: float = -1.0
    stale: int = 0  # validations since the best


class Trainer:
    """One run, one process of it."""

    def __init__(
        self,
        backbone: Backbone,
        processor: Any,
        examples: Sequence[Example],
        config: TrainConfig,
        out: Path,
        command: Sequence[str] = (),
    ) -> None:
        torch.manual_seed(config.seed)
        self.accelerator = Accelerator(cpu=backbone.device.type == "cpu")
        self.backbone, self.config, self.out = backbone, config, out
        self.encoder = Encoder(backbone, processor)
        self.exits = Exits(backbone, config.depths or propose_depths(backbone.depth))
        self.exits.to(torch.float32)
        self.discriminators = build_discriminators(
            backbone.width, self.exits.depths, conditional=config.conditional
        ).to(backbone.device)
        self.generator_steps = torch.optim.AdamW(
            self.exits.parameters(), lr=config.learning_rate, weight_decay=0.01
        )
        self.discriminator_steps = torch.optim.AdamW(
            self.discriminators.parameters(), lr=config.discriminator_learning_rate, betas=(0.5, 0.9)
        )
        self.examples = list(examples)
        self.digest = examples_digest(self.examples)
        self.provenance = provenance(config.seed, list(command) or sys.argv, self.digest)
        self.progress = Progress()
        self.best: dict[str, Tensor] = {}
        self.agreement: dict[str, float] = {}

    # -- the run ------------------------------------------------------------------------------

    def run(self, resume: bool = False) -> Adapter:
        """Train to the last step, or until validation stops improving."""
        restored = resume and self._restore()
        if restored and self._is_over():
            return self._best_adapter()
        train_store, validation = self._stores()
        self._say(f"{len(train_store)} batches, exits at {list(self.exits.depths)}")
        with JsonlLog(self.out / HISTORY) as history, self._bar() as bar:
            if not restored:
                self._validate(validation, history)
            while not self._is_over():
                step = self.progress.step
                batch = train_store[self._order(step, len(train_store))]
                terms = self._step(batch, step)
                self.progress.step += 1
                bar.update()
                if self.accelerator.is_main_process:
                    history.append({"step": step, **terms})
                if self.progress.step % self.config.evaluate_every == 0 or self._is_over():
                    self._validate(validation, history)
                    bar.set_postfix(agreement=f"{self._mean_agreement():.4f}")
        return self._best_adapter()

    def _is_over(self) -> bool:
        patience = self.config.patience
        stopped = patience is not None and self.progress.stale >= patience
        return stopped or self.progress.step >= self.config.steps

    def _order(self, step: int, batches: int) -> int:
        """The batch of a step: a fresh permutation each epoch, a function of the seed alone."""
        epoch, place = divmod(step, batches)
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
        return int(torch.randperm(batches, generator=generator)[place])

    def _step(self, batch: Batch, step: int) -> dict[str, float]:
        """One generator and one discriminator step; the logged terms by depth."""
        self._set_rate(step)
        scene = self._look(batch)
        report: dict[str, float] = {}
        loss = torch.zeros((), device=self.backbone.device)
        for depth, terms in scene.items():
            for name, term in LOSSES.items():
                weight = getattr(self.config, name)
                if not weight:
                    continue
                counted = terms.labelled if name == "cross_entropy" else torch.ones_like(terms.labelled)
                value = masked_mean(term(terms), counted)
                report[f"{name}/{depth}"] = float(value)
                loss = loss + weight * value
        report["loss"] = float(loss)
        if not math.isfinite(report["loss"]):
            raise TrainingError(
                f"The loss is {report['loss']} at step {step}, on the batch of examples "
                f"{', '.join(batch.keys[:4])}, ...",
                f"The last good adapter is in {self.out}; lower the learning rate and resume.",
            )
        self.generator_steps.zero_grad()
        self.accelerator.backward(loss)
        self._average(self.exits)
        nn.utils.clip_grad_norm_(self.exits.parameters(), 1.0)
        self.generator_steps.step()
        if self.config.adversarial:
            report |= self._discriminate(batch, scene)
        return report

    def _look(self, batch: Batch) -> dict[int, Terms]:
        """Exits and final layer side by side, answer tokens only, by depth."""
        features = self._exit_features(batch)
        keep = batch.mask
        teacher = batch.teacher[keep]
        teacher_logits = self.backbone.read(teacher)
        labelled = batch.labelled[:, None].expand_as(keep)[keep].float()
        scene = {}
        for depth, states in features.items():
            kept = states[keep]
            judged = None
            if self.config.adversarial:
                judged = self._judge(depth, kept, batch)
            logits = self.backbone.read(kept)
            scene[depth] = Terms(
                logits, teacher_logits, kept, teacher, batch.targets[keep], labelled, judged,
                self.config.temperature,
            )  # fmt: skip
        return scene

    def _exit_features(self, batch: Batch) -> dict[int, Tensor]:
        # The exits are trained in float32, also beside a half-precision backbone.
        half = self.backbone.dtype != torch.float32
        with torch.autocast(self.backbone.device.type, self.backbone.dtype, enabled=half):
            return exit_features(self.backbone, self.exits, batch)

    def _judge(self, depth: int, features: Tensor, batch: Batch) -> Tensor:
        entries = batch.entries(depth)[batch.mask].float()
        return self.discriminators[str(depth)](features.float(), entries)  # type: ignore[no-any-return]

    def _discriminate(self, batch: Batch, scene: Mapping[int, Terms]) -> dict[str, float]:
        self.discriminator_steps.zero_grad()
        report = {}
        loss = torch.zeros((), device=self.backbone.device)
        for depth, terms in scene.items():
            real = self._judge(depth, terms.teacher_features, batch)
            fake = self._judge(depth, terms.features.detach(), batch)
            value = discriminator_loss(real, fake).mean()
            report[f"discriminator/{depth}"] = float(value)
            loss = loss + value
        self.accelerator.backward(loss)
        self._average(self.discriminators)
        self.discriminator_steps.step()
        return report

    def _set_rate(self, step: int) -> None:
        warm = max(1, min(50, self.config.steps // 10))
        share = min(1.0, (step + 1) / warm)
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.config.steps))
        for group in self.generator_steps.param_groups:
            group["lr"] = self.config.learning_rate * share * max(0.05, cosine)

    def _average(self, module: nn.Module) -> None:
        """Mean of the gradients over processes."""
        if self.accelerator.num_processes > 1:
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, "mean")

    # -- data ---------------------------------------------------------------------------------

    def _stores(self) -> tuple[FeatureStore, FeatureStore]:
        parts = split_examples(
            self.examples,
            {
                "train": 1 - self.config.validation_fraction,
                "validation": self.config.validation_fraction,
            },
            self.config.seed,
        )
        if not parts["train"] or not parts["validation"]:
            raise DataError(
                f"{len(self.examples)} examples are too few to hold some out for validation.",
                "Give examples of at least two different images.",
            )
        stores = []
        for name, part in parts.items():
            rows = self._mine(self._answered(part))
            store = FeatureStore(
                self.encoder,
                rows,
                self.exits.depths,
                batch_size=self.config.batch_size,
                cache=self.config.cache,
                folder=self.out / FEATURES / f"{name}-{self.accelerator.process_index}",
            )
            self._say(f"{name}: {len(rows)} answers, states of about {store.nbytes / 1e6:.0f} MB "
                      f"({store.kind})")  # fmt: skip
            store.fill(self._each(f"{name} states"))
            stores.append(store)
        return stores[0], stores[1]

    def _answered(self, examples: Sequence[Example]) -> list[Answered]:
        """The answers of the regime: from the data, or written by the frozen model."""
        regime = self.config.regime
        labelled: list[Example] = []
        if regime == "supervised":
            labelled = list(examples)
        elif regime == "mixed":
            labelled = list(examples[:: max(1, round(1 / self.config.labelled_fraction))])
        if missing := next((e for e in labelled if not e.answers), None):
            raise DataError(
                f"Example {missing.key} has no answer, and the {regime} regime needs one.",
                "Add answers, or use --regime unsupervised.",
            )
        rows = [
            Answered(e, tuple(self.encoder.answer_ids(e.prompt, e.answers[0])), labelled=True)
            for e in labelled
        ]
        chosen = {e.key for e in labelled}
        rest = [e for e in examples if e.key not in chosen]
        if rest:
            pseudo = regime == "pseudo"
            written = self_written(
                self.encoder,
                rest,
                batch_size=max(self.config.batch_size, 16),
                max_new_tokens=self.config.max_new_tokens,
                min_confidence=self.config.min_confidence if pseudo else 0.0,
                progress=self._each("writing answers"),
            )
            rows += [Answered(r.example, r.ids, labelled=pseudo) for r in written]
        if not rows:
            raise DataError(
                f"No answer reached the confidence {self.config.min_confidence}.",
                "Lower --min-confidence, or use --regime unsupervised.",
            )
        return rows

    def _mine(self, rows: list[Answered]) -> list[Answered]:
        """This process's share; all shares have one length, so that no process waits for ever."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        share = rows[rank::world][: len(rows) // world] if world > 1 else rows
        if not share:
            raise DataError(
                f"{len(rows)} examples are fewer than the {world} processes.",
                "Give more examples, or fewer processes.",
            )
        return share

    # -- validation, checkpoints ----------------------------------------------------------------

    @torch.no_grad()
    def _validate(self, store: FeatureStore, history: JsonlLog) -> None:
        """Agreement with the final layer by depth; keep the best exits, and checkpoint."""
        counts = torch.zeros(len(self.exits.depths) + 1, dtype=torch.float64)
        for index in range(len(store)):
            batch = store[index]
            teacher = self.backbone.read(batch.teacher[batch.mask]).argmax(-1)
            counts[-1] += len(teacher)
            for slot, states in enumerate(self._exit_features(batch).values()):
                same = self.backbone.read(states[batch.mask]).argmax(-1) == teacher
                counts[slot] += same.sum().cpu()
        counts = self.accelerator.reduce(counts.to(self.backbone.device), "sum").cpu()
        agreement = {
            str(d): float(counts[i] / counts[-1]) for i, d in enumerate(self.exits.depths)
        }
        mean = sum(agreement.values()) / len(agreement)
        if mean > self.progress.best:
            self.progress.best, self.progress.stale = mean, 0
            self.agreement = agreement
            self.best = {n: t.detach().clone() for n, t in self.exits.state_dict().items()}
        else:
            self.progress.stale += 1
        if self.accelerator.is_main_process:
            history.append({"step": self.progress.step, "agreement": agreement})
            self._best_adapter().save(self.out)
            self._checkpoint()

    def _mean_agreement(self) -> float:
        return self.progress.best

    def _best_adapter(self) -> Adapter:
        exits = Exits(self.backbone, self.exits.depths)
        exits.load_state_dict(self.best)
        exits.to(self.backbone.device, self.backbone.dtype).requires_grad_(False)
        return Adapter(
            self.backbone,
            exits,
            discriminators=self.discriminators if self.config.adversarial else None,
            provenance={**self.provenance, "config": asdict(self.config)},
            metrics={"agreement": self.agreement, "step": self.progress.step},
        )

    def _checkpoint(self) -> None:
        state = {
            "progress": asdict(self.progress),
            "config": asdict(self.config),
            "digest": self.digest,
            "agreement": self.agreement,
            "exits": self.exits.state_dict(),
            "best": self.best,
            "discriminators": self.discriminators.state_dict(),
            "generator_steps": self.generator_steps.state_dict(),
            "discriminator_steps": self.discriminator_steps.state_dict(),
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomic(self.out / STATE, buffer.getvalue())

    def _restore(self) -> bool:
        """Take up the checkpoint in `out`; False where there is none."""
        path = self.out / STATE
        if not path.exists():
            return False
        state = torch.load(path, map_location=self.backbone.device, weights_only=True)
        now = {**asdict(self.config), "digest": self.digest}
        then = {**state["config"], "digest": state["digest"]}
        changed = [n for n in now if now[n] != then.get(n)]
        if changed:
            raise TrainingError(
                f"The checkpoint in {self.out} was made with other {', '.join(changed)}.",
                "Resume with the same options and data, or train into another folder.",
            )
        self.progress = Progress(**state["progress"])
        self.best, self.agreement = state["best"], state["agreement"]
        self.exits.load_state_dict(state["exits"])
        self.discriminators.load_state_dict(state["discriminators"])
        self.generator_steps.load_state_dict(state["generator_steps"])
        self.discriminator_steps.load_state_dict(state["discriminator_steps"])
        return True

    # -- telling ------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            log.info(text)

    def _each(self, title: str) -> Any:
        quiet = not self.accelerator.is_main_process
        return lambda things: tqdm(things, title, disable=quiet or None, leave=False)

    def _bar(self) -> tqdm[Any]:
        quiet = not self.accelerator.is_main_process
        return tqdm(
            total=self.config.steps, initial=self.progress.step, desc="train", disable=quiet or None
        )
