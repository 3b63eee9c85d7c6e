"""Reading what a user brings: images with prompts and, where they have them, answers.

A row of a JSONL file (or of a Hugging Face data set) is one of

    {"image": PATH, "captions": [TEXT, ...]}                one example; any caption is right
    {"image": PATH, "question": TEXT, "answers": [TEXT]}    one example; "answer": TEXT works too
    {"image": PATH, "dialogue": [{"question": TEXT, "answer": TEXT}, ...]}    one example a round
    {"image": PATH, "prompt": TEXT}                         one example; "answers" if there are any
    {"image": PATH}                                         one example, unlabelled

A .txt file holds prompts for a language model, one a line, without images.

Paths are relative to the JSONL file. A null counts as absent. "group" names what the image came in,
such as a document, a film, a patient or a user: whole groups are drawn and split. Other fields are
ignored, except "split", which `split=` reads, and the one that `group_by=` names.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from offramp.core.errors import DataError, InputError, StorageError
from offramp.data.rows import ANSWERS, CAPTIONS, GROUP, Cell, Row, read_rows
from offramp.inputs.example import Example, examples_digest, rank_of, split_examples
from offramp.inputs.image import EncodedImage

__all__ = [
    "CAPTION_PROMPT",
    "QUESTION_PROMPT",
    "EncodedImage",
    "Example",
    "examples_digest",
    "read_examples",
    "split_examples",
]

CAPTION_PROMPT = "Caption:"
QUESTION_PROMPT = "Question: {question} Answer:"

SEED = 0
"""Of the sample that a limit takes."""

# A row has at most one of these forms; it is recognised by any of the fields.
_FORMS = {
    "captions": CAPTIONS,
    "question": ("question",),
    "dialogue": ("dialogue",),
    "prompt": ("prompt",),
}

Turn = tuple[str, tuple[str, ...]]  # prompt, answers


def read_examples(
    source: str | Path,
    *,
    images: str | Path | None = None,
    split: str | None = None,
    prompt_template: str | None = None,
    limit: int | None = None,
    require_answers: bool = False,
    group_by: str = GROUP,
) -> list[Example]:
    """Read examples. Images must exist, but are not decoded.

    Args:
        source: a JSONL file; a folder of images with one such file, or saved by `datasets`, or with
            Parquet files; or the name of a data set for `datasets.load_dataset`.
        images: the folder with the images of a JSONL file; None: the file's own folder.
        split: only the rows of this split; None means all of them.
        prompt_template: for questions and dialogues, a text with `{question}`; for captions, the
            prompt itself, which may be empty. Defaults: QUESTION_PROMPT and CAPTION_PROMPT.
        limit: a sample of this many examples, with all other examples about their images or groups,
            so that no image or group is split. The sample is random, the same every time, and
            independent of the file's order. Rows about other images are not even checked. Where
            images stand inside the rows of a data set, neighbouring rows count as one image's.
        require_answers: refuse rows without an answer.
        group_by: field with the name of an image's source (`Example.source`); "folder": the image's
            folder.

    Raises:
        InputError: an argument cannot be used.
        DataError: the data cannot be used; names the file and the line.
        StorageError: the file cannot be read.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}.", "Give 1 or more, or leave it out to read all rows.")
    if images is None and str(source).endswith(".txt") and os.path.isfile(source):
        return _text_prompts(Path(source), limit, require_answers=require_answers)
    prompts = _Prompts(prompt_template)
    examples: list[tuple[int, Example]] = []
    drawn: set[str] | None = None  # once the limit is reached: what is read to its end
    rows = read_rows(source, split, images)
    for row in rows if limit is None else _sampled(list(rows), group_by):
        if drawn is not None and _drawn_with(row, group_by) not in drawn:
            if isinstance(row.fields.get("image"), Cell | Image.Image):
                break  # to know the others, all images would have to be read
            continue
        for example in _row_examples(row, prompts, group_by):
            if require_answers and not example.answers:
                row.fail_without_answer()
            examples.append((row.number, example))
        if drawn is None and limit is not None and len(examples) >= limit:
            drawn = {example.source or example.group for _, example in examples}
    if not examples:
        raise DataError(f"{source} holds no examples.", 'Add a row, such as {"image": "dog.jpg"}.')
    return [example for _, example in sorted(examples, key=lambda pair: pair[0])]


def _drawn_with(row: Row, group_by: str) -> str | None:
    """The group of a row's image, or the image's name."""
    return row.image_name() if row.error is not None else row.source(group_by) or row.image_name()


def _sampled(rows: Sequence[Row], group_by: str) -> Iterator[Row]:
    """Rows by image, or by group, as if at random."""
    inside = any(isinstance(row.fields.get("image"), Cell | Image.Image) for row in rows)
    if not inside or all(row.error is None and row.source(group_by) for row in rows):
        names = ((_drawn_with(row, group_by) or str(row.number), row) for row in rows)
        yield from (row for _, row in sorted(names, key=lambda pair: rank_of(SEED, pair[0])))
        return
    # Their images are not read before they are wanted.
    taken: set[int] = set()
    for place in sorted(range(len(rows)), key=lambda place: rank_of(SEED, str(place))):
        if place in taken:
            continue
        first = last = place
        name = rows[place].image_name()
        while first > 0 and rows[first - 1].image_name() == name:
            first -= 1
        while last + 1 < len(rows) and rows[last + 1].image_name() == name:
            last += 1
        taken |= set(range(first, last + 1))
        yield from rows[first : last + 1]


def _text_prompts(file: Path, limit: int | None, *, require_answers: bool) -> list[Example]:
    """The lines of a text file that hold anything; a prompt that comes twice counts once."""
    if require_answers:
        raise DataError(f"{file} holds prompts without answers.", "Train by --regime unsupervised.")
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not text in UTF-8 ({error}).", "Save it as UTF-8.") from error
    except OSError as error:
        raise StorageError(
            f"Cannot read {file}: {error.strerror}.", "Check the path and that it may be read."
        ) from error
    prompts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            prompts.setdefault(line.strip(), number)
    if not prompts:
        raise DataError(f"{file} holds no prompts.", "Write one a line.")
    few = list(prompts.items())[:limit]
    return [Example.of_text(prompt, key=f"{file.name}#{number}") for prompt, number in few]


@dataclass(frozen=True)
class _Prompts:
    """template: of questions, or else the prompt of captions; None: the usual ones of both."""

    template: str | None

    def __post_init__(self) -> None:
        unknown = set(re.findall(r"\{(\w*)\}", self.template or "")) - {"question"}
        if unknown:
            raise InputError(
                f"prompt_template has the placeholder {{{min(unknown)}}}.",
                "The only placeholder is {question}.",
            )

    def for_caption(self, row: Row) -> str:
        if self.template is None:
            return CAPTION_PROMPT
        if "{question}" in self.template:
            raise InputError(
                f"prompt_template asks a {{question}}, but {row.where} has none.",
                "Give a template without {question} for captions, or leave it out.",
            )
        return self.template

    def for_question(self, row: Row) -> str:
        template = QUESTION_PROMPT if self.template is None else self.template
        if "{question}" not in template:
            raise InputError(
                f"prompt_template has no {{question}}; that of {row.where} would be lost.",
                f"Give a template such as {QUESTION_PROMPT!r}, or leave it out.",
            )
        return template.replace("{question}", row.text("question"))


def _row_examples(row: Row, prompts: _Prompts, group_by: str) -> Iterator[Example]:
    if row.error is not None:
        raise row.error
    image, group = _image(row)
    turns, source = _turns(row, prompts), row.source(group_by)
    for turn, (prompt, answers) in enumerate(turns, 1):
        suffix = f".{turn}" if row.has(_FORMS["dialogue"]) else ""
        yield Example(image, prompt, answers, f"{group}#{row.number}{suffix}", group, source)


def _turns(row: Row, prompts: _Prompts) -> list[Turn]:
    """The turns of a row: one, or one for each round of a dialogue."""
    forms = [form for form, names in _FORMS.items() if row.has(names)]
    if len(forms) > 1:
        row.fail(f"has both {forms[0]!r} and {forms[1]!r}", "Keep one of them in each row.")
    match forms:
        case ["captions"]:
            return [(prompts.for_caption(row), row.texts(CAPTIONS))]
        case ["dialogue"]:
            return _rounds(row, prompts)
        case ["question"]:
            return [(prompts.for_question(row), row.texts(ANSWERS))]
        case ["prompt"]:
            return [(row.text("prompt"), row.texts(ANSWERS))]
    if row.has(ANSWERS):
        row.fail(
            "has an answer, but nothing that was asked",
            "Add a 'question' or a 'prompt', or call the answers 'captions'.",
        )
    return [(prompts.for_caption(row), ())]


def _rounds(row: Row, prompts: _Prompts) -> list[Turn]:
    """The rounds of a dialogue; each prompt holds the rounds before, with their first answers."""
    dialogue = row.fields["dialogue"]
    if not isinstance(dialogue, list) or not dialogue:
        row.fail_as_wrong("dialogue", dialogue, "a list of rounds")
    turns: list[Turn] = []
    history = ""
    for number, fields in enumerate(dialogue, 1):
        if not isinstance(fields, dict):
            row.fail_as_wrong("dialogue", fields, "a list of objects with 'question' and 'answer'")
        turn = Row(fields, f"{row.where}, round {number},", row.number, row.base)
        prompt = history + prompts.for_question(turn)
        answers = turn.texts(ANSWERS)
        if not answers and number < len(dialogue):
            turn.fail("has no answer, which the prompts of later rounds need", "Add its answer.")
        turns.append((prompt, answers))
        history = f"{prompt} {answers[0]} " if answers else ""
    return turns


def _image(row: Row) -> tuple[Path | Image.Image | EncodedImage, str]:
    """Where the row's image is, and the name that all rows of this image share."""
    value = row.fields.get("image")
    if value is None:
        row.fail(
            f"has no 'image'; its fields are {', '.join(row.fields) or 'none'}",
            "Add the path of its image, relative to the data file.",
        )
    if isinstance(value, Image.Image | Cell):
        return value, str(row.image_name())
    path = row.base / row.text("image")
    # Not Path.is_file, which raises on names that are too long.
    if not os.path.isfile(path):
        row.fail(
            f"names the image {path}, which does not exist",
            "Correct the path; it is relative to the data file, or to --images.",
        )
    return path, str(row.image_name())
