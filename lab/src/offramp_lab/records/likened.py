"""Note in the exits that ship what calibrations of their time did not keep: how calibrated images
look; of the tiny OPT the scores of answers and the conditions that are compared today; of the photo
model how much early answers differ from the full model's, which is watched.

The images are those of the calibration, by its digest or number. Of the tiny OPT the measured risk
is measured again first, and has to come out the same. Half an hour of one core.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from examples.photo_vlm.rows import half_of, read_photographs

from offramp import demo
from offramp.adapter import Adapter
from offramp.answers import generate_answers
from offramp.calibration.attempts import Draws, images_of
from offramp.calibration.calibrate import CONSISTENCY
from offramp.calibration.risk_control import upper_bound
from offramp.calibration.risk_functions import RISKS
from offramp.conditions import Conditions, of_processor
from offramp.data.example import Example, examples_digest
from offramp.data.scenes.tasks import captions_and_questions
from offramp.likeness import ANSWERS, Likeness, look_of
from offramp.loading import Loaded, load
from offramp.model_card import model_card
from offramp.models.shipped import shipped_exits
from offramp.save_and_load import AdapterParts
from offramp.save_and_load.config import sealed
from offramp.storage import read_json, write_json
from offramp_lab.records.record import asked
from offramp_lab.records.subjects import tiny_with

CONFIG = "adapter.json"
IMAGES, ASKED = 2000, 2


def main() -> None:
    arguments = asked(__doc__, data=True)
    for name, noted in {"tiny-opt": _tiny(), "photo": _photo(arguments.data)}.items():
        folder = shipped_exits(name)
        assert folder is not None
        note(noted, folder)


def note(noted: Adapter, folder: Path) -> None:
    """Write a calibration into a folder whose tensors, and what was verified of them, stay."""
    values = {n: v for n, v in read_json(folder / CONFIG).items() if n != "digest"}
    write_json(folder / CONFIG, sealed({**values, "calibration": noted.calibration}))
    parts = AdapterParts(**{f.name: getattr(noted, f.name) for f in fields(AdapterParts)})
    (folder / "README.md").write_text(model_card(noted.backbone, parts), encoding="utf-8")


def _looks(examples: list[Example]) -> np.ndarray:
    return np.array([look_of(example.open_image()) for example in examples])


def _tiny() -> Adapter:
    adapter, encoder = tiny_with("opt")
    then = dict(adapter.calibration or {})
    examples = captions_and_questions("calibration", IMAGES, per_picture=ASKED)
    assert examples_digest(examples) == then["data_digest"]
    early, full = (
        generate_answers(adapter, encoder, examples, policy, batch_size=64, **demo.OPTIONS)
        for policy in (adapter.policy, adapter.policy.in_mode("full"))
    )
    wrong = np.array([one.ids != other.ids for one, other in zip(early, full, strict=True)])
    by_image = (wrong[:IMAGES] + wrong[IMAGES:].reshape(IMAGES, ASKED).sum(1)) / (1 + ASKED)
    assert abs(by_image.mean() - then["measured"]) < 1e-9, by_image.mean()

    some = ANSWERS // (1 + ASKED)
    rows = [*range(some), *range(IMAGES, IMAGES + ASKED * some)]
    kinds = [adapter.kind_of(examples[row].prompt) for row in rows]
    looks = _looks(examples[:IMAGES])
    of = Likeness.of([early[row].scores for row in rows], kinds, dict.fromkeys(kinds, looks))
    before = Conditions.of_calibration(then)
    here = Conditions.of(
        adapter.backbone, adapter.policy, exits=adapter.exits, sampling="greedy",
        longest=before["longest"], prompts=before["prompts"], **of_processor(encoder.processor),
    )  # fmt: skip
    noted = {**then, "conditions": here.to_json(), "likeness": of.to_json()}
    return replace(adapter, calibration=noted)


def _photo(data: Path) -> Adapter:
    loaded = load("photo", engine="torch", vision="torch")
    adapter, then = loaded.adapter, dict(loaded.adapter.calibration or {})
    photographs = read_photographs(data)
    by_kind = {
        adapter.kind_of(some[0].prompt): [e for e in some if half_of(e) == 0]
        for some in (photographs["captions_val"], photographs["questions_val"])
    }
    assert {kind: len(some) for kind, some in by_kind.items()} == {
        found["kind"]: found["answers"] for found in then["kinds"]
    }
    caption = next(iter(by_kind))
    looks = (
        Likeness.of([[1.0]], [caption], {caption: _looks(by_kind[caption])}).kinds[caption].looks
    )
    kinds = {**adapter.likeness.kinds}
    kinds[caption] = replace(kinds[caption], looks=looks)
    bounds = {kind: _differs(loaded, some, then) for kind, some in by_kind.items()}
    noted = {
        "likeness": Likeness(kinds).to_json(),
        "watched": {"risk": CONSISTENCY, "targets": bounds},
    }
    return replace(adapter, calibration={**then, **noted})


def _differs(loaded: Loaded, examples: Sequence[Example], then: Mapping[str, Any]) -> float:
    """An upper bound of how much early answers differ from the full model's, by image."""
    adapter, options = loaded.adapter, {**demo.OPTIONS, "max_new_tokens": loaded.longest}
    early, full = (
        generate_answers(adapter, loaded.encoder, examples, policy, batch_size=64, **options)
        for policy in (adapter.policy, adapter.policy.in_mode("full"))
    )
    risk = RISKS[CONSISTENCY]
    losses = risk.losses(early, full, examples)
    draws = Draws.by(then["unit"], losses, images_of(examples), whole=risk.whole)
    bound = upper_bound(draws, then["confidence"])
    print(
        f"{losses.mean():.4f} by answer, {draws.risk.item():.4f}, at most {bound:.4f}", flush=True
    )
    return bound


if __name__ == "__main__":
    main()
