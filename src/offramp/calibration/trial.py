"""A path of thresholds, or of levels of trust, is tested on images until a point fails.

What is found has its evidence with it: every point that was tested, by image and by kind of prompt,
and which errors the attempt spent. `offramp.calibration.calibrate` decides what is tested.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from offramp.adapter.answers import Answer
from offramp.calibration.asked import Guarantee
from offramp.calibration.attempts import Attempt, Draws, ImageRows, Turn, grouped, merged, turn_of
from offramp.calibration.risk_control import (
    ANY_TIME,
    Decision,
    control,
    draws_needed,
    first_test,
    highest_risk,
    more_needed,
    p_value,
    samples_needed,
    upper_bound,
)
from offramp.calibration.risk_functions import RISKS
from offramp.calibration.threshold_evaluator import ThresholdEvaluator, lowest, path_of
from offramp.calibration.threshold_search import Array
from offramp.core.decoding.policy import ExitPolicy, Thresholds, policy_to_json
from offramp.inputs.example import Example
from offramp.promises.conditions import Conditions
from offramp.promises.likeness import ANSWERS, Likeness, look_of
from offramp.promises.prompt_kinds import kind_of

CONSISTENCY = "consistency"


# -- what is found ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A point of the path.

    risk, bound: measured on the tested images, and its upper bound; where kinds of prompts are
    tested, of the worst kind, in units of the common target. seconds: predicted, of a decoded
    token; None without a replay or costs.
    """

    thresholds: Thresholds
    risk: float
    bound: float
    seconds: float | None


@dataclass(frozen=True)
class Kind:
    """The results for one kind of prompt, at the chosen thresholds or, where none were chosen, at
    the safest. kind: see `offramp.promises.prompt_kinds.kind_of`. target: its own; None: the common
    one. point: of the path, for this kind alone; None: the common one."""

    kind: str
    images: int
    answers: int
    risk: float
    target: float | None = None
    point: Thresholds | None = None


@dataclass(frozen=True)
class Way:
    """One of the compared ways to answer. name: lossless, trust or thresholds. setting: in words.
    times: speed of whole answers over full depth. risk: measured on `answers`; None: lossless.
    promised: whether the risk was tested; else it is an estimate."""

    name: str
    setting: str
    times: float
    risk: float | None = None
    answers: int = 0
    promised: bool = False


@dataclass(frozen=True)
class Calibration:
    """A guarantee and its evidence.

    policy: thresholds that passed, without unused exits; without thresholds if nothing can be
    guaranteed, for the `reason` given.
    method: the deciding one; see `offramp.calibration.risk_control.control`, as for `monotone`.
    unit: over what the risk is a mean; see `Guarantee`; "group": groups of images.
    measured, bound: the risk on the n tested images, and its upper bound; where each kind of prompt
    is tested, of the worst at its own point, in units of the common target.
    n, answers: tested images without copies, and answers to them. groups: number of groups of these
    images, which are then the draws; None: each came alone. copies: images that are copies of
    others.
    attempt: number of this attempt among those on the same images. level: confidence of its tests,
    so that all attempts together keep `confidence`. candidates: among which the best is taken; see
    `Guarantee`.
    needed: images that would be enough at the measured risk (where nothing passed: at the safest
    point); None: that is above the target, so that no number would.
    speedup: of decoding, predicted from measured costs.
    path: the tested points, up to the first failure.
    attempts: all that were made with these exits, this one included.
    likeness: of the early answers at these thresholds, by which similar requests are known.
    watched: for a risk that needs right answers, the risk that is watched in its place; see
    `offramp.promises.guarantee.watched`.
    largest: the most answers about one image. whole: whether the whole path kept the risk.
    each_kind: whether the target holds for each of `kinds`. qualities: for a risk with labels, the
    mean quality of the full model's answers by kind of prompt, in units of its losses.
    ways: the compared ways, by `offramp.calibration.ways`.
    runtime: name of the engine that the guarantee is for; None: PyTorch.
    conditions: further ones; see `offramp.promises.conditions`.
    """

    policy: ExitPolicy
    risk: str
    target: float
    confidence: float
    method: str
    monotone: bool
    measured: float | None
    bound: float | None
    n: int
    answers: int
    attempt: int
    level: float
    needed: int | None
    speedup: float | None
    reason: str
    path: tuple[Point, ...]
    data_digest: str = ""
    attempts: tuple[Attempt, ...] = ()
    ways: tuple[Way, ...] = ()
    runtime: str | None = None
    unit: str = "image"
    groups: int | None = None
    copies: int = 0
    candidates: int = 1
    largest: int = 1
    whole: bool = False
    likeness: Likeness = field(default_factory=lambda: Likeness({}))
    watched: Mapping[str, Any] | None = None
    each_kind: bool = False
    kinds: tuple[Kind, ...] = ()
    qualities: Mapping[str, float] = field(default_factory=dict)
    conditions: Conditions = field(default_factory=Conditions)

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each tested point, the safest first, as `pandas.DataFrame` takes them.

        threshold_D: of the exit at depth D, or its trust. risk, bound, seconds: as of `Point`.
        chosen: whether answers are given at this point.
        """
        own, trust = self.policy.thresholds, self.policy.trust

        def chosen(point: Point) -> bool:
            same = (
                point.thresholds == own
                if trust is None
                else {*point.thresholds.values()} == {trust}
            )
            return same and not self.reason

        return [
            {
                **{f"threshold_{depth}": level for depth, level in point.thresholds.items()},
                "risk": point.risk,
                "bound": point.bound,
                "seconds": point.seconds,
                "chosen": chosen(point),
            }
            for point in self.path
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the calibration as an adapter stores it, without the attempts; thresholds are
        keyed by depth."""
        path = [{**asdict(point), "thresholds": point.thresholds.to_json()} for point in self.path]
        entries = {**asdict(self), "policy": policy_to_json(self.policy), "path": path}
        kinds = [
            {**asdict(kind), "point": kind.point and kind.point.to_json()} for kind in self.kinds
        ]
        entries |= {"kinds": kinds, "conditions": self.conditions.to_json()}
        entries["ways"] = list(entries["ways"])
        entries["likeness"] = self.likeness.to_json()
        del entries["attempts"]
        return entries


# -- what is tested --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """A path, with the examples that test it and their images in the order of the bets.

    images: their rows are places in `tested.examples`. level: confidence of each test. kinds: names
    of the kinds of prompts [rows].
    """

    tested: ThresholdEvaluator
    images: tuple[ImageRows, ...]
    turn: Turn
    level: float
    kinds: tuple[str, ...]

    def draws(self, losses: Array, asked: Guarantee) -> dict[str, Draws]:
        """Return losses [answers, ...] as draws of images: by kind of prompt where the target must
        hold for each kind, else of all under the name ""."""
        if not asked.by_kind:
            most = max(self._most.values())
            return {"": self._of(losses, asked.unit, self.images, self.turn.looked, most)}
        return self.by_kind(losses, asked)

    @property
    def images_tested(self) -> int:
        """The number of images without copies."""
        return sum(len(image.by_image) for image in self.images) - merged(self.images)

    def nothing(self, asked: Guarantee) -> list[Draws]:
        """Return draws of answers that lose nothing."""
        return [*self.draws(np.zeros(len(self.tested.examples)), asked).values()]

    def number_of(self, asked: Guarantee) -> int:
        """Return the number of tested images or groups, without copies; for kinds, the smallest
        number."""
        return min(part.n for part in self.nothing(asked))

    def by_kind(self, losses: Array, asked: Guarantee) -> dict[str, Draws]:
        """Return losses [answers, ...] as draws of images by kind of prompt."""
        found = {}
        for kind in sorted(set(self.kinds)):
            rows = {row for row, name in enumerate(self.kinds) if name == kind}
            parts = [image.of_rows(rows) for image in self.images]
            looked = sum(part is not None for part in parts[: self.turn.looked])
            some = [part for part in parts if part]
            draws = self._of(losses, asked.unit, some, looked, self._most[kind])
            times = draws.times * asked.target_of(kind) / asked.target
            found[kind] = replace(draws, times=times)
        return found

    def _of(
        self, losses: Array, unit: str, images: Sequence[ImageRows], looked: int, most: float
    ) -> Draws:
        """Draws in units of the largest loss that these answers can have, `most`."""
        whole = self.tested.risk.whole
        draws = Draws.by(unit, losses / most, images, whole=whole, looked=looked)
        return replace(draws, times=1 / most)

    @cached_property
    def _most(self) -> Mapping[str, float]:
        """The largest loss that an answer can have, by kind of prompt: found once, for it reads all
        references."""
        of: dict[str, list[Example]] = {}
        for kind, example in zip(self.kinds, self.tested.examples, strict=True):
            of.setdefault(kind, []).append(example)
        return {kind: self.tested.risk.most(examples) for kind, examples in of.items()}

    def rows_of(self, kinds: Collection[str]) -> Array:
        """Return the rows of answers to prompts of these kinds, ascending."""
        return np.array([row for row, kind in enumerate(self.kinds) if kind in kinds])

    def run(self, asked: Guarantee, progress: Any) -> Calibration:
        """Test the path until a point fails, and return the outcome. Nothing is tested, and no
        errors are spent, where success is impossible or the path is empty."""
        within = _within_reach(self, asked)
        walked = _walk(self, progress(self.turn.path or ()) if within else (), asked)
        found = _decide(self, walked, asked)
        return found if within else replace(found, **_out_of_reach(self, asked))

    def early(self, found: Calibration) -> list[Answer]:
        """Return early answers to the tested examples, each kind of prompt by its thresholds; empty
        without a guarantee. If the risk needs no right answers, only `ANSWERS` examples are
        answered."""
        if found.policy.own_mode != "early_exit":
            return []
        n = len(self.kinds) if self.tested.risk.quality else min(len(self.kinds), ANSWERS)
        answers: dict[int, Answer] = {}
        for kind in found.kinds:
            rows = [row for row in range(n) if self.kinds[row] == kind.kind]
            examples = [self.tested.examples[row] for row in rows]
            some = self.tested.answer(examples, found.policy.moved(kind.point)) if rows else []
            answers |= dict(zip(rows, some, strict=True))
        return [answers[row] for row in range(n)]

    def watched(self, early: Sequence[Answer], asked: Guarantee) -> dict[str, Any] | None:
        """Return, for a risk that needs right answers, upper bounds by kind of prompt of how
        much early answers differ from the full model's, which requests can test; None for other
        risks."""
        if not early or self.tested.risk.quality is None:
            return None
        risk = RISKS[CONSISTENCY]
        losses = risk.losses(early, self.tested.full, self.tested.examples)
        draws = replace(self, tested=replace(self.tested, risk=risk)).by_kind(losses, asked)
        bounds = {kind: upper_bound(part, asked.confidence) for kind, part in draws.items()}
        return {"risk": CONSISTENCY, "targets": {k: min(b, 0.999) for k, b in bounds.items()}}

    def qualities(self) -> dict[str, float]:
        """Return the mean quality of the full model's answers by kind of prompt, which is the most
        that can be lost."""
        quality = self.tested.risk.quality
        if quality is None:
            return {}
        worth, kinds = quality(self.tested.held_to, self.tested.examples), np.array(self.kinds)
        return {kind: float(worth[kinds == kind].mean()) for kind in sorted(set(self.kinds))}

    def likeness(self, early: Sequence[Answer], smallest: int | None) -> Likeness:
        """Return the likeness of the tested images and of the early answers; empty without a
        guarantee or without scores. smallest: as of `Example.open_image`."""
        early, examples = early[:ANSWERS], self.tested.examples
        images = [rows for image in self.images for rows in image.by_image] if early else []
        shown = [rows[0] for rows in images[:ANSWERS] if not examples[rows[0]].is_text]
        looks = [look_of(examples[row].open_image(smallest)) for row in shown]
        return Likeness.of(
            [answer.scores for answer in early], self.kinds[: len(early)], np.array(looks)
        )


def _spare(asked: Guarantee, turn: Turn, *, whole: bool) -> float:
    """What answers may lose so that a test still passes: what it leaves below the target where
    none of them loses anything. whole: whether what one loses is 0 or 1."""
    nothing = Draws.of(np.zeros(len(turn.images)), whole=whole)
    level = asked.level(turn.number, turn.handed)
    return max(0.0, asked.target - upper_bound(nothing, level, asked.method))


def trial_of(
    whole: ThresholdEvaluator,
    search: Sequence[ImageRows],
    tested: Sequence[ImageRows],
    grid: Sequence[float],
    attempts: Sequence[Attempt],
    digest: str,
    asked: Guarantee,
    *,
    search_first: bool,
    frames: Sequence[Sequence[str]],
) -> Trial:
    any_time = first_test(asked.method) in ANY_TIME
    turn = turn_of(attempts, digest, tested, any_time=any_time)
    if search_first and turn.continues is not None:
        whole = whole.with_first(max(turn.continues.outcome["first"].values()))
    elif search_first:
        spare = _spare(asked, turn, whole=whole.risk.whole)
        whole = whole.with_first(lowest(whole, search, grid, spare))
    if turn.path is None:
        turn = replace(turn, path=tuple(path_of(whole, search, grid)))
    rows = [row for image in turn.images for row in image.rows]
    starts = np.cumsum([0, *(len(image.rows) for image in turn.images)]).tolist()
    moved = tuple(image.at(start) for image, start in zip(turn.images, starts, strict=False))
    part = whole.part(np.array(rows))
    kinds = tuple(kind_of(example.prompt, frames) for example in part.examples)
    return Trial(part, moved, turn, asked.level(turn.number, turn.handed), kinds)


def _within_reach(trial: Trial, asked: Guarantee) -> bool:
    """Whether the test passes where no answer loses anything; else none need be tested, and no
    share of the errors is spent. Of a risk with gains it may pass with fewer images."""
    if trial.tested.risk.low < 0 or trial.turn.continues is not None:
        return True
    test = first_test(asked.method)
    level = 1 - trial.level
    return p_value(trial.nothing(asked), asked.target, test, level) <= level


def _out_of_reach(trial: Trial, asked: Guarantee) -> dict[str, Any]:
    """The number of images needed, and the reason in words."""
    drawn = "groups" if grouped(trial.images) else "images"
    needed = draws_needed(trial.nothing(asked), asked.target, trial.level, asked.method)
    reason = (
        f"{trial.number_of(asked)} {drawn} are too few for {asked.target:g} even if no answer lost "
        f"anything: {needed} are needed. None was tested, and no attempt is spent."
    )
    return {"needed": needed, "reason": reason}


@dataclass(frozen=True)
class _Walked:
    """What answers lose at each point of the path that any kind of prompt reached [rows, K], and
    the points. reached: how many points were tried of each kind, its first failure included."""

    losses: Array
    points: Sequence[Point]
    reached: Mapping[str, int]

    @property
    def together(self) -> int:
        """How many points were tried of all kinds."""
        return min(self.reached.values(), default=0)


def _walk(trial: Trial, path: Iterable[Thresholds], asked: Guarantee) -> _Walked:
    """Test the path until a point fails; of several kinds of prompts each until it does."""
    method, error, tested = first_test(asked.method), 1 - trial.level, trial.tested
    columns, points = [np.zeros((len(tested.examples), 0))], list[Point]()
    reached: dict[str, int] = {}
    going: Collection[str] | None = None
    for thresholds in path:
        losses = np.zeros(len(tested.examples))
        if going is None or not asked.by_kind:
            losses = tested.losses(thresholds)
        else:  # of the others nothing more is asked
            rows = trial.rows_of(going)
            losses[rows] = tested.part(rows).losses(thresholds)
        columns.append(losses[:, None])
        parts = trial.draws(losses, asked)
        parts = parts if going is None else {kind: parts[kind] for kind in going}
        bound = upper_bound([*parts.values()], trial.level, method)
        point = Point(
            thresholds, highest_risk([*parts.values()]), bound, tested.seconds(thresholds)
        )
        points.append(point)
        reached |= dict.fromkeys(parts, len(points))
        p_values = {kind: p_value(one, asked.target, method, error) for kind, one in parts.items()}
        going = [kind for kind, p in p_values.items() if p <= error]
        if not going:
            break
    return _Walked(np.concatenate(columns, 1), points, reached)


def _chosen(
    losses: Sequence[Draws],
    points: Sequence[Point],
    trial: Trial,
    asked: Guarantee,
    among: Collection[int] | None = None,
) -> tuple[Point | None, Decision]:
    """The fastest point that passed; of some that all keep the risk any may be taken, and where no
    times are known it is the last. among: depths of the exits that run; None: all."""
    decision = control(losses, asked.target, trial.level, asked.method, trial.tested.risk.low)
    passed = [] if decision.index is None else points[: decision.index + 1]
    passed = [p for p in passed if among is None or p.thresholds.keys() <= set(among)]
    return min(reversed(passed), key=lambda point: point.seconds or 0.0, default=None), decision


def _decide(trial: Trial, walked: _Walked, asked: Guarantee) -> Calibration:
    """The fastest point that passed, if it beats the full model; else none, and why."""
    tested, n = trial.tested, trial.number_of(asked)
    points, losses = walked.points[: walked.together], walked.losses[:, : walked.together]
    draws = [*trial.draws(losses, asked).values()]
    chosen, decision = _chosen(draws, points, trial, asked)
    measured = (chosen or points[0]).risk if points else 0.0
    times = min(part.times for part in draws)
    strictest, lost = min(asked.target * times, 1.0), measured * times
    needed = samples_needed(strictest, trial.level, decision.method, lost)
    if decision.index is None and first_test(asked.method) == "sharp":  # there was a look at these
        needed = more_needed(strictest, trial.level, lost)
    full = tested.seconds({})
    speedup = full / chosen.seconds if chosen and full and chosen.seconds else None
    reason, groups = "", n if grouped(trial.images) else None
    if not points or (speedup is not None and speedup <= 1):
        chosen = speedup = None
        reason = "No exit is predicted to pay: its checks cost more than they save."
    elif chosen is None:
        reason = _too_little(points[0], n, asked, needed, "groups" if groups else "images")
    kinds, columns = _kinds(trial, walked, chosen, asked)
    bound = chosen.bound if chosen else None
    if chosen and asked.by_kind:
        measured = highest_risk(columns)
        bound = upper_bound(columns, trial.level, first_test(asked.method))
    return Calibration(
        policy=tested.at(None if chosen is None else chosen.thresholds),
        risk=asked.risk,
        target=asked.target,
        confidence=asked.confidence,
        method=decision.method,
        monotone=decision.monotone,
        measured=measured if chosen else None,
        bound=bound,
        n=trial.images_tested,
        groups=groups,
        answers=len(tested.examples),
        attempt=trial.turn.number,
        level=trial.level,
        needed=needed,
        speedup=speedup,
        reason=reason,
        path=tuple(points),
        unit="group" if groups and asked.unit == "image" else asked.unit,
        copies=merged(trial.images),
        candidates=asked.candidates,
        largest=max((len(part) for image in trial.images for part in image.by_image), default=1),
        whole=decision.index is not None and decision.index + 1 == len(trial.turn.path or ()),
        each_kind=asked.by_kind,
        kinds=kinds,
    )


def _kinds(
    trial: Trial, walked: _Walked, chosen: Point | None, asked: Guarantee
) -> tuple[tuple[Kind, ...], list[Draws]]:
    """What was measured by kind of prompt, and its losses, at the point chosen or, where each kind
    is tested, at its own, which lies no nearer to the full model."""
    kinds, columns = list[Kind](), list[Draws]()
    own = chosen is not None and asked.by_kind
    for kind, draws in trial.by_kind(walked.losses, asked).items() if walked.points else ():
        point, target = chosen or walked.points[0], asked.target_of(kind)
        if own:
            tried = walked.reached[kind]
            losses = replace(draws, sums=draws.sums[:, :tried])
            found, _ = _chosen([losses], walked.points[:tried], trial, asked, point.thresholds)
            point = found or point
        columns.append(draws.column(walked.points.index(point)))
        kinds.append(
            Kind(
                kind,
                draws.n,
                trial.kinds.count(kind),
                risk=highest_risk(columns[-1:]) * target / asked.target,
                target=None if target == asked.target else target,
                point=point.thresholds if own else None,
            )
        )
    return tuple(kinds), columns


def _too_little(
    safest: Point, n: int, asked: Guarantee, needed: int | None, drawn: str = "images"
) -> str:
    """The reason in words: too few images. drawn: the name of the n units tested."""
    measured = (
        f"At the safest thresholds the risk by {asked.unit} is {safest.risk:.4f} on {n} {drawn}"
    )
    if needed is None:
        return f"{measured}, which is above the target: no number of {drawn} would do."
    about = f"about {needed} {drawn} are needed"
    if asked.unit == "answer":
        about += f", and more where {drawn} have unequal numbers of answers"
    return f"{measured}; to guarantee {asked.target:g} at that risk, {about}."
