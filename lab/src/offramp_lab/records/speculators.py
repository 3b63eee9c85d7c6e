"""An EAGLE-3 drafter of SmolLM2, from `offramp export --to speculators` to llama.cpp's own
programs; rewrites speculators.json.

`python -m offramp_lab.records.speculators --llama-cpp FOLDER --programs FOLDER` trains the drafter
on answers to prompts about some things, has llama.cpp's converter make a file of it, and lets
llama.cpp's own example programs write answers to prompts about others, with the drafter
and without. The programs are built from the same source as the wheel of llama-cpp-python:
`cmake -B build -DLLAMA_BUILD_EXAMPLES=ON`, targets llama-simple and llama-speculative-simple.
llama.cpp's own drafts of n-grams, which need no training, stand beside it. They draft next to
nothing, so the drafter's speed is told against them: the same program, on one thread, where
llama-simple takes as many as llama.cpp likes. Two hours. What is in runs/speculators is
taken from there.
"""

from __future__ import annotations

import re
import resource
import subprocess
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from offramp_photo.packages import LANGUAGE, weights_file
from transformers import AutoTokenizer

from offramp.common.folders import cache_folder
from offramp.inputs.example import Example
from offramp_lab.records.record import Record, Turns, words
from offramp_lab.records.text import PARTS
from offramp_lab.records.walk import WORDS, Walk, write_model, written

RECORD = Record("speculators")
DRAFTS = 4
LEARNT, WRITTEN = 4800, 48
"""Prompts that it learns from, and tokens of an answer."""
FULL, OURS, NGRAMS = "full depth", "EAGLE-3 drafter", "n-grams of the answer so far"
CPU = ("ru_utime", "ru_stime")


def figures(arguments: Namespace) -> dict[str, Any]:
    work = RECORD.work
    write_model(weights_file(LANGUAGE, cache_folder("photo")), work / "model")
    learnt = (*PARTS["train"][0], *PARTS["choose"][0], *WORDS["more"])
    prompts = written(work, {"train": (learnt, LEARNT), "held": PARTS["held"]})
    steps, held = _walk(arguments), prompts["held"][: arguments.prompts]
    asked = [Example.of_text(text, key=text) for text in held]
    answers = Turns(work / "answers.jsonl").answers(_ways(arguments.programs), asked, "answers")
    return {
        "prompts": len(held),
        "new_tokens": WRITTEN,
        "drafts": DRAFTS,
        "walk": steps,
        "ways": [_way(name, rows, answers[FULL]) for name, rows in answers.items()],
    }


def _walk(arguments: Namespace) -> list[dict[str, Any]]:
    work, walk = RECORD.work, Walk(RECORD.work)
    model, drafter = work / "model", work / "drafter"
    convert = partial(walk.converted, converter=arguments.llama_cpp / "convert_hf_to_gguf.py")
    export = words(
        "--to speculators --backbone {} --data {} --steps {} --shortlist 4096 "
        "--max-new-tokens {} --out {} --json",
        *(model, work / "train.txt", arguments.steps, WRITTEN, drafter),
    )
    beside = ("--target-model-dir", str(model))
    return [
        walk.step("export", export),
        convert("drafter's file", model=drafter, out=work / "eagle3.gguf", more=beside),
        convert("model's file", model=model, out=work / "q8_0.gguf"),
    ]


def _ways(programs: Path) -> dict[str, Callable[[Example], dict[str, Any]]]:
    """What writes an answer to a prompt, by name."""
    work, simple = RECORD.work, str(programs / "llama-simple")
    template: Any = AutoTokenizer.from_pretrained(work / "model").apply_chat_template
    model = words("-m {} -n {}", work / "q8_0.gguf", WRITTEN)
    drafting = words(f"-t 1 --temp 0 -c 256 --spec-draft-n-max {DRAFTS}")
    speculative = [str(programs / "llama-speculative-simple"), *model, *drafting]
    eagle3 = words("--spec-type draft-eagle3 -md {} -p", work / "eagle3.gguf")
    commands = {
        FULL: [simple, *model],
        OURS: [*speculative, *eagle3],
        NGRAMS: [*speculative, *words("--spec-type ngram-simple -p")],
    }

    def write(example: Example, command: Sequence[str]) -> dict[str, Any]:
        chat = [{"role": "user", "content": example.prompt}]
        prompt = template(chat, tokenize=False, add_generation_prompt=True)
        return _written([*command, prompt], prompt)

    return {name: partial(write, command=command) for name, command in commands.items()}


def _written(command: Sequence[str], prompt: str) -> dict[str, Any]:
    """What a program wrote behind the prompt, what it counted, and its process's CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    counts = re.findall(r"(n_predict|n_drafted|n_accept)\s*=\s*(\d+)", done.stderr)
    (seconds,) = re.findall(r"decoded +\d+ tokens in +([\d.]+) s", done.stderr)
    return {
        "answer": done.stdout.rpartition(prompt.splitlines()[-1])[2].strip(),
        "decoding_seconds": float(seconds),
        "cpu_seconds": sum(getattr(after, f) - getattr(before, f) for f in CPU),
        **{name: int(number) for name, number in counts},
    }


def _way(
    name: str, rows: Sequence[dict[str, Any]], full: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Tokens a round: n_predict / (n_predict - n_accept), since each round adds one of the model's
    own. An answer is the same where one is the beginning of the other: the programs stop one token
    apart."""
    same = sum(
        a["answer"].startswith(b["answer"]) or b["answer"].startswith(a["answer"])
        for a, b in zip(rows, full, strict=True)
    )
    tokens, drafted, accepted = (
        sum(row.get(count, 0) for row in rows) for count in ("n_predict", "n_drafted", "n_accept")
    )
    return {
        "way": name,
        "same_answers": same,
        "tokens": tokens,
        "drafted": drafted,
        "accepted": accepted,
        "tokens_a_round": tokens / (tokens - accepted) if tokens else 1.0,
        "decoding_seconds": sum(row["decoding_seconds"] for row in rows) / len(rows),
        "cpu_seconds_a_process": sum(row["cpu_seconds"] for row in rows) / len(rows),
        "first_answer": rows[0]["answer"],
    }


if __name__ == "__main__":
    paths = {"llama_cpp": Path, "programs": Path}
    RECORD.run(__doc__, figures, **paths, steps=3000, prompts=100)
