"""Laws of comparison: every idea runs, nothing is measured twice, speed counts at one quality."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fakes
import families
import numpy as np
import pytest

from offramp.calibration.risk_functions import QUALITIES
from offramp.core.errors import DataError, InputError
from offramp.core.models.backbone import Backbone
from offramp.core.storage import read_json
from offramp.training.config import TrainConfig
from offramp.training.feature_dataset import TrainingStates
from offramp.training.trainer import Trainer
from offramp_lab.experiments.comparison import equal_quality as merit
from offramp_lab.experiments.comparison import tradeoff
from offramp_lab.experiments.comparison.compare import compare
from offramp_lab.experiments.comparison.equal_quality import LEVELS, Samples, equal_quality
from offramp_lab.experiments.comparison.grid import Grid, exits_folder
from offramp_lab.experiments.comparison.methods import OBJECTIVES, POLICIES, Plan
from offramp_lab.experiments.comparison.points import PointMeasurer
from offramp_lab.experiments.comparison.tradeoff import speed_at
from offramp_lab.experiments.experiment import Experiment

NAMES = ("blip2-opt", "blip2-t5")
TRAINING = TrainConfig(
    exit_kind="layer", steps=2, batch_size=4, evaluate_every=2, patience=None, max_new_tokens=5
)
PLAN = Plan(
    depths=(2,),
    several=(2, 4),
    quantiles=(0.3, 0.8),
    training=TRAINING,
    timed=1,
    rounds=1,
    max_new_tokens=5,
)
SMALL = replace(PLAN, objectives=("free",), policies=("max_probability",))
RunComparison = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def models() -> dict[str, Backbone]:
    return {name: Backbone(families.build(name, wide=4.0)) for name in NAMES}


@pytest.fixture(scope="module")
def run(models: dict[str, Backbone]) -> RunComparison:
    """Compare on a tiny family, in a folder."""
    examples = fakes.examples(14)

    def start(out: Path, plan: Plan = SMALL, name: str = NAMES[0], **more: Any) -> Any:
        given = {"train": examples[:10], "test": examples[10:], **more}
        processor = fakes.Blip2FakeProcessor(name)
        return compare(
            models[name], processor, given.pop("train"), given.pop("test"), out, plan, **given
        )

    return start


@pytest.fixture(scope="module")
def done_once(run: RunComparison, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished comparison by `SMALL`: its folder and what it found."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, run(folder)


@pytest.fixture
def finished(done_once: Any, tmp_path: Path) -> dict[str, Any]:
    """What a finished comparison found; `tmp_path` holds a copy of its folder."""
    folder, found = done_once
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return found  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("name", "objectives", "policies"),
    [
        ("blip2-opt", OBJECTIVES, POLICIES),
        ("blip2-t5", ("free", "logit_lens"), ("max_probability", "patience")),
    ],
)
def test_every_objective_and_policy_has_its_points(
    run: RunComparison, tmp_path: Path, name: str, objectives: Any, policies: Any
) -> None:
    # for cross-entropy on the model's own answers
    training = replace(TRAINING, regime="pseudo", min_confidence=0.0)
    chosen = {"objectives": tuple(objectives), "policies": tuple(policies)}
    found = run(tmp_path, replace(PLAN, training=training, quantiles=(0.5,), **chosen), name)
    points = found["points"]
    assert {p["objective"] for p in points} == set(objectives)
    assert {p["policy"] for p in points} == set(policies)
    layers = 6
    for point in points:
        assert 0 <= point["agreement"] <= 1
        assert min(point["depths"]) <= point["mean_depth"] <= layers
        assert point["speedup_decode"] > 0 < point["speedup_end_to_end"]
        assert point["score"] == point["policy"]
        assert list(map(int, point["thresholds"])) == point["depths"]
        # without references quality is agreement, of which the full model has all
        assert point["quality"] == point["agreement"] == 1 - point["quality_drop"]
    assert found["quality_full"] == 1
    curves = {(c["objective"], c["policy"]) for c in found["equal_quality"]["curves"]}
    assert curves == {(p["objective"], p["policy"]) for p in points}
    assert json.loads((tmp_path / "compare.json").read_text()) == json.loads(json.dumps(found))
    assert (tmp_path / "compare.svg").read_text().startswith("<svg")


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("this was done before")


def test_what_is_done_is_not_done_again(
    run: RunComparison, finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for owner, name in ((Trainer, "_step"), (PointMeasurer, "figures"), (Experiment, "run")):
        monkeypatch.setattr(owner, name, refuse)
    again = run(tmp_path)
    assert again["points"] == finished["points"]
    assert again["equal_quality"] == finished["equal_quality"]


def test_an_interrupted_comparison_goes_on(
    run: RunComparison, finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as cut:
        cut.setattr(Experiment, "run", refuse)
        with pytest.raises(AssertionError):
            run(tmp_path / "cut")
    monkeypatch.setattr(PointMeasurer, "figures", refuse)
    points = run(tmp_path / "cut")["points"]
    for point, known in zip(points, finished["points"], strict=True):
        timeless = {k: v for k, v in known.items() if "speedup" not in k}
        assert {k: point[k] for k in timeless} == timeless


def test_objectives_on_the_same_answers_share_their_states(
    run: RunComparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    record = TrainingStates.record
    monkeypatch.setattr(TrainingStates, "record", lambda one: made.append(1) or record(one))
    objectives = ("distillation", "logit_lens", "cross_entropy")
    run(tmp_path, replace(PLAN, objectives=objectives, policies=("max_probability",)))
    assert len(made) == 3  # written by the model, at one depth and at two; and labels


def test_free_reads_all_pictures_where_cross_entropy_reads_the_labelled_ones_alone(
    run: RunComparison, tmp_path: Path
) -> None:
    training = replace(TRAINING, regime="mixed", labelled_fraction=0.4)
    objectives = ("cross_entropy_few", "free")
    run(tmp_path / "both", replace(SMALL, objectives=objectives, training=training))
    run(tmp_path / "alone", replace(SMALL, training=training))
    logs = [
        [json.loads(line) for line in path.read_text().splitlines()]
        for place in ("both", "alone")
        for path in (tmp_path / place).glob("exits/free-2-seed-0/training/log.jsonl")
    ]
    assert len(logs) == 2 and logs[0] == logs[1]


def test_every_seed_trains_anew(run: RunComparison, tmp_path: Path) -> None:
    found = run(tmp_path, replace(SMALL, seeds=2, training=replace(TRAINING, seed=5)))
    by_seed = [[p for p in found["points"] if p["seed"] == seed] for seed in (5, 6)]
    names = [[(p["policy"], p["depths"]) for p in some] for some in by_seed]
    assert names[0] == names[1] and sum(map(len, by_seed)) == len(found["points"])
    for seed in (5, 6):
        folder = exits_folder(tmp_path, seed, "free", (2,))
        assert json.loads((folder / "adapter.json").read_text())["provenance"]["seed"] == seed


def test_what_is_added_later_is_all_that_is_trained_and_judged(
    run: RunComparison, finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged, judge = [], PointMeasurer.figures

    def noted(bench: Any, entry: Any) -> Any:
        judged.append((entry.seed, entry.objective, entry.policy))
        return judge(bench, entry)

    monkeypatch.setattr(PointMeasurer, "figures", noted)
    more = {
        "objectives": ("free", "distillation"),
        "policies": ("max_probability", "margin"),
        "seeds": 2,
    }
    found = run(tmp_path, replace(SMALL, **more))
    assert (0, "free", "max_probability") not in judged
    assert len(judged) == len(found["points"]) - len(finished["points"])
    timeless = ("quality", "agreement", "mean_depth", "thresholds")
    kept = [
        p
        for p in found["points"]
        if (p["seed"], p["objective"], p["policy"]) == (0, "free", "max_probability")
    ]
    assert [[p[n] for n in timeless] for p in kept] == [
        [p[n] for n in timeless] for p in finished["points"]
    ]


def test_another_timing_trains_and_judges_nothing_anew(
    run: RunComparison, finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for owner, name in ((Trainer, "_step"), (PointMeasurer, "figures")):
        monkeypatch.setattr(owner, name, refuse)
    known = finished["points"]
    for more in ({"timed": 2}, {"rounds": 2}):
        again = run(tmp_path, replace(SMALL, **more))["points"]
        assert [p["quality"] for p in again] == [p["quality"] for p in known]
        assert [p["speedup_decode"] for p in again] != [p["speedup_decode"] for p in known]


def test_points_that_do_the_same_work_have_the_same_speed(
    run: RunComparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Grid, "_levels", lambda *_: [1e-9])  # every token exits
    plan = replace(SMALL, objectives=("distillation", "logit_lens"), policies=("entropy",))
    found = run(tmp_path, plan)["points"]
    points = {(p["objective"], p["policy"]): p for p in found if p["depths"] == [2]}
    assert all(point["mean_depth"] == 2 for point in points.values())
    speeds = {name: point["speedup_decode"] for name, point in points.items()}
    assert speeds["free", "max_probability"] == speeds["distillation", "max_probability"]
    # no layer is run there, another score is read, or none
    others = {("logit_lens", "max_probability"), ("free", "entropy")}
    assert len({speeds[one] for one in (*others, ("free", "max_probability"))}) == 3


@pytest.mark.usefixtures("finished")
def test_another_comparison_in_the_folder_is_refused(run: RunComparison, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="another plan"):
        run(tmp_path, replace(SMALL, quantiles=(0.5,)))
    with pytest.raises(InputError, match="another test"):
        run(tmp_path, test=fakes.examples(14, seed=1)[10:])
    with pytest.raises(InputError, match="another quality"):
        run(tmp_path, quality=QUALITIES["exact_match"])


def test_quality_is_what_the_judge_says(run: RunComparison, tmp_path: Path) -> None:
    found = run(tmp_path, quality=QUALITIES["exact_match"])
    assert found["quality_full"] == 0  # random weights are never right
    assert all(p["quality"] == 0 and p["quality_drop"] == 0 for p in found["points"])


def test_without_labels_cross_entropy_learns_what_the_model_says(
    run: RunComparison, tmp_path: Path
) -> None:
    bare = [replace(e, answers=()) for e in fakes.examples(14)]
    plan = replace(SMALL, objectives=("cross_entropy", "cross_entropy_few", "free_supervised"))
    found = run(tmp_path, plan, train=bare[:10], test=bare[10:])
    assert {p["objective"] for p in found["points"]} == {"cross_entropy", "free"}


def test_few_labels_are_all_that_cross_entropy_then_reads(
    run: RunComparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: dict[str, int] = {}
    record = TrainingStates.record

    def noted(states: TrainingStates) -> Any:
        stores = record(states)
        objective = states.out.name.split("-")[0]
        read[objective] = len(stores[0].answers)
        return stores

    monkeypatch.setattr(TrainingStates, "record", noted)
    training = replace(TRAINING, labelled_fraction=0.4)
    objectives = ("cross_entropy", "cross_entropy_few", "distillation")
    run(tmp_path, replace(SMALL, objectives=objectives, training=training))
    assert read["cross_entropy"] == read["distillation"] == 9  # and one validates
    assert read["cross_entropy_few"] == 4


@pytest.mark.parametrize("regime", ["unsupervised", "pseudo"])
def test_cross_entropy_on_own_answers_is_compared_where_free_has_pseudo_labels(
    regime: str, run: RunComparison, tmp_path: Path
) -> None:
    training = replace(TRAINING, regime=regime, min_confidence=0.0)
    objectives = ("cross_entropy_own", "cross_entropy")
    found = run(tmp_path, replace(SMALL, objectives=objectives, training=training))
    own = "cross_entropy_own" in {p["objective"] for p in found["points"]}
    assert own == (regime == "pseudo")
    for objective, learnt in (("cross_entropy", "supervised"), ("cross_entropy_own", "pseudo")):
        if objective == "cross_entropy" or own:
            folder = exits_folder(tmp_path, 0, objective, (2,))
            config = read_json(folder / "adapter.json")["provenance"]["config"]
            assert (config["regime"], config["distillation"]) == (learnt, 0)


def test_exits_with_a_shortlist_read_no_other_tokens(
    run: RunComparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules: list[Any] = []
    entries = Grid.entries

    def noted(grid: Grid) -> Any:
        rules.extend(entries(grid))
        return rules

    monkeypatch.setattr(Grid, "entries", noted)
    training = replace(TRAINING, shortlist=8)
    run(tmp_path, replace(SMALL, objectives=("logit_lens",), training=training))
    assert {(e.objective, e.rule.shortlist) for e in rules} == {
        ("free", True),
        ("logit_lens", False),
    }


@pytest.mark.usefixtures("finished")
def test_methods_as_published_are_pairs_of_an_objective_and_a_policy(
    run: RunComparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = (("logit_lens", "saturation"), ("cross_entropy", "patience"), ("free", "saturation"))
    plan = replace(SMALL, pairs=pairs)
    found = run(tmp_path, plan)  # goes on in the folder, and adds them
    several = {(p["objective"], p["policy"]) for p in found["points"] if p["depths"] == [2, 4]}
    assert several == {*pairs, ("free", "max_probability")}
    curves = {(c["objective"], c["policy"]) for c in found["equal_quality"]["curves"]}
    assert curves == several
    # what is there anyway is not there twice
    monkeypatch.setattr(PointMeasurer, "figures", refuse)
    assert len(run(tmp_path, replace(plan, pairs=(*pairs, pairs[0])))["points"]) == len(
        found["points"]
    )


def test_a_method_as_published_is_held_against_free_at_any_depths() -> None:
    pair = point(0.0, 1.5, "cross_entropy", "patience", depths=(2, 4))
    (curve,) = (
        c
        for c in equal_quality([*HAND, pair, point(0.0, 5.0, "free_supervised")])["curves"]
        if c["objective"] == "cross_entropy"
    )
    assert curve["free_over"]["0.005"] == pytest.approx(5.0 / 1.5)


def test_a_pair_has_a_line_of_its_own() -> None:
    points = [*HAND, point(0.0, 1.4, policy="saturation"), point(0.0, 1.2, "l2", "saturation")]
    drawn = merit.drawn({"points": points})
    published = ("logit lens, saturation", "l2, saturation")
    for name in ("free", "distillation", "patience", "saturation", *published):
        assert f">{name}<" in drawn, name
    more = [point(0.0, 1.3, f"objective {n}") for n in range(9)]
    crowded = tradeoff.by_name((p["objective"], p) for p in [*more, *points])
    assert len(crowded) == tradeoff.MOST and {"free", "distillation"} <= crowded.keys()


def test_nothing_to_test_on_is_refused(run: RunComparison, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no examples"):
        run(tmp_path, test=[])
    with pytest.raises(DataError, match="1 of 4 images were used in training"):
        run(tmp_path, test=fakes.examples(13)[9:])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"objectives": ("distilation",)}, "Did you mean 'distillation'"),
        ({"policies": ("patients",)}, "Did you mean 'patience'"),
        ({"pairs": (("logit_lense", "patience"),)}, "Did you mean 'logit_lens'"),
        ({"pairs": (("logit_lens", ""),)}, "Policy '' is not known"),
        ({"rounds": 0}, "rounds is 0"),
        ({"seeds": 0}, "seeds is 0"),
        ({"quantiles": (1.5,)}, "quantiles"),
        ({"several": (3,)}, "two or more depths"),
    ],
)
def test_a_plan_that_cannot_be_followed_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Plan(**change)


# -- figures of merit ----------------------------------------------------------------------------


def point(
    drop: float,
    speed: float,
    objective: str = "free",
    policy: str = "max_probability",
    depths: tuple[int, ...] = (2,),
    seed: int = 0,
) -> dict[str, Any]:
    return {
        "seed": seed,
        "objective": objective,
        "policy": policy,
        "depths": list(depths),
        "quality_drop": drop,
        "speedup_decode": speed,
    }


HAND = [
    point(0.0, 1.5),
    point(0.02, 3.0),
    point(0.0, 2.5, depths=(2, 4)),
    point(0.0, 2.0, "distillation"),
    point(0.05, 2.2, "distillation"),
    point(0.01, 1.2, policy="patience", depths=(2, 4)),
    point(0.01, 1.1, "logit_lens", "saturation"),
]


def test_free_is_held_against_objectives_at_their_own_depths_and_policies_at_any() -> None:
    curves = {(c["objective"], c["policy"]): c for c in equal_quality(HAND)["curves"]}
    alone = [p for p in HAND[:2]]
    for level in LEVELS:
        at = str(level)
        theirs = curves["distillation", "max_probability"]
        assert theirs["speedup_decode"][at] == speed_at(HAND[3:5], level)
        assert theirs["free_over"][at] == speed_at(alone, level) / theirs["speedup_decode"][at]
        patience = curves["free", "patience"]
        assert patience["free_over"][at] == speed_at(HAND[:3], level) / speed_at(HAND[5:6], level)
        assert curves["free", "max_probability"]["free_over"][at] == 1


def test_figures_of_several_seeds_are_means() -> None:
    slower = [p | {"seed": 1, "speedup_decode": 0.5 * p["speedup_decode"]} for p in HAND]
    apart = [equal_quality(some)["curves"] for some in (HAND, slower)]
    for both, *alone in zip(equal_quality([*HAND, *slower])["curves"], *apart, strict=True):
        for level in map(str, LEVELS):
            times = [1 / curve["speedup_decode"][level] for curve in alone]
            assert both["speedup_decode"][level] == pytest.approx(2 / sum(times))
            ratios = both["free_over_by_seed"][level]
            assert ratios == pytest.approx([curve["free_over"][level] for curve in alone])
            assert min(ratios) - 1e-9 <= both["free_over"][level] <= max(ratios) + 1e-9


def each(gain: float) -> Samples:
    """Of `HAND`'s points, two answers to each of 40 images; a point's drop as it says, and
    `gain` more for FREE's two, on half of the images."""
    full = np.ones(80)
    early = np.stack([full - p["quality_drop"] for p in HAND])
    early[:2, ::4] += 2 * gain
    early[:2, 1::4] += 2 * gain
    seconds = np.array([[1 / p["speedup_decode"]] for p in HAND])
    return Samples(full, early, [str(i // 2) for i in range(80)], np.ones_like(seconds), seconds)


def test_intervals_have_no_width_where_answers_do_not_differ() -> None:
    for curve in equal_quality(HAND, each(0.0))["curves"]:
        for level in map(str, LEVELS):
            low, high = curve["free_over_interval"][level]
            assert low == pytest.approx(high) == pytest.approx(curve["free_over"][level])


def test_intervals_hold_the_figure_and_are_as_wide_as_pictures_differ() -> None:
    points = [p | {"quality_drop": p["quality_drop"] - 0.004 * (n < 2)} for n, p in enumerate(HAND)]
    found = equal_quality(points, each(0.004))
    (curve,) = (c for c in found["curves"] if c["objective"] == "distillation")
    low, high = curve["free_over_interval"]["0.01"]
    assert low < curve["free_over"]["0.01"] < high
    # all of an image's answers are drawn together: alone they would say twice as much
    alone = equal_quality(points, replace(each(0.004), groups=[str(i) for i in range(80)]))
    (other,) = (c for c in alone["curves"] if c["objective"] == "distillation")
    near, far = other["free_over_interval"]["0.01"]
    assert 0.5 < (far - near) / (high - low) < 0.9  # 1 / sqrt(2)


def test_intervals_are_as_wide_as_rounds_differ() -> None:
    same = each(0.0)
    noise = np.array([0.9, 1.0, 1.0, 1.0, 1.1])
    free = np.arange(len(HAND))[:, None] < 2
    curve = {}
    for name, seconds in {
        "all": same.seconds * noise,  # a slow round of FREE's two points, and of the others
        "free": same.seconds * np.where(free, noise, 1.0),
    }.items():
        some = replace(same, seconds=seconds, full_seconds=np.ones_like(seconds))
        found = equal_quality(HAND, some)["curves"]
        (curve[name],) = (c for c in found if c["objective"] == "distillation")
    for level in map(str, LEVELS):
        low, high = curve["free"]["free_over_interval"][level]
        assert low < curve["free"]["free_over"][level] < high
        # what slows all points of a race alike tells nothing of one against another
        assert np.ptp(curve["all"]["free_over_interval"][level]) < 0.5 * (high - low)


def test_intervals_are_of_test_pictures(run: RunComparison, tmp_path: Path) -> None:
    plan = replace(SMALL, objectives=("logit_lens",))
    found = run(tmp_path, plan)
    for curve in found["equal_quality"]["curves"]:
        for level in map(str, LEVELS):
            low, high = curve["free_over_interval"][level]
            assert 0 < low <= high
    assert all("each" not in point for point in found["points"])
    assert run(tmp_path, plan)["equal_quality"] == found["equal_quality"]


def test_what_reads_all_labels_is_held_against_the_free_that_does() -> None:
    points = [*HAND, point(0.0, 2.0, "cross_entropy"), point(0.0, 1.5, "cross_entropy_few")]
    curves = {c["objective"]: c for c in equal_quality(points)["curves"]}
    assert curves["cross_entropy"]["free_over"]["0.005"] == pytest.approx(
        speed_at(HAND[:2], 0.005) / 2.0
    )
    labelled = [*points, point(0.0, 5.0, "free_supervised")]
    found = equal_quality(labelled)["curves"]
    curves = {c["objective"]: c for c in found if c["policy"] == "max_probability"}
    assert curves["cross_entropy"]["free_over"]["0.005"] == pytest.approx(2.5)
    few = curves["cross_entropy_few"]["free_over"]["0.005"]
    assert few == pytest.approx(speed_at(HAND[:2], 0.005) / 1.5)


def test_the_order_of_points_does_not_count() -> None:
    points = [*HAND, *(p | {"seed": 1, "quality_drop": 0.01} for p in HAND)]
    expected = equal_quality(points)
    for seed in range(5):
        mixed = random.Random(seed).sample(points, len(points))
        assert equal_quality(mixed) == expected


def test_the_t_interval_of_a_few_values_is_the_textbooks() -> None:
    ends = merit.t_interval([1.0, 2.0, 3.0])  # t of 2 degrees is 4.303, the deviation 1
    assert ends == (pytest.approx(2 - 2.4841, abs=1e-4), pytest.approx(2 + 2.4841, abs=1e-4))
    assert merit.t_interval([1.0]) == (None, None)
