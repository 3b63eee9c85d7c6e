"""An official data set on disk: its parsed files, checked as they are read, and its images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from offramp.core.errors import DataError, InputError
from offramp.core.storage import read_json
from offramp.data.datasets import CAPTION_PROMPT, QUESTION_PROMPT, SEED
from offramp.inputs.example import rank_of


@dataclass
class Source:
    """The files of one data set, the folder of its images, and the form of its prompts.

    content: of the first file; others: of the rest.
    expected: the remedy where the content is not in the expected form.
    only: names of images that are read; None: all.
    """

    path: Path
    content: Any
    others: list[Any]
    images: Path
    prompt: str | None
    split: str | None
    expected: str
    only: set[str] | None = None

    @classmethod
    def open(
        cls,
        files: Sequence[str | Path],
        images: str | Path | None,
        prompt: str | None,
        split: str | None,
        expected: str,
    ) -> Source:
        paths = [Path(file).expanduser() for file in files]
        parsed = [(path, read_json(path)) for path in paths]
        parsed.sort(key=lambda pair: has(pair[1], "annotations"))  # the questions may come second
        (path, content), *others = parsed
        folder = Path(images).expanduser() if images is not None else path.parent
        if not folder.is_dir():
            raise DataError(f"The image folder {folder} does not exist.", "Correct --images.")
        return cls(path, content, [other for _, other in others], folder, prompt, split, expected)

    def second(self, name: str) -> Any:
        """Return the content of the second file, or of `name` beside the first; None without
        one."""
        if self.others:
            return self.others[-1]
        path = self.path.with_name(name)
        return read_json(path) if path != self.path and path.is_file() else None

    def leaves_out(self, row: Any, name: str) -> bool:
        """Return True if a row is skipped because its image `name` is."""
        return self.only is not None and not (has(row, name) and str(row[name]) in self.only)

    def fail(self, problem: str) -> NoReturn:
        """Raise a `DataError` with the problem and what is expected."""
        raise DataError(f"{self.path} {problem}; it holds {shown(self.content)}.", self.expected)

    def get(self, value: Any, name: str, kind: type | tuple[type, ...], where: str) -> Any:
        """Return `value[name]`; raise `DataError` where it is not of this kind."""
        if not has(value, name):
            self.fail(f"has no {name!r} in {where} ({shown(value)})")
        if not isinstance(value[name], kind):
            self.fail(f"has {shown(value[name])} as {name!r} in {where}")
        return value[name]

    def rows(self, value: Any, name: str) -> list[Any]:
        """Return the list `value[name]`."""
        rows: list[Any] = self.get(value, name, list, "the file")
        return rows

    def picture(self, names: Sequence[str]) -> Path:
        """Return the first of these file names that the image folder has."""
        for name in names:
            # Not Path.is_file, which raises on names that are too long.
            if os.path.isfile(path := self.images / name):
                return path
        raise DataError(
            f"The image {names[0]} of {self.path} is not in {self.images} "
            f"(looked for: {', '.join(names)}).",
            "Give the folder that holds it as --images.",
        )

    def caption_prompt(self) -> str:
        if self.prompt is None:
            return CAPTION_PROMPT
        if "{question}" in self.prompt:
            raise InputError(
                f"The prompt {self.prompt!r} asks a {{question}}, but captions have none.",
                "Give a prompt without {question}.",
            )
        return self.prompt

    def question_prompt(self, question: str) -> str:
        template = QUESTION_PROMPT if self.prompt is None else self.prompt
        if "{question}" not in template:
            raise InputError(
                f"The prompt {template!r} has no {{question}}, so every question would be lost.",
                f"Give a template such as {QUESTION_PROMPT!r}.",
            )
        return template.replace("{question}", question.strip())


def sampled(content: Any, depth: int = 2) -> Any:
    """Return the same content with its rows in a random but fixed order by image, so that the first
    rows are a sample. Lists of texts keep their order, because rows refer to them by place
    (VisDial's questions)."""
    if isinstance(content, list) and content and all(isinstance(row, dict) for row in content):
        return sorted(content, key=_rank)
    if isinstance(content, dict) and depth:
        items = {name: sampled(value, depth - 1) for name, value in content.items()}
        if all(has(value, "imageId") for value in content.values() if isinstance(value, dict)):
            return dict(sorted(items.items(), key=lambda item: _rank(item[1])))
        return items
    return content


def _rank(row: Any) -> str:
    """The rank of a row, by the image that it names."""
    names = ("image_id", "imageId", "id", "filename")
    image = next((str(row[name]) for name in names if has(row, name)), repr(row)[:200])
    return rank_of(SEED, image)


def has(value: Any, *names: str) -> bool:
    """Return True if a value is an object with these fields."""
    return isinstance(value, dict) and all(name in value for name in names)


def shown(value: Any) -> str:
    """Return a description of a value in a few words."""
    if isinstance(value, dict):
        names = ", ".join(map(str, list(value)[:6])) or "nothing"
        return f"the fields {names}{', ...' if len(value) > 6 else ''}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
