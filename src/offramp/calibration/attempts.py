"""Attempts at a guarantee: the images they bet on, in which order, and the errors they may make.

What is drawn is images, each with all its answers, and answers about one image are not independent.
An image is what is seen: its upright pixels, whatever file holds them, or the name that examples
share (`Example.group`). Images that come together, as pages of a document, frames of a film or
photographs of a user, are one draw (`Example.source`): the whole group is drawn and counts by the
mean over its images, so that no group, however large, can hide a risk that no draw has shown yet.
Images that are copies of each other, encoded again or resized, are no independent draws, and images
that only look alike are: a test must pass both with the copies as one draw and with each as its own
(`Draws`), so that merging lowers the count that is claimed and never the weight of a kind of image.
Where more than `MANY` of the images would be merged, they are refused.

Trying until it works breaks a guarantee, unless all attempts on the same images share one error
budget. The first attempt may use `FIRST` of it and attempt k >= 2 the share
(1 - FIRST) / (k (k - 1)) of it; these sum to 1 over any number of attempts. An attempt that kept
the risk to the end of its path hands what it might use on to the next (fallback procedure; Wiens
and Dmitrienko 2005): what is true uses nothing up. An attempt that asks the same of a longer list
of images continues the bets of the one before and uses no share of its own: betting is valid
whenever one stops (Ville's inequality; Waudby-Smith and Ramdas 2024).
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from offramp.core.decoding.policy import Thresholds
from offramp.core.errors import DataError
from offramp.core.storage import digest_rows
from offramp.data.decontamination import source_digest
from offramp.data.near_copies import Look, near_copies
from offramp.inputs.example import Example
from offramp.inputs.image import content_digest, pixel_digest

Array = npt.NDArray[Any]

FIRST = 0.8
"""Share of the error budget that a first attempt uses."""
MANY = 0.1
"""Largest share of the images that may be copies of others. With more of them the two ways of
counting are two different questions, and it is not known which one is asked."""
DIGITS = 16
"""Hex digits kept of a digest."""


def error_share(number: int) -> float:
    """Return the share of the error budget for attempt `number`, from 1, on the same images."""
    return FIRST if number == 1 else (1 - FIRST) / (number * (number - 1))


def handed_on(attempts: Sequence[Attempt], number: int) -> float:
    """Return the share of the error budget that earlier attempts on common images hand on to
    attempt `number`: the whole share of the attempt before, if that passed to the end of its path.
    Attempts with the same number each use a share of their own."""
    before = [attempt for attempt in attempts if attempt.number == number - 1]
    if not before or not all(attempt.passed for attempt in before):
        return 0.0
    share = error_share(number - 1)
    return max(0.0, share + handed_on(attempts, number - 1) - (len(before) - 1) * share)


# -- images ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageRows:
    """An image, or a group of images that are drawn together, and its answers.

    image: digest of its pixels, for a group of the first image. asked: digest of the questions
    about the image and its copies. rows: places of its examples in a list. members: digests that
    identify it: of pixels, and of the names that examples share. files: digests of its files, which
    attempts of earlier versions store. cluster: image of the first of its copies; its own without
    copies. parts: for a group, the rows of each image; (): one image.
    """

    image: str
    asked: str
    rows: tuple[int, ...]
    members: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    cluster: str = ""
    parts: tuple[tuple[int, ...], ...] = ()

    @property
    def by_image(self) -> tuple[tuple[int, ...], ...]:
        """Return the rows of each image."""
        return self.parts or (self.rows,)

    def of_rows(self, wanted: Collection[int]) -> ImageRows | None:
        """Return the part within the wanted rows; None where there is none."""
        parts = [tuple(row for row in part if row in wanted) for part in self.by_image]
        parts = [part for part in parts if part]
        rows = tuple(row for row in self.rows if row in wanted)
        kept = tuple(parts) if len(parts) > 1 else ()
        return replace(self, rows=rows, parts=kept) if rows else None

    def at(self, start: int) -> ImageRows:
        """Return the same image with its rows from `start` on."""
        place = {row: start + i for i, row in enumerate(self.rows)}
        parts = tuple(tuple(place[row] for row in part) for part in self.parts)
        return replace(self, rows=tuple(place.values()), parts=parts)

    @property
    def name(self) -> str:
        """The name of the image with its questions; with other questions it counts as another
        draw."""
        return f"{self.image}:{self.asked}"

    @property
    def rank(self) -> float:
        """A number in [0, 1) that looks random and depends on the image alone."""
        return _rank(self.image)


def _rank(name: str) -> float:
    return int(hashlib.sha256(name.encode()).hexdigest()[:13], 16) / 16**13


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
    """Return the images of some examples, in the order of their ranks.

    Raises:
        StorageError: an image file cannot be read. DataError: it is no image, or too many images
            are copies of others.
    """
    opened: dict[Any, _Seen] = {}
    seen = [_opened(example, opened) for example in examples]
    names, together = _Names(), _Names()
    for example, image in zip(examples, seen, strict=True):
        names.root(f"pixels {image.pixels}")
        if example.group:
            names.join(f"pixels {image.pixels}", f"group {example.group}")
    parts: dict[str, list[int]] = {}
    for row, image in enumerate(seen):
        parts.setdefault(names.root(f"pixels {image.pixels}"), []).append(row)
    for name, rows in parts.items():
        for source in {examples[row].source for row in rows} - {""}:
            together.join(name, f"source {source}")
    drawn: dict[str, list[list[int]]] = {}
    for name, rows in parts.items():
        drawn.setdefault(together.root(name), []).append(rows)
    draw_of = {row: root for root, some in drawn.items() for rows in some for row in rows}
    copies = _copies(examples, seen, draw_of)
    alike: dict[str, list[int]] = {}
    for root, some in drawn.items():
        alike.setdefault(copies.root(root), []).extend(row for rows in some for row in rows)
    first = {root: min(seen[row].pixels for row in rows) for root, rows in alike.items()}
    asked = {root: _asked(examples, seen, rows) for root, rows in alike.items()}
    images = [
        _image(examples, seen, some, asked[copies.root(root)], first[copies.root(root)])
        for root, some in drawn.items()
    ]
    _check_copies(examples, images)
    return sorted(images, key=lambda image: (image.rank, image.image))


def _image(
    examples: Sequence[Example],
    seen: Sequence[_Seen],
    parts: Sequence[Sequence[int]],
    asked: str,
    cluster: str,
) -> ImageRows:
    rows = tuple(sorted(row for part in parts for row in part))
    return ImageRows(
        image=min(seen[row].pixels for row in rows),
        asked=asked,
        rows=rows,
        members=_members(examples, seen, rows),
        files=tuple(sorted({seen[row].file for row in rows})),
        cluster=cluster,
        parts=tuple(tuple(part) for part in parts) if len(parts) > 1 else (),
    )


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


def _copies(
    examples: Sequence[Example], seen: Sequence[_Seen], draw_of: Mapping[int, str]
) -> _Names:
    """Draws that are copies of others. Images that both name where they came from count by that:
    a thousand meters of one kind differ in a number alone."""
    shown: dict[str, int] = {}  # a row of each content
    for row, image in enumerate(seen):
        shown.setdefault(image.pixels, row)
    rows = [shown[pixels] for pixels in sorted(shown)]
    copies = _Names()
    if all(examples[row].source for row in rows):
        return copies
    for pair in near_copies([examples[row] for row in rows], [seen[row].look for row in rows]):
        one, other = (rows[i] for i in pair)
        if not (examples[one].source and examples[other].source):
            copies.join(draw_of[one], draw_of[other])
    return copies


def _members(
    examples: Sequence[Example], seen: Sequence[_Seen], rows: Sequence[int]
) -> tuple[str, ...]:
    groups = {examples[row].group for row in rows} - {""}
    named = {hashlib.sha256(f"group {group}".encode()).hexdigest()[:DIGITS] for group in groups}
    named |= {source_digest(examples[row].source) for row in rows if examples[row].source}
    return tuple(sorted({seen[row].pixels for row in rows} | named))


def _asked(examples: Sequence[Example], seen: Sequence[_Seen], rows: Iterable[int]) -> str:
    asked = sorted([seen[r].pixels, examples[r].prompt, *examples[r].answers] for r in rows)
    return digest_rows(asked)[:DIGITS]


def merged(images: Sequence[ImageRows]) -> int:
    """Return how many images are copies of an earlier one."""
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
        "Keep one of each. Where they are draws of their own, or come together in documents, "
        "films, patients or users, say so: a 'group' in each row, or --group-by folder.",
    )


@dataclass(frozen=True)
class Draws:
    """Losses as independent draws; a test shows that their mean is at most the target.

    sums: total loss of the answers to an image or group [n, ...]; where the unit is an image, the
    mean of the images' means. counts: number of answers of each, or 1 [n]. clusters: equal for
    copies of each other [n]. largest: the largest count. whole: whether a loss is 0 or 1 (or a
    gain), known before any is seen. looked: number of draws at the first look; None: all. times:
    factor from the common target to the tested one. chance: in (0, 1], drawn by the names of these
    images; see `offramp.promises.betting.planned_p_value`.
    """

    sums: Array
    counts: Array
    clusters: Array
    largest: float
    whole: bool = False
    looked: int | None = None
    times: float = 1.0
    chance: float = 1.0

    @classmethod
    def of(cls, losses: Array, *, whole: bool = False, looked: int | None = None) -> Draws:
        """Return losses [n, ...] as draws, each of its own."""
        n = len(losses)
        return cls(losses, np.ones(n), np.arange(n), 1.0, whole, looked)

    @classmethod
    def by(
        cls,
        unit: str,
        losses: Array,
        images: Sequence[ImageRows],
        *,
        whole: bool = False,
        looked: int | None = None,
    ) -> Draws:
        """Return losses of answers [rows, ...] to images as draws, in the order of the images.

        unit: of `UNITS`. whole: whether one answer's loss is 0 or 1; for images with several
        answers the draw's is not. looked: see `Draws`.
        """
        whole = whole and all(len(image.rows) == 1 for image in images)
        if unit == "image":
            means = _means(losses, [rows for image in images for rows in image.by_image])
            places = np.arange(len(means)).tolist()
            ends = np.cumsum([len(image.by_image) for image in images]).tolist()
            parts = [places[start:end] for start, end in pairwise([0, *ends])]
            sums, counts = _means(means, parts), np.ones(len(images))
        else:
            counts = np.array([float(len(image.rows)) for image in images])
            sums = _sums(losses, [image.rows for image in images])
        numbers = {name: i for i, name in enumerate(dict.fromkeys(map(cluster_of, images)))}
        clusters = np.array([numbers[cluster_of(image)] for image in images])
        names = "".join(image.image for image in images[:looked])
        return cls(
            sums,
            counts,
            clusters,
            float(counts.max(initial=1.0)),
            whole,
            looked,
            chance=1 - _rank(names),
        )

    @property
    def n(self) -> int:
        """The number of images, or groups of images, without copies."""
        return len(np.unique(self.clusters))

    @property
    def risk(self) -> Any:
        """The risk: the mean loss over images, groups or answers, by the unit [...]."""
        return self.sums.sum(0) / self.counts.sum()

    def values(self, target: float) -> list[Array]:
        """Return values of at most 1 [n, ...] with a mean of at most `target` exactly if the risk
        is.

        An image with c answers is a bet on their summed excess over the target, scaled by the
        largest count: target + (sum - c * target) / largest. Where some images are copies there are
        two lists, and both must pass: each image on its own, and copies as one, by their mean.
        """
        excess = ((self.sums.T - target * self.counts) / self.largest).T
        return self._both(target + excess)

    def differences(self, after: int, before: int) -> list[Array]:
        """Return the extra loss of column `after` over column `before` [n], in the scale of
        `values`."""
        return self._both((self.sums[:, after] - self.sums[:, before]) / self.largest)

    def column(self, index: int) -> Draws:
        """Return one column of losses [n, K], as draws [n]."""
        return replace(self, sums=self.sums[:, index])

    def first(self, n: int | None) -> Draws:
        """Return the first n draws; n: None: all."""
        return replace(self, sums=self.sums[:n], counts=self.counts[:n], clusters=self.clusters[:n])

    def _both(self, values: Array) -> list[Array]:
        sizes = np.bincount(self.clusters)
        if len(values) == 0 or sizes.max() == 1:
            return [values]
        together = np.zeros((len(sizes), *values.shape[1:]))
        np.add.at(together, self.clusters, values)
        _, order = np.unique(self.clusters, return_index=True)
        together = (together.T / np.maximum(sizes, 1)).T
        return [values, together[self.clusters[np.sort(order)]]]


def _sums(losses: Array, parts: Sequence[Sequence[int]]) -> Array:
    """Return the sum of the losses [n, ...] of each part [parts, ...]; none is empty."""
    starts = np.cumsum([0, *map(len, parts)])[:-1]
    flat = [row for part in parts for row in part]
    return np.add.reduceat(losses[flat], starts)


def _means(losses: Array, parts: Sequence[Sequence[int]]) -> Array:
    """Return the mean of the losses [n, ...] of each part [parts, ...]; none is empty."""
    return (_sums(losses, parts).T / [len(part) for part in parts]).T


UNITS = ("image", "answer")
"""What a risk is a mean over: images, each by the mean of its answers, and groups of these by the
mean of their images; or all answers."""


def grouped(images: Sequence[ImageRows]) -> bool:
    """Return True if some images are drawn together, as groups."""
    return any(image.parts for image in images)


def cluster_of(image: ImageRows) -> str:
    """Return a name that an image shares with its copies alone."""
    return image.cluster or image.image or str(image.rows)


def by_image(losses: Array, images: Sequence[ImageRows]) -> Array:
    """Return the mean loss of each image's answers [n, ...] from losses [rows, ...], in the order
    of the images."""
    return Draws.by("image", losses, images).sums


# -- attempts --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attempt:
    """An attempt at a guarantee: the question, and its outcome.

    asked: digest of all that losses and tests depend on, except the images. settings: some of that,
    for people. number: among the attempts on the same images. images: names in the order of the
    bets. looked: number of images at the first look. members: all digests that identify these
    images; see `ImageRows`. path: the tested thresholds. outcome: the result, as JSON.
    """

    asked: str
    settings: Mapping[str, Any]
    number: int
    images: tuple[str, ...]
    path: tuple[Thresholds, ...]
    outcome: Mapping[str, Any]
    members: tuple[str, ...] = ()
    looked: int = 0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": [point.to_json() for point in self.path]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Attempt:
        """Return the attempt that `to_json` wrote. Raise KeyError, TypeError or ValueError for
        anything else."""
        path = tuple(Thresholds.from_json(point) for point in value["path"])
        names = ("asked", "settings", "outcome")
        return cls(
            **{name: value[name] for name in names},
            number=int(value["number"]),
            images=tuple(map(str, value["images"])),
            members=tuple(map(str, value.get("members", ()))),
            looked=int(value.get("looked", 0)),
            path=path,
        )

    @property
    def passed(self) -> bool:
        """Return True if the whole path kept the risk, the last thresholds included. For attempts
        of earlier versions: if the last thresholds were chosen."""
        last = self.path[-1].to_json() if self.path else None
        chosen = self.outcome.get("thresholds") == last
        return last is not None and bool(self.outcome.get("passed", chosen))

    def shares(self, images: Sequence[ImageRows]) -> bool:
        """Return True if the attempt used one of these images, or another image with a common
        digest."""
        known = {*self.members, *(name.partition(":")[0] for name in self.images)}
        return any(not known.isdisjoint((*image.members, *image.files)) for image in images)

    def is_part_of(self, other: Attempt) -> bool:
        """Return True if two records are of one attempt: equal number and question, and one list of
        images begins the other."""
        n = min(len(self.images), len(other.images))
        same = (self.asked, self.number) == (other.asked, other.number)
        return same and self.images[:n] == other.images[:n]

    def joined(self, other: Attempt) -> Attempt:
        """Return the longer of two records of one attempt (the other's where equal), with the
        digests of both."""
        longer = other if len(other.images) >= len(self.images) else self
        members = tuple(sorted({*self.members, *other.members}))
        return replace(longer, members=members, looked=min(self.looked, other.looked))


@dataclass(frozen=True)
class Turn:
    """The images, path and errors that an attempt may use.

    number: among the attempts on the same images. handed: share of the errors that these hand on.
    images: in the order of the bets. looked: number of images at the first look; 0: now fewer, so
    that a test with a fixed number is not valid. path: of the continued attempt; None: a new one.
    continues: the continued attempt.
    """

    number: int
    images: tuple[ImageRows, ...]
    looked: int
    handed: float = 0.0
    path: tuple[Thresholds, ...] | None = None
    continues: Attempt | None = None


def turn_of(
    attempts: Sequence[Attempt], asked: str, images: Sequence[ImageRows], *, any_time: bool
) -> Turn:
    """Continue an earlier attempt, or take the next share of the error budget.

    images: in the order of their ranks. any_time: whether the test stays valid when it goes on
    after its outcome was seen; the same images may be tested again in any case.
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
            looked = before.looked if goes_on else 0
            handed = handed_on(sharing, before.number)
            return Turn(before.number, (*old, *more), looked, handed, before.path, before)
    number = 1 + max((attempt.number for attempt in sharing), default=0)
    return Turn(number, tuple(images), len(images), handed_on(sharing, number))


def recorded(
    attempts: Sequence[Attempt], attempt: Attempt, continues: Attempt | None = None
) -> tuple[Attempt, ...]:
    """Return the attempts with a new one, in place of the attempt that it continues. Of these two,
    the longer list of images, the number at the first look and all digests are kept."""
    others = [a for a in attempts if a != continues]
    parts = [attempt] if continues is None else [continues, attempt]
    longest = max(parts, key=lambda a: len(a.images))
    members = tuple(sorted({member for part in parts for member in part.members}))
    kept = {"images": longest.images, "members": members, "looked": parts[0].looked}
    return (*others, Attempt(**{**vars(attempt), **kept}))
