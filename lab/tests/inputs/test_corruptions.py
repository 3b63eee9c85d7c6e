"""Laws of damaged images: repeatable, of the same form, and worse with every severity."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from offramp.core.errors import InputError
from offramp.data.scenes import world
from offramp.inputs.example import Example, split_examples
from offramp_lab.inputs.corruptions import CORRUPTIONS, SEVERITIES, corrupt, corrupted

NAMES = tuple(CORRUPTIONS)
SCENES = [world.render(world.scene("test", i)) for i in range(12)]


def distance(a: Image.Image, b: Image.Image) -> float:
    return float(np.abs(np.asarray(a, float) - np.asarray(b, float)).mean())


@pytest.mark.parametrize("name", NAMES)
def test_a_stronger_severity_is_farther_from_the_original(name: str) -> None:
    away = [
        np.mean([distance(s, corrupt(s, name, severity, 0)) for s in SCENES])
        for severity in SEVERITIES
    ]
    assert away[0] > 0
    assert away == sorted(away)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("size", [(48, 48), (31, 17), (1, 1)])
def test_size_and_mode_stay(name: str, mode: str, size: tuple[int, int]) -> None:
    before = SCENES[0].convert(mode).resize(size)
    content = before.tobytes()
    after = corrupt(before, name, 3, 0)
    assert (after.size, after.mode) == (size, mode)
    assert before.tobytes() == content


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_pixels(name: str) -> None:
    once, again = (corrupt(SCENES[0], name, 2, 7) for _ in range(2))
    assert once.tobytes() == again.tobytes()


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_jpeg_is_what_an_encoder_makes_of_it(mode: str) -> None:
    whole, packed = SCENES[1].convert(mode), io.BytesIO()
    whole.save(packed, "JPEG", quality=15)
    assert corrupt(whole, "jpeg", 3, 0).tobytes() == Image.open(packed).convert(mode).tobytes()


def example(group: str = "", image: Image.Image | Path = SCENES[0], key: str = "e") -> Example:
    return Example(image, "Caption:", ("a star",), key, group)


def test_only_the_picture_of_an_example_changes() -> None:
    before = example("p")
    after = corrupted(before, "contrast", 3, 0)
    assert (after.prompt, after.answers, after.group) == (before.prompt, before.answers, "p")
    assert after.key != before.key
    assert distance(before.open_image(), after.open_image()) > 0


def test_questions_about_one_picture_see_the_same_damage_and_two_pictures_do_not() -> None:
    def damage(group: str, key: str) -> bytes:
        return corrupted(example(group, key=key), "noise", 3, 0).open_image().tobytes()

    assert damage("p", "a") == damage("p", "b")
    assert damage("p", "a") != damage("q", "a")


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_damaged_copy_never_leaves_the_split_of_its_picture(
    on_disk: bool, tmp_path: Path
) -> None:
    whole = []
    for i, scene in enumerate(SCENES):
        scene.save(tmp_path / f"{i}.png")
        whole.append(example(image=tmp_path / f"{i}.png" if on_disk else scene, key=f"e{i}"))
    both = [*whole, *(corrupted(e, "jpeg", 3, 0) for e in whole)]
    for part in split_examples(both, {"train": 0.5, "test": 0.5}, 0).values():
        assert len({e.key.split()[0] for e in part}) == len(part) / 2


@pytest.mark.parametrize(
    ("name", "severity", "words"),
    [("nois", 3, "Did you mean 'noise'"), ("noise", 0, "from 1"), ("noise", 6, "from 1")],
)
def test_what_is_not_known_is_refused(name: str, severity: int, words: str) -> None:
    with pytest.raises(InputError, match=words):
        corrupt(SCENES[0], name, severity, 0)
