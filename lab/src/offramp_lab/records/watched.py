"""Simulate a watched guarantee; rewrites lab/records/watched.json.

How often a promise that just holds is ever called broken, and after how many watched images one
that does not hold is; also where answers are drawn by how much exits doubted them. Some ten minutes
of one core.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from offramp.promises.active_draw import BLOCK, MOST, chances
from offramp.promises.betting import Restarts, as_share
from offramp_lab.records.record import Record

Array = npt.NDArray[Any]
Losses = Callable[[np.random.Generator, float, int], Array]
"""Draws, of a risk, what the next answer of each of so many streams loses."""
Answers = Callable[[np.random.Generator, float, tuple[int, int]], tuple[Array, Array]]
"""Draws, of a risk, what answers lose and how much exits doubt them, in a shape."""

RECORD = Record("watched")
TARGETS = (0.0075, 0.01, 0.02, 0.05)
LEVEL = 0.01


@dataclass(frozen=True)
class Watch:
    """Streams of at most so many watched answers. promised: their risk. bet: on what the bets are,
    where that is not the risk itself."""

    losses: Losses
    promised: float
    most: int
    bet: Callable[[float], Any] = float

    def alarms(self, times: float, streams: int, seed: int) -> Array:
        """By stream the number of the answer, from 1, at which the alarm is first raised, where the
        risk is so many times the promised one; 0: at none."""
        draw, bets = np.random.default_rng(seed), Restarts(self.bet(self.promised), (streams,))
        found = np.zeros_like(bets.most, dtype=int)
        for number in range(1, self.most + 1):
            bets.add(self.losses(draw, times * self.promised, streams))
            found = np.where((found == 0) & (bets.most >= 1 / LEVEL), number, found)
            if (found > 0).all():
                break
        return found

    def false_alarms(self, streams: int, seed: int) -> float:
        """The share of streams that are called broken though the promise just holds."""
        return float((self.alarms(1.0, streams, seed) > 0).mean())

    def delays(self, times: Sequence[float], streams: int, seed: int) -> dict[str, Any]:
        """Of risks so many times the promised one, how often and after how many answers it is
        noticed."""
        found = {}
        for each in times:
            alarmed = self.alarms(each, streams, seed)
            noticed = alarmed[alarmed > 0]
            found[f"{each:g}"] = {
                "noticed": float((alarmed > 0).mean()),
                "median_images": float(np.median(noticed)) if len(noticed) else None,
                "p95_images": float(np.percentile(noticed, 95)) if len(noticed) else None,
            }
        return found


def entry(target: float, streams: int, images: int) -> dict[str, Any]:
    """Of one promise: false alarms over `images` images, and delays from the start."""
    watch = Watch(lambda draw, risk, n: (draw.random(n) < risk).astype(float), target, images)
    return {
        "target": target,
        "streams": streams,
        "images": images,
        "false_alarms": watch.false_alarms(streams, seed=1),
        "delays": watch.delays((1.5, 2.0, 3.0, 10.0), 200, seed=2),
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


def picked(draw: np.random.Generator, lost: Array, doubts: Array) -> Array:
    """What one answer of each block [streams, block], drawn by doubts, loses, over its chance."""
    each, (streams, block) = chances(doubts), lost.shape
    place = (each.cumsum(-1) < draw.random((streams, 1))).sum(-1).clip(max=block - 1)
    rows = np.arange(streams), place
    return np.asarray(lost[rows] / (block * each[rows]))


def active(words: str, answers: Answers, streams: int, images: int) -> dict[str, Any]:
    """How often a promise that just holds is called broken over so many comparisons, and after how
    many one that does not hold is: drawn uniformly, and by doubts."""
    promised, times = 0.01, (2.0, 3.0)

    def drawn(block: int) -> Watch:
        """One answer of each block of answers is compared."""
        return Watch(
            lambda draw, risk, n: picked(draw, *answers(draw, risk, (n, block))), promised, images
        )

    ways = {"uniform": drawn(1), "active": drawn(BLOCK)}
    noticed = {way: each.delays(times, max(20, streams // 5), 22) for way, each in ways.items()}
    return {
        "words": words,
        "promised": promised,
        "block": BLOCK,
        "streams": streams,
        "images": images,
        "false_alarms": ways["active"].false_alarms(streams, 21),
        "delays": {t: {way: found[t] for way, found in noticed.items()} for t in noticed["active"]},
    }


def judged(streams: int, most: int) -> dict[str, Any]:
    """Of a promised drop of a score, which people judge: alarms where it just holds, over so many
    judged answers, and judged answers until one where twice or four times as much is lost. A
    quarter of the answers change, and what these lose varies by a quarter of the largest score."""

    def loss(draw: np.random.Generator, risk: float, n: int) -> Array:
        lost = draw.normal(4 * risk, 0.25, (n, BLOCK)).clip(-1, 1)
        lost = np.where(draw.random((n, BLOCK)) < 0.25, lost, 0.0)
        return np.asarray(as_share(picked(draw, lost, draw.exponential(size=(n, BLOCK))), MOST))

    watch = Watch(loss, 0.025, most, bet=lambda drop: as_share(drop, MOST))
    return {
        "promised": watch.promised,
        "streams": streams,
        "answers": most,
        "false_alarms": watch.false_alarms(streams, 31),
        "delays": watch.delays((2.0, 4.0), max(20, streams // 5), 32),
    }


def figures(asked: Namespace) -> dict[str, Any]:
    sizes = asked.streams, asked.images
    return {
        "level": LEVEL,
        "entries": [entry(target, *sizes) for target in TARGETS],
        "active": [active(words, answers, *sizes) for words, answers in DOUBTS.items()],
        "judged": judged(asked.streams, asked.images // 4),
    }


if __name__ == "__main__":
    RECORD.run(__doc__, figures, streams=1000, images=20_000)
