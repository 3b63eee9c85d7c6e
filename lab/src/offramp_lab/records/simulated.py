"""Simulate guarantees where the truth is known; rewrites lab/records/simulated.json.

How often a promise is given though the risk is above the target, before the rules for copies,
units and choices and with them; in groups, by kind, after a search, in files that grow; and how
many images a test needs. About four minutes of one core.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from offramp.calibration.asked import Guarantee
from offramp.calibration.attempts import (
    UNITS,
    Attempt,
    Draws,
    ImageRows,
    error_share,
    handed_on,
    turn_of,
)
from offramp.calibration.ledger import merged_attempts
from offramp.calibration.risk_control import PLANNED, TESTS, images_for, p_value, power, walk
from offramp.core.decoding.policy import Thresholds
from offramp.promises.betting import FRACTIONS, SHARES, betting_p_values
from offramp_lab.records.record import Record

Array = npt.NDArray[Any]

RECORD = Record("simulated")
STATED = 0.05
LEVEL = STATED * error_share(1)


def simulate(trials: int) -> dict[str, Any]:
    return {
        "stated": STATED,
        "trials": trials,
        "lookalikes": [charts(0.5, trials), charts(0.3, trials)],
        "still_merged": still_merged(trials),
        "boundary": boundary(trials),
        "unequal_rows": unequal_rows(trials),
        "choices": choices(trials),
        "groups": [groups(size, trials) for size in (10, 20)],
        "rare_groups": rare_groups(min(trials, 300)),
        "forgotten": forgotten(min(trials, 600)),
        "handed": handed(min(trials, 600)),
        "kinds": kinds(trials),
        "two_steps": two_steps(min(trials, 600)),
        "grown": grown(min(trials, 600)),
        "needed": [row for target in (0.01, 0.05) for row in needed(target)],
        "power": [row for share in (0.3, 0.5) for row in powers(0.01, 0.01 * share)],
        "fractions": [r for target in (0.01, 0.05) for r in fractions(target, min(trials, 300))],
    }


# -- images that look alike ------------------------------------------------------------------------


def charts(share: float, trials: int) -> dict[str, Any]:
    """Photographs with a risk of 0.05% and charts with 8%, which before counted as one image."""
    draw, n, target = np.random.default_rng(0), 1000, 0.01
    k = round(share * n)
    photos = (draw.random((n - k, trials)) < 0.0005).astype(float)
    wrong = (draw.random((k, trials)) < 0.08).astype(float)
    before = betting_p_values(np.concatenate([photos, wrong.mean(0)[None]]), target)
    order = draw.permutation(n)
    losses = np.concatenate([photos, wrong])[order]
    now = [p_of(row, target) for row in losses.T]
    risk = (1 - share) * 0.0005 + share * 0.08
    return compared(before, now, photographs=n - k, charts=k, target=target, risk=risk)


def still_merged(trials: int) -> dict[str, Any]:
    """As many copies as are not refused, though each is a draw of its own: 9% of the images, with
    a risk of 10%."""
    draw, n, alike, target = np.random.default_rng(1), 1000, 90, 0.01
    clusters = np.concatenate([np.arange(n - alike), np.full(alike, n - alike)])
    rates = np.where(clusters == n - alike, 0.1, 0.0015)
    order = draw.permutation(n)
    losses = (draw.random((n, trials)) < rates[order, None]).astype(float)
    both = Draws(losses, np.ones(n), clusters[order], 1.0).values(target)
    alone, together = (betting_p_values(values, target) for values in both)
    now, risk = np.maximum(alone, together), float(rates.mean())
    return compared(together, now, images=n, merged=alike - 1, target=target, risk=risk)


def compared(before: Any, now: Any, **about: Any) -> dict[str, Any]:
    """How often a false promise is given without a rule and with it, from their p-values."""
    return {**about, "broken_before": share_of(before), "broken_now": share_of(now)}


def share_of(p: Array | list[float]) -> float:
    return float((np.asarray(p) <= LEVEL).mean())


def p_of(losses: Array, target: float, method: str = "sharp", **how: Any) -> float:
    """Of losses of 0 and 1, one an image."""
    return p_value(Draws.of(losses, whole=True, **how), target, method)


# -- units, choices and the boundary ---------------------------------------------------------------


def boundary(trials: int) -> list[dict[str, Any]]:
    """Each test where the risk is a thousandth of the target above it."""
    draw, rows = np.random.default_rng(2), []
    for target, n in ((0.01, 1500), (0.05, 400)):
        losses = (draw.random((n, trials)) < 1.001 * target).astype(float)
        for method in TESTS:
            broken = share_of([p_of(row, target, method) for row in losses.T])
            rows.append({"method": method, "target": target, "images": n, "broken": broken})
    return rows


def unequal_rows(trials: int) -> dict[str, Any]:
    """Images with 1 or 40 answers, those with many wrong more often."""
    draw, n, target = np.random.default_rng(3), 1500, 0.01
    given = dict.fromkeys(UNITS, 0)
    for _ in range(trials):
        many = draw.random(n) < 0.02
        rows = np.where(many, 40, 1)
        wrong = (draw.random(n) < np.where(many, 0.0344, 0.00175)).astype(float)
        clusters = np.arange(n)
        by = {
            "image": Draws(wrong, np.ones(n), clusters, 1.0),
            "answer": Draws(wrong * rows, rows.astype(float), clusters, 40.0),
        }
        for unit, draws in by.items():
            given[unit] += p_value(draws, target, "upper_bound") <= LEVEL
    by_image = 0.98 * 0.00175 + 0.02 * 0.0344
    by_answer = (0.98 * 0.00175 + 0.8 * 0.0344) / (0.98 + 0.8)
    return {
        "images": n,
        "target": target,
        "risk_by_image": by_image,
        "risk_by_answer": by_answer,
        "passed_by_image": given["image"] / trials,
        "passed_by_answer": given["answer"] / trials,
    }


def choices(trials: int) -> dict[str, Any]:
    """The first of ten adapters that passes, each just above the target on images of its own."""
    draw, n, target, many = np.random.default_rng(4), 400, 0.05, 10
    losses = (draw.random((n, many, trials)) < 1.001 * target).astype(float)
    p = betting_p_values(losses, target).min(0)
    return compared(p, many * p, candidates=many, images=n, target=target)


# -- groups, kinds, and looks ----------------------------------------------------------------------


def interval(broken: int, trials: int) -> list[float]:
    """Of a share, at 95% (Clopper and Pearson 1934)."""
    from scipy.stats import beta

    low = beta.ppf(0.025, broken, trials - broken + 1) if broken else 0.0
    high = beta.ppf(0.975, broken + 1, trials - broken) if broken < trials else 1.0
    return [float(low), float(high)]


def told(broken: Array) -> dict[str, Any]:
    """Of trials: how many promises were broken."""
    return {
        "trials": len(broken),
        "broken": float(broken.mean()),
        "interval": interval(int(broken.sum()), len(broken)),
    }


def tried(
    seed: int, trials: int, one: Callable[[np.random.Generator, int], Any], **about: Any
) -> dict[str, Any]:
    """one: whether a trial's promise is broken, where two without the rule and with it."""
    draw = np.random.default_rng(seed)
    broken = np.array([one(draw, trial) for trial in range(trials)], bool)
    if broken.ndim == 1:
        return {**about, **told(broken)}
    return {**about, "broken_before": float(broken[:, 0].mean()), **told(broken[:, 1])}


def groups(size: int, trials: int) -> dict[str, Any]:
    """Images in 500 groups, at a correlation of a half, just above the target: each counted alone,
    and by group."""
    n, target = 500 * size, 0.01

    def one(draw: np.random.Generator, trial: int) -> Any:
        shared = np.repeat(draw.random(n // size) < 1.001 * target, size)
        repeats = draw.random(n) < 0.5**0.5
        wrong = np.where(repeats, shared, draw.random(n) < 1.001 * target).astype(float)
        rows = [tuple(range(i, i + size)) for i in range(0, n, size)]
        images = [  # whose names draw the chance of the last step
            ImageRows(f"{trial} {own[0]}", "", own, parts=tuple((r,) for r in own)) for own in rows
        ]
        together = p_value(Draws.by("image", wrong, images, whole=True), target, "sharp")
        return p_of(wrong, target) <= LEVEL, together <= LEVEL

    return tried(11, trials, one, size=size, images=n, target=target)


def rare_groups(trials: int) -> dict[str, Any]:
    """One of 2,000 groups has 400 images, of which 30% are wrong, of all others .1%: each image
    counted alike in its group's draw, and groups by the mean over their images, barely above."""
    n, target = 1500, 0.01

    def one(draw: np.random.Generator, trial: int) -> Any:
        large = draw.random(n) < 1 / 2000
        sizes = np.where(large, 400, 1)
        few = draw.binomial(sizes, np.where(large, 0.3, 0.001)).astype(float)
        alike = Draws(few, sizes.astype(float), np.arange(n), float(sizes.max()))
        wrong = draw.binomial(sizes, np.where(large, 0.3, 1.001 * target)) / sizes
        return [p_value(each, target, "sharp") <= LEVEL for each in (alike, Draws.of(wrong))]

    risk = (0.001 + 400 * 0.3 / 2000) / (1 + 400 / 2000)
    return tried(18, trials, one, groups=n, target=target, risk_by_image=risk)


def forgotten(trials: int) -> dict[str, Any]:
    """Ten settings on the same images, each barely above the target, and after each its like on
    fresh ones: as if each were the first, and as the attempts are counted."""
    draw, n, target, many = np.random.default_rng(19), 100, 0.2, 10

    def images(name: str) -> list[ImageRows]:
        return [ImageRows(f"{name} {i}", "", (i,), members=(f"{name} {i}",)) for i in range(5)]

    known: list[Attempt] = []
    levels = []
    for setting in range(many):
        for name in ("all", f"fresh {setting}"):
            asked, some = f"setting {setting}", images(name)
            turn = turn_of(known, asked, some, any_time=True)
            members = tuple(image.image for image in some)
            names = tuple(image.name for image in some)
            made = Attempt(asked, {}, turn.number, names, (), {}, members)
            known = [
                Attempt.from_json(each)
                for each in merged_attempts([made.to_json()], [a.to_json() for a in known])
            ]
            if name == "all":
                levels.append(Guarantee(target, 1 - STATED).level(turn.number, turn.handed))
    p = np.array(
        [
            [p_of(row, target) for row in rows]
            for rows in (draw.random((trials, many, n)) < 1.001 * target).astype(float)
        ]
    )
    return {
        "settings": many,
        "images": n,
        "target": target,
        "broken_before": float((p <= LEVEL).any(1).mean()),
        **told(np.asarray((p <= 1 - np.array(levels)).any(1))),
    }


def handed(trials: int) -> dict[str, Any]:
    """Six attempts on the same images, the first three of a risk far below the target, the others
    barely above it: what is true hands its errors on to what is not."""
    n, target, third = 500, 0.05, list[bool]()
    asked = Guarantee(target, 1 - STATED)

    def one(draw: np.random.Generator, trial: int) -> bool:
        shared = draw.random(n)  # which images are hard: attempts depend on each other
        known: list[Attempt] = []
        for number in range(1, 7):
            risk = (0.1 if number <= 3 else 1.001) * target
            wrong = np.where(draw.random(n) < 0.5, shared, draw.random(n)) < risk
            level = asked.level(number, handed_on(known, number))
            kept = {"passed": p_of(wrong.astype(float), target) <= 1 - level}
            known.append(Attempt("", {}, number, (), (Thresholds({1: 0.5}),), kept))
        passed = [bool(attempt.outcome["passed"]) for attempt in known]
        third.append(passed[2])
        return any(passed[3:])

    made = tried(20, trials, one)
    return {
        "attempts": 6,
        "images": n,
        "target": target,
        "third_passes": sum(third) / trials,
        **made,
    }


def kinds(trials: int) -> dict[str, Any]:
    """Of 60% captions 0.2% differ, of the questions a thousandth above the target."""
    n, target = 3000, 0.02

    def one(draw: np.random.Generator, trial: int) -> Any:
        caption = draw.random(n) < 0.6
        wrong = (draw.random(n) < np.where(caption, 0.002, 1.001 * target)).astype(float)
        parts = [Draws.of(wrong[part], whole=True) for part in (caption, ~caption)]
        return p_of(wrong, target) <= LEVEL, p_value(parts, target, "sharp") <= LEVEL

    return tried(12, trials, one, images=n, target=target)


def two_steps(trials: int) -> dict[str, Any]:
    """Thresholds of two exits, ordered on 300 images and tested on 700 others, where each pair has
    a risk of its own: is the one that is chosen above the target?"""
    target = 0.02

    def one(draw: np.random.Generator, trial: int) -> bool:
        risks = draw.gamma(2, target / 2, 40)
        speeds = risks + draw.normal(0, target / 2, 40)  # what is faster loses more, mostly
        losses = draw.random((1000, 40)) < risks
        order = np.lexsort((-speeds, losses[:300].mean(0)))
        tested = Draws.of(losses[300:][:, order].astype(float), whole=True)
        index = walk(tested, target, 1 - LEVEL, "sharp")
        return index is not None and bool((risks[order][: index + 1] > target).any())

    return tried(13, trials, one, images=1000, target=target)


def grown(trials: int) -> dict[str, Any]:
    """A file that grows from 400 images on by 100, looked at each time, just above the target; as
    if each look were the first, and as it is."""
    target, looks = 0.02, range(400, 2001, 100)

    def one(draw: np.random.Generator, trial: int) -> Any:
        losses = (draw.random(2000) < 1.001 * target).astype(float)
        each = [p_of(losses[:n], target) <= LEVEL for n in looks]
        return any(each), any(p_of(losses[:n], target, looked=400) <= LEVEL for n in looks)

    return tried(14, trials, one, images=2000, target=target)


# -- how many images -------------------------------------------------------------------------------


def needed(target: float, trials: int = 400) -> list[dict[str, Any]]:
    """Images for a pass in four of five trials, by the true risk: of an exact test that has all of
    the level, as we test a file at the first look, and by bets alone."""
    draw, rows = np.random.default_rng(5), []
    for share in (0, 0.1, 0.3, 0.5):
        exact, ours = (images_for(target, 1 - LEVEL, share * target, share=s) for s in (1, PLANNED))
        assert exact is not None and ours is not None
        losses = (draw.random((round(2.5 * exact), trials)) < share * target).astype(float)
        rows.append(
            {
                "target": target,
                "risk": share * target,
                "exact": exact,
                "sharp": ours,
                "more": ours / exact - 1,
                "bets": quantile(first_pass(losses, target)),
            }
        )
    return rows


def powers(target: float, risk: float, trials: int = 400) -> list[dict[str, Any]]:
    """The share of first attempts that pass, by images, for the three tests of `needed`."""
    images = [int(n) for n in np.geomspace(200, 4000, 60)]
    draw = np.random.default_rng(11)
    passed = first_pass((draw.random((images[-1], trials)) < risk).astype(float), target)
    tests = {
        "exact": power(np.array(images), target, risk, LEVEL).tolist(),
        "sharp": power(np.array(images), target, risk, PLANNED * LEVEL).tolist(),
        "bets": [float(((passed > 0) & (passed <= n)).mean()) for n in images],
    }
    of = {"target": target, "risk": risk, "images": images}
    return [{**of, "test": name, "passes": passes} for name, passes in tests.items()]


def fractions(target: float, trials: int) -> list[dict[str, Any]]:
    """The same for losses between 0 and 1, where a first look plans its stakes for so many."""
    draw, rows = np.random.default_rng(10), []
    for share in (0.1, 0.3, 0.5):
        n = round(70 / target)
        for name, losses in spread(draw, share * target, (n, trials)).items():
            if name == "0 or 1":
                continue

            def passes(k: int, losses: Array = losses) -> bool:
                return share_of([p_value(row, target, "sharp") for row in losses[:k].T]) >= 0.8

            least, most = 1, n
            while most - least > max(1, most // 100):
                middle = (least + most) // 2
                least, most = (least, middle) if passes(middle) else (middle, most)
            bets = quantile(first_pass(losses, target))
            row = {"target": target, "risk": share * target, "losses": name, "sharp": most}
            rows.append({**row, "bets": bets})
    return rows


def spread(draw: np.random.Generator, mean: float, shape: tuple[int, int]) -> dict[str, Array]:
    """Losses of one mean, by how they are spread."""
    return {
        "0 or 1": (draw.random(shape) < mean).astype(float),
        "a quarter or 0": 0.25 * (draw.random(shape) < 4 * mean),
        "means of five answers": draw.binomial(5, mean, shape) / 5,
        "beta": draw.beta(10 * mean / 2, 10 * (1 - mean) / 2, shape),
    }


def first_pass(losses: Array, target: float) -> Array:
    """At which image each trial passes, looking after every one, by the bets that calibration
    makes; 0: never."""
    parts: list[Array] = []
    for start in range(0, losses.shape[1], 50):  # memory
        gains = (target - losses[:, start : start + 50, None]) * FRACTIONS / (1 - target)
        fortunes = np.logaddexp.reduce(np.log1p(gains).cumsum(0) + SHARES, axis=-1)
        over = fortunes >= -np.log(LEVEL)
        parts.append(np.where(over.any(0), over.argmax(0) + 1, 0))
    return np.concatenate(parts)


def quantile(at: Sequence[int] | Array, share: float = 0.8) -> int | None:
    """After how many images so many of the trials have passed; None: fewer ever did."""
    found = np.sort(np.where(np.asarray(at) == 0, np.iinfo(int).max, at))
    n = int(found[int(np.ceil(share * len(found))) - 1])
    return None if n == np.iinfo(int).max else n


if __name__ == "__main__":
    RECORD.run(__doc__, lambda asked: simulate(asked.trials), trials=1000)
