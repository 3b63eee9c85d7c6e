"""An EAGLE-3 drafter of SmolLM2, from `offramp export --to speculators` to llama.cpp's own
programs; rewrites speculators.json.

`python -m offramp_lab.records.speculators --llama-cpp FOLDER --programs FOLDER` trains the drafter
on answers to prompts about some things, has llama.cpp's converter make a file of it, and lets
llama.cpp's own example programs write answers to prompts about others, with the drafter
and without. The programs are built from the same source as the wheel of llama-cpp-python:
`cmake -B build -DLLAMA_BUILD_EXAMPLES=ON`, targets llama-simple and llama-speculative-simple.
llama.cpp's own drafts of n-grams, which need no training, stand beside it. They draft next to
nothing, so the drafter's speed is told against them: the same program, on one thread, where
llama-simple takes as many as llama.cpp likes. Two hours. What is in --work is taken from there.
"""

from __future__ import annotations

import re
import resource
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from offramp_photo.packages import LANGUAGE, weights_file
from tqdm import tqdm
from transformers import AutoTokenizer

from offramp.common.folders import cache_folder
from offramp.core.storage import write_atomic
from offramp_lab.places import RUNS
from offramp_lab.records.record import Kept, Record, asked, words
from offramp_lab.records.text import PARTS, WORDS, converted, prompts_of, step, write_model

RECORD = Record("speculators")
DRAFTS = 4
KNOWN = (*PARTS["train"][0], *PARTS["choose"][0])
LEARNT, WRITTEN = 4800, 48
"""Prompts that it learns from, and tokens of an answer."""
FULL, OURS, NGRAMS = "full depth", "EAGLE-3 drafter", "n-grams of the answer so far"
CPU = ("ru_utime", "ru_stime")


def main() -> None:
    arguments = asked(__doc__, steps=3000, prompts=100, work=RUNS / RECORD.name, more=_more)
    work: Path = arguments.work
    write_model(weights_file(LANGUAGE, cache_folder("photo")), work / "model")
    write_atomic(work / "train.txt", "\n".join(prompts_of((*KNOWN, *WORDS["more"]), LEARNT)) + "\n")
    walk = _walk(work, arguments)
    held = prompts_of(*PARTS["held"])[: arguments.prompts]
    answers = _answers(work, arguments.programs, held)
    RECORD.write(
        {
            "prompts": len(held),
            "new_tokens": WRITTEN,
            "drafts": DRAFTS,
            "walk": walk,
            "ways": [_way(name, rows, answers[FULL]) for name, rows in answers.items()],
        }
    )


def _more(parser: Any) -> None:
    parser.add_argument("--llama-cpp", type=Path, required=True, help="llama.cpp's source")
    parser.add_argument("--programs", type=Path, required=True, help="folder of its programs")


def _walk(work: Path, arguments: Any) -> list[dict[str, Any]]:
    model, drafter = work / "model", work / "drafter"
    converter = arguments.llama_cpp / "convert_hf_to_gguf.py"
    return [
        step(
            "export",
            words(
                "--to speculators --backbone {} --data {} --steps {} --shortlist 4096 "
                "--max-new-tokens {} --out {} --json",
                *(model, work / "train.txt", arguments.steps, WRITTEN, drafter),
            ),
            work,
        ),
        converted(
            *("drafter's file", work, converter, drafter, work / "eagle3.gguf"),
            *("--target-model-dir", str(model)),
        ),
        converted("model's file", work, converter, model, work / "q8_0.gguf"),
    ]


def _answers(work: Path, programs: Path, held: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Of each way and prompt, what a program wrote and said of itself, all ways in turns."""
    template: Any = AutoTokenizer.from_pretrained(work / "model").apply_chat_template
    model = words("-m {} -n {}", work / "q8_0.gguf", WRITTEN)
    program, one = programs / "llama-speculative-simple", "-t 1 --temp 0 -c 256"
    speculative = [*words("{}", program), *model, *words(f"{one} --spec-draft-n-max {DRAFTS}")]
    eagle3 = words("--spec-type draft-eagle3 -md {}", work / "eagle3.gguf")
    ways: dict[str, Callable[[str], list[str]]] = {
        FULL: lambda text: [str(programs / "llama-simple"), *model, text],
        OURS: lambda text: [*speculative, *eagle3, "-p", text],
        NGRAMS: lambda text: [*speculative, "--spec-type", "ngram-simple", "-p", text],
    }
    found = Kept(work / "answers.jsonl")
    for text in tqdm(held, "answers", disable=None):
        chat = [{"role": "user", "content": text}]
        prompt = template(chat, tokenize=False, add_generation_prompt=True)
        for name, way in ways.items():
            if (key := f"{name}: {text}") not in found:
                found.keep(key, _written(way(prompt), prompt))
    return {name: [found.found[f"{name}: {text}"] for text in held] for name in ways}


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
    main()
