"""Attempts at a guarantee: the images they bet on, in which order, and the errors they may make.

A guarantee counts images. Answers to several questions about one image are not independent, so the
loss of an image is the mean over its answers. Images are identified by content, so that copies
under other names count once, those that were encoded again or resized too, and by the name that
examples share (`Example.group`).

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
from offramp.data.image import content_digest
from offramp.data.near_copies import near_copies
from offramp.engine.policy import Thresholds
from offramp.storage import digest_rows

Array = npt.NDArray[Any]

FIRST = 0.8
"""Share of the error budget that a first attempt uses."""
DIGITS = 16
"""Hex digits kept of a digest."""


def error_share(number: int) -> float:
    """The share of the error budget that attempt `number`, from 1, on the same images may use."""
    return FIRST if number == 1 else (1 - FIRST) / (number * (number - 1))


# -- images ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageRows:
    """An image and its answers.

    image: digest of its content. asked: digest of what is asked about it. rows: places of its
    examples in a list.
    """

    image: str
    asked: str
    rows: tuple[int, ...]

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


def images_of(examples: Sequence[Example]) -> list[ImageRows]:
    """The images of some examples, in the order of their ranks.

    Raises:
        StorageError: an image file cannot be read. DataError: it is no image.
    """
    digests: dict[Any, str] = {}
    contents: list[str] = []
    shown: dict[str, Example] = {}  # an example of each content
    names = _Names()
    for example in examples:
        key = example.image if hasattr(example.image, "parts") else id(example.image)
        if key not in digests:
            digests[key] = content_digest(example.image)[:DIGITS]
        contents.append(digests[key])
        shown.setdefault(digests[key], example)
        if example.group:
            names.join(f"content {digests[key]}", f"group {example.group}")
    distinct = list(shown)
    for first, second in near_copies([shown[content] for content in distinct]):
        names.join(f"content {distinct[first]}", f"content {distinct[second]}")
    clusters: dict[str, list[int]] = {}
    for row, digest in enumerate(contents):
        clusters.setdefault(names.root(f"content {digest}"), []).append(row)
    images = [
        ImageRows(min(contents[row] for row in rows), _asked(examples, rows), tuple(rows))
        for rows in clusters.values()
    ]
    return sorted(images, key=lambda image: (image.rank, image.image))


def _asked(examples: Sequence[Example], rows: Iterable[int]) -> str:
    asked = sorted([e.prompt, *e.answers] for e in (examples[row] for row in rows))
    return digest_rows(asked)[:DIGITS]


def by_image(losses: Array, images: Sequence[ImageRows]) -> Array:
    """The mean loss of each image's answers [n, ...] of losses [rows, ...], in the order given."""
    return np.array([losses[list(image.rows)].mean(0) for image in images])


# -- attempts --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attempt:
    """What was asked, and what came of it.

    asked: digest of all that the losses and the tests depend on, but for the images.
    settings: some of that, for people. number: of this attempt among those on the same images.
    images: names in the order in which they were bet on. path: thresholds that were tested.
    outcome: what was found.
    """

    asked: str
    settings: Mapping[str, Any]
    number: int
    images: tuple[str, ...]
    path: tuple[Thresholds, ...]
    outcome: Mapping[str, Any]

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
            path=path,
        )


@dataclass(frozen=True)
class Turn:
    """How an attempt is made.

    number: among the attempts on the same images. images: in the order in which they are bet on.
    path: of the attempt that is continued; None: a new one.
    """

    number: int
    images: tuple[ImageRows, ...]
    path: tuple[Thresholds, ...] | None = None


def turn_of(
    attempts: Sequence[Attempt], asked: str, images: Sequence[ImageRows], *, any_time: bool
) -> Turn:
    """Continue an earlier attempt, or take the next share of the error budget.

    images: in the order of their ranks. any_time: whether the test stays valid when it goes on
    after a look at its outcome; the same images may be tested again in any case.
    """
    known = {image.name: image for image in images}
    contents = {image.image for image in images}
    sharing = [a for a in attempts if any(n.partition(":")[0] in contents for n in a.images)]
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
            return Turn(before.number, (*old, *more), before.path)
    return Turn(1 + max((attempt.number for attempt in sharing), default=0), tuple(images))


def recorded(attempts: Sequence[Attempt], attempt: Attempt) -> tuple[Attempt, ...]:
    """The attempts with another one, in place of the one that it continues."""
    others = [a for a in attempts if (a.asked, a.number) != (attempt.asked, attempt.number)]
    continued = [a for a in attempts if a not in others]
    longest = max((*continued, attempt), key=lambda a: len(a.images))
    return (*others, Attempt(**{**vars(attempt), "images": longest.images}))
