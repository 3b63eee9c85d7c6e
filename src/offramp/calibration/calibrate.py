"""Thresholds with a guarantee: on answers to come, the risk stays below a target at a confidence.

One pass of the full model over the examples gives its answers, a replay of these what the exits
would have said; only answers that thresholds change are generated again. A path of
thresholds, the safest first, is then tested until one fails (`risk_control`). With several exits
the path is found on a part of the images that is not tested on (`threshold_search`), and so are a
threshold of first tokens. What is drawn is images, and all attempts
on the same images share one error budget (`attempts`). What the answers were made by is noted
beside the guarantee (`offramp.promises.guarantee`).
Answers are held to the full model's in the same engine; where the vision tower rounds, to those by
the model's own tower in PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from offramp.adapter.adapter import Adapter
from offramp.adapter.answers import Answer, generate_answers
from offramp.adapter.runtime import Runtime
from offramp.calibration.asked import Guarantee
from offramp.calibration.attempts import Attempt, ImageRows, grouped, images_of, recorded
from offramp.calibration.cost_model import Costs
from offramp.calibration.risk_functions import RISKS, Judged
from offramp.calibration.threshold_evaluator import ThresholdEvaluator, split_images
from offramp.calibration.trial import Calibration, Trial, trial_of
from offramp.calibration.trust_path import LEVELS, TrustPath, trusting
from offramp.core.decoding.policy import (
    ExitPolicy,
    Thresholds,
    first_token_may_exit,
    policy_to_json,
    resolved,
)
from offramp.core.errors import DataError, InputError
from offramp.core.models.as_loaded import tensors_digest
from offramp.core.storage import digest_rows
from offramp.data.decontamination import check_no_overlap, picture_digests, unseen
from offramp.data.item import Item
from offramp.features.input_processor import InputProcessor
from offramp.features.self_check import check_untested
from offramp.features.vision_engine import ROUNDED
from offramp.inputs.example import Example, examples_digest
from offramp.promises.conditions import TORCH, Conditions, differences, of_processor, samples
from offramp.promises.prompt_kinds import kind_of, prompt_frames

AUTO = "auto"
"""Of first tokens: a threshold is searched."""
GRID = (0.999, 0.995, 0.99, *(n / 100 for n in range(98, 8, -2)))
"""Thresholds that are tested. A step of 0.1 was 18 to 26% of the speed."""
COARSE = (0.999, 0.995, 0.99, 0.98, 0.97, 0.95, 0.92, *(n / 20 for n in range(18, 1, -1)))
"""Those of a runtime, which answers everything again at each."""


def calibrated(adapter: Adapter, calibration: Calibration, examples: Sequence[Example]) -> Adapter:
    """Return the adapter with the calibration's policy and guarantee, and the digests of its
    images."""
    used = {*adapter.seen.get("calibration", ()), *picture_digests(examples)}
    seen = {**adapter.seen, "calibration": sorted(used)}
    attempted = with_attempts(adapter, calibration)
    return replace(attempted.with_policy(calibration.policy, calibration.to_json()), seen=seen)


def with_attempts(adapter: Adapter, calibration: Calibration) -> Adapter:
    """Return the adapter with the attempts made and no other change, after a calibration that
    failed."""
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
    known: list[Answer] | None = None,
    progress: Any = iter,
    **options: Any,
) -> Calibration:
    """Find the fastest thresholds that keep P(risk <= target) >= confidence.

    One exit is tested along the grid `thresholds` (None: `GRID`, for a runtime `COARSE`). Several
    exits are tested, each with its own threshold or off, along a path found on a part of the
    images, if costs are given and the policy can be replayed (greedy, a score of `SCORES`);
    otherwise all share one threshold.

    Args:
        examples: of images drawn like future ones, each on its own, and never trained on; losses of
            an item with references are against these.
        policy: to calibrate; its own thresholds are ignored, its score is kept. With any trust its
            trust is searched, in place of thresholds: one run gives the losses at all levels, and
            the grid `thresholds` is of levels (None: `LEVELS`).
        first: threshold of an answer's first token, with which the prompt may wait at its exit: a
            number that was chosen before any of these images was seen; or "auto": searched on
            images that are then not tested. None: the policy's own.
        frequencies: with the risk "cider_drop", examples of other images, whose references weigh
            words; images of the calibration are left out. None: the words are weighed by a part of
            the images, which is then not tested.
        risk: of `RISKS`. method: of `offramp.calibration.risk_control.METHODS`. unit, candidates,
            each_kind, kind_targets: see `Guarantee`.
        costs: of decoding on this machine, by `offramp.calibration.profiler.measure_costs`; None:
            no speed is predicted, and the fastest thresholds are the last that keep the risk.
        runtime: answers in the adapter's place, e.g. with quantised weights: the guarantee is then
            for its answers, and all exits share one threshold.
        known: the full model's answers, so that they are not generated again; where the list is
            empty, they are put into it.
        progress: wraps the batches that the full model answers, then the path.
        options: of generation, such as max_new_tokens.

    Raises:
        InputError: an argument cannot be used.
        DataError: no examples, images that training used or of which many are copies, no references
            for the risk, a full model that is always wrong, or scores that are constant or NaN.
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
        adapter,
        encoder,
        judged,
        policy,
        asked,
        thresholds,
        first,
        frequencies,
        options,
        costs=costs,
        batch_size=batch_size,
        runtime=runtime,
        known=known,
        progress=progress,
    )


def _calibrate(
    adapter: Adapter,
    encoder: InputProcessor,
    judged: Sequence[Example],
    policy: ExitPolicy,
    asked: Guarantee,
    thresholds: Sequence[float],
    first: float | str | None,
    frequencies: Sequence[Example] | None,
    options: dict[str, Any],
    *,
    runtime: Runtime | None,
    progress: Any,
    **how: Any,
) -> Calibration:
    """Calibrate what was checked; arguments as of `calibrate`. how: costs, batch_size, known."""
    images = images_of(judged)  # before the model runs: they may be refused
    check_untested(encoder, judged[:1], adapter.exits.depths)
    tried = ThresholdEvaluator if policy.trust is None else TrustPath
    whole: ThresholdEvaluator = tried.of(
        adapter,
        encoder,
        judged,
        policy,
        RISKS[asked.risk],
        runtime=runtime,
        progress=progress,
        **how,
        **options,
    )
    if encoder.backbone.vision_engine in ROUNDED:
        model, size = encoder.backbone.with_tower(None), how["batch_size"]
        own = generate_answers(
            model, encoder, judged, batch_size=size, progress=progress, **options
        )
        whole = replace(whole, by_own_tower=own)
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
    trial = trial_of(
        whole,
        search,
        tested,
        thresholds,
        attempts,
        digest,
        asked,
        search_first=first == AUTO,
        frames=frames,
    )
    calibration = replace(trial.run(asked, progress), data_digest=examples_digest(judged))
    if calibration.path:  # else no errors were risked
        attempt = _attempt(trial, calibration, digest, settings)
        attempts = recorded(attempts, attempt, trial.turn.continues)
    found = replace(calibration, attempts=attempts, runtime=name)
    return _with_conditions(found, trial, encoder, frames, options, here)


def _with_conditions(
    found: Calibration,
    trial: Trial,
    encoder: InputProcessor,
    frames: Sequence[Sequence[str]],
    options: Mapping[str, Any],
    here: Mapping[str, Any],
) -> Calibration:
    """Add the conditions under which what was found holds, and the scores of its calibrated
    answers. frames: of `prompt_frames`. here: of engine, processor and exits."""
    early = trial.early(found)
    likeness = trial.likeness(early, encoder.smallest_side)
    conditions = Conditions.of(
        encoder.backbone,
        found.policy,
        sampling="sampled" if samples(encoder.backbone, options) else "greedy",
        longest=options.get("max_new_tokens"),
        prompts=frames,
        any_prompt=likeness.tells("") or None,
        **here,
    )
    watched = trial.watched(early, Guarantee(confidence=found.confidence, unit=found.unit))
    return replace(
        found,
        conditions=conditions,
        likeness=likeness,
        watched=watched,
        qualities=trial.qualities(),
    )


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
            "Leave the threshold for first tokens out, or calibrate a policy without trust.",
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
    trial: Trial, calibration: Calibration, asked: str, settings: dict[str, Any]
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
    if quality is not None and not quality(whole.held_to, examples).any():
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
    dtype="float32",
    quantized="",
    kernels="plain",
    vision=TORCH,
    shrink_on_load=False,
    device="cpu",
    template="",
    autocast="",
    matmul="highest",
)
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
