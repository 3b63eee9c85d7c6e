"""Laws of attempts: images count by content, a longer list continues, others share the errors."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
from PIL import Image

from offramp.calibration.attempts import (
    Attempt,
    Draws,
    ImageRows,
    by_image,
    error_share,
    images_of,
    merged,
    recorded,
    turn_of,
)
from offramp.calibration.risk_control import p_value
from offramp.core.decoding.policy import Thresholds
from offramp.core.errors import DataError
from offramp.data.scenes import world
from offramp.inputs.example import Example
from offramp.inputs.image import content_digest
from offramp_lab.records import lookalikes

PATH = (Thresholds({2: 0.9}), Thresholds({2: 0.5}))


def copies(folder: Path, n: int) -> list[Example]:
    """One photograph in `n` files, each under its own key and group."""
    files = [folder / f"{i}.png" for i in range(n)]
    for file in files:
        fakes.picture(7).save(file)
    return [Example(file, "Caption:", (), file.name, group=file.name) for file in files]


def attempt(asked: str, images: list[ImageRows], number: int = 1) -> Attempt:
    members = tuple(sorted({member for image in images for member in image.members}))
    names = tuple(image.name for image in images)
    return Attempt(asked, {}, number, names, PATH, {}, members)


# -- images ---------------------------------------------------------------------------------------


def test_copies_under_other_names_are_one_image(tmp_path: Path) -> None:
    (image,) = images_of(copies(tmp_path, 400))
    assert image.rows == tuple(range(400))


def test_images_encoded_again_or_resized_are_one_image(tmp_path: Path) -> None:
    image = world.render(world.scene("test", 0))
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.jpg", quality=60)
    image.resize((144, 144)).save(tmp_path / "c.webp")
    image.resize((50, 50), Image.Resampling.LANCZOS).save(tmp_path / "d.png")
    copies = [Example(tmp_path / n, "Caption:", (), n, group=n) for n in os.listdir(tmp_path)]
    scenes = [
        Example(world.render(world.scene("test", i)), "Caption:", (), f"e{i}")
        for i in range(1, 200)
    ]
    images = images_of([*copies, *scenes])
    assert len(images) == 203 and merged(images) == 3
    (cluster,) = {image.cluster for image in images if image.rows[0] < 4}
    assert [image.cluster for image in images].count(cluster) == 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", lookalikes.KINDS)
def test_charts_pages_and_forms_are_as_many_images_as_there_are(kind: str) -> None:
    some = [
        Example(image, "What is it?", (), f"e{i}")
        for i, image in enumerate(lookalikes.images(kind, 40))
    ]
    images = images_of(some)
    assert len(images) == 40 and merged(images) == 0


def test_many_copies_are_refused() -> None:
    some = [
        Example(world.render(world.scene("test", i)), "Caption:", (), f"e{i}") for i in range(30)
    ]
    small = [example.open_image().resize((60, 60)) for example in some[:2]]
    copies = [Example(image, "Caption:", (), f"copy {i}") for i, image in enumerate(small)]
    assert merged(images_of([*some, *copies])) == 2
    with pytest.raises(DataError, match=r"2 of 11 images are copies.*'(e0|e1|copy 0|copy 1)'"):
        images_of([*some[:9], *copies])
    together = [replace(e, group="one") for e in (some[0], copies[0])]
    assert len(images_of([*together, *some[1:9]])) == 9


def test_images_of_one_source_are_one_draw_of_several_images() -> None:
    some = fakes.examples(6)
    films = [replace(e, source=name) for e, name in zip(some, "aab", strict=False)]
    again = replace(some[3], key="other", prompt="w9")
    images = images_of([*films, *some[3:], again])
    drawn = {image.rows: image.by_image for image in images}
    assert drawn == {
        (0, 1): ((0,), (1,)),
        (2,): ((2,),),
        (3, 6): ((3, 6),),
        (4,): ((4,),),
        (5,): ((5,),),
    }
    losses = np.array([1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    draws = Draws.by("image", losses, images, whole=True)
    assert (draws.n, draws.largest, draws.whole) == (5, 1.0, False)
    assert draws.risk == pytest.approx((0.5 + 0.5) / 5)  # a mean over groups
    named = [image for image in images if image.parts]
    assert named[0].name != images_of(films[:1])[0].name  # another draw with more images
    assert turn_of([attempt("1%", named)], "2%", images_of(films[:1]), any_time=True).number == 2


def test_an_image_that_two_sources_share_makes_them_one_draw() -> None:
    some = fakes.examples(3)
    shared = [replace(some[0], source="a"), replace(some[0], key="again", source="b")]
    others = [replace(some[1], source="a"), replace(some[2], source="b")]
    (image,) = images_of([*shared, *others])
    assert image.rows == (0, 1, 2, 3) and len(image.by_image) == 3


def test_look_alikes_that_name_their_source_count_each() -> None:
    scene = world.render(world.scene("test", 0))
    near = [scene, *(scene.resize((s, s)) for s in (60, 64, 68))]
    some = [Example(image, "What is it?", (), f"e{i}") for i, image in enumerate(near)]
    with pytest.raises(DataError, match="copies of others"):
        images_of(some)
    assert len(images_of([replace(e, source=e.key) for e in some])) == 4
    assert merged(images_of([replace(e, source=e.key) for e in some])) == 0


def test_questions_about_one_image_are_one_image_by_name_or_content() -> None:
    some = fakes.examples(4)
    named = [replace(e, group="a" if i < 2 else "") for i, e in enumerate(some)]
    again = replace(some[3], key="other", prompt="w9")
    assert sorted(image.rows for image in images_of([*named, again])) == [(0, 1), (2,), (3, 4)]


def test_an_image_loses_the_mean_of_what_its_answers_lose() -> None:
    images = [ImageRows("a", "", (0, 2)), ImageRows("b", "", (1,))]
    assert by_image(np.array([1.0, -1.0, 0.0]), images).tolist() == [0.5, -1.0]


@pytest.mark.parametrize("whole", [True, False])
def test_draws_equal_a_slow_loop(whole: bool) -> None:
    """Of a group the mean over its images, of several columns of losses and whatever their type."""
    draw = np.random.default_rng(0)
    losses = draw.random((9, 2)) < 0.5 if whole else draw.random((9, 2))
    images = [
        ImageRows("a", "", (8,)),
        ImageRows("b", "", (1, 0, 4)),
        ImageRows("c", "", (2, 3, 5, 6, 7), parts=((2, 3, 7), (5,), (6,))),
    ]
    means = [[losses[list(rows)].mean(0) for rows in image.by_image] for image in images]
    slow = {
        "image": [np.mean(some, axis=0) for some in means],
        "answer": [losses[list(image.rows)].sum(0) for image in images],
    }
    for unit, expected in slow.items():
        np.testing.assert_allclose(Draws.by(unit, losses, images).sums, expected, rtol=1e-12)


def test_the_order_of_the_images_does_not_depend_on_that_of_the_examples() -> None:
    some = fakes.examples(20)
    names = [image.name for image in images_of(some)]
    assert names == [image.name for image in images_of(some[::-1])]
    assert names != sorted(names)


# -- attempts -------------------------------------------------------------------------------------


def test_a_longer_list_goes_on_with_the_bets_of_a_shorter_one() -> None:
    few, more = images_of(fakes.examples(8)), images_of(fakes.examples(20))
    turn = turn_of([attempt("1%", few)], "1%", more, any_time=True)
    assert (turn.number, turn.path) == (1, PATH)
    assert [i.name for i in turn.images][:8] == [i.name for i in few]
    assert {i.name for i in turn.images} == {i.name for i in more}


def test_a_part_of_the_images_was_looked_at_first_by_nobody() -> None:
    """A test of as many images as there were at the first look says nothing of some of them."""
    images, more = images_of(fakes.examples(12)), images_of(fakes.examples(16))
    before = [replace(attempt("1%", images), looked=12)]
    for some, looked in ((images, 12), (more, 12), (images[:8], 0)):
        turn = turn_of(before, "1%", some, any_time=True)
        assert (turn.number, turn.looked) == (1, looked)


def test_other_settings_on_the_same_images_take_the_next_share() -> None:
    images = images_of(fakes.examples(8))
    attempts: tuple[Attempt, ...] = ()
    for number in range(1, 5):
        turn = turn_of(attempts, f"setting {number}", images, any_time=True)
        assert turn.number == number and turn.path is None
        attempts = recorded(attempts, attempt(f"setting {number}", images, number))
    assert turn_of(attempts, "setting 2", images, any_time=True).number == 2
    assert sum(error_share(a.number) for a in attempts) < 1


def test_the_same_images_in_other_files_share_the_errors(tmp_path: Path) -> None:
    def examples(suffix: str, **how: Any) -> list[Example]:
        files = [tmp_path / f"{i}{suffix}" for i in range(4)]
        for i, file in enumerate(files):
            fakes.picture(i).save(file, **how)
        return [Example(file, "Caption:", (), file.name) for file in files]

    exif = Image.Exif()
    exif[0x010E] = "a description"
    before = [attempt("1%", images_of(examples(".png")))]
    for others in (
        examples("-fast.png", compress_level=1),
        examples("-said.png", exif=exif),
        examples(".bmp"),
        [Example(fakes.picture(i), "Caption:", (), f"e{i}") for i in range(4)],
    ):
        assert turn_of(before, "2%", images_of(others), any_time=True).number == 2


def test_other_frames_of_one_film_share_the_errors() -> None:
    frames = [replace(e, group=f"film {i % 8}") for i, e in enumerate(fakes.examples(16))]
    before = [attempt("1%", images_of(frames[:8]))]
    assert turn_of(before, "2%", images_of(frames[8:]), any_time=True).number == 2


def test_any_image_of_a_group_is_known_again() -> None:
    some = [replace(e, group="one") for e in fakes.examples(3)]
    before = [attempt("1%", images_of(some))]
    for example in some:
        alone = images_of([replace(example, group="")])
        assert turn_of(before, "2%", alone, any_time=True).number == 2


def test_an_attempt_of_an_earlier_version_is_known_by_its_files(tmp_path: Path) -> None:
    some = copies(tmp_path, 1)
    old = f"{content_digest(tmp_path / '0.png')[:16]}:0123456789abcdef"
    before = [Attempt("1%", {}, 1, (old,), PATH, {})]
    assert turn_of(before, "1%", images_of(some), any_time=True).number == 2


def test_no_set_of_images_is_forgotten() -> None:
    first, other = images_of(fakes.examples(8)), images_of(fakes.examples(16)[8:])
    known: tuple[Attempt, ...] = ()
    for images in (first, other):
        turn = turn_of(known, "1%", images, any_time=True)
        known = recorded(known, attempt("1%", images, turn.number), turn.continues)
    for images in (first, other):
        assert turn_of(known, "2%", images, any_time=True).number == 2


def test_an_attempt_that_passed_to_its_end_hands_its_errors_on() -> None:
    """What was true used none of them up."""
    images = images_of(fakes.examples(8))
    known: tuple[Attempt, ...] = ()
    handed = []
    for number, passed in enumerate((True, True, False, True, True), 1):
        turn = turn_of(known, f"setting {number}", images, any_time=True)
        handed.append(turn.handed)
        outcome = {"thresholds": PATH[-1 if passed else 0].to_json()}  # as before it was said
        made = replace(attempt(f"setting {number}", images, number), outcome=outcome)
        known = recorded(known, made if number % 2 else replace(made, outcome={"passed": passed}))
    shares = [error_share(number) for number in range(1, 5)]
    assert handed == pytest.approx([0, shares[0], sum(shares[:2]), 0, shares[3]])
    twice = replace(known[1], asked="another")  # of the same number: it used a share of its own
    turn = turn_of((*known[:2], twice), "setting 6", images, any_time=True)
    assert turn.handed == pytest.approx(sum(shares[:2]) - shares[1])


def test_fresh_images_have_a_budget_of_their_own() -> None:
    first, other = images_of(fakes.examples(8)), images_of(fakes.examples(16)[8:])
    assert turn_of([attempt("1%", first)], "2%", other, any_time=True).number == 1


def test_a_test_of_a_fixed_number_of_images_does_not_go_on() -> None:
    few, more = images_of(fakes.examples(8)), images_of(fakes.examples(20))
    before = [attempt("1%", few)]
    assert turn_of(before, "1%", more, any_time=False).number == 2
    assert turn_of(before, "1%", few, any_time=False).number == 1


def test_another_question_about_an_image_is_another_draw() -> None:
    some = fakes.examples(8)
    asked = [*some, replace(some[0], key="more", prompt="w50 w51")]
    turn = turn_of([attempt("1%", images_of(some))], "1%", images_of(asked), any_time=True)
    assert turn.number == 2


def test_two_attempts_that_grow_into_each_other_do_not_share_a_share() -> None:
    first, other = images_of(fakes.examples(8)), images_of(fakes.examples(16)[8:])
    before = [attempt("1%", first), attempt("2%", other)]
    turn = turn_of(before, "1%", images_of(fakes.examples(16)), any_time=True)
    assert turn.number == 2


def test_an_attempt_comes_back_from_json_and_keeps_the_longest_list() -> None:
    few, more = images_of(fakes.examples(8)), images_of(fakes.examples(20))
    whole = attempt("1%", more)
    assert Attempt.from_json(whole.to_json()) == whole
    assert recorded([whole], attempt("1%", few), whole) == (whole,)
    looked = replace(whole, looked=3)  # what the first look saw stays, whatever goes on from it
    assert recorded([looked], attempt("1%", more), looked)[0].looked == 3


# -- draws ----------------------------------------------------------------------------------------


def test_a_rare_group_however_large_hides_no_risk() -> None:
    """One of 2,000 groups has 400 images: a draw without it says nothing of it, and needs not."""
    draw, passed, n = np.random.default_rng(8), 0, 500
    for trial in range(200):
        sizes = np.where(draw.random(n) < 1 / 2000, 400, 1)
        starts = np.cumsum([0, *sizes])
        groups = [
            ImageRows(
                f"{trial} {i}",
                "",
                rows := tuple(range(*starts[i : i + 2])),
                parts=tuple((row,) for row in rows),
            )
            for i in range(n)
        ]
        risks = np.where(np.repeat(sizes, sizes) > 1, 0.3, 0.0105)
        wrong = (draw.random(len(risks)) < risks).astype(float)
        draws = Draws.by("image", wrong, groups, whole=True)
        passed += p_value(draws, 0.01, "sharp") <= 0.05 * error_share(1)
    assert passed / 200 < 0.08  # a twentieth, and three standard errors


def test_what_is_merged_counts_less_and_weighs_as_much() -> None:
    losses = np.array([0.0] * 98 + [1.0, 0.0])
    images = [ImageRows(f"{i}", "", (i,), cluster="98" if i >= 98 else f"{i}") for i in range(100)]
    draws = Draws.by("image", losses, images)
    alone, together = draws.values(0.05)
    assert draws.n == 99 and draws.risk == alone.mean() == 0.01
    assert len(together) == 99 and together[-1] == 0.5


def test_an_answer_weighs_the_same_wherever_it_is_asked() -> None:
    losses = np.array([0.0] * 9 + [1.0])
    images = [ImageRows("a", "", tuple(range(9))), ImageRows("b", "", (9,))]
    assert Draws.by("image", losses, images).risk == 0.5
    draws = Draws.by("answer", losses, images)
    assert draws.risk == pytest.approx(0.1)
    (values,) = draws.values(0.1)
    assert values.mean() == pytest.approx(0.1) and values.max() <= 1
