"""The data package in this checkout is whole, small, and says what it was learnt from."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

from offramp.adapter.shipped import PHOTOS
from offramp.core.save_and_load import read_config
from offramp.core.storage import digest_file, read_json
from offramp_photo import FOLDERS, exits_folder
from offramp_photo.build import CARD, WEIGHTS
from offramp_photo.packages import LANGUAGE, VISION
from offramp_photo.tower import PhotoTowerConfig

ROOT = Path(__file__).parents[2] / "photo-model"
DATA = ROOT / "offramp_photo"
MODELS = [DATA / inside for inside in FOLDERS.values()]


@pytest.mark.parametrize("data", MODELS, ids=[*FOLDERS])
def test_its_weights_are_those_of_its_card(data: Path) -> None:
    card = read_json(data / CARD)
    assert digest_file(data / WEIGHTS) == card["sha256"]
    assert [base["digest"] for base in card["base"]] == [LANGUAGE.digest, VISION.digest]
    assert len(card["words"]) == len(set(card["words"])) == card["tower"]["vocabulary"]


@pytest.mark.parametrize("data", MODELS, ids=[*FOLDERS])
def test_its_weights_have_the_shapes_of_its_tower(data: Path) -> None:
    tower = PhotoTowerConfig(**read_json(data / CARD)["tower"])
    with safe_open(data / WEIGHTS, "pt") as file:
        shape = file.get_slice("bridge.words.table").get_shape()
        dtypes = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert shape == [tower.vocabulary, tower.hidden_size]
    assert dtypes == {"BF16"}


def test_its_exits_say_what_they_are_of() -> None:
    for (name, long), data in zip(PHOTOS.items(), MODELS, strict=True):
        config = read_config(data / "exits")
        assert config.raw["backbone"]["name"] == long and exits_folder(name) == data / "exits"


def test_it_is_small() -> None:
    """PyPI takes files of up to 100 MB."""
    assert sum(file.stat().st_size for file in ROOT.rglob("*") if file.is_file()) < 90e6


def test_the_picture_to_try_is_named_with_its_licence() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    for picture in DATA.glob("*.jpg"):
        assert Image.open(picture).size
        (row,) = [line for line in text.splitlines() if f"`{picture.name}`" in line]
        assert "CC0" in row or "public domain" in row


def test_its_card_names_the_terms_of_what_it_was_learnt_from() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert "Flickr8k" in text and "DAQUAR" in text and "research and education only" in text
    assert text.count("Apache-2.0") == 2  # the packages whose weights it is put together with
