"""What a user may bring, how it is read, and what a mistake in it says."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from offramp.core.errors import DataError, InputError
from offramp.data.datasets import (
    CAPTION_PROMPT,
    Example,
    examples_digest,
    read_examples,
    split_examples,
)
from offramp.data.formats import read_items

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write rows (dicts, or lines as they are) beside two images, a.png and b.png."""

    def write_rows(*rows: dict[str, Any] | str | bytes, name: str = "data.jsonl") -> Path:
        for image, color in {"a.png": "red", "b.png": "blue"}.items():
            Image.new("RGB", (4, 3), color).save(tmp_path / image)
        lines = [json.dumps(row) if isinstance(row, dict) else row for row in rows]
        data = b"".join(
            (line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines
        )
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return write_rows


def turns(examples: list[Example]) -> list[tuple[str, tuple[str, ...]]]:
    return [(example.prompt, example.answers) for example in examples]


def example(image: Any, answers: tuple[str, ...] = (), key: str = "k", group: str = "") -> Example:
    return Example(image, "Caption:", answers, key, group)


def saved(picture: Image.Image, path: Path, **options: Any) -> Example:
    picture.save(path, **options)
    return example(path)


# Rows


def test_captions_are_one_example_with_every_caption_as_an_answer(write: Write) -> None:
    path = write({"image": "a.png", "captions": ["a dog", "one dog"]})
    assert turns(read_examples(path)) == [("Caption:", ("a dog", "one dog"))]


@pytest.mark.parametrize(
    "answers",
    [
        {"answer": "red"},
        {"answers": ["red"]},
        {"answers": "red"},
        {"answers": [{"answer": "red", "answer_id": 1}]},
        {"answers": None, "answer": "red"},
    ],
)
def test_a_question_is_one_example(write: Write, answers: dict[str, Any]) -> None:
    path = write({"image": "a.png", "question": "What color?", **answers})
    assert turns(read_examples(path)) == [("Question: What color? Answer:", ("red",))]


def test_answers_keep_their_repeats_because_vqa_scores_count_them(write: Write) -> None:
    path = write({"image": "a.png", "question": "Red?", "answers": ["yes", "yes", "no"]})
    assert read_examples(path)[0].answers == ("yes", "yes", "no")


def test_each_round_of_a_dialogue_is_asked_after_the_rounds_before_it(write: Write) -> None:
    rounds = [{"question": "What?", "answer": "a dog"}, {"question": "Old?", "answer": "no"}]
    path = write({"image": "a.png", "dialogue": rounds})
    assert turns(read_examples(path)) == [
        ("Question: What? Answer:", ("a dog",)),
        ("Question: What? Answer: a dog Question: Old? Answer:", ("no",)),
    ]


def test_the_last_round_of_a_dialogue_may_be_unanswered(write: Write) -> None:
    rounds = [{"question": "What?", "answer": "a dog"}, {"question": "Old?"}]
    assert read_examples(write({"image": "a.png", "dialogue": rounds}))[-1].answers == ()


def test_a_prompt_is_taken_as_it_is(write: Write) -> None:
    path = write({"image": "a.png", "prompt": "Describe {this}:"})
    assert turns(read_examples(path)) == [("Describe {this}:", ())]


def test_an_image_alone_is_an_unlabelled_caption(write: Write) -> None:
    assert turns(read_examples(write({"image": "a.png"}))) == [("Caption:", ())]


def test_templates_replace_the_default_prompts(write: Write) -> None:
    rounds = [{"question": "What?", "answer": "a {dog}"}, {"question": "Old?", "answer": "no"}]
    path = write({"image": "a.png", "dialogue": rounds})
    prompts = [e.prompt for e in read_examples(path, prompt_template="Q: {question} A:")]
    assert prompts == ["Q: What? A:", "Q: What? A: a {dog} Q: Old? A:"]


def test_a_caption_prompt_may_be_empty(write: Write) -> None:
    assert read_examples(write({"image": "a.png"}), prompt_template="")[0].prompt == ""


def test_images_of_a_jsonl_file_may_lie_in_another_folder(write: Write, tmp_path: Path) -> None:
    """Else what was asked about them would be about others of these names."""
    away = tmp_path / "away"
    away.mkdir()
    Image.new("RGB", (8, 8), "red").save(away / "a.png")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "a.png")
    file = write({"image": "a.png", "captions": ["one"]})
    [item] = read_items([file], away)
    assert item.example.open_image().getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(InputError, match=r"says itself where.*\n.*--images"):
        read_items([str(away)], away)


def test_a_line_without_an_end_is_refused_at_a_bound(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(b'{"image": "' + b"a" * 2**24)
    with pytest.raises(DataError, match=r"line 1 is longer than 16777216 bytes.*\n"):
        read_examples(file)


def test_blank_lines_and_a_byte_order_mark_are_no_rows(write: Write) -> None:
    path = write(b'\xef\xbb\xbf{"image": "a.png"}', "", "  ", {"image": "b.png"})
    assert len(read_examples(path)) == 2


def test_split_keeps_the_rows_of_that_split(write: Write) -> None:
    path = write(
        {"image": "a.png", "split": "train"}, {"image": "b.png", "split": "val"}, {"image": "a.png"}
    )
    assert [e.group for e in read_examples(path, split="val")] == ["b.png"]


def test_rows_outside_the_sample_are_not_checked(write: Write) -> None:
    rows = [{"image": "a.png"}, {"image": "b.png"}]
    (kept,) = read_examples(write(*rows), limit=1)
    other = rows[0] if kept.group == "b.png" else rows[1]
    other["captions"] = [3]
    assert [e.group for e in read_examples(write(*rows), limit=1)] == [kept.group]


def test_a_limit_splits_no_image(write: Write) -> None:
    asked = [{"image": image, "question": f"{i}?"} for i, image in enumerate("abab")]
    rows = [{**row, "image": f"./{row['image']}.png"} for row in asked]
    found = read_examples(write(*rows, {"image": "a.png"}, {"image": "b.png"}), limit=1)
    keys = [["a.png#1", "a.png#3", "a.png#5"], ["b.png#2", "b.png#4", "b.png#6"]]
    assert [e.key for e in found] in keys
    rounds = [{"question": "q?", "answer": "a"}] * 3
    assert len(read_examples(write({"image": "a.png", "dialogue": rounds}), limit=2)) == 3


def test_a_limit_is_a_sample_whatever_order_the_file_has(write: Write) -> None:
    path = write({"image": "a.png"})
    for i in range(200):
        (path.parent / f"{i:03}.png").write_bytes((path.parent / "a.png").read_bytes())
    rows = [{"image": f"{i:03}.png"} for i in range(200)]
    found = [e.group for e in read_examples(write(*rows), limit=40)]
    assert found == [e.group for e in read_examples(write(*rows[::-1]), limit=40)][::-1]
    late = sum(name >= "100.png" for name in found)
    assert len(found) == 40 and 8 <= late <= 32 and found == sorted(found)
    assert set(found) < {e.group for e in read_examples(write(*rows), limit=80)}


def test_a_group_names_what_an_image_came_in_and_no_sample_splits_it(write: Write) -> None:
    rows = [{"image": f"{name}.png", "group": group} for name, group in (("a", 7), ("b", 7))]
    assert {e.source for e in read_examples(write(*rows))} == {"7"}
    assert len(read_examples(write(*rows), limit=1)) == 2
    assert [e.source for e in read_examples(write({"image": "a.png"}))] == [""]
    named = write({"image": "a.png", "patient": "p 1", "group": "x"})
    assert [e.source for e in read_examples(named, group_by="patient")] == ["p 1"]
    with pytest.raises(DataError, match="line 1 has no 'film' to group by"):
        read_examples(named, group_by="film")
    with pytest.raises(DataError, match=r"\['a'\] as 'group'"):
        read_examples(write({"image": "a.png", "group": ["a"]}))


def test_images_in_one_folder_are_a_group_where_that_is_asked_for(tmp_path: Path) -> None:
    for name in ("one/a.png", "one/b.png", "two/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 3), "red").save(tmp_path / name)
    rows = "".join(f'{{"image": "{n}"}}\n' for n in ("one/a.png", "one/b.png", "two/c.png"))
    (tmp_path / "rows.jsonl").write_text(rows)
    sources = [
        Path(e.source).name for e in read_examples(tmp_path / "rows.jsonl", group_by="folder")
    ]
    assert sources == ["one", "one", "two"]
    splits = split_examples(
        read_examples(tmp_path / "rows.jsonl", group_by="folder"), {"a": 0.5, "b": 0.5}, seed=0
    )
    assert sorted(map(len, splits.values())) == [1, 2]


def test_spellings_of_one_path_are_one_picture(write: Write) -> None:
    path = write({"image": "a.png"}, {"image": "./a.png"}, {"image": "x/../a.png"})
    (path.parent / "x").mkdir()
    absolute = write({"image": str(path.parent / "a.png")}, name="absolute.jsonl")
    groups = {e.group for e in read_examples(path) + read_examples(absolute)}
    assert groups == {"a.png"}


def test_keys_tell_every_example_apart(write: Write) -> None:
    rounds = [{"question": "What?", "answer": "a dog"}] * 3
    path = write(*[{"image": "a.png", "dialogue": rounds}] * 2, {"image": "a.png"})
    assert len({e.key for e in read_examples(path)}) == 7


def test_a_folder_stands_for_its_only_jsonl_file(write: Write) -> None:
    path = write({"image": "a.png"})
    assert read_examples(path.parent) == read_examples(path)


# Mistakes


ROUND = {"question": "What?", "answer": "a dog"}


@pytest.mark.parametrize(
    "row",
    [
        '{"image": "a.png"',
        "[1, 2]",
        b'{"image": "\xff\xfe"}',
        "[" * 100_000,
        {"captions": ["a dog"]},
        {"image": ""},
        {"image": 3},
        {"image": ["a.png"]},
        {"image": "missing.png"},
        {"image": "x" * 5000},
        {"image": "nul\0.png"},
        {"image": "a.png", "captions": ["a dog", ""]},
        {"image": "a.png", "captions": [3]},
        {"image": "a.png", "captions": {"text": "a dog"}},
        {"image": "a.png", "captions": ["a dog"], "question": "What?"},
        {"image": "a.png", "question": " ", "answer": "a dog"},
        {"image": "a.png", "question": "What?", "answer": 3},
        {"image": "a.png", "question": "What?", "answer": None, "answers": [None]},
        {"image": "a.png", "answer": "a dog"},
        {"image": "a.png", "prompt": ""},
        {"image": "a.png", "dialogue": []},
        {"image": "a.png", "dialogue": "What?"},
        {"image": "a.png", "dialogue": ["What?"]},
        {"image": "a.png", "dialogue": [{"answer": "a dog"}]},
        {"image": "a.png", "dialogue": [{"question": "What?"}, ROUND]},
    ],
    ids=lambda row: str(row)[:50],
)
def test_a_bad_row_is_reported_with_file_and_line(write: Write, row: dict[str, Any] | str) -> None:
    path = write({"image": "a.png"}, "", row)
    with pytest.raises(DataError, match=r"data\.jsonl, line 3") as caught:
        read_examples(path)
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    "row",
    [
        {"image": "a.png"},
        {"image": "a.png", "captions": []},
        {"image": "a.png", "question": "What?"},
        {"image": "a.png", "dialogue": [ROUND, {"question": "Old?"}]},
    ],
    ids=str,
)
def test_a_row_without_an_answer_is_refused_only_where_answers_are_required(
    write: Write, row: dict[str, Any]
) -> None:
    path = write({"image": "a.png", "captions": ["a dog"]}, row)
    assert len(read_examples(path)) >= 2
    with pytest.raises(DataError, match="line 2 has no answer"):
        read_examples(path, require_answers=True)


def test_a_misspelt_field_is_named_where_the_answer_is_missed(write: Write) -> None:
    path = write({"image": "a.png", "captoins": ["a dog"]})
    with pytest.raises(DataError, match="Did you mean 'captions'"):
        read_examples(path, require_answers=True)


def test_data_without_rows_is_refused(write: Write) -> None:
    with pytest.raises(DataError, match="no examples"):
        read_examples(write())


def test_an_unknown_split_is_answered_with_those_there_are(write: Write) -> None:
    path = write({"image": "a.png", "split": "train"}, {"image": "b.png", "split": "val"})
    with pytest.raises(DataError, match=r"Did you mean 'train'\? Allowed: train, val"):
        read_examples(path, split="trian")


def test_a_split_of_data_without_splits_is_refused(write: Write) -> None:
    with pytest.raises(DataError, match="Give each row a 'split'"):
        read_examples(write({"image": "a.png"}), split="train")


def test_a_template_that_would_lose_the_question_is_refused(write: Write) -> None:
    path = write({"image": "a.png", **ROUND})
    with pytest.raises(InputError, match="lost"):
        read_examples(path, prompt_template="Describe:")


def test_a_template_that_asks_a_question_needs_one(write: Write) -> None:
    path = write({"image": "a.png", "captions": ["a dog"]})
    with pytest.raises(InputError, match="has none"):
        read_examples(path, prompt_template="Question: {question}")


def test_an_unknown_placeholder_is_refused(write: Write) -> None:
    with pytest.raises(InputError, match=r"\{questoin\}"):
        read_examples(write({"image": "a.png"}), prompt_template="Q: {questoin}")


def test_a_limit_below_one_is_refused(write: Write) -> None:
    with pytest.raises(InputError, match="limit"):
        read_examples(write({"image": "a.png"}), limit=0)


@pytest.mark.parametrize(
    "source", ["gone.jsonl", "./gone", "/gone/data", Path("gone"), "gone", "there/gone", "gone.txt"]
)
def test_a_missing_file_is_not_looked_for_on_the_hub(
    source: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="does not exist"):
        read_examples(source)


@pytest.mark.parametrize("typed", ["held_ot", "./held_uot", "held_out/rows.json", "heldout/"])
def test_a_misspelt_file_is_answered_with_the_one_that_is_there(
    typed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "held_out").mkdir()
    (tmp_path / "held_out" / "rows.jsonl").touch()
    with pytest.raises(DataError, match=r"Did you mean '.*(held_out|rows\.jsonl)'\?"):
        read_examples(typed)


def test_an_empty_name_is_not_the_current_folder(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write({"image": "a.png"}).parent)
    with pytest.raises(DataError, match="no data of the name"):
        read_examples("")


def test_a_folder_with_several_jsonl_files_is_refused(write: Write) -> None:
    write({"image": "a.png"}, name="one.jsonl")
    path = write({"image": "a.png"}, name="two.jsonl")
    with pytest.raises(DataError, match=r"one\.jsonl, two\.jsonl"):
        read_examples(path.parent)


# Data sets


def test_a_data_set_name_without_the_package_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"\[data\]"):
        read_examples("someone/pictures")


def test_a_data_set_that_does_not_load_is_a_data_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(name: str) -> None:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match="someone/pictures: ConnectionError: no network"):
        read_examples("someone/pictures")


@pytest.fixture
def saved_set(tmp_path: Path) -> Path:
    """Two splits on disk; in `train`, one image with two questions and another with one."""
    import datasets

    red, blue = (Image.new("RGB", (4, 3), color) for color in ("red", "blue"))
    rows = {"image": [red, blue, red], "question": ["A?", "B?", "C?"], "answer": ["a", "b", "c"]}
    features = datasets.Features(
        image=datasets.Image(), question=datasets.Value("string"), answer=datasets.Value("string")
    )
    train = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(train=train, val=train.select([1])).save_to_disk(tmp_path / "set")
    return tmp_path / "set"


def test_a_saved_data_set_reads_like_a_jsonl_file(saved_set: Path) -> None:
    examples = read_examples(saved_set, split="train")
    assert [(e.prompt, e.answers) for e in examples] == [
        (f"Question: {answer.upper()}? Answer:", (answer,)) for answer in "abc"
    ]
    assert [e.open_image().getpixel((0, 0)) for e in examples[:2]] == [(255, 0, 0), (0, 0, 255)]


def test_one_picture_in_many_rows_of_a_data_set_is_one_group(saved_set: Path) -> None:
    first, second, third = (e.group for e in read_examples(saved_set, split="train"))
    assert first == third != second


def test_pictures_of_a_data_set_stay_on_disk_until_they_are_opened(saved_set: Path) -> None:
    first = read_examples(saved_set, split="train")[0]
    assert not isinstance(first.image, Image.Image | bytes)


def test_a_folder_of_parquet_files_reads_like_a_saved_data_set(
    saved_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "parquet").mkdir()
    rows = datasets.load_from_disk(str(saved_set))["train"]
    rows.to_parquet(tmp_path / "parquet" / "train-00000-of-00001.parquet")
    examples = read_examples(tmp_path / "parquet", split="train")
    assert turns(examples) == turns(read_examples(saved_set, split="train"))
    assert examples[1].open_image().getpixel((0, 0)) == (0, 0, 255)


def test_a_data_set_with_several_splits_asks_for_one(saved_set: Path) -> None:
    with pytest.raises(DataError, match="Allowed: train, val"):
        read_examples(saved_set)


def test_a_single_saved_split_reads_without_a_name(saved_set: Path) -> None:
    assert len(read_examples(saved_set / "val")) == 1


# Images


def pixel(example: Example) -> tuple[int, ...]:
    picture = example.open_image()
    assert picture.mode == "RGB"
    value = picture.getpixel((0, 0))
    assert isinstance(value, tuple)
    return value


def test_a_photograph_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    upright = saved(Image.new("RGB", (6, 4)), tmp_path / "x.jpg", exif=exif).open_image()
    assert upright.size == (4, 6)


def test_a_broken_exif_block_does_not_cost_the_picture(tmp_path: Path) -> None:
    broken = saved(Image.new("RGB", (6, 4), "red"), tmp_path / "x.png", exif=b"Exif\0\0garbage")
    assert pixel(broken) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_what_is_transparent_is_white(tmp_path: Path, mode: str) -> None:
    picture = Image.new("RGBA", (4, 3), (0, 0, 0, 0)).convert(mode)
    assert pixel(example(picture)) == (255, 255, 255)


def test_half_transparent_black_is_grey() -> None:
    assert pixel(example(Image.new("RGBA", (2, 2), (0, 0, 0, 128)))) == (127, 127, 127)


def test_a_transparent_palette_entry_is_white(tmp_path: Path) -> None:
    picture = Image.new("P", (4, 3), 0)
    picture.putpalette([0, 0, 0, 255, 0, 0])
    assert pixel(saved(picture, tmp_path / "x.png", transparency=0)) == (255, 255, 255)


def test_a_transparent_color_key_is_white(tmp_path: Path) -> None:
    picture = Image.new("RGB", (4, 3), (1, 2, 3))
    assert pixel(saved(picture, tmp_path / "x.png", transparency=(1, 2, 3))) == (255, 255, 255)


def test_an_opaque_palette_shows_its_colors(tmp_path: Path) -> None:
    picture = Image.new("P", (4, 3), 1)
    picture.putpalette([0, 0, 0, 255, 0, 0])
    assert pixel(saved(picture, tmp_path / "x.gif")) == (255, 0, 0)


def test_a_cmyk_jpeg_is_not_inverted(tmp_path: Path) -> None:
    red, green, blue = pixel(saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), tmp_path / "x.jpg"))
    assert red > 240 and green < 15 and blue < 15


@pytest.mark.parametrize("name", ["x.png", "x.tiff", "x.pgm"])
def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path, name: str) -> None:
    levels = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    picture = saved(Image.fromarray(levels), tmp_path / name).open_image()
    assert np.asarray(picture)[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_without_a_known_range_are_refused(mode: str) -> None:
    with pytest.raises(DataError, match="black and white"):
        example(Image.new(mode, (2, 2), 1_000_000)).open_image()


def test_opening_does_not_change_a_picture_in_memory() -> None:
    picture = Image.new("RGBA", (4, 3), (9, 9, 9, 9))
    before = picture.tobytes()
    example(picture).open_image().putpixel((0, 0), (1, 1, 1))
    assert (picture.mode, picture.tobytes()) == ("RGBA", before)


def png(size: tuple[int, int] = (64, 64)) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif"])
def test_a_truncated_file_is_reported_with_its_name(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    Image.open(io.BytesIO(png())).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=f"x{suffix} is not a readable image"):
        example(path).open_image()


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", png()[:20]])
def test_what_is_no_image_is_reported_with_its_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.png is not a readable image"):
        example(tmp_path / "x.png").open_image()


def test_no_damage_to_a_file_escapes_as_another_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    whole = png((16, 16))
    for trial in range(60):
        broken = bytearray(whole)
        for place in rng.integers(8, len(broken), 4):
            broken[place] = int(rng.integers(256))
        (tmp_path / f"{trial}.png").write_bytes(broken)
        try:
            assert example(tmp_path / f"{trial}.png").open_image().mode == "RGB"
        except DataError as error:
            assert len(str(error).splitlines()) == 2


def test_an_image_that_went_missing_is_reported_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.png does not exist"):
        example(tmp_path / "gone.png").open_image()


@pytest.mark.parametrize("limit", [15, 5])
def test_an_image_over_the_size_limit_is_refused(
    tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = saved(Image.new("RGB", (4, 4)), tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)  # Pillow warns at 16, raises above 2 x 5
    with pytest.raises(DataError, match=f"more than {limit} pixels"):
        bomb.open_image()


# Examples, splits, digests


def test_an_example_reports_all_that_is_wrong_with_it() -> None:
    with pytest.raises(InputError) as caught:
        Example("dog.jpg", 3, "a dog", key="")  # type: ignore[arg-type]
    assert all(word in str(caught.value) for word in ("image", "prompt", "answers", "key"))


def many(pictures: int = 20, questions: int = 3) -> list[Example]:
    """Examples of different images, interleaved."""
    return [
        example(Path(f"{picture}.png"), ("yes",), f"{picture}#{question}")
        for question in range(questions)
        for picture in range(pictures)
    ]


def test_no_picture_is_in_two_splits() -> None:
    splits = split_examples(many(), {"train": 0.5, "val": 0.3, "test": 0.2}, seed=0)
    homes = [{e.image for e in members} for members in splits.values()]
    assert [len(home) for home in homes] == [10, 6, 4]
    assert len(set.union(*homes)) == 20


def test_a_picture_in_memory_is_told_by_its_pixels() -> None:
    pictures = [Image.new("RGB", (2, 2), (i % 4, 0, 0)) for i in range(12)]
    examples = [example(picture, key=str(i)) for i, picture in enumerate(pictures)]
    splits = split_examples(examples, {"a": 0.5, "b": 0.5}, seed=0)
    assert {len(members) for members in splits.values()} == {6}
    shades = [{pixel(e) for e in members} for members in splits.values()]
    assert not shades[0] & shades[1]


def test_every_example_of_a_whole_split_is_used_once_and_in_order() -> None:
    examples = many()
    splits = split_examples(examples, {"train": 0.7, "val": 0.2, "test": 0.1}, seed=3)
    places = [[examples.index(e) for e in members] for members in splits.values()]
    assert all(members == sorted(members) for members in places)
    assert sorted(place for members in places for place in members) == list(range(len(examples)))


def test_a_split_depends_on_the_seed_and_not_on_the_order() -> None:
    def train(examples: list[Example], seed: int) -> set[str]:
        return {e.key for e in split_examples(examples, {"train": 0.5}, seed)["train"]}

    assert train(many(), 0) == train(many()[::-1], 0) != train(many(), 1)


@pytest.mark.parametrize(
    "fractions",
    [{}, {"a": 0.0}, {"a": -0.1, "b": 0.5}, {"a": 0.7, "b": 0.4}, {"a": float("nan")}],
    ids=str,
)
def test_fractions_that_cannot_be_are_refused(fractions: dict[str, float]) -> None:
    with pytest.raises(InputError, match="share above 0"):
        split_examples(many(), fractions, seed=0)


@pytest.mark.parametrize("pictures", [0, 2])
def test_no_split_is_left_empty_in_silence(pictures: int) -> None:
    with pytest.raises(DataError, match="too few"):
        split_examples(many(pictures), {"a": 0.9, "b": 0.1}, seed=0)


def test_a_digest_does_not_depend_on_where_the_data_lies(write: Write, tmp_path: Path) -> None:
    here = write({"image": "a.png"}, {"image": "b.png"}).parent
    before = examples_digest(read_examples(here / "data.jsonl"))
    (tmp_path / "moved").mkdir()
    for name in ("a.png", "b.png", "data.jsonl"):
        (here / name).rename(tmp_path / "moved" / name)
    assert examples_digest(read_examples(tmp_path / "moved" / "data.jsonl")) == before


@pytest.mark.parametrize("change", ["prompt", "answers", "key", "pixels", "order"])
def test_a_digest_sees_every_change(write: Write, change: str) -> None:
    path = write({"image": "a.png", "captions": ["a dog"]}, {"image": "b.png"})
    first, second = read_examples(path)
    before = examples_digest([first, second])
    changed = {"prompt": first.prompt, "answers": first.answers, "key": first.key}
    if change in changed:
        changed[change] = ("other",) if change == "answers" else "other"
    elif change == "pixels":
        Image.new("RGB", (4, 3), "green").save(path.parent / "a.png")
    after = [Example(first.image, **changed), second]  # type: ignore[arg-type]
    assert examples_digest(after[::-1] if change == "order" else after) != before


# Photographs


@pytest.mark.parametrize(
    ("name", "split", "count"),
    [
        ("flickr8k_captions", "val", 1000),
        ("daquar_vqa", None, 6795),
        ("vqav2_mini", "eval", 73),
        ("stamps_captions", "test", 76),
    ],
)
def test_real_data_reads_whole(name: str, split: str | None, count: int) -> None:
    if not SHARED.is_dir():
        pytest.skip("the photographs are not part of the repository")
    examples = read_examples(SHARED / f"{name}.jsonl", split=split, require_answers=True)
    assert len(examples) == count
    assert examples[-1].open_image().mode == "RGB"


def test_a_folder_of_images_is_data(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    for name in ("b.JPG", "a.png", "more/c.jpeg"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    found = read_examples(tmp_path)
    assert [Path(e.image).name for e in found] == ["a.png", "b.JPG", "c.jpeg"]  # type: ignore[arg-type]
    assert {e.prompt for e in found} == {CAPTION_PROMPT} and not any(e.answers for e in found)
    assert len({e.key for e in found}) == 3
    with pytest.raises(DataError, match="has no answer"):
        read_examples(tmp_path, require_answers=True)
