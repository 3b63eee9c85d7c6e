"""Note in the exits that ship what calibrations of their time did not keep: how calibrated images
look; of the tiny OPT the scores of answers and the conditions that are compared today; of the photo
model, in each engine of its calibrations, how much early answers differ from the full model's,
which is watched.

The images are those of the calibration, by its digest or number, and its thresholds stay, so no
attempt is spent. Measured again first, and the same or nothing is noted: the risk of the tiny OPT,
and the scores of the photo model's answers. Half an hour of one core; --calibrations: some of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from examples.photo_vlm.rows import half_of, read_photographs

from offramp.adapter.adapter import Adapter
from offramp.adapter.answers import generate_answers
from offramp.adapter.model_card import model_card
from offramp.adapter.records import AdapterParts
from offramp.adapter.shipped import shipped_exits
from offramp.calibration.attempts import Draws, images_of
from offramp.calibration.risk_control import upper_bound
from offramp.calibration.risk_functions import RISKS
from offramp.calibration.trial import CONSISTENCY
from offramp.cli import demo
from offramp.common.progress import progress
from offramp.core.save_and_load.config import sealed
from offramp.core.storage import read_json, write_json
from offramp.data.scenes.tasks import captions_and_questions
from offramp.engines import LLAMA_CPP, engine_named
from offramp.engines.loading import Loaded, load
from offramp.inputs.example import Example, examples_digest
from offramp.promises.conditions import TORCH, Conditions, of_processor
from offramp.promises.likeness import ANSWERS, Likeness, look_of
from offramp_lab.records.record import Some, asked
from offramp_lab.records.subjects import tiny_with

CONFIG = "adapter.json"
TINY, PHOTO = "tiny-opt", "photo"
PHOTO_IN = (TORCH, "f16", "q8_0")
"""Calibrations of the photo model: in PyTorch, and in llama.cpp by its number format."""
IMAGES, ASKED = 2000, 2
SAME = 1e-3
"""Largest difference of a mean log score from the one of the calibration."""


def main() -> None:
    arguments = asked(__doc__, data=True, calibrations=Some((TINY, *PHOTO_IN)))
    for name in arguments.calibrations:
        folder = shipped_exits(TINY if name == TINY else PHOTO)
        assert folder is not None
        note(_tiny() if name == TINY else _photo(arguments.data, name), folder)


def note(noted: Adapter, folder: Path) -> None:
    """Write calibrations into a folder whose tensors, and what was verified of them, stay."""
    values = {n: v for n, v in read_json(folder / CONFIG).items() if n != "digest"}
    values["calibration"] = noted.calibration
    if noted.elsewhere:
        values["elsewhere"] = noted.elsewhere
    write_json(folder / CONFIG, sealed(values))
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
    of = Likeness.of([early[row].scores for row in rows], kinds, looks)
    before = Conditions.of_calibration(then)
    here = Conditions.of(
        adapter.backbone,
        adapter.policy,
        exits=adapter.exits,
        sampling="greedy",
        longest=before["longest"],
        prompts=before["prompts"],
        **of_processor(encoder.processor),
    )
    noted = {**then, "conditions": here.to_json(), "likeness": of.to_json()}
    return replace(adapter, calibration=noted)


def _photo(data: Path, numbers: str) -> Adapter:
    """With what is kept of its calibration in PyTorch or, in a number format, in llama.cpp."""
    loaded = load(PHOTO, engine=TORCH, vision=TORCH)
    adapter = loaded.adapter
    photographs = read_photographs(data)
    by_kind = {
        adapter.kind_of(some[0].prompt): [e for e in some if half_of(e) == 0]
        for some in (photographs["captions_val"], photographs["questions_val"])
    }
    caption = next(iter(by_kind))
    looks = {caption: _looks(by_kind[caption])}
    if numbers == TORCH:
        return replace(adapter, calibration=_noted(loaded, by_kind, looks))
    [name] = [name for name in adapter.elsewhere if name.startswith(f"{LLAMA_CPP} {numbers},")]
    with TemporaryDirectory() as folder:
        files = Path(folder) / numbers
        prepare = engine_named(LLAMA_CPP).prepare
        assert prepare is not None
        prepare(adapter, files, numbers)
        seen = Conditions.of_calibration(adapter.elsewhere[name])["vision"]
        loaded = load(PHOTO, engine=LLAMA_CPP, vision=seen, gguf=files)
        noted = _noted(loaded, by_kind, looks)
        loaded.model.close()
    return replace(adapter, elsewhere={**adapter.elsewhere, name: noted})


def _noted(
    loaded: Loaded, by_kind: Mapping[str, Sequence[Example]], looks: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """A calibration with its images' looks, and with an upper bound of how much early answers
    differ from the full model's, by image and kind of prompt."""
    adapter, then = loaded.adapter, dict(loaded.adapter.calibration or {})
    examples = list(chain(*by_kind.values()))
    kinds = [kind for kind, some in by_kind.items() for _ in some]
    options = {**demo.OPTIONS, "max_new_tokens": loaded.longest}
    size = getattr(loaded.model, "rows", 64)
    early, full = (
        generate_answers(
            loaded.model,
            loaded.encoder,
            examples,
            policy,
            batch_size=size,
            progress=partial(progress, title=mode),
            **options,
        )
        for mode, policy in (("early", adapter.policy), ("full", adapter.policy.in_mode("full")))
    )
    shown = np.concatenate([*looks.values()])
    of = Likeness.of([answer.scores for answer in early], kinds, shown)
    for kind, before in adapter.likeness.kinds.items():
        again = of.kinds[kind]
        apart = np.abs(np.subtract(again.low, before.low)).max()
        assert again.n == before.n and apart < SAME, (kind, again.n, apart)

    risk, bounds = RISKS[CONSISTENCY], {}
    losses = risk.losses(early, full, examples)
    for kind, some in by_kind.items():
        own = losses[[row for row, name in enumerate(kinds) if name == kind]]
        draws = Draws.by(then["unit"], own, images_of(some), whole=risk.whole)
        bounds[kind] = upper_bound(draws, then["confidence"])
        print(
            f"{then['conditions']['engine']}, {kind}: {own.mean():.4f} by answer, "
            f"{draws.risk.item():.4f}, at most {bounds[kind]:.4f}",
            flush=True,
        )
    watched = {"risk": CONSISTENCY, "targets": bounds}
    return {**then, "likeness": of.to_json(), "watched": watched}


if __name__ == "__main__":
    main()
