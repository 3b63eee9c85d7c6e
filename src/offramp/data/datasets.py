"""Reading what a user brings: images with prompts and, where they have them, answers.

A row of a JSONL file (or of a Hugging Face data set) is one of

    {"image": PATH, "captions": [TEXT, ...]}                one example; any caption is right
    {"image": PATH, "question": TEXT, "answers": [TEXT]}    one example; "answer": TEXT works too
    {"image": PATH, "dialogue": [{"question": TEXT, "answer": TEXT}, ...]}    one example a round
    {"image": PATH, "prompt": TEXT}                         one example; "answers" if there are any
    {"image": PATH}                                         one example, unlabelled

Paths are relative to the JSONL file. A null counts as absent. Other fields are ignored, except
"split", which `split=` reads.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from PIL import Image

from offramp.data.example import Example, examples_digest, split_examples
from offramp.data.image import EncodedImage, content_digest, image_names
from offramp.errors import DataError, InputError, StorageError, did_you_mean

__all__ = [
    "CAPTION_PROMPT", "QUESTION_PROMPT", "EncodedImage", "Example", "examples_digest",
    "read_examples", "split_examples",
]  # fmt: skip

CAPTION_PROMPT = "Caption:"
QUESTION_PROMPT = "Question: {question} Answer:"

_CAPTIONS = ("captions", "caption")
_ANSWERS = ("answers", "answer")
# A row has at most one of these forms; it is recognised by any of the fields.
_FORMS = {
    "captions": _CAPTIONS,
    "question": ("question",),
    "dialogue": ("dialogue",),
    "prompt": ("prompt",),
}
_FIELDS = ("image", *_CAPTIONS, "question", *_ANSWERS, "dialogue", "prompt", "split")

Turn = tuple[str, tuple[str, ...]]  # prompt, answers


def read_examples(
    source: str | Path,
    *,
    split: str | None = None,
    prompt_template: str | None = None,
    limit: int | None = None,
    require_answers: bool = False,
) -> list[Example]:
    """Read examples; images are looked for, but not decoded.

    Args:
        source: a JSONL file; a folder of images, that holds one such file, that `datasets` saved,
            or with Parquet files; or the name of a data set for `datasets.load_dataset`.
        split: only the rows of this split; None means all of them.
        prompt_template: for questions and dialogues, a text with `{question}`; for captions, the
            prompt itself, which may be empty. Defaults: QUESTION_PROMPT and CAPTION_PROMPT.
        limit: stop after this many examples, so that later rows are not even checked.
        require_answers: refuse rows without an answer.

    Raises:
        InputError: an argument cannot be used.
        DataError: the data cannot be used; names the file and the line.
        StorageError: the file cannot be read.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}.", "Give 1 or more, or leave it out to read all rows.")
    prompts = _Prompts.of(prompt_template)
    examples: list[Example] = []
    for row in _rows(source, split):
        for example in _row_examples(row, prompts):
            if require_answers and not example.answers:
                row.fail_without_answer()
            examples.append(example)
            if len(examples) == limit:
                return examples
    if not examples:
        raise DataError(f"{source} holds no examples.", 'Add a row, such as {"image": "dog.jpg"}.')
    return examples


@dataclass(frozen=True)
class _Row:
    """The fields of one row, with what an error needs to name it."""

    fields: Mapping[str, Any]
    where: str  # such as "cats.jsonl, line 3"
    number: int  # of the line or row, from 1
    base: Path  # the folder that image paths are relative to

    def has(self, names: Sequence[str]) -> bool:
        return any(self.fields.get(name) is not None for name in names)

    def text(self, name: str) -> str:
        return self._checked(name, self.fields.get(name))

    def texts(self, names: Sequence[str]) -> tuple[str, ...]:
        """The texts under the first of these names that the row has; () where it has none."""
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
        hints = (did_you_mean(name, _FIELDS) for name in self.fields if name not in _FIELDS)
        self.fail(
            f"has no answer; its fields are {', '.join(self.fields)}",
            next((hint for hint in hints if hint.startswith("Did")), "")
            or "Add 'captions', or 'answers' to the question, or train without labels.",
        )


@dataclass(frozen=True)
class _Prompts:
    """The prompt of captions and the template of questions; None for the one not asked for."""

    caption: str | None
    question: str | None

    @classmethod
    def of(cls, template: str | None) -> "_Prompts":
        if template is None:
            return cls(CAPTION_PROMPT, QUESTION_PROMPT)
        unknown = set(re.findall(r"\{(\w*)\}", template)) - {"question"}
        if unknown:
            raise InputError(
                f"prompt_template has the placeholder {{{min(unknown)}}}.",
                "The only placeholder is {question}.",
            )
        is_question = "{question}" in template
        return cls(None if is_question else template, template if is_question else None)

    def for_caption(self, row: _Row) -> str:
        if self.caption is None:
            raise InputError(
                f"prompt_template asks a {{question}}, but {row.where} has none.",
                "Give a template without {question} for captions, or leave it out.",
            )
        return self.caption

    def for_question(self, row: _Row) -> str:
        if self.question is None:
            raise InputError(
                f"prompt_template has no {{question}}; that of {row.where} would be lost.",
                f"Give a template such as {QUESTION_PROMPT!r}, or leave it out.",
            )
        return self.question.replace("{question}", row.text("question"))


def _row_examples(row: _Row, prompts: _Prompts) -> Iterator[Example]:
    image, group = _image(row)
    turns = _turns(row, prompts)
    for turn, (prompt, answers) in enumerate(turns, 1):
        suffix = f".{turn}" if row.has(_FORMS["dialogue"]) else ""
        yield Example(image, prompt, answers, f"{group}#{row.number}{suffix}", group)


def _turns(row: _Row, prompts: _Prompts) -> list[Turn]:
    """One turn, or one a round of a dialogue."""
    forms = [form for form, names in _FORMS.items() if row.has(names)]
    if len(forms) > 1:
        row.fail(f"has both {forms[0]!r} and {forms[1]!r}", "Keep one of them in each row.")
    match forms:
        case ["captions"]:
            return [(prompts.for_caption(row), row.texts(_CAPTIONS))]
        case ["dialogue"]:
            return _rounds(row, prompts)
        case ["question"]:
            return [(prompts.for_question(row), row.texts(_ANSWERS))]
        case ["prompt"]:
            return [(row.text("prompt"), row.texts(_ANSWERS))]
    if row.has(_ANSWERS):
        row.fail(
            "has an answer, but nothing that was asked",
            "Add a 'question' or a 'prompt', or call the answers 'captions'.",
        )
    return [(prompts.for_caption(row), ())]


def _rounds(row: _Row, prompts: _Prompts) -> list[Turn]:
    """Each round's prompt has the rounds before it, with their first answers."""
    dialogue = row.fields["dialogue"]
    if not isinstance(dialogue, list) or not dialogue:
        row.fail_as_wrong("dialogue", dialogue, "a list of rounds")
    turns: list[Turn] = []
    history = ""
    for number, fields in enumerate(dialogue, 1):
        if not isinstance(fields, dict):
            row.fail_as_wrong("dialogue", fields, "a list of objects with 'question' and 'answer'")
        turn = _Row(fields, f"{row.where}, round {number},", row.number, row.base)
        prompt = history + prompts.for_question(turn)
        answers = turn.texts(_ANSWERS)
        if not answers and number < len(dialogue):
            turn.fail("has no answer, which the prompts of later rounds need", "Add its answer.")
        turns.append((prompt, answers))
        history = f"{prompt} {answers[0]} " if answers else ""
    return turns


def _image(row: _Row) -> tuple[Path | Image.Image | EncodedImage, str]:
    """Where the row's image is, and the name that all rows of this image share."""
    value = row.fields.get("image")
    if value is None:
        row.fail(
            f"has no 'image'; its fields are {', '.join(row.fields) or 'none'}",
            "Add the path of its image, relative to the data file.",
        )
    if isinstance(value, Image.Image | _Cell):
        return value, content_digest(value)[:16]
    path = row.base / row.text("image")
    # Not Path.is_file, which raises on names that are too long.
    if not os.path.isfile(path):
        row.fail(
            f"names the image {path}, which does not exist",
            "Correct the path; it is relative to the data file.",
        )
    return path, Path(os.path.relpath(path, row.base)).as_posix()


def _rows(source: str | Path, split: str | None) -> Iterator[_Row]:
    """The rows of any source, those of other splits left out."""
    if source == "":
        raise DataError(
            "There is no data of the name ''.", "Give a JSONL file, a folder or a name."
        )
    path = Path(source).expanduser()
    if os.path.isdir(path):
        files = sorted(path.glob("*.jsonl"))
        if _is_saved_by_datasets(path) or (not files and any(path.rglob("*.parquet"))):
            return _dataset_rows(str(path), split)
        if not files and (names := image_names(path)):
            rows = (_Row({"image": n}, f"{path}/{n}", i, path) for i, n in enumerate(names, 1))
            return _of_split(rows, split, str(path))
        if len(files) != 1:
            found = ", ".join(file.name for file in files) or "none, and no images"
            problem = f"The folder {source} should hold images or one JSONL file; found: {found}."
            raise DataError(problem, "Give the path of the file itself.")
        path = files[0]
    if os.path.isfile(path):
        return _of_split(_jsonl_rows(path), split, str(path))
    if _looks_like_path(source):
        raise DataError(f"{source} does not exist.", "Correct the path.")
    return _dataset_rows(str(source), split)


def _looks_like_path(source: str | Path) -> bool:
    # A data set on the hub is NAME or OWNER/NAME, and neither starts with a dot.
    name = str(source)
    return (
        isinstance(source, Path)
        or name.endswith((".jsonl", ".json", ".ndjson", ".csv", ".parquet"))
        or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name)
    )


def _jsonl_rows(path: Path) -> Iterator[_Row]:
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _parse(line, path, number)
    except OSError as error:
        raise StorageError(
            f"Cannot read {path}: {error.strerror}.", "Check that the file may be read."
        ) from error


def _parse(line: bytes, path: Path, number: int) -> _Row:
    where = f"{path}, line {number}"
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
    return _Row(fields, where, number, path.parent)


def _of_split(rows: Iterator[_Row], split: str | None, name: str) -> Iterator[_Row]:
    """Keep the rows whose "split" is this one; rows without the field belong to none."""
    if split is None:
        yield from rows
        return
    found: dict[str, int] = {}
    for row in rows:
        if row.has(["split"]):
            label = row.text("split")
            found[label] = found.get(label, 0) + 1
            if label == split:
                yield row
    if split not in found:
        raise DataError(
            f"{name} has no rows of the split {split!r}.",
            did_you_mean(split, found) or "Give each row a 'split', or do not ask for one.",
        )


@dataclass(frozen=True)
class _Cell:
    """The encoded image of one row of a data set; read when wanted, so that memory stays small."""

    dataset: Any  # a datasets.Dataset whose image column is not decoded
    index: int

    def read(self) -> bytes:
        content: bytes = self.dataset[self.index]["image"]["bytes"]
        return content


def _dataset_rows(name: str, split: str | None) -> Iterator[_Row]:
    """Rows of a Hugging Face data set, from a folder or by name."""
    dataset, split = _load(name, split)
    base = Path(name) if os.path.isdir(name) else Path()

    def rows() -> Iterator[_Row]:
        for index, fields in enumerate(dataset):
            image = fields.get("image")
            if isinstance(image, dict):
                inside = image.get("bytes") is not None
                fields["image"] = _Cell(dataset, index) if inside else image.get("path")
            yield _Row(fields, f"{name}, row {index + 1}", index + 1, base)

    return _of_split(rows(), split, name)


def _load(name: str, split: str | None) -> tuple[Any, str | None]:
    """The data set, and the split still to be picked by the rows' own field."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"Reading {name} needs the package 'datasets', which is not installed.",
            "Install it with: pip install 'offramp[data]'; or give a JSONL file.",
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
