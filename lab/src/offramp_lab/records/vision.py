"""The photo model's tower in PyTorch and in inference engines; rewrites vision.json in lab/records.

One thread, float32. The tower alone on photographs, by each engine in turn; how far its tokens are
from PyTorch's own; and captions with the shipped exits, as many as are the same. Then from a
photograph's file to the tower's inputs, decoded whole and shrunk on load; and from these to what
enters llama.cpp, of a prompt text that is new and of one that is kept.
`python -m offramp_lab.records.vision` takes five minutes; engines that are not installed are left
out.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from examples.photo_vlm.rows import read_photographs
from PIL import Image
from torch import Tensor

from offramp.adapter import Adapter
from offramp.answers import generate_answers
from offramp.data.example import Example
from offramp.errors import InputError
from offramp.models.input_processor import InputProcessor
from offramp.models.shipped import load_named, shipped_exits
from offramp.models.shrink_on_load import with_shrink_on_load
from offramp.models.vision_cache import VisionCache
from offramp.models.vision_engine import ENGINES, check_vision_engine
from offramp.runtimes.llama_cpp.entry import PromptEntry
from offramp.runtimes.llama_cpp.graphs import Architecture
from offramp.runtimes.llama_cpp.segment import EngineOptions
from offramp_lab.experiments.experiment import Experiment, Rounds, same
from offramp_lab.records.record import Record, asked

RECORD = Record("vision")
TOKENS = 30
LARGE = (4000, 3000)
STANDARD = 128
"""Of the photo model's processor, in 255ths of a pixel's range."""
Call = tuple[tuple[Any, ...], dict[str, Any]]


def loaded(name: str) -> tuple[Adapter, InputProcessor]:
    """The photo model whose tower runs so, with the exits that ship."""
    backbone, processor = load_named("photo", vision=name)
    assert backbone.vision_engine == name
    folder = shipped_exits("photo")
    assert folder is not None
    return Adapter.from_pretrained(backbone, folder), InputProcessor(backbone, processor)


def names() -> list[str]:
    """The engines that are installed."""
    found = []
    for name in ENGINES:
        try:
            check_vision_engine(name)
        except InputError as error:
            print(error)
            continue
        found.append(name)
    return found


def calls_of(model: Adapter, encoder: InputProcessor, examples: Sequence[Example]) -> list[Call]:
    """How the model calls its tower for each photograph."""
    calls: list[Call] = []
    hook = model.backbone.vision.register_forward_pre_hook(
        lambda _, args, kw: calls.append((args, kw)), with_kwargs=True
    )
    generate_answers(model, encoder, examples, batch_size=1, max_new_tokens=1)
    hook.remove()
    return calls


@torch.inference_mode()
def measure(pictures: int, rounds: int, data: Path) -> list[dict[str, Any]]:
    models = {name: loaded(name) for name in names()}
    examples = read_photographs(data)["captions_val"][:pictures]
    calls = calls_of(*models["torch"], examples)

    def tokens(call: Call, name: str) -> Tensor:
        args, kw = call
        found: Tensor = models[name][0].backbone.vision(*args, **kw).last_hidden_state
        return found

    def milliseconds(call: Call, name: str) -> float:
        start = time.process_time()
        tokens(call, name)
        return 1e3 * (time.process_time() - start)

    def figures(found: Rounds) -> dict[str, float]:
        times = [taken for taken_in_round in found for taken in taken_in_round]
        return {"cpu_milliseconds": median(times), "cpu_milliseconds_least": min(times)}

    methods = {name: partial(milliseconds, name=name) for name in models}
    entries = Experiment(methods, calls, rounds, warm=2).entries(("engine",), figures)
    answers = {
        name: generate_answers(*model, examples, batch_size=1, max_new_tokens=TOKENS)
        for name, model in models.items()
    }
    for entry in entries:
        name = entry["engine"]
        pairs = [(tokens(call, name), tokens(call, "torch")) for call in calls]
        entry["distance"] = max(float((made - own).norm() / own.norm()) for made, own in pairs)
        entry["same_captions"] = same(answers[name], answers["torch"])
    return entries


def decode(pictures: int, rounds: int, data: Path) -> dict[str, Any]:
    """Milliseconds from a file of 12 megapixels to the model's inputs, and how far the pixels that
    the tower gets are from those of the whole photograph."""
    backbone, processor = load_named("photo")
    encoders = {
        "whole": InputProcessor(backbone, processor),
        "shrunk": InputProcessor(backbone, with_shrink_on_load(processor)),
    }
    with TemporaryDirectory() as folder:
        examples = list[Example]()
        for example in read_photographs(data)["captions_val"][:pictures]:
            file = Path(folder) / f"{len(examples)}.jpg"
            example.open_image().resize(LARGE, Image.Resampling.BICUBIC).save(file, quality=90)
            examples.append(replace(example, image=file))

        def milliseconds(example: Example, name: str) -> float:
            start = time.process_time()
            encoders[name].prompts([example])
            return 1e3 * (time.process_time() - start)

        methods = {name: partial(milliseconds, name=name) for name in encoders}
        taken = Experiment(methods, examples, rounds, warm=2).run()
        far = []
        for example in examples:
            whole, shrunk = (e.prompts([example])["pixel_values"] for e in encoders.values())
            far.append((whole - shrunk).abs() * STANDARD)
        size = median(example.image.stat().st_size for example in examples)  # type: ignore[union-attr]
    ways = {name: median(t for row in rows for t in row) for name, rows in taken.items()}
    return {
        "pictures": len(examples), "rounds": rounds, "size": LARGE, "bytes": size,
        "cpu_milliseconds": ways, "mean": float(torch.stack(far).mean()),
        "largest": float(torch.stack(far).max()),
    }  # fmt: skip


@torch.inference_mode()
def prompts(pictures: int, rounds: int, data: Path) -> dict[str, Any]:
    """Milliseconds from a processor's output to what enters llama.cpp, the tower left out: as
    Hugging Face prepares it, and of a prompt text that is kept."""
    backbone, processor = load_named("photo")
    encoder = InputProcessor(backbone, processor)
    examples = read_photographs(data)["captions_val"][:pictures]
    inputs = [encoder.prompts([example]) for example in examples]
    options = {"max_new_tokens": TOKENS, "do_sample": False}

    def entry() -> PromptEntry:  # the cache takes the tower's part
        return PromptEntry(backbone, Architecture("llama", {}), EngineOptions(context=512), cache)

    def whole(one: dict[str, Any]) -> Any:
        fresh = entry()  # as for every answer, before texts were kept
        return fresh.prompts(fresh.prepare(one, options))[0]

    def lean(one: dict[str, Any]) -> Any:
        return kept.read(one, options)[1][0]

    cache = VisionCache()
    kept = entry()
    same = [np.array_equal(whole(one).states, lean(one).states) for one in inputs]

    def milliseconds(one: dict[str, Any], way: Callable[[dict[str, Any]], Any]) -> float:
        start = time.process_time()
        way(one)
        return 1e3 * (time.process_time() - start)

    methods = {"whole": partial(milliseconds, way=whole), "kept": partial(milliseconds, way=lean)}
    taken = Experiment(methods, inputs, rounds).run()
    ways = {name: median(t for row in rows for t in row) for name, rows in taken.items()}
    return {
        "pictures": len(inputs), "rounds": rounds, "cpu_milliseconds": ways,
        "same_states": sum(same), "from_what_was_kept": kept.kept.hits,
    }  # fmt: skip


def engines(pictures: int, rounds: int, data: Path) -> dict[str, Any]:
    before = os.getloadavg()[0]
    found = measure(pictures, rounds, data)
    load = [round(before, 1), round(os.getloadavg()[0], 1)]
    return {"pictures": pictures, "rounds": rounds, "engines": found, "load": load}


def main() -> None:
    parts = {"towers": engines, "decoding": decode, "prompts": prompts}
    arguments = asked(
        __doc__, photo=True, rounds=3, pictures=50,
        more=lambda parser: parser.add_argument("--parts", nargs="+", default=[*parts]),
    )  # fmt: skip
    how = (arguments.pictures, arguments.rounds, arguments.data)
    made = {name: partial(part, *how) for name, part in parts.items()}
    RECORD.parts(made, arguments.parts)


if __name__ == "__main__":
    main()
