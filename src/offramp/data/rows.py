"""The rows of what a user brings, wherever they stand: a JSONL file, or a Hugging Face data set."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from PIL import Image

from offramp.common.names import close_name, is_hub_name
from offramp.core.errors import DataError, InputError, StorageError, did_you_mean
from offramp.core.missing import how_to_install
from offramp.inputs.image import content_digest, image_names

CAPTIONS = ("captions", "caption")
ANSWERS = ("answers", "answer")
GROUP, FOLDER = "group", "folder"
"""Field of a row that names what its image came in; and what stands for the image's folder."""
FIELDS = ("image", *CAPTIONS, "question", *ANSWERS, "dialogue", "prompt", "split", GROUP)


class NoAnswerError(DataError):
    """A row has no answer although its reader needs one."""


@dataclass(frozen=True)
class Row:
    """The fields of one row, and its place for error messages."""

    fields: Mapping[str, Any]
    where: str  # such as "cats.jsonl, line 3"
    number: int  # of the line or row, from 1
    base: Path  # the folder that image paths are relative to
    error: DataError | None = None  # why it has no fields

    def image_name(self) -> str | None:
        """Return the name that all rows of an image share; None where the row names none."""
        value = self.fields.get("image")
        if isinstance(value, Image.Image | Cell):
            return content_digest(value)[:16]
        if not isinstance(value, str) or not value.strip():
            return None
        return Path(os.path.relpath(self.base / value, self.base)).as_posix()

    def source(self, group_by: str = GROUP) -> str:
        """Return the source of the row's image, by a field or by the image's folder; "" if
        unknown."""
        if group_by == FOLDER:
            image = self.fields.get("image")
            if not isinstance(image, str):
                self.fail("has its image in no folder", "Name a field to group by.")
            return str((self.base / image).resolve().parent)
        value = self.fields.get(group_by)
        if value is None and group_by != GROUP:
            self.fail(f"has no {group_by!r} to group by", "Add it, or group by another field.")
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return "" if value is None else self._checked(group_by, value)

    def has(self, names: Sequence[str]) -> bool:
        return any(self.fields.get(name) is not None for name in names)

    def text(self, name: str) -> str:
        return self._checked(name, self.fields.get(name))

    def texts(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return the texts in the first of these fields that the row has; () if it has none."""
        for name in names:
            value = self.fields.get(name)
            if value is not None:
                values = value if isinstance(value, list) else [value]
                # VQA data sets on the hub keep each answer in an object of its own.
                plain = (v.get("answer") if isinstance(v, dict) else v for v in values)
                return tuple(self._checked(name, v) for v in plain)
        return ()

    def _checked(self, name: str, value: Any) -> str:
        if not isinstance(value, str):
            self.fail_as_wrong(name, value, "a text in quotes")
        if not value.strip():
            self.fail(f"has an empty {name!r}", "Fill it in, or remove the row.")
        return value

    def fail(self, problem: str, remedy: str) -> NoReturn:
        raise DataError(f"{self.where} {problem}.", remedy)

    def fail_as_wrong(self, name: str, value: Any, expected: str) -> NoReturn:
        shown = repr(value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        self.fail(f"has {shown} as {name!r}", f"Make it {expected}.")

    def fail_without_answer(self) -> NoReturn:
        # A misspelt field is ignored like any other unknown one; here is where it shows.
        hints = (did_you_mean(name, FIELDS) for name in self.fields if name not in FIELDS)
        raise NoAnswerError(
            f"{self.where} has no answer; its fields are {', '.join(self.fields)}.",
            next((hint for hint in hints if hint.startswith("Did")), "")
            or "Add 'captions', or 'answers' to the question.",
        )


def read_rows(
    source: str | Path, split: str | None, images: str | Path | None = None
) -> Iterator[Row]:
    """Yield the rows of any source, without those of other splits. images: folder of the images of
    a JSONL file, if not beside it."""
    if images is not None and not (os.path.isfile(source) and not str(source).endswith(".txt")):
        raise InputError(
            f"A folder of images was given, {images}, and {source} says itself where its images "
            "are.",
            "Leave --images out, or give the JSONL file itself.",
        )
    if source == "":
        raise DataError(
            "There is no data of the name ''.", "Give a JSONL file, a folder or a name."
        )
    path = Path(source).expanduser()
    if os.path.isdir(path):
        try:
            files = sorted(path.glob("*.jsonl"))
            tables = not files and any(path.rglob("*.parquet"))
            names = [] if files or tables else image_names(path)
        except OSError as error:  # a folder below it that goes while it is looked through
            raise StorageError(
                f"The folder {source} cannot be looked through: {error.strerror}.",
                "Give the folder of the data itself.",
            ) from error
        if _is_saved_by_datasets(path) or tables:
            return _dataset_rows(str(path), split)
        if names:
            rows = (Row({"image": n}, f"{path}/{n}", i, path) for i, n in enumerate(names, 1))
            return _of_split(rows, split, str(path))
        if len(files) != 1:
            listed = ", ".join(file.name for file in files) or "none, and no images"
            problem = f"The folder {source} should hold images or one JSONL file; found: {listed}."
            raise DataError(problem, "Give the path of the file itself.")
        path = files[0]
    if os.path.isfile(path):
        return _of_split(_jsonl_rows(path, Path(images or path.parent)), split, str(path))
    if isinstance(source, Path) or source.endswith(_ENDINGS) or not is_hub_name(source):
        raise DataError(
            f"{source} does not exist.",
            f"{close_name(path)}Correct the path; a data set of the hub is named OWNER/NAME.",
        )
    return _dataset_rows(str(source), split)


_ENDINGS = (".jsonl", ".json", ".ndjson", ".csv", ".parquet", ".txt")
"""Of names that are files."""


LONGEST = 2**24
"""Bytes of the longest line."""


def _jsonl_rows(path: Path, base: Path) -> Iterator[Row]:
    try:
        with open(path, "rb") as file:
            begin = file.read(512)
            if kind := _kind_of(begin):
                raise DataError(
                    f"{path} is {kind}, not rows of data.",
                    'Give a JSONL file with a line such as {"image": "dog.jpg"}, or the folder '
                    "that holds the images.",
                )
            file.seek(0)
            lines = iter(lambda: file.readline(LONGEST + 1), b"")
            for number, line in enumerate(lines, 1):
                if len(line) > LONGEST:
                    raise DataError(
                        f"{path}, line {number} is longer than {LONGEST} bytes.",
                        "Write one JSON object a line, and images as files.",
                    )
                if line.strip():
                    yield _row_of(line, path, base, number)
    except OSError as error:
        raise StorageError(
            f"Cannot read {path}: {error.strerror}.", "Check that the file may be read."
        ) from error


_KINDS = {
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"GIF8": "an image",
    b"BM": "an image",
    b"RIFF": "an image or a sound",
    b"II*\0": "an image",
    b"MM\0*": "an image",
    b"PK\x03\x04": "a ZIP archive",
    b"\x1f\x8b": "a gzip archive",
    b"%PDF": "a PDF",
    b"PAR1": "a Parquet file",
    b"GGUF": "a GGUF file",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
}


def _kind_of(begin: bytes) -> str | None:
    """What a file is that holds no text; None: it may."""
    for mark, kind in _KINDS.items():
        if begin.startswith(mark):
            return kind
    return "a file of bytes" if b"\0" in begin else None


def _row_of(line: bytes, path: Path, base: Path, number: int) -> Row:
    where = f"{path}, line {number}"
    try:
        return Row(_parse(line, where, number), where, number, base)
    except DataError as error:  # raised where the row is asked for
        return Row({}, where, number, base, error)


def _parse(line: bytes, where: str, number: int) -> dict[str, Any]:
    try:
        # The byte-order mark that some editors put in front is no part of the data.
        fields = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 text.", "Save the file as UTF-8.") from error
    except (ValueError, RecursionError) as error:
        problem = f"{where} is not valid JSON: {error}."
        raise DataError(problem, "Write one JSON object a line.") from error
    if not isinstance(fields, dict):
        raise DataError(f"{where} is not a JSON object.", "Write one JSON object a line.")
    return fields


def _of_split(rows: Iterator[Row], split: str | None, name: str) -> Iterator[Row]:
    """Keep the rows whose "split" is this one; rows without the field belong to none."""
    if split is None:
        yield from rows
        return
    counts: dict[str, int] = {}
    for row in rows:
        if row.error is not None:
            yield row
        elif row.has(["split"]):
            label = row.text("split")
            counts[label] = counts.get(label, 0) + 1
            if label == split:
                yield row
    if split not in counts:
        raise DataError(
            f"{name} has no rows of the split {split!r}.",
            did_you_mean(split, counts) or "Give each row a 'split', or do not ask for one.",
        )


@dataclass(frozen=True)
class Cell:
    """The encoded image of one row of a data set, read only when wanted, to save memory."""

    dataset: Any  # a datasets.Dataset whose image column is not decoded
    index: int

    def read(self) -> bytes:
        content: bytes = self.dataset[self.index]["image"]["bytes"]
        return content


def _dataset_rows(name: str, split: str | None) -> Iterator[Row]:
    """Rows of a Hugging Face data set, from a folder or by name."""
    dataset, split = _load(name, split)
    base = Path(name) if os.path.isdir(name) else Path()

    def rows() -> Iterator[Row]:
        for index, fields in enumerate(dataset):
            image = fields.get("image")
            if isinstance(image, dict):
                inside = image.get("bytes") is not None
                fields["image"] = Cell(dataset, index) if inside else image.get("path")
            yield Row(fields, f"{name}, row {index + 1}", index + 1, base)

    return _of_split(rows(), split, name)


def _load(name: str, split: str | None) -> tuple[Any, str | None]:
    """The data set, and the split still to be picked by the rows' own field."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"Reading {name} needs the package 'datasets', which is not installed.",
            f"{how_to_install('datasets')}; or give a JSONL file.",
        ) from error
    try:
        if _is_saved_by_datasets(Path(name)):
            dataset = datasets.load_from_disk(name)
        else:
            dataset = datasets.load_dataset(name)
    except Exception as error:  # whatever its many file formats and the network raise
        raise DataError(
            f"Cannot load the data set {name}: {type(error).__name__}: {error}.",
            "Check the name and the connection; for data of your own, give the path of a file.",
        ) from error
    if isinstance(dataset, datasets.DatasetDict):
        dataset, split = _one_split(dataset, split, name), None
    elif split is not None and "split" not in dataset.column_names and split == str(dataset.split):
        split = None
    dataset = dataset.with_format(None)
    if isinstance(dataset.features.get("image"), datasets.Image):
        dataset = dataset.cast_column("image", datasets.Image(decode=False))
    return dataset, split


def _one_split(splits: Mapping[str, Any], split: str | None, name: str) -> Any:
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if split is not None and split in splits:
        return splits[split]
    problem = f"has no split {split!r}" if split else "has several splits, and none was named"
    raise DataError(f"The data set {name} {problem}.", did_you_mean(split or "", splits))


def _is_saved_by_datasets(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()
