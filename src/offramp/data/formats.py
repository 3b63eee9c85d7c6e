"""Official files of captioning, VQA and dialogue data sets as items, as they are downloaded.

Nothing is fetched: the annotation files and the folder of images are the user's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from offramp.data import format_readers as readers
from offramp.data.annotation_file import Source, has, sampled
from offramp.data.datasets import read_examples
from offramp.data.item import Item
from offramp.errors import InputError, check_known


@dataclass(frozen=True)
class Layout:
    """How a layout is read, how it is recognised, and how its shape is explained to a user."""

    read: Callable[[Source], Iterator[Item]]
    fits: Callable[[Source], bool]
    shape: str


def _is_karpathy(source: Source) -> bool:
    rows = source.content.get("images") if has(source.content, "images") else None
    return isinstance(rows, list) and bool(rows) and has(rows[0], "sentences")


def _is_visdial(source: Source) -> bool:
    return has(source.content, "data") and has(source.content["data"], "dialogs")


def _is_gqa(source: Source) -> bool:
    rows = source.content
    return isinstance(rows, dict) and bool(rows) and has(next(iter(rows.values())), "imageId")


_COCO = Layout(
    readers.coco,
    lambda source: has(source.content, "images", "annotations"),
    "{images: [{id, file_name}], annotations: [{image_id, caption}]}",
)
_VQA = Layout(
    readers.vqa,
    lambda source: has(source.content, "questions"),
    "{questions: [{question_id, image_id, question}]} and, in the second file, "
    "{annotations: [{question_id, answers: [{answer}]}]}",
)
LAYOUTS = {
    "coco": _COCO,
    "nocaps": _COCO,
    "karpathy": Layout(
        readers.karpathy, _is_karpathy, "{images: [{split, filename, sentences: [{raw}]}]}"
    ),
    "vqav2": _VQA,
    "okvqa": _VQA,
    "visdial": Layout(
        readers.visdial,
        _is_visdial,
        "{split, data: {questions, answers, dialogs: [{image_id, caption, dialog: [{question, "
        "answer_options, gt_index}]}]}}",
    ),
    "gqa": Layout(readers.gqa, _is_gqa, "{question_id: {imageId, question, answer}}"),
}
"""By name; "auto" takes the first that fits."""

FORMATS = ("auto", "jsonl", *sorted(LAYOUTS))


def read_items(
    files: Sequence[str | Path],
    images: str | Path | None = None,
    layout: str = "auto",
    *,
    split: str | None = None,
    prompt: str | None = None,
    limit: int | None = None,
    require_answers: bool = True,
) -> list[Item]:
    """Read a data set in one of `LAYOUTS`, or in what `offramp.data.read_examples` reads.

    Args:
        files: the official file; for VQA v2 and OK-VQA the questions and the annotations, for
            VisDial the dialogues and, where there are some, the dense annotations. Files that
            stand beside the first under their official names need not be given.
        images: the folder of images. Default: the folder of the first file.
        layout: of `LAYOUTS`, "jsonl", or "auto", which looks at what the file holds.
        split: for Karpathy's files (default: test), JSONL and `datasets`.
        prompt: the captions' prompt, or a template with `{question}`; see `read_examples`.
        limit: a sample of this many examples, and all else that is asked about their images; see
            `read_examples`.
        require_answers: of JSONL and `datasets`; False: images alone are enough.

    Raises:
        InputError: an argument cannot be used.
        DataError: another layout than the one expected, or an image or annotation is missing.
        StorageError: a file cannot be read.
    """
    check_known("Data format", [layout], FORMATS)
    if not files or (limit is not None and limit < 1):
        raise InputError(
            f"{len(files)} data files and a limit of {limit} leave nothing to read.",
            "Give at least one file, and a limit of 1 or more.",
        )
    if layout == "jsonl" or (layout == "auto" and not str(files[0]).endswith(".json")):
        if len(files) > 1:
            raise InputError(
                f"{len(files)} files were given; a JSONL file or data set stands alone.",
                "Give one, or name the official --format.",
            )
        examples = read_examples(
            files[0], split=split, prompt_template=prompt, limit=limit,
            require_answers=require_answers,
        )  # fmt: skip
        return [Item(example) for example in examples]
    known = f"Name one with --format: {', '.join(FORMATS)}."
    source = Source.open(files, images, prompt, split, known)
    name = layout if layout != "auto" else _recognised(source)
    if limit is not None:
        source.content = sampled(source.content)
    source.expected = f"The {name} layout is: {LAYOUTS[name].shape}."
    items: list[Item] = []
    for item in LAYOUTS[name].read(source):
        items.append(item)
        if len(items) == limit:
            source.only = {item.example.group for item in items}
    if not items:
        source.fail("holds no examples")
    return items


def _recognised(source: Source) -> str:
    for name, layout in LAYOUTS.items():
        if layout.fits(source):
            return name
    source.fail("has a layout that is not known")
