"""Whether a request is like those that were calibrated: by how sure exits were of its answer, and
by the look of its image.

A guarantee is of images and prompts like the calibrated ones. Exits that know their images from
training are unsure of others, so of each calibrated answer the mean logarithm of its tokens' scores
is kept, by kind of prompt. Exits are sure of some images that they do not know, too, so the
colours and contrasts of each image are kept as a distance from those of the others (Mahalanobis;
each left out of the mean and covariance that it is held to).

The share of the calibrated ones that are no surer, or no nearer, is a conformal p-value (Vovk,
Gammerman and Shafer 2005): of requests drawn as the calibrated ones were, at most a share p has one
of p or less. Of both, twice the smaller is one again (Bonferroni). Scores cost nothing, as they are
there; a look costs about a millisecond.

Over many requests, bets are made that more of them are called unlike than of requests drawn so
(`offramp.promises.betting`). With one set of calibrated answers for all p-values share its luck
(conditional conformal test martingales: arXiv 2602.13848), so the bets are against the largest rate
that these answers leave possible.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from offramp.core.errors import DataError
from offramp.core.storage import schema
from offramp.promises.betting import Restarts
from offramp.promises.prompt_kinds import OTHER

Array = npt.NDArray[Any]

LIKE = "on images and prompts like those calibrated"
"""What a promise is about; whatever shows one says it."""
UNLIKE = 0.005
"""P-value up to which a request is called unlike those that were calibrated."""
KEPT = 0.05
"""Share of the calibrated answers, the least sure, whose mean scores are kept."""
ANSWERS = 2000
"""Calibrated answers, and images, at most, that are looked at."""
LUCK, LEVEL = 1e-3, 1e-3
"""How often the calibrated answers are so lucky that the bets are not fair, and how often, at most,
the alarm is raised over requests like the calibrated ones, over unlimited time."""
_LEAST = 1e-6
AGE = 200
"""Requests after which an alarm ends that none of them gave a new reason for."""
LATELY = 64
"""The last requests, which tell whether several clients ask."""
SIDE = 128
"""Pixels of the longer side, at most, at which an image is looked at."""
STEPS = (0.001, 0.03, 0.1, 0.3)
"""Differences of neighbouring pixels, of 1, whose shares are looked at, at each of `SCALES`: the
first tells any difference, which drawings seldom have and photographs nearly everywhere."""
SCALES = 3
BLUR = 1 / 255
"""A difference between two looks, in any feature, that says nothing: a step of 8 bits."""


def is_unlike(p_value: float | None) -> bool:
    """Return True if a request with this p-value is called unlike; p_value: None: not tested."""
    return p_value is not None and p_value <= UNLIKE


def mean_log_score(scores: Sequence[float]) -> float | None:
    """Return the mean log score of an answer's tokens with a score; None without any."""
    seen = [math.log(max(score, _LEAST)) for score in scores if score == score]  # NaN: not looked
    return sum(seen) / len(seen) if seen else None


@dataclass(frozen=True)
class Kept:
    """Scores of the answers to one kind of prompt. n: number of answers. low: the smallest mean log
    scores, ascending, up to `KEPT` of them."""

    n: int
    low: tuple[float, ...]

    @classmethod
    def of(cls, means: Sequence[float]) -> Kept:
        least = sorted(means)[: math.ceil(KEPT * len(means))]
        return cls(len(means), tuple(round(mean, 5) for mean in least))

    def can_call(self, level: float) -> bool:
        """Return True if there are enough answers for a p-value of `level`."""
        return (self.n + 1) * level >= 1

    def p_value(self, mean: float) -> float:
        """Return the p-value of "drawn as the calibrated answers were"; 1 above the smallest
        scores."""
        place = bisect_right(self.low, round(mean, 5))  # as those are
        return 1.0 if place == len(self.low) else (1 + place) / (1 + self.n)

    def rate(self, level: float) -> float:
        """Return an upper bound of the rate of p-values up to `level`, for requests drawn as these
        were, with confidence 1 - `LUCK` (Clopper and Pearson 1934)."""
        from scipy.stats import beta

        called = max(0, math.floor(level * (self.n + 1)))  # as many are as sure as that, or less
        return float(beta.ppf(1 - LUCK, max(1, called), max(1, self.n - called + 1)))

    def to_json(self) -> dict[str, Any]:
        return {"n": self.n, "low": list(self.low)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Kept:
        return cls(int(value["n"]), tuple(sorted(float(mean) for mean in value["low"])))


def look_of(image: Image.Image) -> Array:
    """Return the look of an image [8 + SCALES * len(STEPS)]: mean and deviation of its colours and
    their saturation, and at each scale how often neighbouring pixels differ by how much."""
    small = image.convert("RGB")
    if max(small.size) > SIDE:
        small.thumbnail((SIDE, SIDE))
    pixels = np.asarray(small, dtype=np.float32) / 255
    saturation = pixels.max(2) - pixels.min(2)
    found = [*pixels.mean((0, 1)), *pixels.std((0, 1)), saturation.mean(), saturation.std()]
    for _ in range(SCALES):
        across, down = (np.abs(np.diff(pixels, axis=axis)).max(2, initial=0) for axis in (1, 0))
        steps = np.concatenate([across.ravel(), down.ravel()])
        found += [math.sqrt((steps > step).sum() / max(1, len(steps))) for step in STEPS]
        high, wide = (max(1, side // 2) for side in pixels.shape[:2])
        parts = [pixels[i : i + 2 * high : 2, j : j + 2 * wide : 2] for i in (0, 1) for j in (0, 1)]
        pixels = np.mean([part[:high, :wide] for part in parts if part.size], axis=0)
    return np.array(found, dtype=float)


@dataclass(frozen=True, eq=False)
class Looks:
    """Looks of images, and the distance of each from the others.

    center: their mean [F]. whitened: transforms their covariance to the identity [F, F]. kept: the
    largest distances, negated.
    """

    center: Array
    whitened: Array
    kept: Kept

    @classmethod
    def of(cls, looks: Array) -> Looks:
        """Summarise the looks of images. looks: [n, F] of n images, with n > F + 1."""
        n, features = looks.shape
        center = looks.mean(0)
        spread = np.cov(looks.T) + BLUR**2 * np.eye(features)
        whitened = np.linalg.inv(np.linalg.cholesky(spread))
        squares = ((looks - center) @ whitened.T) ** 2
        own = squares.sum(1) * n / (n - 1) ** 2  # what each adds to the covariance it is held to
        out = squares.sum(1) * (n / (n - 1)) ** 2 * (n - 2) / (n - 1) / np.maximum(1e-9, 1 - own)
        return cls(center.round(6), whitened.round(4), Kept.of((-np.sqrt(out)).tolist()))

    def p_value(self, look: Array) -> float:
        """Return the p-value of "drawn as these images were"."""
        return self.kept.p_value(-float(np.linalg.norm(self.whitened @ (look - self.center))))

    def to_json(self) -> dict[str, Any]:
        lower = self.whitened[np.tril_indices(len(self.center))]
        return {**self.kept.to_json(), "center": self.center.tolist(), "whitened": lower.tolist()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Looks:
        center = np.array(value["center"], dtype=float)
        whitened = np.zeros((len(center), len(center)))
        whitened[np.tril_indices(len(center))] = value["whitened"]
        return cls(center, whitened, Kept.from_json(value))


@dataclass(frozen=True)
class Tested:
    """The outcome of a test of a request's likeness. p_value: of "drawn as the calibrated ones
    were"; None: not tested. untested: the parts not tested, in words."""

    p_value: float | None = None
    untested: str = ""


@dataclass(frozen=True)
class Likeness:
    """Calibrated answers and images. kinds: scores by kind of prompt
    (`offramp.promises.prompt_kinds`). looks: of all images; None: too few, or not kept."""

    kinds: Mapping[str, Kept]
    looks: Looks | None = None

    @classmethod
    def of(
        cls, scores: Sequence[Sequence[float]], kinds: Sequence[str], looks: Array | None = None
    ) -> Likeness:
        """Summarise calibrated answers. scores: of the tokens of each answer. kinds: of the
        prompts, one for each answer. looks: of the images, each once [n, F]."""
        means: dict[str, list[float]] = {}
        for kind, row in zip(kinds, scores, strict=True):
            mean = mean_log_score(row)
            if mean is not None:
                means.setdefault(kind, []).append(mean)
        enough = looks is not None and (len(looks) + 1) * UNLIKE >= 1
        kept = {kind: Kept.of(some) for kind, some in sorted(means.items())}
        return cls(kept, Looks.of(looks) if enough and looks is not None else None)

    def tells(self, kind: str) -> bool:
        """Return True if a kind of prompt has enough calibrated answers to call a request
        unlike."""
        return kind in self.kinds and self.kinds[kind].can_call(UNLIKE)

    @property
    def looks_at_images(self) -> bool:
        """Return True if enough images were kept to call a request unlike by its image."""
        return self.looks is not None and self.looks.kept.can_call(UNLIKE)

    def _by(self, kind: str) -> tuple[Kept | None, Looks | None]:
        """Return what answers to a kind of prompt are held to: both, where both can call one unlike
        at half the level, else one of them, else nothing."""
        scores, looks = self.kinds.get(kind), self.looks
        if scores and looks and min(scores.n, looks.kept.n) + 1 >= 2 / UNLIKE:
            return scores, looks
        if self.tells(kind):
            return scores, None
        return None, looks if self.looks_at_images else None

    def test(self, kind: str, scores: Sequence[float], look: Array | None = None) -> Tested:
        """Test whether a request is like the calibrated ones of its kind.

        look: of the image (`look_of`); None: the test is by scores alone.
        """
        kept, looks = self._by(kind)
        found, mean = list[float](), mean_log_score(scores)
        if kept is not None and mean is not None:
            found.append(kept.p_value(mean))
        if looks is not None and look is not None:
            found.append(looks.p_value(look))
        if found:
            told = "" if look is None or looks else "likeness of the image not tested"
            return Tested(min(1.0, len(found) * min(found)), told)
        if kept is not None:
            return Tested(None, "likeness not tested (no exit was asked)")
        n = self.looks.kept.n if self.looks else self.kinds[kind].n if kind in self.kinds else 0
        return Tested(None, f"likeness not tested ({n} images)")

    def p_value(
        self, kind: str, scores: Sequence[float], look: Array | None = None
    ) -> float | None:
        """Return the p-value of `test`; None: not tested."""
        return self.test(kind, scores, look).p_value

    @property
    def rate(self) -> float:
        """Return an upper bound of the rate at which requests like the calibrated ones are called
        unlike; 0 where none can be called so."""

        def of(kind: str) -> float:
            kept, looks = self._by(kind)
            used = [kept] if kept is not None else []
            used += [looks.kept] if looks is not None else []
            return sum(one.rate(UNLIKE / len(used)) for one in used)

        return max(map(of, [OTHER, *self.kinds]))

    def to_json(self) -> dict[str, Any]:
        return {
            "kinds": {kind: known.to_json() for kind, known in self.kinds.items()},
            **({} if self.looks is None else {"looks": self.looks.to_json()}),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any] | None) -> Likeness:
        """Return the likeness that `to_json` wrote, in this version or in one with looks by kind,
        of which the largest set is used. From None, a likeness without any kind.

        Raises:
            DataError: it is anything else.
        """
        if value is None:
            return cls({})
        try:
            told = schema.likeness_of(value)
        except ValueError as error:
            raise DataError(
                f"What calibrated answers were like is damaged: {error}.",
                "Restore the file that it is from, or calibrate again.",
            ) from error
        if isinstance(told, schema.Likeness):
            kinds, looks = value["kinds"], [value["looks"]] if told.looks else []
        else:
            kinds, looks = value, [kept["looks"] for kept in value.values() if kept.get("looks")]
        most = max(looks, key=lambda look: int(look["n"]), default=None)
        kept = {kind: Kept.from_json(one) for kind, one in kinds.items()}
        return cls(kept, None if most is None else Looks.from_json(most))


class Alarm:
    """A test whether more requests than by chance are unlike the calibrated ones.

    spared: largest rate of unlike requests that chance explains. compared, unlike: numbers of
    requests so far. raised: until a reset, or until `AGE` requests in a row gave no reason. While
    others ask, one client brings at most half of the unlike requests that count.
    """

    def __init__(self, likeness: Likeness) -> None:
        self.spared: float = min(0.5, likeness.rate)
        self.reset()

    def reset(self) -> None:
        """Forget all requests."""
        self.compared: int = 0
        self.unlike: int = 0
        self.raised: bool = False
        self._since = 0
        self._new()

    def _new(self) -> None:
        self._bets = Restarts(self.spared or 0.5)
        self._asked: deque[str] = deque(maxlen=LATELY)
        self._called: Counter[str] = Counter()

    def add(self, p_value: float, client: str = "") -> bool:
        """Note a request; return True if it is called unlike. client: a name of who asked."""
        called = is_unlike(p_value)
        self.compared += 1
        self.unlike += called
        self._asked.append(client)
        if called and len(set(self._asked)) > 1:
            most = max(1.0, (self._called.total() + 1) / 2)
            if self._called[client] + 1 > most:
                return called
        self._called[client] += called
        self._bets.add(float(called))
        self._since += 1
        if self._bets.most >= 1 / LEVEL:
            self.raised, self._since = True, 0
            self._new()
        elif self._since >= AGE:
            self.raised = False
        return called

    def to_json(self) -> dict[str, Any]:
        """Return the state that is kept over a restart."""
        return {"compared": self.compared, "unlike": self.unlike, "raised": self.raised}

    def restore(self, value: Any) -> None:
        """Take over the state that `to_json` wrote; start anew from anything else."""
        self.reset()
        with suppress(TypeError, KeyError, ValueError):
            counts = int(value["compared"]), int(value["unlike"])
            self.compared, self.unlike = counts
            self.raised = value["raised"] is True
