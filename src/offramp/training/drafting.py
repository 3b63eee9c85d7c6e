"""The second stage of an exit of kind "drafting": it learns to draft on from its own states.

Only the `DraftInput` learns; the exit's layer stays as it is, so what the exit says of a token that
was fed, its thresholds and their guarantee stay too. Drafts are unrolled from every place of the
recorded answers, the prompt's last token the first of them: an answer's first round begins there.
Training on what the drafter itself makes is the training-time test of EAGLE-3 (Li et al. 2025).
"""

from __future__ import annotations

import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.adapter.adapter import Adapter
from offramp.common.progress import progress_bar
from offramp.core.decoding.policy import AHEAD
from offramp.core.errors import InputError, TrainingError, UnsupportedBackboneError
from offramp.core.executors.kv_cache import cache_parameter, self_attention
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import DraftInput, Exits, ExitSet
from offramp.core.models.intercept import InterceptedModel
from offramp.core.models.opened import LayerCall
from offramp.core.models.sharding import unread
from offramp.features.teacher_forcing import Batch, exits_only
from offramp.training.adversarial import AdversarialObjective
from offramp.training.config import TrainConfig
from offramp.training.feature_dataset import Stores
from offramp.training.losses import kl, log_probabilities
from offramp.training.optimization import adamw, average_gradients, set_learning_rate

log = logging.getLogger(__name__)

UNROLLED = 4
"""Drafts in a row that are trained; one layer that reads its own states holds beyond them."""
MEASURED = 6
"""Drafts in a row whose acceptance is measured."""
DECAY = 0.9
"""Weight of a draft against the one before it: it counts only where that is right."""
FITTED = 32
"""Batches that the first matrices are fitted on."""

MASK, BIAS = "attention_mask", "position_bias"


@dataclass
class Rollout:
    """The states of an exit on B answers of A tokens, whose first A-1 are fed.

    before: its states at the columns before these [B, A-1, D], the prompt's last first. drafts:
    states [B, A-1, D] of the k-th draft from every place, at the columns of its input tokens;
    undefined at the first k-1 places.
    """

    before: Tensor
    drafts: list[Tensor] = field(default_factory=list)


class _Prompt:
    """Layer handler of the prompt's call: lays down the exits' keys, and keeps their last state."""

    def __init__(self, backbone: Backbone, exits: Exits, entries: Mapping[int, Tensor]) -> None:
        self.backbone, self.exits, self.entries = backbone, exits, entries
        self.last: dict[int, Tensor] = {}

    def layer(self, call: LayerCall) -> Any:
        if call.index in self.entries:
            entry = replace(call, hidden=self.entries[call.index])
            with torch.no_grad():
                self.last[call.index] = self.exits.run(call.index, entry)[:, -1]
        return self.backbone.skipped_layer_output(call)


class _Unrolled:
    """Layer handler of the answer's call: the exits over what is true, then `steps` drafts."""

    def __init__(
        self,
        prompt: _Prompt,
        entries: Mapping[int, Tensor],
        embedded: Tensor,
        cache: Any,
        steps: int,
    ) -> None:
        self.backbone, self.exits, self.last = prompt.backbone, prompt.exits, prompt.last
        self.entries, self._embedded = entries, embedded
        self._own, self._steps = self_attention(cache), steps
        self.made: dict[int, Rollout] = {}

    def layer(self, call: LayerCall) -> Any:
        depth = call.index
        if depth in self.entries:
            true: list[tuple[Tensor, Tensor]] = []

            def note(stored: tuple[Tensor, Tensor], _: Any) -> tuple[Tensor, Tensor]:
                true.append(stored)
                return stored

            with torch.no_grad(), self._updating(note):
                entry = replace(call, hidden=self.entries[depth])
                state = self.exits.run(depth, entry)
            before = torch.cat([self.last[depth][:, None], state[:, :-1]], 1)
            self.made[depth] = Rollout(before)
            self._unroll(call, *true[0])
        return self.backbone.skipped_layer_output(call)

    def _unroll(self, call: LayerCall, keys: Tensor, values: Tensor) -> None:
        """Every place drafts at once: the k-th draft from a place stands k columns after it, so a
        query sees the true keys up to its place and its own drafts' alone."""
        rollout, made = self.made[call.index], self.exits.draft_input(call.index)
        assert made is not None
        state, held = rollout.before, [(keys, values)]

        def append(_: Any, own: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            held.append(own)
            return torch.cat([k for k, _ in held], 2), torch.cat([v for _, v in held], 2)

        for step in range(1, self._steps + 1):
            hidden = made(self._embedded, state)
            asked = _seeing_drafts(call, step, hidden.shape[1], keys.shape[2])
            with self._updating(append, write=False):
                out = self.exits.run(call.index, replace(asked, hidden=hidden))
            rollout.drafts.append(out)
            state = torch.cat([out[:, :1], out[:, :-1]], 1)

    @contextmanager
    def _updating(self, instead: Any, *, write: bool = True) -> Iterator[None]:
        """Have the cache return what `instead` makes of what is stored, and of what comes."""
        update = self._own.update

        def updated(keys: Tensor, values: Tensor, *more: Any, **kw: Any) -> Any:
            stored = update(keys, values, *more, **kw) if write else None
            return instead(stored, (keys, values))

        self._own.update = updated
        try:
            yield
        finally:
            del self._own.update


def seen_by_drafts(step: int, new: int, columns: int, device: torch.device) -> Tensor:
    """Return which keys the `step`-th drafts from `new` places see [new, columns + step * new]:
    true columns up to `step` before the query (the last `new` columns are those places), and of
    draft m the column `step` - m before the query."""
    query = torch.arange(new, device=device)[:, None]
    behind = query - torch.arange(new, device=device)  # columns before the query
    past = torch.ones(new, columns - new, dtype=torch.bool, device=device)
    blocks = [torch.cat([past, behind >= step], 1)]
    blocks += [behind == step - m for m in range(1, step + 1)]
    return torch.cat(blocks, 1)


def _seeing_drafts(call: LayerCall, step: int, new: int, columns: int) -> LayerCall:
    """The call with masks for keys of true columns, then of `new` of each draft so far."""
    names = [*inspect.signature(type(call.layer).forward).parameters][2:]
    args = dict(zip(names, call.args, strict=False))
    if MASK not in {*args, *call.kw}:
        raise UnsupportedBackboneError(
            f"Layers of {type(call.layer).__name__} take no mask, so drafts cannot be unrolled.",
            "Train exits of kind 'layer' for it.",
        )
    device = call.hidden.device
    seen = seen_by_drafts(step, new, columns, device)

    def of(name: str, value: Any) -> Any:
        if name == BIAS and value is not None:
            return _repeated(value, new, step)
        if name != MASK:
            return value
        if value is None:
            causal = seen_by_drafts(0, new, columns, device)[None, None]
            return _repeated(causal, new, step) & seen
        if not isinstance(value, Tensor) or value.dim() != 4:
            raise UnsupportedBackboneError(
                "Drafts are unrolled by masks, and this attention takes none of four dimensions.",
                "Load the model with attn_implementation='sdpa' or 'eager'.",
            )
        whole = _repeated(value, new, step)
        if whole.dtype == torch.bool:
            return whole & seen
        return whole.masked_fill(~seen, torch.finfo(whole.dtype).min)

    return replace(
        call,
        args=tuple(of(name, value) for name, value in args.items()) + call.args[len(args) :],
        kw={name: of(name, value) for name, value in call.kw.items()},
    )


def _repeated(mask: Tensor, new: int, step: int) -> Tensor:
    """A mask or bias [..., K] with its last `new` columns again for every draft."""
    return torch.cat([mask, *[mask[..., mask.shape[-1] - new :]] * step], -1)


def roll_out(backbone: Backbone, exits: Exits, batch: Batch, steps: int) -> dict[int, Rollout]:
    """Return drafts from every place of a batch's answers, by depth; differentiable in the
    `DraftInput`s.

    Empty where no answer has two tokens.
    """
    if batch.targets.shape[1] < 2:
        return {}
    cross = batch.prompt_kw.get("encoder_hidden_states") is not None
    cache = exits_only(backbone, exits.entries, cross=cross)
    prompt = _Prompt(backbone, exits, batch.prompt)
    with torch.no_grad():
        embedded = backbone.stack.get_input_embeddings()(batch.targets[:, :-1])
    answer = _Unrolled(prompt, batch.answer, embedded, cache, steps)
    parts: list[tuple[Any, Mapping[int, Tensor], Mapping[str, Any]]] = [
        (prompt, batch.prompt, batch.prompt_kw),
        (answer, batch.answer, batch.answer_kw),
    ]
    for handler, entries, kw in parts:
        stack = InterceptedModel(backbone, handler).stack
        embeds = next(iter(entries.values())).clone()  # BLIP adds positions where it lies
        stack(inputs_embeds=embeds, use_cache=True, **{cache_parameter(stack): cache}, **kw)
    return answer.made


@dataclass
class Acceptance:
    """The share of right drafts after right drafts.

    tried, right: counts by place in the draft. first_tried, first_right: of an answer's first
    draft.
    """

    tried: list[int]
    right: list[int]
    first_tried: int = 0
    first_right: int = 0

    @property
    def to_json(self) -> dict[str, Any]:
        """Return shares by place, the share of an answer's first draft, and the number of
        drafts."""
        places = zip(self.right, self.tried, strict=True)
        return {
            "acceptance": [round(r / n, 4) for r, n in places if n],
            "first_draft": round(self.first_right / max(1, self.first_tried), 4),
            "drafts": self.tried[0],
        }

    @property
    def tokens(self) -> float:
        """Return the expected number of accepted drafts of a round."""
        kept, run = 0.0, 1.0
        for right, tried in [*zip(self.right, self.tried, strict=True)][:UNROLLED]:
            run *= right / max(1, tried)
            kept += run
        return kept


class DraftTraining(ABC):
    """Training of modules that draft on from their own states, unrolled over recorded answers.

    learning: the trained modules. depths: of the drafting exits.
    """

    learning: nn.Module
    depths: tuple[int, ...]

    def __init__(self, backbone: Backbone, config: TrainConfig, accelerator: Any) -> None:
        self.backbone: Backbone = backbone
        self.config: TrainConfig = config
        self.accelerator: Any = accelerator

    @abstractmethod
    def rollouts(self, batch: Batch, steps: int) -> Mapping[int, Rollout]:
        """Return drafts from every place of a batch's answers, by depth; empty where no answer has
        two tokens."""

    @abstractmethod
    def logits(self, states: Tensor) -> Tensor:
        """Return logits [..., S] of a rollout's states [..., D]."""

    @abstractmethod
    def truth(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the full model's logits [B, A, S], and the index of its token [B, A]: -1 outside
        these S."""

    def follow(self, stores: Stores) -> dict[int, Acceptance]:
        """Train on recorded states, keep the best by validation, and return the shares of right
        drafts.

        All steps are taken, because drafts are best once the learning rate has come down.
        """
        config, (train, validation) = self.config, stores
        learning = (p for p in self.learning.parameters() if p.requires_grad)
        optimizer = adamw(learning, lr=config.learning_rate, weight_decay=0.01)
        best, found = self._copy(), self.measure(validation)
        quiet = not self.accelerator.is_main_process
        with progress_bar("drafting", total=config.steps, tell=not quiet) as bar:
            for step in range(config.steps):
                epoch, place = divmod(step, len(train))
                draw = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
                self._step(
                    train[int(torch.randperm(len(train), generator=draw)[place])], optimizer, step
                )
                bar.update()
                if (step + 1) % config.evaluate_every and step + 1 < config.steps:
                    continue
                now = self.measure(validation)
                if _mean(now) > _mean(found):
                    best, found = self._copy(), now
        self.learning.load_state_dict(best)
        return found

    def loss(self, batch: Batch) -> Tensor:
        """Return the sum over the drafts k of DECAY^(k-1) (KL(full || draft) - log p(full's
        token)), each a mean over tokens; for tokens outside the shortlist KL alone."""
        rollouts = self.rollouts(batch, UNROLLED)
        total = torch.zeros((), device=self.backbone.device)
        with torch.no_grad():
            teacher, said = self.truth(batch)
        for rollout in rollouts.values():
            for step, states in enumerate(rollout.drafts):
                keep = batch.mask[:, step + 1 :]
                if not bool(keep.any()):
                    continue
                logits = self.logits(states[:, step:][keep])
                truth, places = teacher[:, step + 1 :][keep], said[:, step + 1 :][keep]
                away = kl(log_probabilities(truth), log_probabilities(logits))
                own = F.cross_entropy(logits, places.clamp(min=0), reduction="none")
                total = total + DECAY**step * (away + own * (places >= 0)).mean()
        return total

    @torch.no_grad()
    def measure(self, store: Any) -> dict[int, Acceptance]:
        """Return the acceptance by place, for drafts from every place of the answers, by depth."""
        counts = {d: torch.zeros(2 * MEASURED + 2) for d in self.depths}
        for index in range(len(store)):
            batch = store[index]
            with self._autocast():
                rollouts = self.rollouts(batch, MEASURED)
                said = self.truth(batch)[1]
                for depth, rollout in rollouts.items():
                    self._count(rollout, said, batch.mask, counts[depth])
        found = {}
        for depth, row in counts.items():
            numbers = [int(n) for n in self.accelerator.reduce(row.to(self.backbone.device), "sum")]
            tried, right = numbers[:MEASURED], numbers[MEASURED : 2 * MEASURED]
            found[depth] = Acceptance(tried, right, *numbers[2 * MEASURED :])
        return found

    def _count(self, rollout: Rollout, said: Tensor, mask: Tensor, counts: Tensor) -> None:
        so_far = torch.ones_like(mask[:, 1:])
        for step, states in enumerate(rollout.drafts):
            keep = mask[:, step + 1 :] & so_far[:, : mask.shape[1] - 1 - step]
            if not bool(keep.any()):
                return
            right = torch.zeros_like(keep)
            own = self.logits(states[:, step:][keep]).argmax(-1)
            right[keep] = own == said[:, step + 1 :][keep]
            counts[step] += keep.sum().cpu()
            counts[MEASURED + step] += right.sum().cpu()
            if step == 0:
                counts[-2] += keep[:, 0].sum().cpu()
                counts[-1] += right[:, 0].sum().cpu()
            so_far = right  # by the place that the drafts began at

    def _autocast(self) -> Any:
        half = self.backbone.dtype != torch.float32
        return torch.autocast(self.backbone.device.type, self.backbone.dtype, enabled=half)

    def _step(self, batch: Batch, optimizer: Any, step: int) -> None:
        set_learning_rate(optimizer, self.config, step)
        with self._autocast():
            loss = self.loss(batch)
        if not bool(torch.isfinite(self.accelerator.reduce(loss.detach().clone(), "mean"))):
            raise TrainingError(
                f"The loss of drafts is not finite at step {step}.",
                "Lower the learning rate; what was trained before the drafts is saved.",
            )
        if not loss.requires_grad:
            return  # no answer of the batch has two tokens
        optimizer.zero_grad()
        self.accelerator.backward(loss)
        average_gradients(self.accelerator, self.learning)
        nn.utils.clip_grad_norm_(self.learning.parameters(), 1.0)
        optimizer.step()

    def _copy(self) -> dict[str, Tensor]:
        return {n: t.detach().clone() for n, t in self.learning.state_dict().items()}


def check_kind(exits: ExitSet) -> None:
    """Raise `InputError` where exits are no copied layers, which alone can learn to draft on."""
    if (kind := exits.modules.kind) not in ("layer", "drafting"):
        raise InputError(
            f"Exits of kind {kind!r} cannot learn to draft on.",
            "Train exits of kind 'drafting': offramp train --drafting.",
        )


class DraftingStage(DraftTraining):
    """The training stage in which an adapter's exits learn to draft on.

    adapter: with exits that are copied layers. config: of its training run; steps, batches, rate.

    Raises:
        InputError: exits of another kind.
    """

    def __init__(self, adapter: Adapter, config: TrainConfig, accelerator: Any) -> None:
        check_kind(adapter.exits)
        config = replace(config, exit_kind="drafting", adversarial=0.0)
        super().__init__(adapter.backbone, config, accelerator)
        self.adapter: Adapter = adapter
        self.depths: tuple[int, ...] = adapter.exits.depths
        self.objective: AdversarialObjective = AdversarialObjective(
            self.backbone, self.depths, self.config
        )
        self.exits: Exits = self.objective.exits
        state = adapter.exits.modules.state_dict()
        self.exits.load_state_dict({n: t.float() for n, t in state.items()}, strict=False)
        self.exits.requires_grad_(False)
        self.learning: nn.ModuleDict = nn.ModuleDict({str(d): self._input(d) for d in self.depths})
        self.learning.requires_grad_(True)
        if (ids := adapter.exits.shortlist) is not None:
            self.objective.narrow(ids)

    def _input(self, depth: int) -> DraftInput:
        made = self.exits.draft_input(depth)
        assert made is not None
        return made

    def run(self, stores: Stores) -> Adapter:
        """Train on recorded states, and return the adapter with the best exits by validation.

        Exits that already draft start from what they have learnt.
        """
        if not self.adapter.exits.draft_on:
            self.fit(stores[0])
        return self._adapter(self.follow(stores))

    def rollouts(self, batch: Batch, steps: int) -> Mapping[int, Rollout]:
        return roll_out(self.backbone, self.exits, batch, steps)

    def logits(self, states: Tensor) -> Tensor:
        return self.objective.logits(self.backbone.final_norm(states)).float()

    def truth(self, batch: Batch) -> tuple[Tensor, Tensor]:
        teacher = self.objective.logits(batch.teacher).float()
        words, places = self.backbone.logits(batch.teacher).argmax(-1), self.objective._places
        return teacher, words if places is None else places[words]

    def fit(self, store: Any) -> None:
        """Set the first matrices by least squares, so that the layer's input is closest to its
        input from the true state at its depth."""
        grams: dict[int, list[Tensor]] = {}
        for index in range(0, len(store), max(1, len(store) // FITTED)):
            batch = store[index]
            keep = batch.mask[:, :-1]
            if not bool(keep.any()):
                continue
            with torch.no_grad(), self._autocast():
                embedded = self.backbone.stack.get_input_embeddings()(batch.targets[:, :-1])
                for depth, rollout in roll_out(self.backbone, self.exits, batch, 0).items():
                    made = self._input(depth)
                    given = [
                        norm(x[keep].float().to(norm.weight.device))
                        for norm, x in (
                            (made.embedding_norm, embedded),
                            (made.state_norm, rollout.before),
                        )
                    ]
                    x = torch.cat(given, -1).double()
                    y = batch.answer[depth][keep].to(x)
                    both = grams.setdefault(depth, [x.new_zeros(()), x.new_zeros(())])
                    both[0], both[1] = both[0] + x.T @ x, both[1] + x.T @ y
        for depth, parts in grams.items():
            gram, across = (self.accelerator.reduce(part, "sum") for part in parts)
            ridge = 1e-3 * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
            found = torch.linalg.solve(gram + ridge, across).T.float()
            made = self._input(depth)
            width = made.embedding.in_features
            with torch.no_grad():
                made.embedding.weight.copy_(found[:, :width])
                made.state.weight.copy_(found[:, width:])

    def _adapter(self, found: Mapping[int, Acceptance]) -> Adapter:
        with unread():
            exits = Exits(self.backbone, self.exits.depths, kind="drafting")
        exits.load_state_dict(self.exits.state_dict())
        exits.to(self.backbone.dtype).requires_grad_(False)
        adapter = self.adapter
        measured = {str(depth): one.to_json for depth, one in found.items()}
        for depth, one in measured.items():
            shares = ", ".join(f"{share:.0%}" for share in one["acceptance"])
            log.info("At depth %s drafts in turn are right, after right ones: %s.", depth, shares)
        drafts = dict.fromkeys(adapter.policy.drafts or adapter.exits.depths, AHEAD)
        policy = replace(adapter.policy, drafts=drafts, max_draft=UNROLLED)
        ran = {**dict(adapter.provenance.get("config") or {}), "exit_kind": "drafting"}
        return replace(
            adapter,
            exits=replace(adapter.exits, modules=exits),
            policy=policy,
            metrics={**adapter.metrics, "drafting": measured},
            provenance={**adapter.provenance, "config": {**asdict(self.config), **ran}},
        )


def _mean(found: Mapping[int, Acceptance]) -> float:
    kept: Sequence[float] = [one.tokens for one in found.values()]
    return sum(kept) / len(kept)
