"""Readers for the official files of captioning, VQA and dialogue data sets, as downloaded.

Nothing is fetched: the annotation files and the folder of pictures are the user's. Each reader
checks the layout it expects, and names what it found where that differs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from offramp.data import CAPTION_PROMPT, QUESTION_PROMPT, read_examples
from offramp.errors import DataError, InputError, did_you_mean
from offramp.examples import Example
from offramp.records import read_json


@dataclass(frozen=True)
class Item:
    """An example to evaluate, with what its task's official metric needs besides.

    references: what the answer is compared with; the example's answers when left out.
    groups: names to report by, such as {"answer_type": "yes/no"} or {"domain": "near-domain"}.
    candidates, gold, relevance: of a dialogue's round: the answers to rank, the right one's place
        (from 0), and how right each is (VisDial's dense annotations; empty if there are none).
    """

    example: Example
    references: tuple[str, ...] = ()
    groups: Mapping[str, str] = field(default_factory=dict)
    candidates: tuple[str, ...] = ()
    gold: int | None = None
    relevance: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.references:
            object.__setattr__(self, "references", self.example.answers)

    @property
    def key(self) -> str:
        return self.example.key


def read_items(
    files: Sequence[str | Path],
    images: str | Path | None = None,
    layout: str = "auto",
    *,
    split: str | None = None,
    prompt: str | None = None,
    limit: int | None = None,
) -> list[Item]:
    """Read a data set in one of `LAYOUTS`, or in what `offramp.data.read_examples` reads.

    Args:
        files: the official file; for VQA v2 and OK-VQA the questions and the annotations, for
            VisDial the dialogues and, where there are some, the dense annotations. Files that
            stand beside the first under their official names need not be given.
        images: the folder of pictures. Default: the folder of the first file.
        layout: of `LAYOUTS`, "jsonl", or "auto", which looks at what the file holds.
        split: for Karpathy's files (default: test), JSONL and `datasets`.
        prompt: the captions' prompt, or a template with `{question}`; see `read_examples`.
        limit: stop after this many examples.

    Raises:
        InputError: an argument cannot be used.
        DataError: another layout than the one expected, or a picture or annotation is missing.
        StorageError: a file cannot be read.
    """
    if layout not in FORMATS:
        raise InputError(f"Data format {layout!r} is not known.", did_you_mean(layout, FORMATS))
    if not files or (limit is not None and limit < 1):
        raise InputError(
            f"{len(files)} data files and a limit of {limit} leave nothing to read.",
            "Give at least one file, and a limit of 1 or more.",
        )
    if layout == "jsonl" or (layout == "auto" and not str(files[0]).endswith(".json")):
        return _plain(files, split, prompt, limit)
    source = _Source.open(files, images, layout, prompt, split)
    items: list[Item] = []
    for item in LAYOUTS[source.layout].read(source):
        items.append(item)
        if len(items) == limit:
            break
    if not items:
        source.fail("holds no examples")
    return items


def _plain(
    files: Sequence[str | Path], split: str | None, prompt: str | None, limit: int | None
) -> list[Item]:
    if len(files) > 1:
        raise InputError(
            f"{len(files)} files were given; a JSONL file or data set stands alone.",
            "Give one, or name the official --format.",
        )
    examples = read_examples(
        files[0], split=split, prompt_template=prompt, limit=limit, require_answers=True
    )
    return [Item(example) for example in examples]


# -- what all layouts need ----------------------------------------------------------------------


@dataclass
class _Source:
    """The parsed files of one data set, and where its pictures are."""

    path: Path
    layout: str
    content: Any
    others: list[tuple[Path, Any]]
    images: Path
    prompt: str | None
    split: str | None

    @classmethod
    def open(
        cls,
        files: Sequence[str | Path],
        images: str | Path | None,
        layout: str,
        prompt: str | None,
        split: str | None,
    ) -> _Source:
        paths = [Path(file).expanduser() for file in files]
        parsed = [(path, read_json(path)) for path in paths]
        # The questions may come second.
        parsed.sort(key=lambda pair: isinstance(pair[1], dict) and "annotations" in pair[1])
        (path, content), *others = parsed
        folder = Path(images).expanduser() if images is not None else path.parent
        if not folder.is_dir():
            raise DataError(f"The picture folder {folder} does not exist.", "Correct --images.")
        source = cls(path, layout, content, others, folder, prompt, split)
        if layout == "auto":
            source.layout = source._recognised()
        return source

    def _recognised(self) -> str:
        for name, layout in LAYOUTS.items():
            if layout.fits(self):
                return name
        self.layout = ""
        self.fail("has a layout that is not known")

    def sibling(self, names: Sequence[str], holds: str) -> Any:
        """The content of the other file that has the field `holds`; None where there is none."""
        for _, content in self.others:
            if isinstance(content, dict) and holds in content:
                return content
        path = next((p for n in names if (p := self.path.with_name(n)) != self.path
                     and p.is_file()), None)  # fmt: skip
        if path is None:
            return None
        content = read_json(path)
        self.others.append((path, content))
        return content

    def fail(self, problem: str) -> NoReturn:
        """Raise a `DataError` that says what was found and what is expected."""
        expected = (
            f"The {self.layout} layout is: {LAYOUTS[self.layout].shape}."
            if self.layout in LAYOUTS
            else f"Name one with --format: {', '.join(FORMATS)}."
        )
        raise DataError(f"{self.path} {problem}; it holds {_shown(self.content)}.", expected)

    def get(self, value: Any, name: str, kind: type | tuple[type, ...], where: str) -> Any:
        """`value[name]`, which must be of this kind."""
        if not isinstance(value, dict) or name not in value:
            self.fail(f"has no {name!r} in {where} ({_shown(value)})")
        if not isinstance(value[name], kind):
            self.fail(f"has {_short(value[name])} as {name!r} in {where}")
        return value[name]

    def rows(self, value: Any, name: str) -> list[dict[str, Any]]:
        """The list `value[name]` of objects."""
        rows: list[dict[str, Any]] = self.get(value, name, list, "the file")
        return rows

    def picture(self, names: Sequence[str]) -> Path:
        """The first of these files that is in the picture folder."""
        for name in names:
            # Not Path.is_file, which raises on names that are too long.
            if os.path.isfile(path := self.images / name):
                return path
        raise DataError(
            f"The picture {names[0]} of {self.path} is not in {self.images} "
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


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        names = ", ".join(map(str, list(value)[:6])) or "nothing"
        return f"the fields {names}{', ...' if len(value) > 6 else ''}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return _short(value)


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _texts(values: Sequence[Any]) -> tuple[str, ...]:
    """The texts that say something: an example's answers may not be blank."""
    return tuple(v for v in values if isinstance(v, str) and v.strip())


def _coco_names(image_id: int, subset: str) -> list[str]:
    """Names under which a COCO picture is found: with or without its subset, in its own folder."""
    plain = f"{image_id:012d}.jpg"
    names = [f"COCO_{subset}_{plain}", plain] if subset else [plain]
    return [*names, *(f"{subset}/{name}" for name in names if subset)]


# -- captions -----------------------------------------------------------------------------------


def _coco(source: _Source) -> Iterator[Item]:
    """COCO captions and NoCaps: one item a picture, all of its captions as references."""
    captions: dict[Any, list[str]] = {}
    for row in source.rows(source.content, "annotations"):
        image_id = source.get(row, "image_id", (int, str), "an annotation")
        text = source.get(row, "caption", str, f"the annotation of image {image_id}")
        captions.setdefault(image_id, []).append(text)
    for row in source.rows(source.content, "images"):
        image_id = source.get(row, "id", (int, str), "an image")
        name = source.get(row, "file_name", str, f"image {image_id}")
        found = _texts(captions.get(image_id, ()))
        if not found:
            source.fail(f"has no caption for image {image_id}")
        groups = {"domain": row["domain"]} if isinstance(row.get("domain"), str) else {}
        path = source.picture([name, Path(name).name])
        key = str(image_id)
        yield Item(Example(path, source.caption_prompt(), found, key, key), groups=groups)


def _karpathy(source: _Source) -> Iterator[Item]:
    wanted = source.split or "test"
    found: set[str] = set()
    for number, row in enumerate(source.rows(source.content, "images")):
        split = source.get(row, "split", str, f"image {number}")
        found.add(split)
        if split != wanted:
            continue
        name = source.get(row, "filename", str, f"image {number}")
        sentences = source.get(row, "sentences", list, f"image {name}")
        texts = _texts([source.get(s, "raw", str, f"image {name}") for s in sentences])
        if not texts:
            source.fail(f"has no caption for image {name}")
        names = [f"{row['filepath']}/{name}"] if isinstance(row.get("filepath"), str) else []
        path = source.picture([*names, name])
        yield Item(Example(path, source.caption_prompt(), texts, name, name))
    if wanted not in found:
        raise DataError(
            f"{source.path} has no pictures of the split {wanted!r}.",
            did_you_mean(wanted, sorted(found)) or "The file has no pictures.",
        )


# -- questions ----------------------------------------------------------------------------------


def _vqa(source: _Source) -> Iterator[Item]:
    """VQA v2 and OK-VQA: ten answers a question, empty ones kept for the official count.

    OK-VQA's are those the official script compares with ("answer", stemmed), not "raw_answer".
    """
    answered = {
        source.get(row, "question_id", (int, str), "an annotation"): row
        for row in source.rows(_vqa_annotations(source), "annotations")
    }
    subset = str(source.content.get("data_subtype", ""))
    for row in source.rows(source.content, "questions"):
        number = source.get(row, "question_id", (int, str), "a question")
        where = f"question {number}"
        image_id = source.get(row, "image_id", int, where)
        if number not in answered:
            source.fail(f"has no annotation for question {number}")
        annotation = answered[number]
        texts = tuple(
            source.get(a, "answer", str, f"the answers to {where}")
            for a in source.get(annotation, "answers", list, where)
        )
        if not _texts(texts):
            source.fail(f"has no answer to question {number}")
        names = ("question_type", "answer_type")
        groups = {n: annotation[n] for n in names if isinstance(annotation.get(n), str)}
        example = Example(
            source.picture(_coco_names(image_id, subset)),
            source.question_prompt(source.get(row, "question", str, where)),
            _texts(texts),
            str(number),
            str(image_id),
        )
        yield Item(example, texts, groups)


def _vqa_annotations(source: _Source) -> Any:
    name = source.path.name
    official = name.replace("OpenEnded_", "").replace("_questions", "_annotations")
    found = source.sibling([official], "annotations")
    if found is None:
        source.fail(f"came without its annotations ({official} is not beside it)")
    return found


def _gqa(source: _Source) -> Iterator[Item]:
    if not isinstance(source.content, dict):
        source.fail("is no object of questions")
    for number, row in source.content.items():
        where = f"question {number}"
        image_id = source.get(row, "imageId", str, where)
        answer = source.get(row, "answer", str, where)
        types = row.get("types")
        kind = types.get("structural") if isinstance(types, dict) else None
        example = Example(
            source.picture([f"{image_id}.jpg", f"images/{image_id}.jpg"]),
            source.question_prompt(source.get(row, "question", str, where)),
            _texts([answer]),
            str(number),
            image_id,
        )
        if not example.answers:
            source.fail(f"has an empty answer to question {number}")
        yield Item(example, groups={"structural_type": kind} if isinstance(kind, str) else {})


# -- dialogue -----------------------------------------------------------------------------------


def _visdial(source: _Source) -> Iterator[Item]:
    """VisDial v1.0: one item a round; the prompt has the caption and the rounds before."""
    data = source.get(source.content, "data", dict, "the file")
    lists = [source.get(data, n, list, "'data'") for n in ("questions", "answers", "dialogs")]
    questions, answers, dialogs = lists
    subset = str(source.content.get("split", ""))
    dense = _dense(source)
    for dialog in dialogs:
        image_id = source.get(dialog, "image_id", int, "a dialogue")
        names = [f"VisualDialog_{subset}_{image_id:012d}.jpg"]
        years = {"val": "val2018", "test": "test2018"}
        if subset in years:
            names.insert(0, f"VisualDialog_{years[subset]}_{image_id:012d}.jpg")
        names += [n for s in ("train2014", "val2014") for n in _coco_names(image_id, s)]
        path = source.picture(list(dict.fromkeys(names)))
        history = source.get(dialog, "caption", str, f"the dialogue on image {image_id}").strip()
        rounds = source.get(dialog, "dialog", list, f"the dialogue on image {image_id}")
        for number, turn in enumerate(rounds, 1):
            where = f"round {number} on image {image_id}"
            question = _told(source, turn, "question", questions, where)
            asked = question if question.endswith("?") else f"{question}?"
            prompt = f"{history} {source.question_prompt(asked)}".lstrip()
            item = _round(source, turn, path, prompt, answers, where, f"{image_id}.{number}")
            yield _with_relevance(source, item, dense.get((image_id, number), ()), where)
            history = f"{prompt} {item.example.answers[0]}"


def _round(
    source: _Source,
    turn: Any,
    path: Path,
    prompt: str,
    answers: list[Any],
    where: str,
    key: str,
) -> Item:
    options = source.get(turn, "answer_options", list, where)
    gold = source.get(turn, "gt_index", int, where)
    if not 0 <= gold < len(options):
        source.fail(f"has {gold} as 'gt_index' in {where}, of {len(options)} options")
    candidates = tuple(
        _told(source, {"answer_options": o}, "answer_options", answers, where) for o in options
    )
    group = key.split(".", maxsplit=1)[0]
    example = Example(path, prompt, (candidates[gold],), key, group)
    return Item(example, candidates=candidates, gold=gold)


def _told(source: _Source, turn: Any, name: str, texts: list[Any], where: str) -> str:
    """The text that a turn points at by its place in one of the file's lists."""
    place = source.get(turn, name, int, where)
    if not 0 <= place < len(texts) or not _texts([texts[place]]):
        source.fail(f"points at {name} {place} in {where}, which is no text in its list")
    return str(texts[place]).strip()


def _dense(source: _Source) -> dict[tuple[int, int], tuple[float, ...]]:
    """Relevance of every candidate, by image and round; empty without dense annotations."""
    name = f"{source.path.stem}_dense_annotations.json"
    path = source.path.with_name(name)
    rows = source.others[0][1] if source.others else read_json(path) if path.is_file() else []
    if not isinstance(rows, list):
        source.fail(f"came with {_shown(rows)} where a list of dense annotations belongs")
    found = {}
    for row in rows:
        image_id = source.get(row, "image_id", int, "a dense annotation")
        number = source.get(row, "round_id", int, "a dense annotation")
        named = "relevance" if "relevance" in row else "gt_relevance"
        values = source.get(row, named, list, f"the dense annotation of image {image_id}")
        found[image_id, number] = tuple(map(float, values))
    return found


def _with_relevance(source: _Source, item: Item, relevance: tuple[float, ...], where: str) -> Item:
    if relevance and len(relevance) != len(item.candidates):
        source.fail(
            f"has {len(item.candidates)} candidates and {len(relevance)} relevances in {where}"
        )
    return Item(item.example, item.references, {}, item.candidates, item.gold, relevance)


# -- the table ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How a layout is read, how it is recognised, and what a user is told about its shape."""

    read: Callable[[_Source], Iterator[Item]]
    fits: Callable[[_Source], bool]
    shape: str


def _has(value: Any, *names: str) -> bool:
    return isinstance(value, dict) and all(name in value for name in names)


def _first(value: Any, name: str) -> Any:
    rows = value.get(name) if isinstance(value, dict) else None
    return rows[0] if isinstance(rows, list) and rows else None


def _is_nocaps(source: _Source) -> bool:
    return _has(source.content, "images", "annotations") and _has(
        _first(source.content, "images"), "open_images_id"
    )


def _is_okvqa(source: _Source) -> bool:
    if not _has(source.content, "questions"):
        return False
    row = _first(_vqa_annotations(source), "annotations")
    return _has(_first(row, "answers"), "raw_answer")


def _is_gqa(source: _Source) -> bool:
    rows = source.content
    return isinstance(rows, dict) and bool(rows) and _has(next(iter(rows.values())), "imageId")


_CAPTIONS = "{images: [{id, file_name}], annotations: [{image_id, caption}]}"
_QUESTIONS = (
    "{questions: [{question_id, image_id, question}]} and, in the second file, "
    "{annotations: [{question_id, answers: [{answer}]}]}"
)

LAYOUTS = {
    "nocaps": Layout(_coco, _is_nocaps, _CAPTIONS),
    "coco": Layout(_coco, lambda s: _has(s.content, "images", "annotations"), _CAPTIONS),
    "karpathy": Layout(
        _karpathy,
        lambda s: _has(_first(s.content, "images"), "sentences"),
        "{images: [{split, filename, sentences: [{raw}]}]}",
    ),
    "okvqa": Layout(_vqa, _is_okvqa, _QUESTIONS),
    "vqav2": Layout(_vqa, lambda s: _has(s.content, "questions"), _QUESTIONS),
    "visdial": Layout(
        _visdial,
        lambda s: _has(s.content, "data") and _has(s.content["data"], "dialogs"),
        "{split, data: {questions, answers, dialogs: [{image_id, caption, dialog: [{question, "
        "answer_options, gt_index}]}]}}",
    ),
    "gqa": Layout(_gqa, _is_gqa, "{question_id: {imageId, question, answer}}"),
}
"""By name; "auto" takes the first that fits."""

FORMATS = ("auto", "jsonl", *sorted(LAYOUTS))
