"""Laws of the readers of official files, on miniatures of them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from offramp.core.errors import DataError, InputError, StorageError
from offramp.data.formats import LAYOUTS, read_items
from offramp.data.item import Item

COCO: dict[str, Any] = {
    "info": {},
    "images": [
        {"id": 42, "file_name": "COCO_val2014_000000000042.jpg"},
        {"id": 73, "file_name": "COCO_val2014_000000000073.jpg"},
    ],
    "annotations": [
        {"id": 1, "image_id": 42, "caption": "A dog."},
        {"id": 2, "image_id": 73, "caption": "一只猫 in a café"},
        {"id": 3, "image_id": 42, "caption": "A brown dog sits."},
    ],
}
NOCAPS: dict[str, Any] = {
    "images": [
        {"id": 0, "file_name": "a.jpg", "open_images_id": "a", "domain": "in-domain"},
        {"id": 1, "file_name": "b.jpg", "open_images_id": "b", "domain": "out-domain"},
    ],
    "annotations": [
        {"id": 0, "image_id": 0, "caption": "A dog."},
        {"id": 1, "image_id": 1, "caption": "An accordion."},
    ],
}
KARPATHY: dict[str, Any] = {
    "dataset": "flickr8k",
    "images": [
        {"split": "train", "filename": "t.jpg", "sentences": [{"raw": "A train."}]},
        {"split": "test", "filename": "a.jpg", "sentences": [{"raw": "A dog."}, {"raw": "Dog."}]},
        {
            "split": "test",
            "filepath": "val2014",
            "filename": "b.jpg",
            "sentences": [{"raw": "A cat."}],
        },
    ],
}
QUESTIONS: dict[str, Any] = {
    "data_subtype": "val2014",
    "questions": [
        {"question_id": 420, "image_id": 42, "question": "Is it a dog?"},
        {"question_id": 421, "image_id": 42, "question": "What color?"},
    ],
}
ANNOTATIONS: dict[str, Any] = {
    "annotations": [
        {
            "question_id": number,
            "image_id": 42,
            "question_type": kind,
            "answer_type": answer_type,
            "answers": [
                {"answer": a, "answer_id": i} for i, a in enumerate([answer] * 9 + [""], 1)
            ],
        }
        for number, kind, answer_type, answer in (
            (421, "what color", "other", "brown"),
            (420, "is it", "yes/no", "yes"),
        )
    ]
}
GQA: dict[str, Any] = {
    "20": {
        "imageId": "a",
        "question": "Is it red?",
        "answer": "no",
        "types": {"structural": "verify"},
    },
    "21": {"imageId": "b", "question": "What is it?", "answer": "dog"},
}
VISDIAL: dict[str, Any] = {
    "version": "1.0",
    "split": "val",
    "data": {
        "questions": ["is it big", "what color"],
        "answers": ["yes", "no", "brown", "black"],
        "dialogs": [
            {
                "image_id": 42,
                "caption": "a dog on grass",
                "dialog": [
                    {"question": 0, "answer": 0, "answer_options": [1, 0, 2], "gt_index": 1},
                    {"question": 1, "answer": 2, "answer_options": [2, 3, 1], "gt_index": 0},
                ],
            }
        ],
    },
}
DENSE: list[dict[str, Any]] = [{"image_id": 42, "round_id": 2, "gt_relevance": [1.0, 0.4, 0.0]}]

FILES: dict[str, dict[str, Any]] = {
    "coco": {"captions_val2014.json": COCO},
    "nocaps": {"nocaps_val.json": NOCAPS},
    "karpathy": {"dataset_flickr8k.json": KARPATHY},
    "vqav2": {
        "v2_OpenEnded_mscoco_val2014_questions.json": QUESTIONS,
        "v2_mscoco_val2014_annotations.json": ANNOTATIONS,
    },
    "gqa": {"testdev_balanced_questions.json": GQA},
    "visdial": {"visdial_1.0_val.json": VISDIAL, "visdial_1.0_val_dense_annotations.json": DENSE},
}
PICTURES = {
    "coco": ["COCO_val2014_000000000042.jpg", "COCO_val2014_000000000073.jpg"],
    "nocaps": ["a.jpg", "b.jpg"],
    "karpathy": ["a.jpg", "val2014/b.jpg"],
    "vqav2": ["COCO_val2014_000000000042.jpg"],
    "gqa": ["a.jpg", "b.jpg"],
    "visdial": ["VisualDialog_val2018_000000000042.jpg"],
}
Made = tuple[list[Path], Path]
Make = Callable[..., Made]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Write a miniature data set, changed by `change`; its files and its image folder."""

    def write(layout: str, change: Callable[[dict[str, Any]], Any] | None = None) -> Made:
        files = copy.deepcopy(FILES[layout])
        if change is not None:
            change(files[next(iter(files))])
        paths = [tmp_path / name for name in files]
        for path, content in zip(paths, files.values(), strict=True):
            path.write_text(json.dumps(content), encoding="utf-8")
        for name in PICTURES[layout]:
            place = tmp_path / "pictures" / name
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4)).save(place)
        return paths, tmp_path / "pictures"

    return write


def keys(items: list[Item]) -> list[str]:
    return [item.key for item in items]


@pytest.mark.parametrize("layout", FILES)
def test_every_layout_is_recognised(make: Make, layout: str) -> None:
    files, pictures = make(layout)
    found = read_items(files[:1], pictures)
    assert found == read_items(files, pictures)
    assert len(found) == 2
    for item in found:
        assert item.example.open_image().size == (4, 4)
        assert item.references


def test_all_captions_of_a_coco_picture_are_references(make: Make) -> None:
    files, pictures = make("coco")
    first, second = read_items(files, pictures)
    assert first.key == first.example.group == "42"
    assert first.references == ("A dog.", "A brown dog sits.")
    assert second.references == ("一只猫 in a café",)
    assert first.example.prompt == "Caption:"
    assert read_items(files, pictures, prompt="")[0].example.prompt == ""


def test_nocaps_tells_domains_apart(make: Make) -> None:
    items = read_items(*make("nocaps"))
    assert [item.groups for item in items] == [{"domain": "in-domain"}, {"domain": "out-domain"}]


def test_karpathy_takes_the_test_split_unless_told_otherwise(make: Make) -> None:
    files, pictures = make("karpathy")
    assert keys(read_items(files, pictures)) == ["a.jpg", "b.jpg"]
    with pytest.raises(DataError, match=r"no images of the split 'tset'.*\n.*'test'"):
        read_items(files, pictures, split="tset")


def test_vqa_keeps_all_ten_answers_and_their_types(make: Make) -> None:
    first, second = read_items(*make("vqav2"))
    assert keys([first, second]) == ["420", "421"]
    assert first.references == ("yes",) * 9 + ("",)
    assert first.example.answers == ("yes",) * 9  # nobody is to learn an empty one
    assert first.example.prompt == "Question: Is it a dog? Answer:"
    assert first.groups == {"question_type": "is it", "answer_type": "yes/no"}
    assert first.example.group == second.example.group == "42"


def test_okvqa_is_read_as_vqa_is(make: Make) -> None:
    files, pictures = make("vqav2")
    annotations = copy.deepcopy(ANNOTATIONS)
    for row in annotations["annotations"]:
        for answer in row["answers"]:
            answer["raw_answer"] = answer["answer"]
    files[1].write_text(json.dumps(annotations), encoding="utf-8")
    assert [item.references for item in read_items(files, pictures)] == [
        ("yes",) * 9 + ("",),
        ("brown",) * 9 + ("",),
    ]


def test_questions_and_annotations_come_in_any_order(make: Make) -> None:
    files, pictures = make("vqav2")
    assert read_items(files[::-1], pictures) == read_items(files, pictures)


def test_gqa_has_one_answer_and_a_type(make: Make) -> None:
    first, second = read_items(*make("gqa"))
    assert first.references == ("no",)
    assert first.groups == {"structural_type": "verify"}
    assert second.groups == {}


def test_a_dialogue_is_one_item_a_round_with_what_was_said_before(make: Make) -> None:
    files, pictures = make("visdial")
    first, second = read_items(files, pictures)
    assert keys([first, second]) == ["42.1", "42.2"]
    assert first.example.prompt == "a dog on grass Question: is it big? Answer:"
    assert second.example.prompt == (
        "a dog on grass Question: is it big? Answer: yes Question: what color? Answer:"
    )
    assert first.candidates == ("no", "yes", "brown")
    assert first.gold == 1
    assert first.relevance == ()
    assert second.relevance == (1.0, 0.4, 0.0)


def test_dense_annotations_are_optional(make: Make) -> None:
    files, pictures = make("visdial")
    files[1].unlink()
    assert all(item.relevance == () for item in read_items(files[:1], pictures))


def test_pictures_may_lie_beside_the_file(make: Make, tmp_path: Path) -> None:
    files, pictures = make("gqa")
    for picture in pictures.iterdir():
        picture.rename(tmp_path / picture.name)
    assert len(read_items(files)) == 2


@pytest.mark.parametrize("name", ["coco", "gqa", "vqav2", "karpathy"])
def test_a_limit_is_a_sample_whatever_order_the_file_has(make: Make, name: str) -> None:
    def turned(content: Any) -> None:
        if name == "gqa":
            rows = dict(reversed(list(content.items())))
            content.clear()
            content.update(rows)
        for rows in content.values():
            if isinstance(rows, list):
                rows.reverse()

    found = []
    for change in (None, turned):
        files, pictures = make(name, change) if change else make(name)
        items = read_items(files, pictures, limit=1)
        found.append({item.example.group for item in items})
    assert found[0] == found[1] and len(found[0]) == 1


def test_a_limit_splits_no_image(make: Make) -> None:
    def scattered(content: Any) -> None:
        last = {"imageId": "a", "question": "Is it big?", "answer": "yes"}
        content |= {"24": last}

    files, pictures = make("gqa", scattered)
    found = read_items(files, pictures, limit=1)
    assert sorted(item.key for item in found) in (["20", "24"], ["21"])
    files, pictures = make("vqav2")
    assert len(read_items(files, pictures, limit=1)) == 2
    files, pictures = make("visdial")
    assert len(read_items(files, pictures, limit=1)) == 2


def test_jsonl_is_read_as_everywhere(make: Make, tmp_path: Path) -> None:
    _, pictures = make("gqa")
    rows = [{"image": "a.jpg", "question": "Why?", "answers": ["so"]}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (item,) = read_items([path], pictures)
    assert item.references == ("so",)
    with pytest.raises(InputError, match="2 files"):
        read_items([path, path])


# -- bad input -----------------------------------------------------------------------------------


def drop(*path: Any) -> Callable[[dict[str, Any]], None]:
    """Remove what stands at `path`."""

    def change(content: Any) -> None:
        for step in path[:-1]:
            content = content[step]
        del content[path[-1]]

    return change


def put(value: Any, *path: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: Any) -> None:
        for step in path[:-1]:
            content = content[step]
        content[path[-1]] = value

    return change


WRONG = {
    "coco": [
        (drop("annotations"), "layout that is not known"),
        (drop("images", 0, "file_name"), "'file_name' in image 42"),
        (drop("annotations", 1), "no caption for image 73"),
        (put("   ", "annotations", 1, "caption"), "no caption for image 73"),
        (put(5, "annotations", 0, "caption"), "5 as 'caption'"),
        (put([], "images"), "holds no examples"),
    ],
    "nocaps": [(put({}, "images"), "nothing as 'images'")],
    "karpathy": [
        (drop("images", 1, "sentences"), "'sentences' in image a.jpg"),
        (put([], "images", 1, "sentences"), "no caption for image a.jpg"),
    ],
    "vqav2": [
        (drop("questions", 0, "image_id"), "'image_id' in question 420"),
        (put(99, "questions", 0, "question_id"), "no annotation for question 99"),
    ],
    "gqa": [
        (drop("20", "answer"), "'answer' in question 20"),
        (put(" ", "20", "answer"), "empty answer to question 20"),
    ],
    "visdial": [
        (drop("data", "answers"), "'answers' in 'data'"),
        (put(3, "data", "dialogs", 0, "dialog", 0, "gt_index"), "3 as 'gt_index' in round 1"),
        (put([1, 99, 2], "data", "dialogs", 0, "dialog", 0, "answer_options"), "99 in round 1"),
        (
            put([1, 0], "data", "dialogs", 0, "dialog", 1, "answer_options"),
            "2 candidates and 3 relevances in round 2",
        ),
    ],
}


@pytest.mark.parametrize(
    ("layout", "case"), [(layout, i) for layout, cases in WRONG.items() for i in range(len(cases))]
)
def test_a_wrong_layout_says_what_was_found_and_what_is_expected(
    make: Make, layout: str, case: int
) -> None:
    change, words = WRONG[layout][case]
    files, pictures = make(layout, change)
    with pytest.raises(DataError) as error:
        read_items(files, pictures)
    problem, remedy = str(error.value).split("\n")
    assert words in problem
    assert files[0].name in problem
    assert LAYOUTS["coco" if layout == "nocaps" else layout].shape in remedy


@pytest.mark.parametrize("layout", FILES)
def test_a_missing_picture_is_named(make: Make, layout: str) -> None:
    files, pictures = make(layout)
    name = PICTURES[layout][0]
    (pictures / name).unlink()
    with pytest.raises(DataError, match=r"is not in .*\n.*--images") as error:
        read_items(files, pictures)
    assert Path(name).name in str(error.value)


def test_missing_vqa_annotations_are_named(make: Make) -> None:
    files, pictures = make("vqav2")
    files[1].unlink()
    with pytest.raises(DataError, match=r"v2_mscoco_val2014_annotations\.json is not beside"):
        read_items(files[:1], pictures)


@pytest.mark.parametrize("content", [{"rows": []}, [1, 2], {}, "text", None])
def test_an_unknown_layout_lists_the_known_ones(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"layout that is not known.*\n.*karpathy"):
        read_items([path])


@pytest.mark.parametrize(
    "content",
    [
        {"images": 5, "annotations": 5},
        {"images": [{"sentences": 5}]},
        {"questions": 5},
        {"data": {"dialogs": 5}},
        {"1": {"imageId": 5}},
        [],
        7,
        {"a": 1},
    ],
)
def test_any_json_is_an_error_of_two_lines(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError) as error:
        read_items([path])
    assert len(str(error.value).split("\n")) == 2


def test_other_mistakes_are_named(make: Make, tmp_path: Path) -> None:
    files, pictures = make("coco")
    with pytest.raises(InputError, match="limit of 0"):
        read_items(files, pictures, limit=0)
    with pytest.raises(InputError, match="no folder of images"):
        read_items(files, tmp_path / "nowhere")
    with pytest.raises(StorageError, match=r"none\.json"):
        read_items([tmp_path / "none.json"])
    with pytest.raises(InputError, match="captions have none"):
        read_items(files, pictures, prompt="{question}")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        read_items([tmp_path / "bad.json"])


@pytest.mark.parametrize("layout", ["coco", "karpathy", "gqa", "vqav2", "visdial"])
def test_a_file_that_would_not_be_read_is_refused(make: Make, layout: str) -> None:
    files, pictures = make(layout)
    more = [files[0]] * (LAYOUTS[layout].files + 1 - len(files))
    with pytest.raises(InputError, match=f"{len(files) + len(more)} files were given; of the "):
        read_items([*files, *more], pictures)


@pytest.mark.parametrize("value", ["x", None, [], float("nan")])
def test_a_relevance_that_is_no_number_is_named(make: Make, value: Any) -> None:
    files, pictures = make("visdial")
    dense = copy.deepcopy(DENSE)
    dense[0]["gt_relevance"] = [1, value, 0]
    files[1].write_text(json.dumps(dense), encoding="utf-8")
    with pytest.raises(DataError, match="as a relevance of image 42"):
        read_items(files, pictures)


def test_a_name_in_capitals_is_of_json_too(make: Make) -> None:
    files, pictures = make("gqa")
    there = read_items(files, pictures)
    assert read_items([files[0].rename(files[0].with_suffix(".JSON"))], pictures) == there


def test_a_prompt_that_would_lose_the_question_is_refused(make: Make) -> None:
    with pytest.raises(InputError, match="every question would be lost"):
        read_items(*make("gqa"), prompt="Answer:")
