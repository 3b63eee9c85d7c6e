"""The readers of official files, by task: captions, questions and dialogues as items.

Each checks what it reads, and names what it found where that differs from what it expects.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from offramp.core.errors import DataError, did_you_mean
from offramp.data.annotation_file import Source, shown
from offramp.data.item import Item
from offramp.inputs.example import Example


def _texts(values: Sequence[Any]) -> tuple[str, ...]:
    """The texts that say something: an example's answers may not be blank."""
    return tuple(v for v in values if isinstance(v, str) and v.strip())


def _coco_names(image_id: int, subset: str) -> list[str]:
    """Names under which a COCO image is found: with or without its subset, in its own folder."""
    plain = f"{image_id:012d}.jpg"
    names = [f"COCO_{subset}_{plain}", plain] if subset else [plain]
    return [*names, *(f"{subset}/{name}" for name in names if subset)]


# -- captions -----------------------------------------------------------------------------------


def coco(source: Source) -> Iterator[Item]:
    """Yield one item an image of COCO captions or NoCaps, with all its captions as references."""
    captions: dict[Any, list[str]] = {}
    for row in source.rows(source.content, "annotations"):
        image_id = source.get(row, "image_id", (int, str), "an annotation")
        text = source.get(row, "caption", str, f"the annotation of image {image_id}")
        captions.setdefault(image_id, []).append(text)
    for row in source.rows(source.content, "images"):
        if source.leaves_out(row, "id"):
            continue
        image_id = source.get(row, "id", (int, str), "an image")
        name = source.get(row, "file_name", str, f"image {image_id}")
        texts = _texts(captions.get(image_id, ()))
        if not texts:
            source.fail(f"has no caption for image {image_id}")
        groups = {"domain": row["domain"]} if isinstance(row.get("domain"), str) else {}
        path = source.picture([name, Path(name).name])
        key = str(image_id)
        yield Item(Example(path, source.caption_prompt(), texts, key, key), groups=groups)


def karpathy(source: Source) -> Iterator[Item]:
    wanted = source.split or "test"
    splits: set[str] = set()
    for number, row in enumerate(source.rows(source.content, "images")):
        if source.leaves_out(row, "filename"):
            continue
        split = source.get(row, "split", str, f"image {number}")
        splits.add(split)
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
    if wanted not in splits:
        raise DataError(
            f"{source.path} has no images of the split {wanted!r}.",
            did_you_mean(wanted, sorted(splits)) or "The file has no images.",
        )


# -- questions ----------------------------------------------------------------------------------


def vqa(source: Source) -> Iterator[Item]:
    """Yield items of VQA v2 and OK-VQA, with ten answers a question; empty ones count officially.

    OK-VQA's are those the official script compares with ("answer", stemmed), not "raw_answer".
    """
    official = source.path.name.replace("OpenEnded_", "").replace("_questions", "_annotations")
    annotations = source.second(official)
    if annotations is None:
        source.fail(f"came without its annotations ({official} is not beside it)")
    answered = {
        source.get(row, "question_id", (int, str), "an annotation"): row
        for row in source.rows(annotations, "annotations")
    }
    subset = str(source.content.get("data_subtype", ""))
    for row in source.rows(source.content, "questions"):
        if source.leaves_out(row, "image_id"):
            continue
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


def gqa(source: Source) -> Iterator[Item]:
    if not isinstance(source.content, dict):
        source.fail("is no object of questions")
    for number, row in source.content.items():
        if source.leaves_out(row, "imageId"):
            continue
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


def visdial(source: Source) -> Iterator[Item]:
    """Yield one item a round of VisDial v1.0; the prompt has the caption and the rounds before."""
    data = source.get(source.content, "data", dict, "the file")
    lists = [source.get(data, n, list, "'data'") for n in ("questions", "answers", "dialogs")]
    questions, answers, dialogs = lists
    relevances = _relevances(source)
    for dialog in dialogs:
        if source.leaves_out(dialog, "image_id"):
            continue
        image_id = source.get(dialog, "image_id", int, "a dialogue")
        path = source.picture(_visdial_names(image_id, str(source.content.get("split", ""))))
        history = source.get(dialog, "caption", str, f"the dialogue on image {image_id}").strip()
        rounds = source.get(dialog, "dialog", list, f"the dialogue on image {image_id}")
        for number, turn in enumerate(rounds, 1):
            where = f"round {number} on image {image_id}"
            place = source.get(turn, "question", int, where)
            asked = _text_at(source, place, "question", questions, where).removesuffix("?") + "?"
            prompt = f"{history} {source.question_prompt(asked)}".lstrip()
            options = source.get(turn, "answer_options", list, where)
            candidates = tuple(
                _text_at(source, o, "answer_options", answers, where) for o in options
            )
            gold = source.get(turn, "gt_index", int, where)
            if not 0 <= gold < len(candidates):
                source.fail(f"has {gold} as 'gt_index' in {where}, of {len(candidates)} options")
            relevance = relevances.get((image_id, number), ())
            if relevance and len(relevance) != len(candidates):
                source.fail(
                    f"has {len(candidates)} candidates and {len(relevance)} relevances in {where}"
                )
            key = f"{image_id}.{number}"
            example = Example(path, prompt, (candidates[gold],), key, str(image_id))
            yield Item(example, candidates=candidates, gold=gold, relevance=relevance)
            history = f"{prompt} {candidates[gold]}"


def _visdial_names(image_id: int, subset: str) -> list[str]:
    """Its own images, of 2018, or those of COCO that the training dialogues are about."""
    years = [f"{subset}2018", subset] if subset in ("val", "test") else [subset]
    own = [f"VisualDialog_{year}_{image_id:012d}.jpg" for year in years]
    coco = [n for s in ("train2014", "val2014") for n in _coco_names(image_id, s)]
    return list(dict.fromkeys([*own, *coco]))


def _text_at(source: Source, place: Any, name: str, texts: list[Any], where: str) -> str:
    """The text in one of the file's lists that a turn points at by its place."""
    if not isinstance(place, int) or not 0 <= place < len(texts) or not _texts([texts[place]]):
        source.fail(f"points at {name} {place} in {where}, which is no text in its list")
    return str(texts[place]).strip()


def _relevances(source: Source) -> dict[tuple[int, int], tuple[float, ...]]:
    """Relevance of every candidate, by image and round; empty without dense annotations."""
    rows = source.second(f"{source.path.stem}_dense_annotations.json")
    if rows is None:
        return {}
    if not isinstance(rows, list):
        source.fail(f"came with {shown(rows)} where a list of dense annotations belongs")
    relevances = {}
    for row in rows:
        image_id = source.get(row, "image_id", int, "a dense annotation")
        number = source.get(row, "round_id", int, "a dense annotation")
        named = "relevance" if "relevance" in row else "gt_relevance"
        values = source.get(row, named, list, f"the dense annotation of image {image_id}")
        for value in values:
            if not isinstance(value, int | float) or not isfinite(value):
                source.fail(f"came with {shown(value)} as a relevance of image {image_id}")
        relevances[image_id, number] = tuple(map(float, values))
    return relevances
