"""One example, and what is done with many: splits by image, and digests."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from offramp.core.errors import DataError, InputError
from offramp.core.storage import digest_rows
from offramp.inputs.image import EncodedImage, content_digest, open_rgb


@dataclass(frozen=True)
class TextAlone:
    """The text of a prompt without an image, in the image's place, by which examples are told
    apart."""

    text: str

    def read(self) -> bytes:
        return self.text.encode()


@dataclass(frozen=True)
class Example:
    """One image, one prompt, and the answers that count as right.

    Args:
        image: a file, an image in memory, or an object whose `read()` gives a file's bytes; for
            `Example.of_text` a `TextAlone`.
        prompt: the question to the backbone; may be empty, with which some backbones caption best.
        answers: any of them is right; empty means unlabelled.
        key: names the example in digests; the same on every machine.
        group: names the image; examples of one group never land in different splits. Empty:
            `split_examples` tells images apart by path or, in memory, by pixels.
        source: names the origin of similar images, such as a document, a film, a patient or a user.
            Whole sources are drawn and split. Empty: the image came alone.
    """

    image: Path | Image.Image | EncodedImage | TextAlone
    prompt: str
    answers: tuple[str, ...]
    key: str
    group: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        wrong = []
        if not isinstance(self.image, Path | Image.Image) and not hasattr(self.image, "read"):
            wrong.append(f"image is a {type(self.image).__name__}, not a Path or a PIL image")
        if not isinstance(self.prompt, str):
            wrong.append(f"prompt is a {type(self.prompt).__name__}, not a str")
        # A str would pass as a sequence of one-letter answers.
        if not isinstance(self.answers, tuple):
            wrong.append(f"answers is a {type(self.answers).__name__}, not a tuple of str")
        elif not all(isinstance(answer, str) and answer.strip() for answer in self.answers):
            wrong.append("answers holds something empty or not a str")
        if not isinstance(self.key, str) or not self.key:
            wrong.append("key is not a name")
        if wrong:
            raise InputError(
                f"This example cannot be used: {'; '.join(wrong)}.",
                "Write Example(Path('dog.jpg'), 'Caption:', ('a dog',), key='dog').",
            )

    @classmethod
    def of_text(cls, prompt: str, answers: tuple[str, ...] = (), *, key: str) -> "Example":
        """Return an example for a language model, without an image. Raise `InputError` if the
        prompt is empty."""
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError("A prompt without an image is empty.", "Write what is asked.")
        return cls(TextAlone(prompt), prompt, answers, key)

    @property
    def is_text(self) -> bool:
        """Return True if there is no image."""
        return isinstance(self.image, TextAlone)

    def open_image(self, smallest: int | None = None) -> Image.Image:
        """Return the image as 8-bit RGB: upright (EXIF), alpha over white, 16 bits scaled to 8.

        smallest: as of `offramp.inputs.image.open_rgb`.

        Raises:
            DataError: the image is missing, damaged, too large (Pillow's `MAX_IMAGE_PIXELS`) or of
                a kind without an agreed range, such as floating point.
        """
        if isinstance(self.image, TextAlone):
            raise DataError(
                f"The example {self.key!r} is a prompt without an image.",
                "Give data with images for this model, or train a language model.",
            )
        name = str(self.image) if isinstance(self.image, Path) else f"The image of {self.key!r}"
        return open_rgb(self.image, name, smallest=smallest)


def split_examples(
    examples: Sequence[Example], fractions: Mapping[str, float], seed: int
) -> dict[str, list[Example]]:
    """Split examples by image: all examples of one image, or of one source of images, land in the
    same split.

    Args:
        fractions: share of the *images* for each split, in (0, 1], summing to at most 1; the rest
            is left out.
        seed: equal images, fractions and seed give equal splits, in any order of `examples`.

    Returns:
        The examples of each split, in the order they came in.

    Raises:
        InputError: the fractions cannot be used.
        DataError: there are too few images to give every split one.
    """
    total = math.fsum(fractions.values())
    # Written so that NaN fails too; the margin lets 0.7 + 0.2 + 0.1 be 1.
    if not fractions or not all(0 < f <= 1 for f in fractions.values()) or not total <= 1 + 1e-9:
        raise InputError(
            f"These fractions cannot be used: {dict(fractions)}.",
            "Give each split a share above 0, with a sum of at most 1.",
        )
    group_of = list(map(drawn_with(examples), examples))
    # Ranks from a hash, not from a generator: no version of Python or numpy changes them.
    groups = sorted(set(group_of), key=lambda group: rank_of(seed, group))
    home: dict[str, str] = {}
    share = 0.0
    for name, fraction in fractions.items():
        start, share = round(share * len(groups)), share + fraction
        members = groups[start : round(share * len(groups))]
        if not members:
            raise DataError(
                f"{len(groups)} images are too few to give split {name!r} a share of {fraction}.",
                "Give more images, or give it a larger share.",
            )
        home.update(dict.fromkeys(members, name))
    splits: dict[str, list[Example]] = {name: [] for name in fractions}
    for example, group in zip(examples, group_of, strict=True):
        if group in home:
            splits[home[group]].append(example)
    return splits


def examples_digest(examples: Iterable[Example]) -> str:
    """Return the SHA-256 of keys, prompts, answers and the images' content, wherever files lie.

    Raises:
        StorageError: an image file cannot be read.
    """
    of_file = cache(content_digest)  # read once, however many questions are asked about it

    def rows() -> Iterator[list[Any]]:
        for example in examples:
            image = example.image
            content = of_file(image) if isinstance(image, Path) else content_digest(image)
            yield [example.key, example.prompt, example.answers, content]

    return digest_rows(rows())


def picture_of(example: Example) -> str:
    """Return a name of the example's image, the same for all examples of that image."""
    if not example.group and isinstance(example.image, Path):
        return str(example.image.resolve())
    return example.group or content_digest(example.image)


def drawn_with(examples: Iterable[Example]) -> Callable[[Example], str]:
    """Return a function from an example to its unit of sampling: the source of its image, or the
    image itself where no example about that image names a source."""
    sources = {picture_of(e): f"source {e.source}" for e in examples if e.source}

    def named(example: Example) -> str:
        picture = picture_of(example)
        return sources.get(picture, picture)

    return named


def rank_of(seed: int, group: str) -> str:
    """Return a sort key that orders images as if at random, the same on every machine."""
    return hashlib.sha256(f"{seed}:{group}".encode(errors="surrogatepass")).hexdigest()
