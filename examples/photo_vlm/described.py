"""Descriptions of several sentences, made of what people wrote in captions of a photograph.

The caption likest the others comes first; those that say most that is not said yet come behind it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from examples.photo_vlm.asked import may_be_called
from examples.photo_vlm.command import command, parser_of
from examples.photo_vlm.rows import consensual, half_of, read_photographs
from examples.photo_vlm.said import SUBJECTS, english
from offramp.core.errors import DataError
from offramp.core.storage import write_atomic

FILE = "described.jsonl"
MOST, SHORTEST, NEW = 4, 25, 2
"""Sentences of a description; its words, at least; what a sentence says that is new, at least."""
DETAIL = (
    "Describe the photograph in detail.",
    "Describe this picture in detail.",
    "Describe the image in a few sentences.",
    "Describe everything you see.",
    "Describe the scene in detail.",
    "What do you see? Describe it in detail.",
    "Tell me more about this picture.",
    "Give me a detailed description of this photo.",
    "Write a detailed description of the image.",
    "describe the photo in detail",
)
_SAY_NOTHING = frozenset(("be", "have", "picture", "photo", "other", "one"))
Words = frozenset[str]


@dataclass(frozen=True)
class Described:
    """image: the photograph's name. half: as of `half_of`; training photographs have none. people:
    what nouns, verbs, adjectives and numbers their captions have."""

    image: str
    half: int | None
    text: str
    people: tuple[str, ...]


def things_in(texts: Sequence[str]) -> list[Words]:
    """What nouns, verbs, adjectives and numbers each text has, as lemmas.

    Raises:
        InputError: spaCy or its English model is not installed.
    """
    kinds = ("NOUN", "PROPN", "VERB", "ADJ", "NUM")
    return [
        frozenset(t.lemma_.lower() for t in doc if t.pos_ in kinds and t.is_alpha) - _SAY_NOTHING
        for doc in english().pipe(texts, batch_size=256)
    ]


def is_said(word: str, words: Words) -> bool:
    """Whether words have a word, or what it may be called."""
    who = SUBJECTS.get(word)
    called = may_be_called(word) & words
    return word in words or bool(called) or any(SUBJECTS.get(w) == who for w in words if who)


def described(captions: Sequence[str], things: Sequence[Words]) -> str:
    """A description, of captions in their order of likeness and of what each says; empty where it
    would be short."""
    chosen, told = [captions[0]], things[0]
    left = list(zip(captions, things, strict=True))[1:]
    while left and len(chosen) < MOST:
        fresh = [sum(not is_said(word, told) for word in words) for _, words in left]
        if max(fresh) < NEW:
            break
        caption, words = left.pop(fresh.index(max(fresh)))
        chosen.append(caption)
        told |= words
    text = " ".join(_sentence(caption) for caption in chosen)
    return text if len(text.split()) >= SHORTEST else ""


def _sentence(caption: str) -> str:
    text = caption.strip().rstrip(" .")
    return f"{text[:1].upper()}{text[1:]} ."


def sentences(text: str) -> list[str]:
    """Those of a description."""
    return [part.strip() for part in text.split(" .") if part.strip()]


def read_described(file: Path) -> list[Described]:
    """What `main` wrote.

    Raises:
        DataError: the file is not there, or not whole.
    """
    try:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        return [Described(**{**row, "people": tuple(row["people"])}) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file} does not hold descriptions.",
            "Make them: python -m examples.photo_vlm.described",
        ) from error


@command
def main() -> None:
    parser = parser_of("described", "--work runs/photo_vlm", str(__doc__), "data", "work")
    arguments = parser.parse_args()
    splits, rows = read_photographs(arguments.data), list[Described]()
    for split in ("captions", "captions_val"):
        examples = splits[split]
        liked = consensual(examples, max(len(e.answers) for e in examples))
        things = iter(things_in([_sentence(a) for e in liked for a in e.answers]))
        for example in liked:
            own = [next(things) for _ in example.answers]
            half = None if split == "captions" else half_of(example)
            people = tuple(sorted(frozenset[str]().union(*own)))
            row = Described(example.group, half, described(example.answers, own), people)
            rows.append(row)
    text = "".join(json.dumps(asdict(row)) + "\n" for row in rows)
    write_atomic(arguments.work / FILE, text.encode())
    long = sum(bool(row.text) for row in rows if row.half is None)
    print(f"{long:,} descriptions of training", file=sys.stderr)


if __name__ == "__main__":
    main()
