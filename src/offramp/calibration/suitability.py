"""Would exits pay on a model, before any is trained: from the model's own answers to some prompts.

A stand-in takes the trained exit's place. An exit starts as a copy of the layer after it, so what
an untrained one gives is the state one layer deeper; a kernel ridge regression maps that, and the
mean of these states so far in the answer, to which an exit attends, to the final layer's features,
in closed form. It is fitted on three quarters of the answers and judged on
the others, in turn, and on halves and quarters of what it is fitted on: the share of tokens that it
leaves to deeper layers falls as a power of how many answers it learns from (as errors do; Hestness
et al. 2017), and the line through the three is followed to as many as an exit would be trained on.
Then speed is tried, with exits that leave at random, as often as foretold; and with drafts, of
exits that draft on: losslessly, right as often, and in answers that are taken unverified.

What calibration leaves is told of answers: the largest share of tokens that exit while so many
answers hold none that is wrong, followed likewise, with an interval from drawing the answers again.
Trust is told in the same way: the share of tokens in answers that are taken unverified, by the
product of their probabilities; the others are decoded losslessly. There the stand-in knows what an
exit that drafts on knows: the state where the answer begins, and embeddings of the tokens since.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from offramp.adapter.answers import GREEDY, prompted
from offramp.calibration import draft_thresholds, trust_path
from offramp.core.errors import DataError, InputError
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits, ExitSet, check_depths
from offramp.core.models.intercept import InterceptedModel
from offramp.core.models.opened import LayerCall
from offramp.evaluation.scripted_exits import OPTIONS, Script, generate_drafted, generate_forced
from offramp.evaluation.timing import beside_full, clock_on, exit_generate_fn, in_turn, timed
from offramp.features.input_processor import InputProcessor
from offramp.features.shortlist import usual_size
from offramp.features.teacher_forcing import Answered, StateRecorder, check_length
from offramp.inputs.example import Example

Array = npt.NDArray[Any]

LEVELS = (0.9, 0.95, 0.98)
"""Shares of all tokens that stay the full model's, for which it is said how many settle. Beyond
these, a few tokens would decide."""
RISKS = (0.01, 0.02, 0.05)
"""Targets of a calibration, of answers that differ, for which the speed is told. Half of each is
what may be measured on some two thousand images at a target of 1%."""
REDRAWN = 200
"""How often the answers are drawn again, for the interval."""
TOKENS = 3000
"""Most tokens that are looked at; of more, those of answers as if at random."""
FOLDS = 4
PIECES = (4, 2, 1)
"""Into which the answers to learn from are cut, to see how much more of them would help."""
RIDGE = 0.003
"""Beside a kernel whose diagonal is 1."""
BEFORE = 0.3
"""Weight of what was before against the state itself, or the tokens since, by squared distance."""
FEWEST = 16
"""Prompts."""
SHOWN = 3
"""Answers that are shown with the depths foretold of their words."""
WORTH = 1.05
"""Below this speed exits are not worth their training."""
FEWEST_TIMED, TIMED, SECONDS, ROUNDS = 4, 8, 12.0, 5
"""Least and most prompts whose answers are written at full depth and with exits that leave at
random, seconds that this may take beyond the fewest, and rounds at most."""

_Spared = Callable[[Array, Array, Array, float], float]
"""`exiting` or `taken`."""
_Ends = tuple[float, float, float]
"""A figure with the ends of its interval."""


@dataclass(frozen=True)
class Prospect:
    """The forecast for a trained exit at `depth`.

    agreement: share of tokens for which its likeliest token is the full model's.
    settled: by level, the largest share of tokens that exit, surest first, while that share of all
    tokens stays the full model's.
    speedup: by level, of decoding one answer at a time on this machine, over full depth.
    thresholds, trust: by target of `RISKS`, for what is calibrated to it: the expected speed, and
    its 95% interval from the scatter of the answers.
    lossless: speed of lossless decoding, for which the exit drafts; 1 where the model cannot.
    """

    depth: int
    agreement: float
    settled: Mapping[float, float]
    speedup: Mapping[float, float]
    thresholds: Mapping[float, _Ends]
    trust: Mapping[float, _Ends]
    lossless: float

    @property
    def calibrated(self) -> dict[float, _Ends]:
        """Return the faster of thresholds and trust, by target."""
        both = ((target, own, self.trust[target]) for target, own in self.thresholds.items())
        return {target: max(ways, key=lambda told: told[0]) for target, *ways in both}


@dataclass(frozen=True)
class Shown:
    """One of the full model's answers. ids: its N tokens. ranks: by depth, for each token but the
    first (which comes with the prompt), the share of all tokens that an exit there is surer of [N -
    1]."""

    key: str
    ids: tuple[int, ...]
    ranks: Mapping[int, tuple[float, ...]]


@dataclass(frozen=True)
class Suitability:
    """The forecast of exits on a model of L `layers`.

    prompts, tokens: answered prompts, and tokens read. planned: prompts that training would have.
    shortlist: whether exits read a shortlist of the vocabulary. seconds: of an answer at full
    depth, and of its decoding. shown: some answers.
    """

    layers: int
    prompts: int
    tokens: int
    planned: int
    shortlist: bool
    seconds: tuple[float, float]
    prospects: tuple[Prospect, ...]
    shown: tuple[Shown, ...] = ()

    def best(self, level: float) -> Prospect:
        """Return the prospect of the depth with the fastest decoding at a level of `LEVELS`; if
        that is not faster than lossless decoding, of the depth that drafts best."""
        fastest = max(self.prospects, key=lambda p: p.speedup[level])
        drafts = max(self.prospects, key=lambda p: p.lossless)
        return fastest if fastest.speedup[level] >= drafts.lossless else drafts

    def kept(self, level: float) -> float | None:
        """Return the smallest target of `RISKS` at which the best exit is expected to pay, by the
        lower end of its interval, and to be faster than losslessly by as much; None: at no
        target."""
        best = self.best(level)
        return next(
            (
                risk
                for risk, (speed, low, _) in best.calibrated.items()
                if low >= WORTH and speed >= WORTH * best.lossless
            ),
            None,
        )

    def pays(self, level: float) -> bool:
        """Return True if exits would decode faster, even if only where words may change."""
        best = self.best(level)
        speeds = (best.lossless, best.speedup[level])
        return self.kept(level) is not None or max(speeds) >= WORTH

    def verdict(self, level: float) -> str:
        """Return in a sentence whether exits would pay."""
        best, risk = self.best(level), self.kept(level)
        where = f"at depth {best.depth} of {self.layers}"
        if risk is not None:
            speed, low, high = best.calibrated[risk]
            same = f", {best.lossless:.2f}x with none changed" if best.lossless >= WORTH else ""
            return (
                f"Exits would pay: decoding {speed:.2f}x as fast [{low:.2f}, {high:.2f}] while at "
                f"most {risk:.0%} of answers change{same}; train one {where}."
            )
        if best.lossless >= WORTH:
            return (
                f"Exits would pay: decoding {best.lossless:.2f}x as fast losslessly, no answer "
                f"changed; train one {where}."
            )
        if self.pays(level):
            return (
                f"Exits would pay only if words may change: decoding {best.speedup[level]:.2f}x as "
                f"fast while {level:.0%} of words stay, and more than {RISKS[-1]:.0%} of answers "
                f"change; the exit would stand {where}."
            )
        return (
            f"Exits would not pay here: the best, {where}, would agree with the full model on "
            f"{best.agreement:.0%} of words, and be confident of too few of them to save time."
        )

    def seconds_with(self, level: float) -> float:
        """Return the seconds of an answer with the best exit, at the smallest target that pays;
        else losslessly."""
        whole, decoding = self.seconds
        risk, best = self.kept(level), self.best(level)
        if risk is not None:
            speed = best.calibrated[risk][0]
        else:
            speed = best.lossless if best.lossless >= WORTH else best.speedup[level]
        return whole - decoding + decoding / speed

    def answers(self, level: float) -> list[dict[str, Any]]:
        """Return the shown answers with the forecast depth of each token: the best exit's for as
        many tokens as settle at the level."""
        best = self.best(level)
        return [
            {
                "key": one.key,
                "ids": list(one.ids),
                "depths": [
                    self.layers,
                    *(
                        best.depth if rank < best.settled[level] else self.layers
                        for rank in one.ranks[best.depth]
                    ),
                ],
            }
            for one in self.shown
        ]

    def to_json(self) -> dict[str, Any]:
        def named(value: Any) -> Any:
            if not isinstance(value, Mapping):
                return value
            return {f"{level:g}": told for level, told in value.items()}

        entries = asdict(self)
        del entries["shown"]
        rows = [{n: named(v) for n, v in row.items()} for row in entries.pop("prospects")]
        for row, prospect in zip(rows, self.prospects, strict=True):
            row["calibrated"] = named(prospect.calibrated)
        return {**entries, "depths": rows}


def looked_at(layers: int) -> tuple[int, ...]:
    """Return the depths tried by default: four, up to three quarters of the layers."""
    return tuple(sorted({min(max(1, round(layers * k / 8)), layers - 1) for k in (1, 2, 4, 6)}))


@torch.no_grad()
def suitability(
    encoder: InputProcessor,
    examples: Sequence[Example],
    *,
    depths: Sequence[int] = (),
    planned: int = 2000,
    max_new_tokens: int = 40,
    batch_size: int = 16,
    seed: int = 0,
    progress: Any = iter,
) -> Suitability:
    """Answer the prompts with the full model, and forecast how many tokens exits at `depths` would
    settle.

    planned: prompts that training would have. progress: wraps the batches that are answered, and
    the prompts on which speed is tried.

    Raises:
        DataError: fewer than `FEWEST` prompts, or decoded tokens; a prompt that leaves no room for
            `max_new_tokens`.
        InputError: depths that do not fit; fewer prompts planned than given.
    """
    backbone = encoder.backbone
    chosen = check_depths(depths or looked_at(backbone.depth), backbone.depth)
    if len(examples) < FEWEST:
        raise DataError(
            f"{len(examples)} prompts are too few to tell what exits would settle.",
            f"Give at least {FEWEST}; with 200 it is told to within about a tenth.",
        )
    if planned < len(examples):
        raise InputError(
            f"Training on {planned} prompts was planned, and {len(examples)} are given.",
            "Plan for at least as many.",
        )
    batches = prompted(encoder, examples, batch_size, max_new_tokens, progress)
    written = [_written(encoder, inputs, chosen, max_new_tokens) for inputs in batches]
    ids = [row for batch in written for row in batch.ids]
    answers = [Answered(example, row, False) for example, row in zip(examples, ids, strict=True)]
    seen = _Seen.of(written, answers, chosen, seed)
    more, shares, scores = planned / len(examples), {}, {}
    for depth in chosen:
        shares[depth], scores[depth] = _shares(backbone, seen, depth, more)
    shortlist = seen.spoken if usual_size(backbone) else None
    speeds, seconds = _speeds(encoder, answers, shares, shortlist, max_new_tokens, seed, progress)
    return Suitability(
        layers=backbone.depth,
        prompts=len(examples),
        tokens=len(seen.said),
        planned=planned,
        shortlist=shortlist is not None,
        seconds=seconds,
        shown=_shown(answers, seen, scores),
        prospects=tuple(_prospect(depth, told, speeds) for depth, told in shares.items()),
    )


def _shown(
    answers: Sequence[Answered], seen: _Seen, scores: Mapping[int, Array]
) -> tuple[Shown, ...]:
    """The first answers of which all tokens were looked at, with as many words as most have."""
    ranks = {d: (-own).argsort(kind="stable").argsort() / len(own) for d, own in scores.items()}
    places: dict[int, list[int]] = {}
    for place, number in enumerate(seen.answer.tolist()):
        places.setdefault(number, []).append(place)
    looked = [(a, places[n]) for a, n in zip(answers, seen.order, strict=True) if n in places]
    usual = float(np.median([len(own) for _, own in looked]))
    some = [pair for pair in looked if len(pair[1]) >= usual][:SHOWN]
    return tuple(
        Shown(
            answer.example.key,
            tuple(answer.ids),
            {depth: tuple(rank[own].tolist()) for depth, rank in ranks.items()},
        )
        for answer, own in some
    )


def _prospect(depth: int, foretold: _Foretold, speeds: Mapping[_Way, float]) -> Prospect:
    """Seconds of a token are taken as a line between the shares at which speed was tried, and
    none."""
    tried = sorted(
        (share, 1 / times)
        for (own, share), times in speeds.items()
        if own == depth and not isinstance(share, str)
    )
    shares, seconds = zip((0.0, 1.0), *((s, t) for s, t in tried if s > 0), strict=True)

    def speed(share: float) -> float:
        return float(1 / np.interp(share, shares, seconds))

    lossless = speeds[depth, LOSSLESS]

    def trusting(share: float) -> float:
        return 1 / ((1 - share) / lossless + share / speeds[depth, TAKEN])

    def ends(way: Callable[[float], float], told: Mapping[float, _Ends]) -> dict[float, _Ends]:
        speeds = {target: [*map(way, shares)] for target, shares in told.items()}
        # Where exits slow down, many are slower.
        return {target: (own[0], min(own[1:]), max(own[1:])) for target, own in speeds.items()}

    return Prospect(
        depth,
        foretold.agreement,
        foretold.settled,
        {n: speed(share) for n, share in foretold.settled.items()},
        ends(speed, foretold.exits),
        ends(trusting, foretold.trusted),
        lossless,
    )


# -- what the model did ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """N tokens of the full model's answers. The first of each is left out: it comes out of the
    prompt's pass, is often the same for all prompts, and does not count for decoding's speed.

    untrained: by depth, features [N, D] that an untrained exit gives, their means [N, D] over the
    answer so far, and where the answer begins [N, D]. fed: embeddings [N, E] of the tokens before
    these, and their means over the answer so far. final: the final layer's. said: the tokens [N].
    spoken: each of them once, ascending. answer: the number [N] of each one's answer, in a random
    order; order: the number of each answer.
    """

    untrained: Mapping[int, tuple[Tensor, ...]]
    fed: tuple[Tensor, ...]
    final: Tensor
    said: Tensor
    spoken: Tensor
    answer: Tensor
    order: tuple[int, ...]

    @classmethod
    def of(
        cls,
        written: Sequence[_Written],
        answers: Sequence[Answered],
        depths: Sequence[int],
        seed: int,
    ) -> _Seen:
        order = torch.randperm(len(answers), generator=torch.Generator().manual_seed(seed))
        decoded = sum(len(answer.ids) - 1 for answer in answers)
        if decoded < FEWEST:
            raise DataError(
                f"Beyond the first token, {len(answers)} answers have {decoded} tokens in all.",
                "Give prompts with longer answers: the prompt's own pass gives the first token.",
            )
        each = order.repeat_interleave(torch.tensor([len(answer.ids) - 1 for answer in answers]))
        keep = each < TOKENS / decoded * len(answers)  # of answers in a random order
        said = torch.tensor([token for answer in answers for token in answer.ids[1:]])[keep]

        def of_all(part: Callable[[_Written], Sequence[Tensor]]) -> tuple[Tensor, ...]:
            batches = zip(*map(part, written), strict=True)
            return tuple(torch.cat(own)[keep].float() for own in batches)

        return cls(
            untrained={
                depth: of_all(lambda batch, d=depth: batch.untrained[d])  # type: ignore[misc]
                for depth in depths
            },
            fed=of_all(lambda batch: batch.fed),
            final=of_all(lambda batch: [batch.final])[0],
            said=said,
            spoken=torch.unique(said),
            answer=each[keep],
            order=tuple(order.tolist()),
        )


@dataclass(frozen=True)
class _Written:
    """A batch of the full model's answers. ids: of each. untrained, fed, final: as of `_Seen`, of
    all tokens but each answer's first [N, D], in the backbone's precision."""

    ids: tuple[tuple[int, ...], ...]
    untrained: Mapping[int, tuple[Tensor, ...]]
    fed: tuple[Tensor, ...]
    final: Tensor


class _Noted(StateRecorder):
    """Notes, while a model writes, the states of the position that each token comes from."""

    def __init__(self, backbone: Backbone, entered: Collection[int]) -> None:
        super().__init__(backbone, entered)
        self.entries: list[dict[int, Tensor]] = []
        self.final: list[Tensor] = []
        self.states: list[int] = []
        """How many positions came out of the last layer."""

    def layer(self, call: LayerCall) -> Any:
        out = super().layer(call)
        if self.is_whole:
            entries, _, final = self.take()
            self.entries.append({depth: states[:, -1].clone() for depth, states in entries.items()})
            self.final.append(final[:, -1].clone())
            self.states.append(final.shape[1])
        return out


def _written(
    encoder: InputProcessor, inputs: Mapping[str, Any], depths: Sequence[int], longest: int
) -> _Written:
    """The model's own answers to a batch, and the states that each token came from."""
    backbone = encoder.backbone
    # The state that enters the last layer is the deepest one that is no final state yet.
    entered = {depth: min(depth + 1, backbone.depth - 1) for depth in depths}
    noted = _Noted(backbone, {*entered.values()})
    intercepted = InterceptedModel(backbone, noted)
    with intercepted.recording() as calls:
        made = intercepted.model.generate(**inputs, **GREEDY, max_new_tokens=longest)
    check_length(calls[0], noted.states[0], backbone)
    rows = made[:, -len(noted.final) :].tolist()
    named = getattr(backbone.model.generation_config, "eos_token_id", None)
    ends = {encoder.eos, *(named if isinstance(named, list) else [])}
    ids = [
        tuple(row[: next((n + 1 for n, token in enumerate(row) if token in ends), len(row))])
        for row in rows
    ]
    lengths = torch.tensor([[len(row)] for row in ids], device=made.device)
    places = torch.arange(len(noted.final), device=made.device)
    keep = (places > 0) & (places < lengths)
    untrained = {}
    for depth in depths:
        entries = torch.stack([step[entered[depth]] for step in noted.entries], 1)
        given = backbone.final_norm(entries)
        mean = given.float().cumsum(1) / (places + 1)[:, None]
        first = given[:, :2][:, -1:].expand_as(given)
        untrained[depth] = given[keep], mean[keep], first[keep]
    before = made[:, -len(noted.final) :].roll(1, 1)
    embedded = backbone.stack.get_input_embeddings()(before)
    sums = embedded.float().cumsum(1) - embedded[:, :1]  # no token is before the first one
    so_far = sums / places.clamp(min=1)[:, None]
    final = backbone.final_norm(torch.stack(noted.final, 1))[keep]
    return _Written(tuple(ids), untrained, (embedded[keep], so_far[keep]), final)


# -- what an exit would say --------------------------------------------------------------------


class _Foretold(NamedTuple):
    """agreement: the share of tokens for which an exit's likeliest is the full model's. settled: by
    level, the share that settles. exits: by target of `RISKS`, the share that exits, with its
    interval. accepted: of drafts that follow drafts, the agreement. trusted: the share of tokens in
    answers that are taken unverified."""

    agreement: float
    settled: Mapping[float, float]
    exits: Mapping[float, _Ends]
    accepted: float
    trusted: Mapping[float, _Ends]


def _shares(backbone: Backbone, seen: _Seen, depth: int, more: float) -> tuple[_Foretold, Array]:
    """What is foretold of an exit, and the stand-in's scores [N]. more: how many times as many
    answers training would have as there are here."""
    state, before, start = seen.untrained[depth]
    newest, so_far = seen.fed
    known = _kernel((1.0, state), (BEFORE, before))
    exits, scores = _told(backbone, seen, known, exiting, more)
    if not backbone.is_encoder_decoder:  # whose layers all read the image
        known = _kernel((1.0, newest), (1.0, so_far), (BEFORE, start))
    (accepted, _, trusted), _ = _told(backbone, seen, known, taken, more)
    return _Foretold(*exits, accepted, trusted), scores


def _told(
    backbone: Backbone, seen: _Seen, kernel: Tensor, way: _Spared, more: float
) -> tuple[tuple[float, dict[float, float], dict[float, _Ends]], Array]:
    """A stand-in's agreement, what settles by level, and by target what a way leaves unverified;
    and its scores [N]."""
    head = backbone.head_rows(seen.spoken.to(backbone.device))
    judged = {
        pieces: [_judged(backbone, seen, kernel, head, n, pieces) for n in range(pieces)]
        for pieces in PIECES
    }
    answer = seen.answer.numpy()
    left = [np.mean([_left(*one, answer, way) for one in judged[n]], 0) for n in PIECES]
    learnt = (1 - 1 / FOLDS) / np.array(PIECES)
    least = 0.5 / len(seen.said)
    wrong, *rest = followed(learnt, np.maximum(left, least), more).tolist()
    # At a higher level no more settle; where it seems so, that is noise.
    shares = np.minimum.accumulate([1.0 - share for share in rest[: len(LEVELS)]]).tolist()
    told = np.array(rest[len(LEVELS) :])
    again = _redrawn(*judged[PIECES[-1]][0], answer, way)
    # By how much more or less is left where other answers are drawn.
    times = np.maximum(again, least) / np.maximum(left[-1][1 + len(LEVELS) :], least)
    spread = 1 - np.minimum(told * np.quantile(times, (0.975, 0.025), axis=0), 1.0)
    ends = [(float(a), float(b), float(c)) for a, b, c in zip(1 - told, *spread, strict=True)]
    settle = dict(zip(LEVELS, shares, strict=True))
    scores, _ = judged[PIECES[-1]][0]
    return (1.0 - wrong, settle, dict(zip(RISKS, ends, strict=True))), scores


def _kernel(*parts: tuple[float, Tensor]) -> Tensor:
    """exp(-sum of w |x - y|^2 / m) over parts of what is known [N, D], by their weights w, with m
    the median of the squared distances: [N, N]."""
    far = torch.zeros(())
    for weight, x in parts:
        own = torch.cdist(x, x).square()
        far = far + weight * own / own[own > 0].median()
    return torch.exp(-far)


def _judged(
    backbone: Backbone, seen: _Seen, kernel: Tensor, head: Any, piece: int, pieces: int
) -> tuple[Array, Array]:
    """The stand-in's scores [N] of the tokens, and which of them it gets right [N], where it has
    learnt one of so many pieces of the other folds' answers."""
    scores, right = np.empty(len(seen.said)), np.empty(len(seen.said), dtype=bool)
    fold, turn = seen.answer % FOLDS, seen.answer // FOLDS
    for number in range(FOLDS):
        judged, learnt = fold == number, (fold != number) & (turn % pieces == piece)
        middle = seen.final[learnt].mean(0)
        known = kernel[learnt][:, learnt].double()
        known.diagonal().add_(RIDGE)
        slope = torch.linalg.solve(known, (seen.final[learnt] - middle).double()).float()
        features = kernel[judged][:, learnt] @ slope + middle
        best, place = backbone.logits(features.to(backbone.dtype), head).float().softmax(-1).max(-1)
        scores[judged] = best.cpu()
        right[judged] = seen.spoken[place.cpu()] == seen.said[judged]
    return scores, right


def _left(scores: Array, right: Array, answer: Array, way: _Spared) -> Array:
    """Share of tokens that are wrong; then, by level, those that do not settle, and those of
    `_verified`."""
    settle = [1 - settled(scores, right, level) for level in LEVELS]
    return np.array([1 - right.mean(), *settle, *_verified(scores, right, answer, way)])


def _verified(scores: Array, right: Array, answer: Array, way: _Spared) -> list[float]:
    """By target of `RISKS`, the share of tokens that a way, `exiting` or `taken`, does not spare
    the full model."""
    return [1 - way(scores, right, answer, risk / 2) for risk in RISKS]


def _redrawn(scores: Array, right: Array, answer: Array, way: _Spared) -> Array:
    """What `_verified` tells [`REDRAWN`, `RISKS`] where as many answers are drawn again, with
    replacement."""
    draw = np.random.default_rng(0)
    rows = [np.flatnonzero(answer == one) for one in np.unique(answer)]
    found = []
    for _ in range(REDRAWN):
        some = [rows[i] for i in draw.integers(0, len(rows), len(rows))]
        numbers = np.repeat(np.arange(len(some)), [len(row) for row in some])
        drawn = np.concatenate(some)
        found.append(_verified(scores[drawn], right[drawn], numbers, way))
    return np.array(found)


def exiting(scores: Array, right: Array, answer: Array, risk: float) -> float:
    """Return the largest number of tokens that may exit at one threshold, while at most a share
    `risk` of the answers holds a wrong token that exited.

    scores, right: confidence, and whether the exit's token is the full model's [N]. answer: index
    of each token's answer [N].
    """
    _, place = np.unique(answer, return_inverse=True)
    surest = np.full(place.max() + 1, -np.inf)  # of the wrong ones of each answer
    np.maximum.at(surest, place[~right], scores[~right])
    return float((scores > _level(surest, risk)).mean())


def taken(scores: Array, right: Array, answer: Array, risk: float) -> float:
    """Return the largest share of tokens in answers that are taken unverified at one level of
    trust, while at most a share `risk` of all answers is taken and holds a wrong token.

    Arguments as of `exiting`; an answer is as sure as the product of its scores.
    """
    _, place = np.unique(answer, return_inverse=True)
    product = np.bincount(place, np.log(np.maximum(scores, 1e-30)))
    is_wrong = np.bincount(place, ~right) > 0
    level = _level(np.where(is_wrong, product, -np.inf), risk)
    return float((product > level)[place].mean())


def _level(wrong: Array, risk: float) -> float:
    """The least level above which at most a share `risk` of the answers is wrong. wrong: up to
    which level each answer is; -inf where it never is."""
    allowed = int(risk * len(wrong) + 1e-9)
    return float(np.sort(wrong)[::-1][allowed]) if allowed < len(wrong) else -np.inf


def settled(scores: Array, right: Array, level: float) -> float:
    """Return the largest share of N tokens that exit at one threshold, while at most 1 - level of
    all N differ from the full model's. scores, right: [N], of each token."""
    order = np.argsort(-scores, kind="stable")
    wrong = np.cumsum(~right[order])
    ends = np.append(scores[order][1:] != scores[order][:-1], True)
    passed = np.flatnonzero(ends & (wrong <= (1 - level) * len(scores) + 1e-9))
    return float(passed[-1] + 1) / len(scores) if len(passed) else 0.0


def followed(learnt: Array, left: Array, more: float) -> Array:
    """Return the shares [K] still wrong after learning from `more` prompts, by the power law
    through `left` [P, K] after learning from `learnt` [P]; it never rises."""
    x, y = np.log(learnt), np.log(left)
    slopes = np.minimum(np.polyfit(x, y, 1)[0], 0.0)
    return np.asarray(np.exp(y.mean(0) + slopes * (np.log(more) - x.mean())))


# -- what it would be worth --------------------------------------------------------------------


LOSSLESS, TAKEN = "lossless", "taken"
DRAFTING: Mapping[str, Mapping[str, Any]] = {
    LOSSLESS: {"lossless": True, "max_draft": max(draft_thresholds.LONGEST)},
    TAKEN: {"trust": 0.0, "max_draft": trust_path.LONGEST},
}
_Way = tuple[int, float | str]
"""The depth of an exit, and the share of tokens that leave there; or it drafts: `LOSSLESS`, or
answers that are `TAKEN` unverified."""
_Given = tuple[Mapping[str, Any], Tensor, tuple[int, ...]]
"""A prompt; of its answer's N tokens each one's share of all tokens [N], drawn at random, and its
id."""


def _speeds(
    encoder: InputProcessor,
    answers: Sequence[Answered],
    shares: Mapping[int, _Foretold],
    shortlist: Tensor | None,
    longest: int,
    seed: int,
    progress: Any,
) -> tuple[dict[_Way, float], tuple[float, float]]:
    """Of decoding, over full depth, by depth and the share of tokens that exits there, the smallest
    foretold and all: untrained exits, whose work is a trained one's, leave at random so
    often. Where first tokens leave, decoding has to read their prompts deeper later on, as it will.
    Where an exit drafts, it is right at random as often as foretold; all answers that end are taken
    by trust. And seconds of an answer at full depth, whole and of decoding."""
    backbone, clock = encoder.backbone, clock_on(encoder.backbone.device.type)
    modules = Exits(backbone, sorted(shares), kind="drafting").requires_grad_(False)
    exits = ExitSet(modules, shortlist)
    written = [answer for answer in answers if len(answer.ids) > 1][:TIMED]
    lengths = [len(answer.ids) for answer in written]
    order = torch.randperm(sum(lengths), generator=torch.Generator().manual_seed(seed))
    ranks = torch.split(order.argsort() / len(order), lengths)  # those below a share leave
    asked = [encoder.prompts([answer.example]) for answer in written]

    def forced(given: _Given, stop: StoppingCriteriaList, way: _Way) -> Tensor:
        (inputs, rank, ids), (depth, share) = given, way
        options: dict[str, Any] = {"depth": depth, "criteria": stop}
        options["shortlist"] = shortlist is not None
        if not isinstance(share, str):
            script = Script((rank < share)[:, None])
            output = generate_forced(backbone, inputs, exits, script, len(rank), **options)
            return output.new_tokens.flatten()
        right = ((rank < shares[depth].accepted) | (share == TAKEN)).tolist()
        says = [
            i if own else (i + 1) % backbone.vocabulary for i, own in zip(ids, right, strict=True)
        ]
        output = generate_drafted(
            backbone, inputs, exits, says, max_new_tokens=longest, **options, **DRAFTING[share]
        )
        return output.new_tokens.flatten()

    def full(given: _Given, stop: StoppingCriteriaList) -> Tensor:
        inputs, rank, _ = given
        return exit_generate_fn(backbone, max_new_tokens=len(rank), **OPTIONS)(inputs, stop)

    drafting: list[_Way] = [(depth, how) for depth in shares for how in (LOSSLESS, TAKEN)]
    ends = ((d, share) for d, told in shares.items() for share in (min(told.settled.values()), 1.0))
    ways = [*drafting, *sorted({*ends})]
    writes: dict[_Way | None, Any] = {None: full}
    writes |= {way: partial(forced, way=way) for way in ways}
    runs = {way: partial(timed, write, clock=clock) for way, write in writes.items()}
    given = [(a, r, w.ids) for a, r, w in zip(asked, ranks, written, strict=True)]
    began = clock()
    tried = (None, ways[0], ways[-1])  # one of each kind: what is made once is made here
    for way in tried:
        try:
            runs[way](given[0])
        except InputError:
            if way not in drafting:
                raise
            for one in drafting:  # states that cannot be taken back
                del runs[one]
    once = (clock() - began) / len(tried) * len(runs)
    passes = max(FEWEST_TIMED, int(SECONDS / once))
    some = given[: min(passes, len(given))]
    rounds = max(1, min(ROUNDS, passes // len(given)))
    found = in_turn(runs, some, rounds=rounds, progress=progress)
    found = beside_full(found, {way: None for way in drafting if way in found})
    took = {
        way: float(np.median([[decode for _, decode, _ in one] for one in by_round], 0).sum())
        for way, by_round in found.items()
    }
    whole = np.median([[whole for whole, _, _ in one] for one in found[None]], 0).mean()
    speeds = {way: took[None] / took[way] if way in took else 1.0 for way in ways}
    left: dict[_Way, float] = {  # a share of few tokens is of whole ones
        (depth, share): float((torch.cat(ranks[: len(some)]) < share).float().mean())
        for depth, share in ways
        if not isinstance(share, str)
    }
    told = {(way[0], left.get(way, way[1])): speed for way, speed in speeds.items()}
    return told, (float(whole), took[None] / len(some))
