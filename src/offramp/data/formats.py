"""Official files of captioning, VQA and dialogue data sets as items, as they are downloaded.

Nothing is fetched: the annotation files and the folder of images are the user's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from offramp.core.errors import InputError
from offramp.data import format_readers as readers
from offramp.data.annotation_file import Source, has, sampled
from offramp.data.datasets import read_examples
from offramp.data.item import Item
from offramp.data.rows import GROUP


@dataclass(frozen=True)
class Layout:
    """One format of data files: how a file is recognised and read, and its fields in words.

    files: most files that are read together.
    """

    read: Callable[[Source], Iterator[Item]]
    fits: Callable[[Source], bool]
    shape: str
    files: int = 1


def _is_karpathy(source: Source) -> bool:
    rows = source.content.get("images") if has(source.content, "images") else None
    return isinstance(rows, list) and bool(rows) and has(rows[0], "sentences")


def _is_visdial(source: Source) -> bool:
    return has(source.content, "data") and has(source.content["data"], "dialogs")


def _is_gqa(source: Source) -> bool:
    rows = source.content
    return isinstance(rows, dict) and bool(rows) and has(next(iter(rows.values())), "imageId")


LAYOUTS = {
    "coco": Layout(  # NoCaps too
        readers.coco,
        lambda source: has(source.content, "images", "annotations"),
        "{images: [{id, file_name}], annotations: [{image_id, caption}]}",
    ),
    "karpathy": Layout(
        readers.karpathy, _is_karpathy, "{images: [{split, filename, sentences: [{raw}]}]}"
    ),
    "vqav2": Layout(  # OK-VQA too
        readers.vqa,
        lambda source: has(source.content, "questions"),
        "{questions: [{question_id, image_id, question}]} and, in the second file, "
        "{annotations: [{question_id, answers: [{answer}]}]}",
        files=2,
    ),
    "visdial": Layout(
        readers.visdial,
        _is_visdial,
        "{split, data: {questions, answers, dialogs: [{image_id, caption, dialog: [{question, "
        "answer_options, gt_index}]}]}}",
        files=2,
    ),
    "gqa": Layout(readers.gqa, _is_gqa, "{question_id: {imageId, question, answer}}"),
}
"""By name; a file is read by the first that fits."""


def read_items(
    files: Sequence[str | Path],
    images: str | Path | None = None,
    *,
    split: str | None = None,
    prompt: str | None = None,
    limit: int | None = None,
    require_answers: bool = True,
    group_by: str = GROUP,
) -> list[Item]:
    """Read a JSON file in one of `LAYOUTS`, or any source of `offramp.data.read_examples`.

    Args:
        files: the official file; for VQA v2 and OK-VQA the questions and the annotations, for
            VisDial the dialogues and, where there are some, the dense annotations. Files beside the
            first with their official names need not be given.
        images: folder of the images of JSON and JSONL files. Default: the folder of the first file.
        split: for Karpathy's files (default: test), JSONL and `datasets`.
        prompt: the captions' prompt, or a template with `{question}`; see `read_examples`.
        limit: a sample of this many examples, with all others about their images; see
            `read_examples`.
        require_answers, group_by: of JSONL, folders and `datasets`; see `read_examples`.

    Raises:
        InputError: an argument cannot be used.
        DataError: another layout than the one expected, or an image or annotation is missing.
        StorageError: a file cannot be read.
    """
    if not files or (limit is not None and limit < 1):
        raise InputError(
            f"{len(files)} data files and a limit of {limit} leave nothing to read.",
            "Give at least one file, and a limit of 1 or more.",
        )
    if images is not None and not os.path.isdir(images):
        raise InputError(
            f"There is no folder of images {str(images)!r}.",
            "Correct --images, or leave it out: images are then looked for beside the data.",
        )
    if not str(files[0]).lower().endswith(".json"):
        if len(files) > 1:
            raise InputError(
                f"{len(files)} files were given; a JSONL file or data set stands alone.",
                "Give one; official files end in .json.",
            )
        examples = read_examples(
            files[0],
            images=images,
            split=split,
            prompt_template=prompt,
            limit=limit,
            require_answers=require_answers,
            group_by=group_by,
        )
        return [Item(example) for example in examples]
    if group_by != GROUP:
        raise InputError(
            f"Official files such as {files[0]} name no {group_by!r} to group by.",
            "Leave --group-by out, or give a JSONL file.",
        )
    known = "; ".join(f"{name}: {layout.shape}" for name, layout in LAYOUTS.items())
    source = Source.open(files, images, prompt, split, f"Known layouts are {known}.")
    name = next((name for name, layout in LAYOUTS.items() if layout.fits(source)), None)
    if name is None:
        source.fail("has a layout that is not known")
    if len(files) > LAYOUTS[name].files:
        raise InputError(
            f"{len(files)} files were given; of the {name} layout {LAYOUTS[name].files} can be "
            "read together.",
            "Read one data set at a time.",
        )
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
