"""What `engine="auto"` chooses, and why, for four kinds of model; rewrites auto.json.

`python tests/helpers/record_auto.py` needs photographs, onnxruntime and llama-cpp-python (minutes
of one core). The photo model and the tiny OPT are measured as they ship; photographs are then
captioned in turns by what the default loads, by the same way named, and with prepacked weights. The
others are tiny random models. For tiny ones `auto` takes PyTorch unmeasured: this is what it would
find if they were not too small.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import tiny_families
import torch

from offramp.adapter.adapter import Adapter
from offramp.adapter.records import calibrations
from offramp.adapter.shipped import shipped_exits
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits, ExitSet
from offramp.core.save_and_load import read_config
from offramp.engines import AUTO, TORCH, auto, engine_named
from offramp.engines.loading import load
from offramp.features.towers import with_vision
from offramp.inputs.example import Example
from offramp_lab.experiments.experiment import Experiment, same, spent, times
from offramp_lab.records.record import Record, asked
from offramp_lab.records.subjects import halves

RECORD = Record("auto", "tests/helpers/record_auto.py")
PHOTO, OPT = "photo", "tiny-opt"
KINDS = {"InstructBLIP, T5": "instructblip-t5", "Qwen2-VL": "qwen2-vl", "Idefics3": "idefics3"}
LONGEST = 16


def load_tiny(name: str, *, engine: str, vision: str, gguf: Path | None) -> Any:
    """A tiny random model of a family with exits that nobody trained, in the place of
    `offramp.load`."""
    kind = tiny_families.kind_of(name)
    backbone = Backbone(tiny_families.build(name))
    if vision != TORCH:
        backbone = with_vision(backbone, vision, kind.inputs(1))
    depth = tiny_families.depths(name)[0]
    exits = Exits(backbone, [depth]).requires_grad_(False)
    adapter = Adapter(backbone, ExitSet(exits), ExitPolicy({depth: 0.1}))
    model = engine_named(engine).open(adapter, gguf=gguf, context=256, threads=1)
    own = model if isinstance(model, Adapter) else adapter
    prompts = SimpleNamespace(prompts=lambda examples: kind.inputs(1, int(examples[0].key[-1])))
    return SimpleNamespace(model=model, adapter=own, encoder=prompts, longest=LONGEST)


def found(model: str, ready: Callable[..., Any], config: Any) -> dict[str, Any]:
    """All ways with what stands against them, and the one that would be taken."""
    ways = [*auto._measured(lambda way: ready(**way._asdict()), config, model, AUTO, False)]
    best = auto.fastest(ways, calibrations(config))
    return {"chosen": best.words, "ways": [asdict(way) for way in ways]}


def paired(best: auto.Way, examples: Sequence[Example]) -> list[dict[str, Any]]:
    """CPU milliseconds of a caption by the default and by name, what share of the latter's time the
    default takes, and how many captions are the same."""
    loaded = {
        "default": load(PHOTO),
        "named": load(PHOTO, engine=best.engine, vision=best.vision, gguf=best.gguf),
        "packed": load(PHOTO, engine="packed", vision=best.vision),
    }

    def answer(of: Any, example: Example) -> str:
        return str(of.answer(example.image, example.prompt))

    methods = {name: spent(partial(answer, of)) for name, of in loaded.items()}
    [*runs] = Experiment(methods, examples, 1, 2, "captions").run().items()
    rates = {n: np.array([(1.0, seconds) for _, seconds in told]).T for n, [told] in runs}
    texts = {name: [text for text, _ in told] for name, [told] in runs}
    return [
        {
            "way": name,
            "milliseconds": 1e3 * float(own[1].mean()),
            "same": same(texts[name], texts["default"]),
            "default_takes": times(own, rates["default"]),
        }
        for name, own in rates.items()
    ]


def main() -> None:
    arguments = asked(__doc__, data=True, photographs=60)
    configs = {name: read_config(shipped_exits(name) or name) for name in (PHOTO, OPT)}
    examples = halves(arguments.data)[1][: arguments.photographs]
    best = auto.settled(
        lambda way: load(PHOTO, **way._asdict()),
        configs[PHOTO],
        auto.Way(AUTO, AUTO),
        threads=torch.get_num_threads(),
    )
    told = paired(best, examples)
    with tempfile.TemporaryDirectory() as folder:
        auto.__dict__["cache_folder"] = lambda name: Path(folder) / name  # files of this run alone
        rows = [
            {"model": name, **found(name, partial(load, name), config)}
            for name, config in configs.items()
        ]
        for title, name in KINDS.items():
            ready, exits = partial(load_tiny, name), Path(folder) / name
            ready(engine=TORCH, vision=TORCH, gguf=None).adapter.save(exits)
            rows.append({"model": title, **found(name, ready, read_config(exits))})
    RECORD.write({"models": rows, "photographs": len(examples), "paired": told})


if __name__ == "__main__":
    main()
