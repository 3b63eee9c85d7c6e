"""Attempts at a guarantee: the images they bet on, in which order, and the errors they may make.

What is drawn is images, each with all its answers, and answers about one image are not independent.
An image is what is seen: its upright pixels, whatever file holds them, or the name that examples
share (`Example.group`). Images that are copies of each other, encoded again or resized, are no
independent draws, and images that only look alike are: a test must pass both with the copies as one
draw and with each as its own (`Draws`), so that merging lowers the count that is claimed and never
the weight of a kind of image. Where more than `MANY` of the images would be merged, they are
refused.

Trying until it works breaks a guarantee, unless all attempts on the same images share one error
budget. The first attempt may use `FIRST` of it and attempt k >= 2 the share
(1 - FIRST) / (k (k - 1)) of it; these sum to 1 over any number of attempts. An attempt that asks
the same of a longer list of images continues the bets of the one before and uses no share of its
own: betting is valid whenever one stops (Ville's inequality; Waudby-Smith and Ramdas 2024).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from offramp.data.example import Example
from offramp.data.image import content_digest, pixel_digest
from offramp.data.near_copies import Look, near_copies
from offramp.engine.policy import Thresholds
from offramp.errors import DataError
from offramp.storage import digest_rows

Array = npt.NDArray[Any]

FIRST = 0.8
"""Share of the error budget that a first attempt uses."""
MANY = 0.1
"""Largest share of the images that may be copies of others. With more of them the two ways of
counting are two different questions, and it is not known which one is asked."""
DIGITS = 16
"""Hex digits kept of a digest."""


def error_share(number: int) -> float:
    """The share of the error budget that attempt `number`, from 1, on the same images may use."""
    return FIRST if number == 1 else (1 - FIRST) / (number * (number - 1))


# -- images ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageRows:
    """An image and its answers.

    image: digest of its pixels, the first of several. asked: digest of what is asked about it and
    about its copies. rows: places of its examples in a list. members: all that it is known by, as
    digests: pixels, and the name that examples share. files: digests of its files, by which
    attempts of earlier versions know it. cluster: image of the first of its copies; its own where
    it has none.
    """

    image: str
    asked: str
    rows: tuple[int, ...]
    members: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    cluster: str = ""

    @property
    def name(self) -> str:
        """The image with its questions: with others it is not the same draw."""
        return f"{self.image}:{self.asked}"

    @property
    def rank(self) -> float:
        """A number in [0, 1) that looks random and depends on the image alone."""
        return int(hashlib.sha256(self.image.encode()).hexdigest()[:13], 16) / 16**13


class _Names:
    """Names of images, of which some turn out to be of the same one."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def root(self, name: str) -> str:
        """The first of all names of its image."""
        while self._parent.setdefault(name, name) != name:
            name = self._parent[name]
        return name

    def join(self, name: str, other: str) -> None:
        # The smaller name stays, so that the order of the examples does not matter.
        first, second = sorted((self.root(name), self.root(other)))
        self._parent[second] = first


@dataclass(frozen=True)
class _Seen:
    """An image that was opened. look: None of a prompt without an image, known by its text."""

    pixels: str
    file: str
    look: Look | None


def images_of(examples: Sequence[Example]) -> list[ImageRows]:
    """The images of some examples, in the order of their ranks.

    Raises:
        StorageError: an image file cannot be read. DataError: it is no image, or too many images
            are copies of others.
    """
    opened: dict[Any, _Seen] = {}
    seen = [_opened(example, opened) for example in examples]
    names = _Names()
    for example, image in zip(examples, seen, strict=True):
        names.root(f"pixels {image.pixels}")
        if example.group:
            names.join(f"pixels {image.pixels}", f"group {example.group}")
    parts: dict[str, list[int]] = {}
    for row, image in enumerate(seen):
        parts.setdefault(names.root(f"pixels {image.pixels}"), []).append(row)
    copies = _copies(examples, seen, names)
    together: dict[str, list[int]] = {}
    for name, rows in parts.items():
        together.setdefault(copies.root(name), []).extend(rows)
    first = {root: min(seen[row].pixels for row in rows) for root, rows in together.items()}
    asked = {root: _asked(examples, seen, rows) for root, rows in together.items()}
    images = [
        ImageRows(
            image=min(seen[row].pixels for row in rows),
            asked=asked[copies.root(name)],
            rows=tuple(rows),
            members=_members(examples, seen, rows),
            files=tuple(sorted({seen[row].file for row in rows})),
            cluster=first[copies.root(name)],
        )
        for name, rows in parts.items()
    ]
    _check_copies(examples, images)
    return sorted(images, key=lambda image: (image.rank, image.image))


def _opened(example: Example, known: dict[Any, _Seen]) -> _Seen:
    """An example's image; a file is opened once, however many questions are asked about it."""
    key = example.image if hasattr(example.image, "parts") else id(example.image)
    if key not in known:
        file = content_digest(example.image)[:DIGITS]
        if example.is_text:
            known[key] = _Seen(file, file, None)
            return known[key]
        image = example.open_image()
        known[key] = _Seen(pixel_digest(image)[:DIGITS], file, Look.of(image))
    return known[key]


def _copies(examples: Sequence[Example], seen: Sequence[_Seen], names: _Names) -> _Names:
    """Images, by the first of their names, that are copies of others."""
    shown: dict[str, int] = {}  # a row of each content
    for row, image in enumerate(seen):
        shown.setdefault(image.pixels, row)
    rows = [shown[pixels] for pixels in sorted(shown)]
    pairs = near_copies([examples[row] for row in rows], [seen[row].look for row in rows])
    copies = _Names()
    for one, other in pairs:
        first, second = (names.root(f"pixels {seen[rows[i]].pixels}") for i in (one, other))
        copies.join(first, second)
    return copies


def _members(
    examples: Sequence[Example], seen: Sequence[_Seen], rows: Sequence[int]
) -> tuple[str, ...]:
    groups = {examples[row].group for row in rows} - {""}
    named = {hashlib.sha256(f"group {group}".encode()).hexdigest()[:DIGITS] for group in groups}
    return tuple(sorted({seen[row].pixels for row in rows} | named))


def _asked(examples: Sequence[Example], seen: Sequence[_Seen], rows: Iterable[int]) -> str:
    asked = sorted([seen[r].pixels, examples[r].prompt, *examples[r].answers] for r in rows)
    return digest_rows(asked)[:DIGITS]


def merged(images: Sequence[ImageRows]) -> int:
    """How many images are copies of another one of them."""
    return len(images) - len(set(map(cluster_of, images)))


def _check_copies(examples: Sequence[Example], images: Sequence[ImageRows]) -> None:
    copies = merged(images)
    if copies <= MANY * len(images):
        return
    sizes: dict[str, list[ImageRows]] = {}
    for image in images:
        sizes.setdefault(image.cluster, []).append(image)
    one, other, *_ = max(sizes.values(), key=len)
    shown = " and ".join(repr(examples[image.rows[0]].key) for image in (one, other))
    raise DataError(
        f"{copies} of {len(images)} images are copies of others, such as {shown}: they are no "
        "independent draws.",
        "Keep one of each, or give the images that are one and the same a shared group.",
    )


@dataclass(frozen=True)
class Draws:
    """Losses as independent draws, of which a test needs a mean that is at most the target.

    sums: what all answers to an image lose together [n, ...] or, where the unit is an image, their
    mean. counts: answers of each image [n], or 1. clusters: which images are copies of each
    other [n]. largest: the largest count.
    """

    sums: Array
    counts: Array
    clusters: Array
    largest: float

    @classmethod
    def of(cls, losses: Array) -> Draws:
        """Losses [n, ...], each a draw of its own."""
        n = len(losses)
        return cls(losses, np.ones(n), np.arange(n), 1.0)

    @classmethod
    def by(cls, unit: str, losses: Array, images: Sequence[ImageRows]) -> Draws:
        """Losses of answers [rows, ...] to images, in the order given. unit: of `UNITS`."""
        counts = np.array([float(len(image.rows)) for image in images])
        sums = np.array([losses[list(image.rows)].sum(0) for image in images])
        if unit == "image":
            sums, counts = (sums.T / counts).T, np.ones(len(images))
        numbers = {name: i for i, name in enumerate(dict.fromkeys(map(cluster_of, images)))}
        clusters = np.array([numbers[cluster_of(image)] for image in images])
        return cls(sums, counts, clusters, float(counts.max(initial=1.0)))

    @property
    def n(self) -> int:
        """Images, copies left out."""
        return len(np.unique(self.clusters))

    @property
    def risk(self) -> Any:
        """The mean loss of the unit [...]."""
        return self.sums.sum(0) / self.counts.sum()

    def values(self, target: float) -> list[Array]:
        """Values of at most 1 [n, ...] whose mean is at most `target` where the risk is.

        An image with c answers is a bet on their summed excess over the target, scaled by the
        largest count: target + (sum - c * target) / largest. Where some images are copies there are
        two lists, and both must pass: each image on its own, and copies as one, by their mean.
        """
        excess = ((self.sums.T - target * self.counts) / self.largest).T
        return self._both(target + excess)

    def differences(self, after: int, before: int) -> list[Array]:
        """By how much more is lost at one column than at another [n], scaled alike."""
        return self._both((self.sums[:, after] - self.sums[:, before]) / self.largest)

    def column(self, index: int) -> Draws:
        """One column of losses [n, K], as [n]."""
        return Draws(self.sums[:, index], self.counts, self.clusters, self.largest)

    def first(self, n: int) -> Draws:
        """The first n images."""
        return Draws(self.sums[:n], self.counts[:n], self.clusters[:n], self.largest)

    def _both(self, values: Array) -> list[Array]:
        sizes = np.bincount(self.clusters)
        if len(values) == 0 or sizes.max() == 1:
            return [values]
        together = np.zeros((len(sizes), *values.shape[1:]))
        np.add.at(together, self.clusters, values)
        _, order = np.unique(self.clusters, return_index=True)
        together = (together.T / np.maximum(sizes, 1)).T
        return [values, together[self.clusters[np.sort(order)]]]


UNITS = ("image", "answer")
"""What a risk is a mean over: images, each by the mean of its answers, or all answers."""


def cluster_of(image: ImageRows) -> str:
    """A name that an image shares with its copies alone."""
    return image.cluster or image.image or str(image.rows)


def by_image(losses: Array, images: Sequence[ImageRows]) -> Array:
    """The mean loss of each image's answers [n, ...] of losses [rows, ...], in the order given."""
    return Draws.by("image", losses, images).sums


# -- attempts --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attempt:
    """What was asked, and what came of it.

    asked: digest of all that the losses and the tests depend on, but for the images.
    settings: some of that, for people. number: of this attempt among those on the same images.
    images: names in the order in which they were bet on. members: all that these images are known
    by; see `ImageRows`. path: thresholds that were tested. outcome: what was found.
    """

    asked: str
    settings: Mapping[str, Any]
    number: int
    images: tuple[str, ...]
    path: tuple[Thresholds, ...]
    outcome: Mapping[str, Any]
    members: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": [point.to_json() for point in self.path]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Attempt:
        """What `to_json` gave. Raise KeyError, TypeError or ValueError for anything else."""
        path = tuple(Thresholds.from_json(point) for point in value["path"])
        names = ("asked", "settings", "outcome")
        return cls(
            **{name: value[name] for name in names},
            number=int(value["number"]),
            images=tuple(map(str, value["images"])),
            members=tuple(map(str, value.get("members", ()))),
            path=path,
        )

    def shares(self, images: Sequence[ImageRows]) -> bool:
        """Whether it was made on one of these images, or on another that goes by its name."""
        known = {*self.members, *(name.partition(":")[0] for name in self.images)}
        return any(not known.isdisjoint((*image.members, *image.files)) for image in images)


@dataclass(frozen=True)
class Turn:
    """How an attempt is made.

    number: among the attempts on the same images. images: in the order in which they are bet on.
    path: of the attempt that is continued; None: a new one. continues: that attempt.
    """

    number: int
    images: tuple[ImageRows, ...]
    path: tuple[Thresholds, ...] | None = None
    continues: Attempt | None = None


def turn_of(
    attempts: Sequence[Attempt], asked: str, images: Sequence[ImageRows], *, any_time: bool
) -> Turn:
    """Continue an earlier attempt, or take the next share of the error budget.

    images: in the order of their ranks. any_time: whether the test stays valid when it goes on
    after a look at its outcome; the same images may be tested again in any case.
    """
    known = {image.name: image for image in images}
    sharing = [attempt for attempt in attempts if attempt.shares(images)]
    for before in (attempt for attempt in sharing if attempt.asked == asked):
        old = [known[name] for name in before.images if name in known]
        goes_on = len(old) == len(before.images)
        stops_early = [image.name for image in old] == list(before.images[: len(old)])
        is_same = goes_on and len(old) == len(known)
        share_is_its_own = all(a is before or a.number != before.number for a in sharing)
        if is_same or (
            any_time and share_is_its_own and (goes_on or (stops_early and len(old) == len(known)))
        ):
            bet_on = set(before.images)
            more = [image for image in images if image.name not in bet_on]
            return Turn(before.number, (*old, *more), before.path, before)
    return Turn(1 + max((attempt.number for attempt in sharing), default=0), tuple(images))


def recorded(
    attempts: Sequence[Attempt], attempt: Attempt, continues: Attempt | None = None
) -> tuple[Attempt, ...]:
    """The attempts with another one, in place of the one that it continues. The longer list of
    images stays, and all that they were ever known by."""
    others = [a for a in attempts if a != continues]
    parts = [attempt] if continues is None else [continues, attempt]
    longest = max(parts, key=lambda a: len(a.images))
    members = tuple(sorted({member for part in parts for member in part.members}))
    kept = {"images": longest.images, "members": members}
    return (*others, Attempt(**{**vars(attempt), **kept}))
