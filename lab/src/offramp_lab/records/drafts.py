"""Drafts of several tokens on photographs, against full depth by the same kernels, in drafts.json.

`python -m offramp_lab.records.drafts` needs photographs, and exits that draft on, as those of the
photo model do:

    offramp train photo --drafting photo --data flickr8k_captions.jsonl --split train \
        --limit 2000 --steps 900 --max-new-tokens 30 --out runs/drafting

Every photograph is answered by all ways in an order of its own, with CPU seconds of the thread from
the first token on; it is kept in runs/drafts, so that a run that was cut off goes on there. The
table's counts are of the model's own answers to `--learn` photographs of the training split. Ways:
full depth; today's exit, by the adapter's drafts and by 5 at .2; the table; 3, 4, 5 drafts of the
exit from its own state, as far as they are sure, and 4 sure or not. `--packed` lays the weights out
first, `--gguf q8_0` decodes inside llama.cpp; each makes a part of its own. Of exits that learnt
from a number format (`offramp train --of-format`) that part has full depth and their drafts alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from examples.photo_vlm.rows import read_photographs
from transformers import StoppingCriteriaList

from offramp.adapter import Adapter
from offramp.engine.generate import generate
from offramp.engine.policy import FULL, ExitPolicy, GenerationOutput
from offramp.engines import ENGINES
from offramp.errors import InputError
from offramp.evaluation.drafts import Drafted, Rounds
from offramp.evaluation.timing import FirstToken
from offramp.models.exits import Exits, ExitSet
from offramp.progress import progress
from offramp.runtimes.llama_cpp import LlamaCppRuntime, export_gguf
from offramp_lab.experiments.experiment import Rates, same, times
from offramp_lab.experiments.word_triples import DraftTable, TableRuntime, table_generate
from offramp_lab.places import RUNS
from offramp_lab.records.record import Kept, Record, asked
from offramp_lab.records.subjects import photo, photo_exits

RECORD = Record("drafts")
AT_ONCE = 16
ALWAYS = "drafting, 4, sure or not"
OPTIONS: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False}
Way = Callable[[Mapping[str, Any], StoppingCriteriaList], GenerationOutput]
Generates = Callable[..., GenerationOutput]
"""As `Adapter.generate`."""


def plain_exits(adapter: Adapter) -> ExitSet:
    """The same layer as an exit of its own: drafts are what it says of fed tokens."""
    backbone, exits = adapter.backbone, adapter.exits
    layer = Exits(backbone, exits.depths)
    layer.load_state_dict(exits.modules.state_dict(), strict=False)
    layer.to(backbone.dtype).requires_grad_(False)
    return replace(exits, modules=layer)


def lossless_policies(adapter: Adapter) -> tuple[dict[str, ExitPolicy], dict[str, ExitPolicy]]:
    """Of the exit that says what follows fed tokens, and of the one that drafts on; by name."""
    lossless = replace(adapter.policy, lossless=True)
    tuned = dict.fromkeys(adapter.exits.depths[:1], 0.2)
    by_exit = {"exit, 5 at .2": replace(lossless, drafts=tuned, max_draft=5)}
    if lossless.effective.thresholds:
        by_exit["exit, as stored"] = replace(lossless, max_draft=ExitPolicy.max_draft)
    drafting = {f"drafting, {most}": replace(lossless, max_draft=most) for most in (3, 4, 5)}
    unsure = dict.fromkeys(adapter.exits.depths, 0.0)
    return by_exit, drafting | {ALWAYS: replace(lossless, drafts=unsure, max_draft=4)}


def _by(generates: Generates, policies: Mapping[str, ExitPolicy]) -> dict[str, Way]:
    """Ways by name."""

    def way(inputs: Mapping[str, Any], stop: StoppingCriteriaList, policy: ExitPolicy) -> Any:
        return generates(inputs, policy=policy, stopping_criteria=stop, **OPTIONS)

    return {name: partial(way, policy=policy) for name, policy in policies.items()}


def ways_in_llama_cpp(
    adapter: Adapter, table: DraftTable, formats: str, folder: Path, stack: ExitStack
) -> dict[str, Way]:
    """The same inside llama.cpp, by our kernels, one thread. folder: of the exports."""
    plain = replace(adapter, exits=plain_exits(adapter))
    for name, one in (("drafting", adapter), ("plain", plain)):
        if not (folder / name).is_dir():
            export_gguf(one, folder / name, formats)
    drafts = stack.enter_context(LlamaCppRuntime(adapter, folder / "drafting"))
    exits = stack.enter_context(LlamaCppRuntime(plain, folder / "plain"))
    words = stack.enter_context(TableRuntime(plain, folder / "plain", table))
    by_exit, drafting = lossless_policies(adapter)
    return {
        **_by(exits.generate, {"full": FULL, **by_exit}),
        **_by(words.generate, {"table": drafting["drafting, 4"]}),
        **_by(drafts.generate, drafting),
    }


def ways_of(adapter: Adapter, table: DraftTable) -> dict[str, Way]:
    """All ways to the full model's answer, by name. adapter: with exits that draft on."""
    backbone, exits = adapter.backbone, adapter.exits
    by_exit, drafting = lossless_policies(adapter)
    return {
        **_by(partial(generate, backbone), {"full": FULL}),
        **_by(partial(generate, backbone, exits=plain_exits(adapter)), by_exit),
        "table": partial(table_generate, backbone, table, **OPTIONS),
        **_by(partial(generate, backbone, exits=exits), drafting),
    }


def answered(way: Way, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Token ids, CPU seconds behind the first, and rounds, of one way on one photograph."""
    first = FirstToken(time.thread_time)
    made = way(inputs, StoppingCriteriaList([first]))
    seconds = time.thread_time() - (first.seconds or 0.0)
    return {"ids": made.new_tokens[0].tolist(), "seconds": seconds, "rounds": [*made.rounds]}


def summary(told: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """An entry for each way, of what it answered to each photograph.

    speed: tokens a CPU second; times, low, high: of full depth, with a 95% interval of a bootstrap
    that draws photographs and keeps their pairs. acceptance: by place in a round, of those drafts
    before which all were right; tokens: written in a round.
    """
    rates = {name: _rates(answers) for name, answers in told.items()}
    ids = {name: [answer["ids"] for answer in answers] for name, answers in told.items()}
    entries = []
    for name, own in rates.items():
        entries.append(
            {
                "way": name, "photographs": len(ids[name]),
                "speed": float(own[0].sum() / own[1].sum()),
                **times(own, rates["full"]),
                "identical": same(ids[name], ids["full"]),
                **_rounds([answer["rounds"] for answer in told[name]]),
            }
        )  # fmt: skip
    return entries


def _rates(answers: Sequence[Mapping[str, Any]]) -> Rates:
    """Decoded tokens and seconds, by photograph."""
    tokens = [max(0, len(answer["ids"]) - 1) for answer in answers]
    return np.array([tokens, [answer["seconds"] for answer in answers]], float)


def _rounds(rounds: Sequence[Rounds]) -> dict[str, Any]:
    """Acceptance by place of all rounds, that of first rounds' first drafts, tokens a round."""
    if (found := Drafted.of(rounds)) is None:
        return {}
    told = {"first_draft": found.first, "tokens_a_round": found.tokens}
    return {"acceptance": [*found.acceptance], **told}


def own_answers(adapter: Adapter, encoder: Any, examples: Sequence[Any], file: Path) -> DraftTable:
    """A table of the full model's answers, which are kept in a file."""
    kept = Kept(file)
    left = [example for example in examples if example.key not in kept]
    groups = [left[start : start + AT_ONCE] for start in range(0, len(left), AT_ONCE)]
    for group in progress(groups, "the table's answers"):
        made = generate(adapter.backbone, encoder.prompts(group), **OPTIONS)
        for example, ids, depths in zip(group, made.new_tokens, made.depths, strict=True):
            kept.keep(example.key, ids[depths > 0].tolist())
    return DraftTable.of(kept.found[example.key] for example in examples)


def main() -> None:
    arguments = asked(
        __doc__, photo=True, dtype="float32", out=RECORD.path, photographs=100, learn=1600,
        packed=False, gguf="",
    )  # fmt: skip
    subject = photo(arguments, arguments.photographs, arguments.dtype)
    adapter, encoder, held = subject.adapter, subject.encoder, subject.examples
    if not adapter.exits.draft_on:
        raise InputError(
            f"The exits in {photo_exits(arguments.adapter)} do not draft on.",
            "Teach them: offramp train --drafting ADAPTER.",
        )
    if arguments.packed:
        ENGINES["packed"].open(adapter)
    part = f"pytorch {arguments.dtype}{', packed' if arguments.packed else ''}"
    if arguments.gguf:
        part = f"llama.cpp {arguments.gguf}"
    folder = RUNS / RECORD.name
    own = adapter.of_format == arguments.gguf
    if own:
        part = f"{part}, exits for it"
    learnt = read_photographs(arguments.data)["captions"][: 0 if own else arguments.learn]
    table = own_answers(adapter, encoder, learnt, folder / "answers.jsonl")
    with ExitStack() as stack:
        if own:
            if not (folder / part).is_dir():
                export_gguf(adapter, folder / part, arguments.gguf)
            runtime = stack.enter_context(LlamaCppRuntime(adapter, folder / part))
            ways = _by(runtime.generate, {"full": FULL, **lossless_policies(adapter)[1]})
        elif arguments.gguf:
            ways = ways_in_llama_cpp(adapter, table, arguments.gguf, folder / part, stack)
        else:
            ways = ways_of(adapter, table)
        told = Kept(folder / f"{part}.jsonl").answers(
            {name: partial(answered, way) for name, way in ways.items()},
            held, lambda example: encoder.prompts([example]), part,
        )  # fmt: skip
    RECORD.add({part: summary(told)}, arguments.out)


if __name__ == "__main__":
    main()
