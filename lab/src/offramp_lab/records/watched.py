"""Simulate a watched guarantee; rewrites lab/records/watched.json.

How often a promise that just holds is ever called broken, and where it holds on average alone;
after how many watched images one that does not hold is, from the start and after many good images,
with and without new starts of the bets; and where answers are drawn by how much exits doubted
them. Some fifteen minutes of one core.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from offramp.adapter.answers import generate_answers
from offramp.cli import demo
from offramp.data.scenes.tasks import captions_and_questions
from offramp.promises.active_draw import BLOCK, MOST, chances, doubt
from offramp.promises.betting import RATIOS, Restarts, as_share
from offramp_lab.records.record import Record, Some, asked
from offramp_lab.records.subjects import tiny_with

Array = npt.NDArray[Any]
Rate = Callable[[int], float]
Answers = Callable[[np.random.Generator, float, tuple[int, int]], tuple[Array, Array]]
"""Draws, of a risk, what answers lose and how much exits doubt them, in a shape."""

RECORD = Record("watched")
TARGETS = (0.0075, 0.01, 0.02, 0.05)
LEVEL = 0.01
GOOD = 0.3
"""The risk of good images, as a share of what was promised."""
AFTER = (0, 1_000, 5_000, 20_000)
TIMES = (1.5, 2.0, 5.0, 50.0)


def main() -> None:
    arguments = asked(__doc__, streams=1000, images=20_000, parts=Some(PARTS))
    made = {
        name: partial(part, arguments.streams, arguments.images) for name, part in PARTS.items()
    }
    RECORD.parts(made, arguments.parts)


# -- alarms ----------------------------------------------------------------------------------------


class Once(Restarts):
    """The same bets without new starts, as they were at first."""

    def start(self) -> bool:
        if self.n == 0:
            self.fortune, self.kept = self.fortune + 1 / len(RATIOS), 0.0
            self.for_cues = np.zeros_like(self.for_cues)
        return self.n == 0


def first_alarms(bets: Restarts, draws: Iterable[Array]) -> Array:
    """By stream the number of the draw, from 1, at which the alarm is first raised; 0: at none.
    draws: losses of all streams."""
    found = np.zeros_like(bets.most, dtype=int)
    for number, losses in enumerate(draws, 1):
        bets.add(losses)
        found = np.where((found == 0) & (bets.most >= 1 / LEVEL), number, found)
        if (found > 0).all():
            break
    return found


def alarms(
    promised: float, rate: Rate, streams: int, images: int, *, starts: bool = True, seed: int = 0
) -> Array:
    """First alarms of streams whose losses are 1 with probability rate(image), else 0; 0: none."""
    random, kind = np.random.default_rng(seed), Restarts if starts else Once
    losses = (
        (random.random(streams) < rate(image)).astype(float) for image in range(1, images + 1)
    )
    return first_alarms(kind(promised, (streams,)), losses)


def entry(target: float, streams: int, images: int) -> dict[str, Any]:
    """Of one promise: false alarms over `images` images, and delays from the start."""
    false = alarms(target, steady(target), streams, images, seed=1) > 0
    delays = {
        f"{times:g}": told(alarms(target, steady(times * target), 200, images, seed=2))
        for times in (1.5, 2.0, 3.0, 10.0)
    }
    return {
        "target": target,
        "streams": streams,
        "images": images,
        "false_alarms": float(false.mean()),
        "delays": delays,
    }


def steady(risk: float) -> Rate:
    return lambda image: risk


def told(alarmed: Array) -> dict[str, Any]:
    noticed = alarmed[alarmed > 0]
    return {
        "noticed": float((alarmed > 0).mean()),
        "median_images": float(np.median(noticed)) if len(noticed) else None,
        "p95_images": float(np.percentile(noticed, 95)) if len(noticed) else None,
    }


def delay(target: float, after: int, times: float, streams: int, starts: bool) -> dict[str, Any]:
    """Images until a risk that rises after so many good ones is noticed."""
    most = after + round(150 / target) if times < 2 else after + round(80 / target)

    def rate(image: int) -> float:
        return GOOD * target if image <= after else times * target

    found = alarms(target, rate, streams, most, starts=starts, seed=3)
    early = float(((found > 0) & (found <= after)).mean())
    later = np.where(found > after, found - after, 0)[(found == 0) | (found > after)]
    return {
        "target": target,
        "after": after,
        "times": times,
        "new_starts": starts,
        "within": most - after,
        "alarms_before": early,
        **told(later),
    }


# -- answers that are drawn by doubts -------------------------------------------------------------


def split(part: float, holds: float, *, tells: bool = True) -> Answers:
    """Answers of which a part holds so much of the risk. tells: whether doubts tell which."""

    def answers(draw: np.random.Generator, risk: float, shape: tuple[int, int]) -> Any:
        rates = np.where(draw.random(shape) < part, holds / part, (1 - holds) / (1 - part))
        lost = (draw.random(shape) < risk * rates).astype(float)
        return lost, rates if tells else draw.exponential(size=shape)

    return answers


DOUBTS = {
    "a tenth of the answers holds 80% of the risk": split(0.1, 0.8),
    "a twentieth holds 90%": split(0.05, 0.9),
    "doubts tell nothing": split(0.1, 0.8, tells=False),
}
TINY = "answers of the tiny OPT at a threshold of 0.5"


def tiny_answers() -> Answers:
    """Answers to fresh images by exits at a threshold below the calibrated one, with their scores;
    of those that differ from the full model's as many count as make up a risk."""
    adapter, encoder = tiny_with("opt")
    some = captions_and_questions("test", 700, 500_000, 2)
    low = {depth: 0.5 for depth in adapter.policy.thresholds}
    early, full = (
        generate_answers(adapter, encoder, some, policy, batch_size=64, **demo.OPTIONS)
        for policy in (replace(adapter.policy, thresholds=low), adapter.policy.in_mode("full"))
    )
    wrong = np.array([one.ids != other.ids for one, other in zip(early, full, strict=True)])
    doubts = np.array([doubt(one.scores) for one in early])

    def answers(draw: np.random.Generator, risk: float, shape: tuple[int, int]) -> Any:
        assert risk <= wrong.mean()
        rows = draw.integers(0, len(wrong), shape)
        return wrong[rows] * (draw.random(shape) < risk / wrong.mean()), doubts[rows]

    return answers


def compared(
    answers: Answers, risk: float, promised: float, streams: int, most: int, block: int, seed: int
) -> Array:
    """Comparisons until the alarm, one of each block of answers; 0: none of so many."""
    draw = np.random.default_rng(seed)
    losses = (picked(draw, *answers(draw, risk, (streams, block))) for _ in range(most))
    return first_alarms(Restarts(promised, (streams,)), losses)


def picked(draw: np.random.Generator, lost: Array, doubts: Array) -> Array:
    """What one answer of each block [streams, block], drawn by doubts, loses, over its chance."""
    each, (streams, block) = chances(doubts), lost.shape
    place = (each.cumsum(-1) < draw.random((streams, 1))).sum(-1).clip(max=block - 1)
    rows = np.arange(streams), place
    return np.asarray(lost[rows] / (block * each[rows]))


def active(words: str, answers: Answers, streams: int, images: int) -> dict[str, Any]:
    """How often a promise that just holds is called broken over so many comparisons, and after how
    many one that does not hold is: drawn uniformly, and by doubts."""
    promised, few = 0.01, max(20, streams // 5)
    false = compared(answers, promised, promised, streams, images, BLOCK, 21) > 0
    delays = {
        f"{times:g}": {
            way: told(compared(answers, times * promised, promised, few, images, block, 22))
            for way, block in (("uniform", 1), ("active", BLOCK))
        }
        for times in (2.0, 3.0)
    }
    return {
        "words": words,
        "promised": promised,
        "block": BLOCK,
        "streams": streams,
        "images": images,
        "false_alarms": float(false.mean()),
        "delays": delays,
    }


# -- answers that people judge ---------------------------------------------------------------------


def judged(streams: int, most: int) -> dict[str, Any]:
    """Of a promised drop of a score: alarms where it just holds, over so many judged answers, and
    judged answers until one where twice or four times as much is lost. A quarter of the answers
    change, and what these lose varies by a quarter of the largest score."""
    promised = 0.025

    def stream(risk: float, several: int, seed: int) -> Array:
        draw, blocks = np.random.default_rng(seed), (several, BLOCK)

        def loss() -> Array:
            lost = draw.normal(4 * risk, 0.25, blocks).clip(-1, 1)
            lost = np.where(draw.random(blocks) < 0.25, lost, 0.0)
            return np.asarray(as_share(picked(draw, lost, draw.exponential(size=blocks)), MOST))

        bets = Restarts(as_share(promised, MOST), (several,))
        return first_alarms(bets, (loss() for _ in range(most)))

    false = stream(promised, streams, 31) > 0
    delays = {f"{t:g}": told(stream(t * promised, max(20, streams // 5), 32)) for t in (2.0, 4.0)}
    return {
        "promised": promised,
        "streams": streams,
        "answers": most,
        "false_alarms": float(false.mean()),
        "delays": delays,
    }


# -- a risk that is below the promise on average ---------------------------------------------------

UNEVEN: dict[str, tuple[str, Callable[[float], Rate]]] = {
    "bursts": (
        "of every 500 images 50 of one user, at 8 times the mean risk",
        lambda mean: lambda image: 8 * mean if image % 500 < 50 else 0.2 / 0.9 * mean,
    ),
    "days": (
        "a cycle of 2,000 images from 0.1 to 1.9 times the risk",
        lambda mean: lambda image: mean * (1 + 0.9 * float(np.sin(image * 2 * np.pi / 2000))),
    ),
}


def on_average(kind: str, slack: int, streams: int) -> dict[str, Any]:
    """Alarms over 20,000 images whose risk is nine tenths of the promise on average."""
    target = 0.01
    words, rate = UNEVEN[kind]
    found = alarms(slack * target, rate(0.9 * target), streams, 20_000, seed=4) > 0
    return {"kind": kind, "words": words, "slack": slack, "alarms": float(found.mean())}


# -- the parts -------------------------------------------------------------------------------------


PARTS: dict[str, Callable[[int, int], Any]] = {
    "level": lambda streams, images: LEVEL,
    "entries": lambda streams, images: [entry(target, streams, images) for target in TARGETS],
    "delays": lambda streams, images: [
        delay(0.01, after, times, max(20, streams // 5), starts)
        for after in (a for a in AFTER if a <= images)
        for times in TIMES
        for starts in (True, False)
    ],
    "active": lambda streams, images: [
        active(words, answers, streams, images)
        for words, answers in {**DOUBTS, TINY: tiny_answers()}.items()
    ],
    "judged": lambda streams, images: judged(streams, images // 4),
    "on_average": lambda streams, images: [
        on_average(kind, slack, max(20, streams // 5)) for kind in UNEVEN for slack in (1, 2, 3)
    ],
}


if __name__ == "__main__":
    main()
