"""What every exit would have said at every token of known answers, from one full-depth pass.

With exact keys and values an exit reads the same state whatever exited before, so on the full
model's own greedy answers a replay shows, without decoding again, which answers would stay the
same under any thresholds: up to the first token that differs the two generations are one. After
that they part, and only decoding shows more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from offramp.core.decoding.policy import ExitPolicy, first_token_may_exit, shortlist_of_policy
from offramp.core.decoding.rule import ExitRule
from offramp.core.decoding.scores import SCORES
from offramp.core.models.exits import Exits, ExitSet
from offramp.features.input_processor import InputProcessor
from offramp.features.teacher_forcing import Answered, exit_features, group, record

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Replay:
    """The exits' predictions along N answers of at most A tokens; arrays [N, A], in the order of
    the answers.

    layers: depth L of the full model.
    targets: the tokens of the answers; -1 after an answer's end.
    final: the full model's arg-max at each token; -1 after the end.
    said, scores: each exit's arg-max, and its score, by depth.
    """

    layers: int
    targets: Array
    final: Array
    said: Mapping[int, Array]
    scores: Mapping[int, Array]

    @property
    def mask(self) -> Array:
        """Return which entries [N, A] are tokens, not padding."""
        return self.targets >= 0

    def part(self, rows: Array) -> Replay:
        """Return the replay of these answers alone."""

        def some(arrays: Mapping[int, Array]) -> dict[int, Array]:
            return {depth: array[rows] for depth, array in arrays.items()}

        return replace(
            self,
            targets=self.targets[rows],
            final=self.final[rows],
            said=some(self.said),
            scores=some(self.scores),
        )

    def depths(
        self, thresholds: Mapping[int, float], *, first: Mapping[int, float] | None = None
    ) -> Array:
        """Return the depth [N, A] at which each token exits; 0 for padding.

        first: thresholds of an answer's first token; empty: it never exits early, as where a
        decoder-only model reads the prompt at full depth. None: as for other tokens.
        """
        depths, rule = np.where(self.mask, self.layers, 0), ExitRule(thresholds, first=first)
        opening = rule if first is None else rule.opening
        for depth in sorted(thresholds, reverse=True):
            scores = self.scores[depth]
            leaves = self.mask & rule.reaches(depth, scores)
            leaves[:, 0] = self.mask[:, 0] & opening.reaches(depth, scores[:, 0])
            depths = np.where(leaves, depth, depths)
        return depths

    def written(self, depths: Array) -> Array:
        """Return the tokens [N, A] that are written if each exits at its depth in `depths` [N,
        A]."""
        tokens = self.final
        for depth, said in self.said.items():
            tokens = np.where(depths == depth, said, tokens)
        return tokens

    def differs(self, depths: Array) -> Array:
        """Return which answers [N] would differ from the full model's, if the targets are its
        greedy answers."""
        return (self.written(depths) != self.targets).any(1)  # type: ignore[no-any-return]


def can_replay(policy: ExitPolicy) -> bool:
    """Return True if a replay shows the effect of `policy`: for a score of `SCORES`, and without
    the omitted visual tokens of earlier versions, which change tokens at full depth too."""
    return policy.score in SCORES and not policy.lossless


@dataclass(frozen=True)
class PolicyReplay:
    """A replay that is read by a policy, with its shortlist and its rule for first tokens.

    first: whether an answer's first token may exit early.
    """

    replay: Replay
    policy: ExitPolicy
    first: bool

    @classmethod
    def of(
        cls,
        encoder: InputProcessor,
        exits: ExitSet,
        rows: Sequence[Answered],
        policy: ExitPolicy,
        *,
        batch_size: int = 32,
        progress: Any = iter,
    ) -> PolicyReplay:
        """Replay `rows` for a policy that `can_replay`; the thresholds may be changed later."""
        replayed = replay(
            encoder,
            exits,
            rows,
            policy.score,
            shortlist=policy.shortlist,
            batch_size=batch_size,
            progress=progress,
        )
        return cls(replayed, policy, first_token_may_exit(encoder.backbone, policy))

    def depths(self, thresholds: Mapping[int, float] | None = None) -> Array:
        """Return the depth [N, A] at which each token exits, by the policy's thresholds or by
        others."""
        by = self.policy
        if thresholds is not None:
            by = replace(by, thresholds=thresholds)
        first = by.opening if self.first else {}
        return self.replay.depths(by.thresholds, first=first)

    def differs(self, thresholds: Mapping[int, float] | None = None) -> Array:
        """Return which answers [N] would differ from the full model's, if the rows are its greedy
        answers."""
        return self.replay.differs(self.depths(thresholds))

    def part(self, rows: Array) -> PolicyReplay:
        """Return the replay of these answers alone."""
        return replace(self, replay=self.replay.part(rows))


@torch.inference_mode()
def replay(
    encoder: InputProcessor,
    exits: ExitSet | Exits,
    rows: Sequence[Answered],
    score: str = "max_probability",
    *,
    shortlist: bool = False,
    batch_size: int = 32,
    progress: Any = iter,
) -> Replay:
    """Read every exit at every token of `rows`.

    rows: of `offramp.adapter.answers.full_model_answers` for the full model's own answers, or
    labelled ones. score: a key of `SCORES`. shortlist: whether exits read their shortlist alone.

    Raises:
        DataError: prompt and answer are longer than the backbone's positions.
    """
    backbone, exits = encoder.backbone, ExitSet.of(exits)
    place = {id(row): i for i, row in enumerate(rows)}
    shape = (len(rows), max(len(row.ids) for row in rows))
    targets, final = np.full(shape, -1), np.full(shape, -1)
    said = {d: np.full(shape, -1) for d in exits.depths}
    scores = {d: np.full(shape, np.nan) for d in exits.depths}
    ids = shortlist_of_policy(ExitPolicy(shortlist=shortlist), exits)
    head = None if ids is None else exits.shortlist_head(backbone)
    for answered in progress(group(rows, batch_size)):
        batch = record(encoder, answered, exits.depths)
        states = {backbone.depth: batch.teacher, **exit_features(backbone, exits.modules, batch)}
        where = np.ix_([place[id(row)] for row in answered], range(batch.targets.shape[1]))
        mask = batch.mask.cpu().numpy()

        def put(array: Array, values: torch.Tensor, where: Any = where, mask: Array = mask) -> None:
            array[where] = np.where(mask, values.cpu().numpy(), array[where])

        put(targets, batch.targets)
        for depth, features in states.items():
            if depth == backbone.depth:
                put(final, backbone.logits(features).argmax(-1))
                continue
            logits = backbone.logits(features, head)
            chosen = logits.argmax(-1)
            put(said[depth], chosen if ids is None else ids[chosen])
            flat = SCORES[score](logits.flatten(0, 1))
            put(scores[depth], flat.view(logits.shape[:2]).float())
    return Replay(backbone.depth, targets, final, said, scores)
