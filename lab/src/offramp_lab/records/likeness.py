"""Which requests are called unlike the calibrated ones, by the exits that ship; rewrites
lab/records/likeness.json.

Of the tiny OPT answers to images of its world and of others, by scores alone and with the look of
images; of the photo model the looks of photographs and of others. Three minutes of one core.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from examples.photo_vlm.rows import read_photographs
from PIL import Image

from offramp.adapter.answers import generate_answers
from offramp.cli import demo
from offramp.core.storage import read_json
from offramp.data.datasets import read_examples
from offramp.data.scenes.tasks import captions_and_questions
from offramp.inputs.example import Example
from offramp.promises.likeness import Likeness, is_unlike, look_of
from offramp_lab.records import lookalikes
from offramp_lab.records.record import Record
from offramp_lab.records.simulated import interval
from offramp_lab.records.subjects import halves, photo_exits, tiny_with

RECORD = Record("likeness")
FRESH, OTHER = 400, 200


def of_tiny(asked: Namespace) -> list[dict[str, Any]]:
    """Of the exits that ship: captions and questions called unlike those calibrated, by scores
    alone and with the look of the image, of other images of their world, of cuts of these, noise,
    plain colours, charts, and photographs."""
    adapter, encoder = tiny_with("opt")
    fresh = list(captions_and_questions("test", FRESH, 400_000, 2))
    rows = []
    for words, some in {"images of its world": fresh, **_others(fresh[:OTHER], asked.data)}.items():
        made = generate_answers(adapter, encoder, some, adapter.policy, **demo.OPTIONS)
        found = [
            (adapter.kind_of(e.prompt), answer.scores, look_of(e.open_image()))
            for e, answer in zip(some, made, strict=True)
        ]
        by_scores = unlike_of([adapter.likeness.p_value(*each[:2]) for each in found])
        both = unlike_of([adapter.likeness.p_value(*each) for each in found])
        rows.append({"images": words, "scores_alone": by_scores["unlike"], **both})
    return rows


def unlike_of(p_values: Sequence[float | None]) -> dict[str, Any]:
    """How many are called unlike."""
    called = [is_unlike(p) for p in p_values]
    return {
        "answers": len(called),
        "unlike": float(np.mean(called)),
        "interval": interval(sum(called), len(called)),
    }


def of_photo(asked: Namespace) -> list[dict[str, Any]]:
    """Of the photo model that ships: images called unlike the calibrated photographs by their look,
    half the level that it has beside scores."""
    exits = read_json(photo_exits() / "adapter.json")
    known = Likeness.from_json(exits["calibration"]["likeness"]).looks
    assert known is not None
    data, fresh = asked.data, halves(asked.data)[1]
    sets = {
        "photographs like them": fresh,
        **{k: v for k, v in _others(fresh[:OTHER], data).items() if k != "photographs"},
        "drawn scenes": captions_and_questions("test", OTHER, 400_000, 0),
        "cut-outs": read_examples(data / "stamps_captions.jsonl", split="train")[:OTHER],
        "photographs of rooms": read_photographs(data)["questions_val"][::6],
    }
    return [
        {"images": words, **unlike_of([2 * known.p_value(look_of(e.open_image())) for e in some])}
        for words, some in sets.items()
    ]


def _others(captions: Sequence[Example], data: Path) -> dict[str, list[Example]]:
    draw = np.random.default_rng(15)
    images = [example.open_image() for example in captions]
    width, height = images[0].size
    quarter = (width // 4, height // 4, 3 * width // 4, 3 * height // 4)
    drawn = [image for kind in lookalikes.KINDS for image in lookalikes.images(kind, 40)]
    made: dict[str, list[Any]] = {
        "the middle of these, enlarged": [i.crop(quarter).resize(i.size) for i in images],
        "noise": [
            Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))
            for _ in images
        ],
        "plain colours": [
            Image.new("RGB", (width, height), tuple(draw.integers(0, 256, 3).tolist()))
            for _ in images
        ],
        "charts, pages and forms": drawn,
    }
    photographs = sorted(data.rglob("*.jpg"))[: len(images)]
    made["photographs"] = [Image.open(path).convert("RGB") for path in photographs]
    return {
        words: [replace(e, image=i, group="") for e, i in zip(captions, some, strict=False)]
        for words, some in made.items()
    }


if __name__ == "__main__":
    RECORD.run(__doc__, {"tiny": of_tiny, "photo": of_photo}, data=True)
