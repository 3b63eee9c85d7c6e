"""A procedural world of coloured shapes whose captions, questions and answers are exactly right.

Early exits are judged by what a model says, so the reference must be beyond doubt: a scene is drawn
from a seed, and its picture, caption, questions, answers and dialogues all follow from the scene.
Some tokens are easy (grammar, articles), some are hard (colours, places, counts, relations), which
is what makes a per-token depth worth choosing. Splits use disjoint seeds; numpy and Pillow only.

Two scenes of different splits can show the same few objects (there are only some thousand scenes of
one object), but never the same pixels: shades, jitter and gradient come from the seed as well.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import cos, pi, sin
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIZE = 72  # pixels per side
GRID = 3  # cells per side
CELL = IMAGE_SIZE // GRID  # pixels

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star")
SIZES = ("small", "large")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
COUNTS = ("zero", "one", "two", "three", "four")
PALETTE = {
    "red": (215, 40, 40),
    "green": (40, 160, 60),
    "blue": (45, 80, 215),
    "yellow": (235, 215, 50),
    "purple": (130, 50, 170),
    "orange": (240, 140, 40),
    "cyan": (70, 205, 215),
    "pink": (245, 140, 190),
}
COLORS = tuple(PALETTE)
BACKDROPS = {
    "black": (25, 25, 28),
    "gray": (125, 125, 125),
    "white": (232, 232, 230),
    "brown": (100, 70, 45),
}
BACKGROUNDS = tuple(BACKDROPS)
RADII = {"small": (4.2, 5.2), "large": (8.0, 9.6)}  # pixels
COUNT_WEIGHTS = (0.2, 0.3, 0.3, 0.2)  # of one to four objects

SPLITS = ("train", "validation", "calibration", "test")
SPLIT_SPAN = 10_000_000  # scenes a split may hold; keeps the seeds of two splits apart

CAPTION_PROMPT = "Caption:"

T = TypeVar("T")


@dataclass(frozen=True)
class Thing:
    """One object; `place` counts the grid cells in reading order, 0 to 8."""

    shape: str
    color: str
    size: str
    place: int

    @property
    def row(self) -> int:
        return self.place // GRID

    @property
    def column(self) -> int:
        return self.place % GRID


@dataclass(frozen=True)
class Scene:
    """The content of a picture: objects in reading order, a background, and a seed for all else."""

    objects: tuple[Thing, ...]
    background: str
    seed: int


def looks_of(thing: Thing) -> str:
    return f"{thing.size} {thing.color} {thing.shape}"


def place_name(place: int) -> str:
    """Return the two words that name a grid cell, such as "top left"."""
    return f"{ROWS[place // GRID]} {COLUMNS[place % GRID]}"


def scene(split: str, index: int) -> Scene:
    """Return scene number `index` of a split; equal arguments always give the same scene."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    if not 0 <= index < SPLIT_SPAN:
        raise ValueError(f"scene index {index} is outside 0..{SPLIT_SPAN - 1}")
    return _scene_from_seed(SPLITS.index(split) * SPLIT_SPAN + index)


def scenes(split: str, n: int, start: int = 0) -> Iterator[Scene]:
    """Yield the scenes `start` to `start + n - 1` of a split."""
    return (scene(split, index) for index in range(start, start + n))


def generator_of(seed: int, purpose: str) -> np.random.Generator:
    """Return a random generator for one purpose, so that more questions never change the
    picture."""
    return np.random.default_rng((seed, sum(map(ord, purpose))))


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def _scene_from_seed(seed: int) -> Scene:
    rng = generator_of(seed, "layout")
    count = 1 + int(rng.choice(len(COUNT_WEIGHTS), p=COUNT_WEIGHTS))
    places = sorted(int(p) for p in rng.choice(GRID * GRID, size=count, replace=False))
    # Few shapes and colours per scene: repeats make counting and naming non-trivial.
    shapes = [SHAPES[i] for i in rng.choice(len(SHAPES), size=3, replace=False)]
    colors = [COLORS[i] for i in rng.choice(len(COLORS), size=4, replace=False)]
    objects = tuple(
        Thing(pick(rng, shapes), pick(rng, colors), pick(rng, SIZES), p) for p in places
    )
    return Scene(objects, pick(rng, BACKGROUNDS), seed)


# ---------------------------------------------------------------- pictures

_OVERSAMPLE = 4


def _outline(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    """Polygon corners of a shape of radius `r` around (x, y)."""
    if shape == "square":
        unit = [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]
    elif shape == "triangle":
        unit = [(0.0, -1.0), (1.0, 0.85), (-1.0, 0.85)]
    elif shape == "diamond":
        unit = [(0.0, -1.1), (0.85, 0.0), (0.0, 1.1), (-0.85, 0.0)]
    elif shape == "cross":
        a = 0.36
        unit = [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a)]
        unit += [(-u, -v) for u, v in unit]
    else:  # star
        turns = [(i, 1.1 if i % 2 == 0 else 0.45) for i in range(10)]
        unit = [(d * sin(pi * i / 5), -d * cos(pi * i / 5)) for i, d in turns]
    return [(x + r * u, y + r * v) for u, v in unit]


def _shade(
    rng: np.random.Generator, anchor: tuple[int, int, int], spread: int
) -> tuple[int, int, int]:
    red, green, blue = (int(np.clip(c + rng.integers(-spread, spread + 1), 0, 255)) for c in anchor)
    return red, green, blue


def _backdrop(rng: np.random.Generator, background: str, side: int) -> Image.Image:
    """A background with a slight linear gradient in a random direction."""
    angle = rng.uniform(0, 2 * pi)
    axis = np.linspace(-0.5, 0.5, side)
    slope = 22 * (np.cos(angle) * axis[None, :] + np.sin(angle) * axis[:, None])
    base = np.array(_shade(rng, BACKDROPS[background], 10))
    return Image.fromarray(np.clip(base + slope[:, :, None], 0, 255).astype(np.uint8))


def render(scene: Scene) -> Image.Image:
    """Return the picture of a scene: RGB, `IMAGE_SIZE` pixels square, anti-aliased."""
    rng = generator_of(scene.seed, "pixels")
    image = _backdrop(rng, scene.background, IMAGE_SIZE).resize((IMAGE_SIZE * _OVERSAMPLE,) * 2)
    draw = ImageDraw.Draw(image)
    for thing in scene.objects:
        r = rng.uniform(*RADII[thing.size])
        x, y = (CELL * (i + 0.5) + rng.uniform(-1.3, 1.3) for i in (thing.column, thing.row))
        x, y, r = x * _OVERSAMPLE, y * _OVERSAMPLE, r * _OVERSAMPLE
        fill = _shade(rng, PALETTE[thing.color], 12)
        if thing.shape == "circle":
            draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        else:
            draw.polygon(_outline(thing.shape, x, y, r), fill=fill)
    return image.reduce(_OVERSAMPLE)
