"""Simulate a watched guarantee; rewrites lab/records/watched.json.

How often a promise that just holds is ever called broken, and after how many watched images one
that does not hold is; also where answers are drawn by how much exits doubted them. Some ten minutes
of one core.
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
from offramp.promises.betting import Restarts, as_share
from offramp_lab.records.record import Record, Some, asked
from offramp_lab.records.subjects import tiny_with

Array = npt.NDArray[Any]
Answers = Callable[[np.random.Generator, float, tuple[int, int]], tuple[Array, Array]]
"""Draws, of a risk, what answers lose and how much exits doubt them, in a shape."""

RECORD = Record("watched")
TARGETS = (0.0075, 0.01, 0.02, 0.05)
LEVEL = 0.01


def main() -> None:
    arguments = asked(__doc__, streams=1000, images=20_000, parts=Some(PARTS))
    made = {
        name: partial(part, arguments.streams, arguments.images) for name, part in PARTS.items()
    }
    RECORD.parts(made, arguments.parts)


# -- alarms ----------------------------------------------------------------------------------------


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


def alarms(promised: float, risk: float, streams: int, images: int, seed: int) -> Array:
    """First alarms of streams whose losses are 1 at a risk, else 0; 0: none."""
    random = np.random.default_rng(seed)
    losses = ((random.random(streams) < risk).astype(float) for _ in range(images))
    return first_alarms(Restarts(promised, (streams,)), losses)


def entry(target: float, streams: int, images: int) -> dict[str, Any]:
    """Of one promise: false alarms over `images` images, and delays from the start."""
    false = alarms(target, target, streams, images, seed=1) > 0
    delays = {
        f"{times:g}": told(alarms(target, times * target, 200, images, seed=2))
        for times in (1.5, 2.0, 3.0, 10.0)
    }
    return {
        "target": target,
        "streams": streams,
        "images": images,
        "false_alarms": float(false.mean()),
        "delays": delays,
    }


def told(alarmed: Array) -> dict[str, Any]:
    noticed = alarmed[alarmed > 0]
    return {
        "noticed": float((alarmed > 0).mean()),
        "median_images": float(np.median(noticed)) if len(noticed) else None,
        "p95_images": float(np.percentile(noticed, 95)) if len(noticed) else None,
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


# -- the parts -------------------------------------------------------------------------------------


PARTS: dict[str, Callable[[int, int], Any]] = {
    "level": lambda streams, images: LEVEL,
    "entries": lambda streams, images: [entry(target, streams, images) for target in TARGETS],
    "active": lambda streams, images: [
        active(words, answers, streams, images)
        for words, answers in {**DOUBTS, TINY: tiny_answers()}.items()
    ],
    "judged": lambda streams, images: judged(streams, images // 4),
}


if __name__ == "__main__":
    main()
