"""Thresholds with a guarantee: on answers to come, the risk stays below a target at a confidence.

One pass of the full model over the examples gives its answers, a replay of these what the exits
would have said; only answers that thresholds change are generated again. A path of
thresholds, the safest first, is then tested until one fails (`risk_control`). With several exits
the path is found on a part of the images that is not tested on (`threshold_search`), and so are a
threshold of first tokens. What is drawn is images, and all attempts
on the same images share one error budget (`attempts`). What the answers were made by is noted
beside the guarantee (`offramp.promises.guarantee`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from offramp.adapter.adapter import Adapter
from offramp.adapter.answers import Answer, Runtime
from offramp.calibration.asked import Guarantee
from offramp.calibration.attempts import (
    Attempt,
    Draws,
    ImageRows,
    Turn,
    grouped,
    images_of,
    merged,
    recorded,
    turn_of,
)
from offramp.calibration.cost_model import Costs
from offramp.calibration.risk_control import (
    ANY_TIME,
    control,
    draws_needed,
    first_test,
    highest_risk,
    more_needed,
    p_value,
    samples_needed,
    upper_bound,
)
from offramp.calibration.risk_functions import RISKS, Judged
from offramp.calibration.threshold_evaluator import (
    ThresholdEvaluator,
    lowest,
    path_of,
    split_images,
)
from offramp.calibration.threshold_search import Array
from offramp.calibration.trust_path import LEVELS, TrustPath, trusting
from offramp.core.decoding.policy import (
    ExitPolicy,
    Thresholds,
    first_token_may_exit,
    policy_to_json,
    resolved,
)
from offramp.core.errors import DataError, InputError
from offramp.core.inputs.example import Example, examples_digest
from offramp.core.storage import digest_rows
from offramp.data.decontamination import check_no_overlap, picture_digests, unseen
from offramp.data.item import Item
from offramp.features.input_processor import InputProcessor
from offramp.features.self_check import check_untested
from offramp.promises.conditions import (
    TORCH,
    Conditions,
    differences,
    of_processor,
    samples,
    tensors_digest,
)
from offramp.promises.likeness import ANSWERS, Likeness, look_of
from offramp.promises.prompt_kinds import kind_of, prompt_frames

CONSISTENCY = "consistency"
AUTO = "auto"
"""Of first tokens: a threshold is searched."""
GRID = (0.999, 0.995, 0.99, *(n / 100 for n in range(98, 8, -2)))
"""Thresholds that are tested. A step of 0.1 was 18 to 26% of the speed."""
COARSE = (0.999, 0.995, 0.99, 0.98, 0.97, 0.95, 0.92, *(n / 20 for n in range(18, 1, -1)))
"""Those of a runtime, which answers everything again at each."""


# -- what is asked, and what is found --------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A point of the path.

    risk, bound: measured on the tested images, and what the method bounds it by; where kinds of
        prompts are tested, of the worst, with a target of its own in units of that of all.
    seconds: predicted, of a decoded token; None without a replay or costs.
    """

    thresholds: Thresholds
    risk: float
    bound: float
    seconds: float | None


@dataclass(frozen=True)
class Kind:
    """Prompts of a kind: what was measured of them at the thresholds that were chosen, or at the
    safest ones where none were. kind: see `offramp.promises.prompt_kinds.kind_of`. target: its own;
    None: that of all."""

    kind: str
    images: int
    answers: int
    risk: float
    target: float | None = None


@dataclass(frozen=True)
class Calibration:
    """A guarantee and its evidence.

    policy: thresholds that passed, exits that none uses left out; without thresholds if nothing
        can be guaranteed, and then `reason` says why.
    method: that decided; see `offramp.calibration.risk_control.control`, as for `monotone`.
    unit: what the risk is a mean over; see `Guarantee`; "group": groups of images.
    measured, bound: the risk on the n tested images, and its upper bound.
    n, answers: images tested, copies left out, and answers to them. groups: that these images came
        in, which are what was drawn; None: each came alone. copies: images that were found
        to be copies of others.
    attempt: number of this attempt among those on the same images. level: the confidence at which
        its tests were made, so that all attempts together keep `confidence`. candidates: among
        which the best is taken; see `Guarantee`.
    needed: images that would be enough at the risk measured (where nothing passed: at the safest
        point); None where that is above the target, so that no number would.
    speedup: of decoding, predicted from measured costs.
    path: what was tested, up to the first failure.
    attempts: all that were made with these exits, this one included.
    likeness: of the early answers at these thresholds, to know others that are like them by.
    watched: of a risk that needs right answers, what is watched in its place, and how much of it
        was calibrated; see `offramp.promises.guarantee.watched`.
    largest: answers of the image that had most. whole: whether the last thresholds of the path kept
        the risk too. each_kind: whether the target holds of each of
        `kinds`, by what was measured of each. qualities: of a risk with labels, the mean quality of
        the full model's answers by kind of prompt, in units of its losses.
    runtime: whose answers the guarantee is about, by name; None: PyTorch's.
    conditions: what else it holds under; see `offramp.promises.conditions`.
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
    data_digest: str
    attempts: tuple[Attempt, ...] = ()
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

    def to_json(self) -> dict[str, Any]:
        """Return the calibration as an adapter stores it, without the attempts; thresholds are
        keyed by depth."""
        path = [{**asdict(point), "thresholds": point.thresholds.to_json()} for point in self.path]
        entries = {**asdict(self), "policy": policy_to_json(self.policy), "path": path}
        entries |= {"kinds": list(entries["kinds"]), "conditions": self.conditions.to_json()}
        entries["likeness"] = self.likeness.to_json()
        del entries["attempts"]
        return entries


def calibrated(adapter: Adapter, calibration: Calibration, examples: Sequence[Example]) -> Adapter:
    """The adapter with the policy that was found, its guarantee, and the images it stands on."""
    used = {*adapter.seen.get("calibration", ()), *picture_digests(examples)}
    seen = {**adapter.seen, "calibration": sorted(used)}
    attempted = with_attempts(adapter, calibration)
    return replace(attempted.with_policy(calibration.policy, calibration.to_json()), seen=seen)


def with_attempts(adapter: Adapter, calibration: Calibration) -> Adapter:
    """The adapter as it is, with the attempts made: what is left of a calibration that failed."""
    return replace(adapter, attempts=[attempt.to_json() for attempt in calibration.attempts])


# -- calibration ----------------------------------------------------------------------------------


def calibrate(
    adapter: Adapter,
    encoder: InputProcessor,
    examples: Sequence[Example | Item],
    policy: ExitPolicy,
    *,
    target: float = 0.01,
    confidence: float = 0.95,
    risk: str = "disagreement",
    method: str = "auto",
    unit: str = "image",
    candidates: int = 1,
    each_kind: bool = False,
    kind_targets: Mapping[str, float] | None = None,
    thresholds: Sequence[float] | None = None,
    first: float | str | None = None,
    frequencies: Sequence[Example] | None = None,
    batch_size: int = 64,
    costs: Costs | None = None,
    runtime: Runtime | None = None,
    progress: Any = iter,
    **options: Any,
) -> Calibration:
    """The fastest thresholds found that keep P(risk <= target) >= confidence.

    One exit is tested along the grid `thresholds` (None: `GRID`, of a runtime `COARSE`). Several
    are, each with its own threshold or off, along a path found on a part of the images, if costs
    are given and the policy can be replayed (greedy, a score of `SCORES`); otherwise all share one
    threshold.

    Args:
        examples: of images drawn like those to come, each on its own, and never trained on; of an
            item with references, what is lost is lost against these.
        policy: what to calibrate; its own thresholds are ignored, its score is kept. With any trust
            its trust is found, in place of thresholds: one run tells the losses at all levels, and
            the grid `thresholds` is one of them (None: `LEVELS`).
        first: threshold of an answer's first token, with which the prompt may wait at its exit:
            a number that was chosen before any of these images was looked at; or "auto": it is
            searched, on images that are then not tested on. None: the policy's own.
        frequencies: with the risk "cider_drop", examples of other images, whose references weigh
            words; those of images that are calibrated on are left out. None: a part of the images,
            which is then not tested on, weighs them.
        risk: of `RISKS`. method: of `offramp.calibration.risk_control.METHODS`. unit,
            candidates, each_kind, kind_targets: see `Guarantee`.
        costs: of decoding on this machine, by `offramp.calibration.profiler.measure_costs`; None:
            no speed is predicted, and the fastest thresholds are the last that keep the risk.
        runtime: answers in the adapter's place, e.g. with quantised weights: the guarantee is then
            of its answers, and all exits share one threshold.
        options: of generation, such as max_new_tokens.

    Raises:
        InputError: an argument cannot be used.
        DataError: no examples, images that training used or of which many are copies, no
            references that the risk can be measured against, a full model that
            is wrong everywhere, or scores that are constant or NaN.
    """
    asked = Guarantee(
        target, confidence, risk, method, unit, candidates, each_kind, dict(kind_targets or {})
    )
    if policy.trust is None:
        thresholds = thresholds or (GRID if runtime is None else COARSE)
    else:
        thresholds = thresholds or LEVELS
        policy = trusting(policy, adapter, options.get("max_new_tokens", policy.max_draft))
    judged = list(map(Judged.of, examples))
    policy = _policy_of(policy, first, adapter, encoder)
    _check_examples(adapter, judged, risk, policy)
    return _calibrate(
        adapter, encoder, judged, policy, asked, thresholds, first, frequencies, options,
        costs=costs, batch_size=batch_size, runtime=runtime, progress=progress,
    )  # fmt: skip


def _calibrate(
    adapter: Adapter, encoder: InputProcessor, judged: Sequence[Example], policy: ExitPolicy,
    asked: Guarantee, thresholds: Sequence[float], first: float | str | None,
    frequencies: Sequence[Example] | None, options: dict[str, Any], *,
    runtime: Runtime | None, progress: Any, **how: Any,
) -> Calibration:  # fmt: skip
    """Calibrate what was checked; arguments as of `calibrate`. how: costs and batch_size."""
    images = images_of(judged)  # before the model runs: they may be refused
    check_untested(encoder, judged[:1], adapter.exits.depths)
    tried = ThresholdEvaluator if policy.trust is None else TrustPath
    whole: ThresholdEvaluator = tried.of(
        adapter, encoder, judged, policy, RISKS[asked.risk], runtime=runtime, **how, **options
    )
    _check_quality(whole)
    also = first == AUTO or (bool(whole.risk.weighed) and frequencies is None)
    search, tested = split_images(whole, images, also=also)
    whole, weighed = _weighed(whole, frequencies, [row for image in search for row in image.rows])
    attempts = tuple(map(Attempt.from_json, adapter.attempts))
    name = None if runtime is None else runtime.name
    here = {"engine": name, **of_processor(encoder.processor), "exits": adapter.exits}
    frames = prompt_frames([example.prompt for example in judged])
    unlike = _unlike_usual(Conditions.of(encoder.backbone, policy, **here), policy, adapter)
    settings = {
        **_settings(asked, policy, thresholds, options),
        "runtime": name,
        **({"first": AUTO} if first == AUTO else {}),
        **weighed,
        **({"conditions": unlike} if unlike else {}),
        **_counted(asked, judged, images, frames),
    }
    digest = digest_rows([settings, tensors_digest(adapter.exits.modules)])
    trial = _trial(
        whole, search, tested, thresholds, attempts, digest, asked,
        search_first=first == AUTO, frames=frames,
    )  # fmt: skip
    calibration, was_tested = _test(trial, asked, judged, progress)
    if was_tested:  # else no errors were risked
        attempt = _attempt(trial, calibration, digest, settings)
        attempts = recorded(attempts, attempt, trial.turn.continues)
    found = replace(calibration, attempts=attempts, runtime=name)
    return _with_conditions(found, trial, encoder, frames, options, here)


def _with_conditions(
    found: Calibration, trial: _Trial, encoder: InputProcessor, frames: Sequence[Sequence[str]],
    options: Mapping[str, Any], here: Mapping[str, Any],
) -> Calibration:  # fmt: skip
    """Add the conditions under which what was found holds, and the scores of its calibrated
    answers. frames: of `prompt_frames`. here: of engine, processor and exits."""
    early = _early(trial, found.policy)
    likeness = _likeness(trial, early, encoder.smallest_side)
    conditions = Conditions.of(
        encoder.backbone,
        found.policy,
        sampling="sampled" if samples(encoder.backbone, options) else "greedy",
        longest=options.get("max_new_tokens"),
        prompts=frames,
        any_prompt=likeness.tells("") or None,
        **here,
    )
    watched = _watched(trial, early, Guarantee(confidence=found.confidence, unit=found.unit))
    found = replace(found, conditions=conditions, likeness=likeness, watched=watched)
    return replace(found, qualities=_qualities(trial))


def _test(
    trial: _Trial, asked: Guarantee, judged: Sequence[Example], progress: Any
) -> tuple[Calibration, bool]:
    """What was found, and whether any thresholds were tested for it."""
    within = _within_reach(trial, asked)
    losses, points = _walk(trial, progress(trial.turn.path or ()) if within else (), asked)
    found = _decide(trial, losses, points, asked, examples_digest(judged))
    return found if within else replace(found, **_out_of_reach(trial, asked)), bool(points)


def _weighed(
    whole: ThresholdEvaluator, others: Sequence[Example] | None, searched_on: Sequence[int]
) -> tuple[ThresholdEvaluator, dict[str, Any]]:
    """The evaluator whose risk weighs words by the references of images that are not tested on,
    and the setting that tells which: with others it is another attempt."""
    if whole.risk.weighed is None:
        return whole, {}
    if others is None:
        others = [whole.examples[row] for row in searched_on]
    else:
        kept = unseen({"own": [*picture_digests(whole.examples)]}, others, ("own",))
        others = [example for example, keep in zip(others, kept, strict=True) if keep]
    words = digest_rows(sorted([*example.answers] for example in others))
    return replace(whole, risk=whole.risk.weighed(others)), {"frequencies": words}


def _counted(
    asked: Guarantee,
    judged: Sequence[Example],
    images: Sequence[ImageRows],
    frames: Sequence[Sequence[str]],
) -> dict[str, Any]:
    """Settings of what the bounds count: kinds of prompt, and answers of one image or group."""
    settings: dict[str, Any] = {}
    if asked.by_kind:
        settings["kinds"] = sorted({kind_of(example.prompt, frames) for example in judged})
    if asked.unit == "answer":  # by which bets are scaled
        settings["largest"] = max(len(image.rows) for image in images)
    elif grouped(images):
        settings["each"] = "group"
    return settings


def _policy_of(
    policy: ExitPolicy, first: float | str | None, adapter: Adapter, encoder: InputProcessor
) -> ExitPolicy:
    """The policy to calibrate. Raise `InputError` where first tokens cannot have a threshold."""
    if first is None:
        return resolved(policy, encoder.backbone)
    if policy.trust is not None:
        raise InputError(
            "By trust an answer's first token is decided about with all others.",
            "Leave the threshold for first tokens out, or calibrate --by thresholds.",
        )
    is_share = isinstance(first, int | float) and 0 <= first <= 1
    if not (is_share or first == AUTO):
        raise InputError(
            f"A threshold of {first!r} for first tokens is not known.",
            f"Give a number from 0 to 1, or {AUTO!r} to have it searched.",
        )
    own = None if isinstance(first, str) else Thresholds.shared(adapter.exits.depths, first)
    policy = resolved(replace(policy, first=own), encoder.backbone)
    if not first_token_may_exit(encoder.backbone, policy):
        raise InputError(
            f"First tokens of {encoder.backbone.name} never exit: its prompts are read whole.",
            "Calibrate without a threshold for first tokens.",
        )
    return policy


def _attempt(
    trial: _Trial, calibration: Calibration, asked: str, settings: dict[str, Any]
) -> Attempt:
    """The attempt as it is stored."""
    searched = settings.get("first") == AUTO
    own = {"first": Thresholds(trial.tested.policy.first or {}).to_json()} if searched else {}
    outcome: dict[str, Any] = {
        n: getattr(calibration, n) for n in ("n", "measured", "bound", "reason")
    }
    return Attempt(
        asked=asked,
        settings=settings,
        number=trial.turn.number,
        images=tuple(image.name for image in trial.turn.images),
        members=tuple(sorted({m for image in trial.turn.images for m in image.members})),
        path=trial.turn.path or (),
        looked=trial.turn.looked,
        outcome={
            **outcome,
            "thresholds": Thresholds(calibration.policy.thresholds).to_json(),
            "passed": calibration.whole,
            **({} if calibration.policy.trust is None else {"trust": calibration.policy.trust}),
            **own,
        },
    )


def _check_examples(
    adapter: Adapter, examples: Sequence[Example], risk: str, policy: ExitPolicy
) -> None:
    if policy.lossless:
        raise InputError(
            "Lossless answers are the full model's, so there is no risk to calibrate.",
            "Calibrate a policy with lossless=False.",
        )
    if not examples:
        raise DataError(
            "There are no examples to calibrate on.", "Check the data's path and split."
        )
    unlabelled = [e.key for e in examples if not e.answers]
    if RISKS[risk].quality is not None and unlabelled:
        raise DataError(
            f"{len(unlabelled)} examples, such as {unlabelled[0]!r}, have no answer to compare "
            f"with, and the risk {risk!r} needs one.",
            "Add answers, or calibrate without labels: --risk disagreement or consistency.",
        )
    check_no_overlap(
        adapter.seen, examples, ("train",), "Calibrate on images that training has not seen."
    )
    if (quality := RISKS[risk].quality) is not None:
        quality([Answer((), "")] * len(examples), examples)  # refuses what it cannot judge


def _check_quality(whole: ThresholdEvaluator) -> None:
    """Raise `DataError` where the full model has no quality to lose."""
    quality, examples = whole.risk.quality, whole.examples
    if quality is not None and not quality(whole.full, examples).any():
        raise DataError(
            f"The full model is wrong on all {len(examples)} examples, so no drop can be measured.",
            "Check the prompts and the answers, or calibrate without labels: --risk disagreement.",
        )


def _settings(
    asked: Guarantee, policy: ExitPolicy, grid: Sequence[float], options: dict[str, Any]
) -> dict[str, Any]:
    """What an attempt depends on besides exits and images; how many tokens are drafted changes no
    early answer but by trust."""
    most = ExitPolicy.max_draft if policy.trust is None else policy.max_draft
    plain = replace(policy, thresholds={}, drafts={}, max_draft=most)
    shown = {name: value for name, value in options.items() if isinstance(value, str | int | float)}
    how = {name: value for name, value in asdict(asked).items() if value != {}}
    return {**how, "policy": policy_to_json(plain), "grid": list(grid), "options": shown}


USUAL = Conditions(
    dtype="float32", quantized="", kernels="plain", vision=TORCH, shrink_on_load=False,
    device="cpu", template="", autocast="", matmul="highest",
)  # fmt: skip
"""What an attempt is made under that says nothing else."""


def _unlike_usual(here: Conditions, policy: ExitPolicy, adapter: Adapter) -> dict[str, Any]:
    """The conditions that are not the usual ones, where no guarantee of those would hold; and
    digests of the checks that the policy uses."""
    unlike = {
        name: here[name]
        for name, value in USUAL.items()
        if differences(here.under(**{name: value}), here)
    }
    ids = adapter.exits.shortlist
    if policy.shortlist and ids is not None:
        unlike["shortlist"] = digest_rows([ids.tolist()])
    return unlike


# -- the path, and what it is tested on ------------------------------------------------------------


@dataclass(frozen=True)
class _Trial:
    """What is tested: examples, their images in the order of the bets, and the turn's path.

    images: their rows are places in `tested.examples`. level: confidence of each test. kinds: names
    of the kinds of prompts [rows].
    """

    tested: ThresholdEvaluator
    images: tuple[ImageRows, ...]
    turn: Turn
    level: float
    kinds: tuple[str, ...]

    def draws(self, losses: Array, asked: Guarantee) -> list[Draws]:
        """Losses [answers, ...] as those of the images: of all or, where the target is to hold of
        each kind of prompt, of each."""
        if not asked.by_kind:
            return [self._of(losses, asked.unit, self.images, self.turn.looked)]
        return list(self.by_kind(losses, asked).values())

    @property
    def images_tested(self) -> int:
        """Images, those that are copies of others left out."""
        return sum(len(image.by_image) for image in self.images) - merged(self.images)

    def nothing(self, asked: Guarantee) -> list[Draws]:
        """Draws of answers that lose nothing."""
        return self.draws(np.zeros(len(self.tested.examples)), asked)

    def number_of(self, asked: Guarantee) -> int:
        """Images, or groups of them, that were tested, copies left out; of kinds, the fewest."""
        return min(part.n for part in self.nothing(asked))

    def by_kind(self, losses: Array, asked: Guarantee) -> dict[str, Draws]:
        """The same by kind of prompt."""
        found = {}
        for kind in sorted(set(self.kinds)):
            rows = {row for row, name in enumerate(self.kinds) if name == kind}
            parts = [image.of_rows(rows) for image in self.images]
            looked = sum(part is not None for part in parts[: self.turn.looked])
            draws = self._of(losses, asked.unit, [part for part in parts if part], looked)
            found[kind] = replace(draws, times=asked.target_of(kind) / asked.target)
        return found

    def _of(self, losses: Array, unit: str, images: Sequence[ImageRows], looked: int) -> Draws:
        return Draws.by(unit, losses, images, whole=self.tested.risk.whole, looked=looked)


def _spare(asked: Guarantee, turn: Turn, *, whole: bool) -> float:
    """What answers may lose so that a test still passes: what it leaves below the target where
    none of them loses anything. whole: whether what one loses is 0 or 1."""
    nothing = Draws.of(np.zeros(len(turn.images)), whole=whole)
    level = asked.level(turn.number, turn.handed)
    return max(0.0, asked.target - upper_bound(nothing, level, asked.method))


def _trial(
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
) -> _Trial:
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
    return _Trial(part, moved, turn, asked.level(turn.number, turn.handed), kinds)


def _within_reach(trial: _Trial, asked: Guarantee) -> bool:
    """Whether the test passes where no answer loses anything; else none need be tested, and no
    share of the errors is spent. Of a risk with gains it may pass with fewer images."""
    if trial.tested.risk.low < 0 or trial.turn.continues is not None:
        return True
    test = first_test(asked.method)
    level = 1 - trial.level
    return p_value(trial.nothing(asked), asked.target, test, level) <= level


def _out_of_reach(trial: _Trial, asked: Guarantee) -> dict[str, Any]:
    """The number of images needed, and the reason in words."""
    drawn = "groups" if grouped(trial.images) else "images"
    needed = draws_needed(trial.nothing(asked), asked.target, trial.level, asked.method)
    reason = (
        f"{trial.number_of(asked)} {drawn} are too few for {asked.target:g} even if no answer lost "
        f"anything: {needed} are needed. None was tested, and no attempt is spent."
    )
    return {"needed": needed, "reason": reason}


def _walk(trial: _Trial, path: Iterable[Thresholds], asked: Guarantee) -> tuple[Array, list[Point]]:
    """What answers lose at each point of the path [rows, K], and the points, up to the first that
    fails."""
    method = first_test(asked.method)
    columns = [np.zeros((len(trial.tested.examples), 0))]
    points: list[Point] = []
    for thresholds in path:
        losses = trial.tested.losses(thresholds)
        columns.append(losses[:, None])
        draws = trial.draws(losses, asked)
        bound = upper_bound(draws, trial.level, method)
        seconds = trial.tested.seconds(thresholds)
        points.append(Point(thresholds, highest_risk(draws), bound, seconds))
        if p_value(draws, asked.target, method, 1 - trial.level) > 1 - trial.level:
            break
    return np.concatenate(columns, 1), points


def _decide(
    trial: _Trial, losses: Array, points: Sequence[Point], asked: Guarantee, digest: str
) -> Calibration:
    """The fastest point that passed, if it beats the full model; else none, and why."""
    tested, n = trial.tested, trial.number_of(asked)
    decision = control(
        trial.draws(losses, asked), asked.target, trial.level, asked.method, tested.risk.low
    )
    passed = [] if decision.index is None else points[: decision.index + 1]
    # All that passed keep the risk, so any may be taken: the last where no times are known.
    chosen = min(reversed(passed), key=lambda point: point.seconds or 0.0, default=None)
    measured = (chosen or points[0]).risk if points else 0.0
    needed = samples_needed(asked.target, trial.level, decision.method, measured)
    if not passed and first_test(asked.method) == "sharp":  # there was a look at these
        needed = more_needed(asked.target, trial.level, measured)
    full = tested.seconds({})
    speedup = full / chosen.seconds if chosen and full and chosen.seconds else None
    reason, groups = "", n if grouped(trial.images) else None
    if not points or (speedup is not None and speedup <= 1):
        chosen = speedup = None
        reason = "No exit is predicted to pay: its checks cost more than they save."
    elif chosen is None:
        reason = _too_little(points[0], n, asked, needed, "groups" if groups else "images")
    return Calibration(
        policy=tested.at(None if chosen is None else chosen.thresholds),
        risk=asked.risk,
        target=asked.target,
        confidence=asked.confidence,
        method=decision.method,
        monotone=decision.monotone,
        measured=chosen.risk if chosen else None,
        bound=chosen.bound if chosen else None,
        n=trial.images_tested,
        groups=groups,
        answers=len(tested.examples),
        attempt=trial.turn.number,
        level=trial.level,
        needed=needed,
        speedup=speedup,
        reason=reason,
        path=tuple(points),
        data_digest=digest,
        unit="group" if groups and asked.unit == "image" else asked.unit,
        copies=merged(trial.images),
        candidates=asked.candidates,
        largest=max((len(part) for image in trial.images for part in image.by_image), default=1),
        whole=bool(points) and len(passed) == len(trial.turn.path or ()),
        each_kind=asked.by_kind,
        kinds=_kinds(trial, losses, points.index(chosen) if chosen else 0, asked),
    )


def _early(trial: _Trial, policy: ExitPolicy) -> list[Answer]:
    """Return early answers to what was tested: to all of it where the risk needs right answers,
    else to `ANSWERS`; none where nothing is guaranteed."""
    if policy.own_mode != "early_exit":
        return []
    n = len(trial.kinds) if trial.tested.risk.quality else min(len(trial.kinds), ANSWERS)
    return trial.tested.answer(trial.tested.examples[:n], policy)


def _watched(trial: _Trial, early: Sequence[Answer], asked: Guarantee) -> dict[str, Any] | None:
    """Return what requests can show where the risk needs right answers: by kind of prompt, an upper
    bound of how much early answers differ from the full model's; None of other risks."""
    if not early or trial.tested.risk.quality is None:
        return None
    risk = RISKS[CONSISTENCY]
    losses = risk.losses(early, trial.tested.full, trial.tested.examples)
    draws = replace(trial, tested=replace(trial.tested, risk=risk)).by_kind(losses, asked)
    bounds = {kind: upper_bound(part, asked.confidence) for kind, part in draws.items()}
    return {"risk": CONSISTENCY, "targets": {k: min(b, 0.999) for k, b in bounds.items()}}


def _qualities(trial: _Trial) -> dict[str, float]:
    """Return what the full model's answers are worth, by kind of prompt: all that can be lost."""
    quality = trial.tested.risk.quality
    if quality is None:
        return {}
    worth, kinds = quality(trial.tested.full, trial.tested.examples), np.array(trial.kinds)
    return {kind: float(worth[kinds == kind].mean()) for kind in sorted(set(trial.kinds))}


def _likeness(trial: _Trial, early: Sequence[Answer], smallest: int | None) -> Likeness:
    """Return the likeness of the tested images and of early answers about them; of nothing where
    nothing is guaranteed, or where what answers tells no scores. smallest: as of
    `Example.open_image`."""
    early, examples = early[:ANSWERS], trial.tested.examples
    images = [rows for image in trial.images for rows in image.by_image] if early else []
    shown = [rows[0] for rows in images[:ANSWERS] if not examples[rows[0]].is_text]
    looks = [look_of(examples[row].open_image(smallest)) for row in shown]
    return Likeness.of(
        [answer.scores for answer in early], trial.kinds[: len(early)], np.array(looks)
    )


def _kinds(trial: _Trial, losses: Array, point: int, asked: Guarantee) -> tuple[Kind, ...]:
    """What was measured by kind of prompt at a point of the path."""
    if losses.shape[1] == 0:
        return ()
    found = trial.by_kind(losses[:, point], asked)
    return tuple(
        Kind(
            kind,
            draws.n,
            trial.kinds.count(kind),
            float(draws.risk),
            None if draws.times == 1 else asked.target_of(kind),
        )
        for kind, draws in found.items()
    )


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
