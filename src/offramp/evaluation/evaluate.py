"""Full model and early exit over a task, through the same loop: quality, depth and latency.

Answers are free-running and greedy. Every answer is on disk before the next one is begun, one JSON
object a line, so an interrupted run goes on where it stopped and a finished one is scored again
without a model. A run's folder holds rows.jsonl, see `run_log`, and result.json, which is what
`evaluate` returns.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from offramp.adapter.adapter import Adapter
from offramp.adapter.answers import GREEDY, answers_of
from offramp.adapter.runtime import Runtime
from offramp.common.folders import locked_folder
from offramp.common.provenance import provenance
from offramp.core.decoding.policy import FULL, ExitPolicy, GenerationOutput, policy_to_json
from offramp.core.engine.generate import generate
from offramp.core.errors import DataError, InputError
from offramp.core.models.as_loaded import tensors_digest
from offramp.core.models.backbone import Backbone
from offramp.core.models.fingerprint import dump_fingerprint, fingerprint
from offramp.core.storage import digest_rows, write_json
from offramp.data.decontamination import check_no_overlap
from offramp.data.item import Item
from offramp.evaluation.loglikelihood import candidate_scores, follows_policy
from offramp.evaluation.results import score
from offramp.evaluation.run_log import ROWS, Done, Row, RunLog, check_digests, read_rows
from offramp.evaluation.tasks import EvaluationSettings, as_items
from offramp.features.input_processor import InputProcessor
from offramp.inputs.example import Example, examples_digest
from offramp.promises.conditions import kernels

log = logging.getLogger(__name__)

FORMAT = 1
RESULT = "result.json"


def evaluate(
    model: Adapter | Backbone | nn.Module,
    encoder: InputProcessor,
    examples: Sequence[Item | Example],
    task: str,
    policy: ExitPolicy | None = None,
    *,
    out: str | Path,
    runtime: Runtime | None = None,
    resume: bool = False,
    allow_seen: bool = False,
    progress: Any = iter,
    **settings: Any,
) -> dict[str, Any]:
    """Answer every example, at full depth and with early exits, and score the answers.

    Args:
        model: an adapter; or a backbone, for the full model alone (mode "full").
        examples: with references; for dialogue, `Item`s with candidates.
        task: of `offramp.evaluation.tasks.TASKS`.
        policy: of the early exits. Default: the adapter's; for a batch of one, that of the prompt's
            kind, if kinds were calibrated.
        out: the run's folder; see the module for its files.
        runtime: answers in the adapter's place; not for dialogue, whose candidates PyTorch ranks.
        resume: go on with the run in `out`; its answers are kept.
        allow_seen: take images that the adapter was trained or calibrated on.
        progress: wraps the remaining batches.
        settings: fields of `offramp.evaluation.tasks.EvaluationSettings`.

    Returns:
        `n` examples; by mode `metrics` (each with value, low, high and maybe a note), `unavailable`
            (metric: why), `by_group`, `tokens`, `mean_depth`, `depth_shares`, `latency`, for
            dialogue `ranked_by`, in lossless mode `drafted` and `accepted` tokens; with both modes
            `compared`: `agreement`, `difference` (early exit minus full) and `speedup`, with
            intervals from the same draws. `provenance`: command, versions, machine and time.

    Raises:
        InputError: an argument or setting cannot be used, or `out` holds another run.
        DataError: the examples cannot be evaluated on this task, or share images with the adapter's
            training or calibration.
        StorageError: a file cannot be read or written, or another run is writing to `out`.
    """
    plan = EvaluationSettings(task, **settings)
    items = as_items(examples, task)
    model = model if isinstance(model, Adapter) else Backbone.of(model)
    if isinstance(model, Adapter) and plan.mode != "full" and not allow_seen:
        check_no_overlap(
            model.seen,
            [item.example for item in items],
            ("train", "calibration"),
            "Evaluate on other images, or allow these with --seen allow: the figures are then too "
            "good.",
        )
    answerer = _Answerer(model, encoder, plan, policy, runtime)
    stored = answerer.stored()
    with locked_folder(out):
        with RunLog(Path(out) / ROWS, stored, items, resume=resume) as rows:
            _fill(rows, answerer, items, progress)
        return _scored(rows.done, items, plan, stored, Path(out))


def rescore(
    out: str | Path, examples: Sequence[Item | Example], task: str, **settings: Any
) -> dict[str, Any]:
    """Score the answers in a run's folder again, with other metrics or data; no model runs.

    Examples without an answer there are left out and counted under `missing`.
    """
    plan = EvaluationSettings(task, **settings)
    items = as_items(examples, task)
    stored, done = read_rows(Path(out) / ROWS)
    if stored.get("task") != task:
        raise InputError(
            f"{out} holds answers to the task {stored.get('task')!r}, not {task!r}.",
            "Give the task that was run.",
        )
    check_digests(done, {item.key: item.digest() for item in items}, Path(out) / ROWS)
    there = {mode for mode, _ in done}.intersection(plan.modes)
    if not there:
        raise DataError(
            f"{out} holds no answers of mode {plan.mode}.", "Run offramp eval without --rescore."
        )
    if len(there) == 1:
        plan = replace(plan, mode=there.pop())
    return _scored(done, items, plan, stored, Path(out))


def _scored(
    done: Done,
    items: Sequence[Item],
    plan: EvaluationSettings,
    stored: Mapping[str, Any],
    out: Path,
) -> dict[str, Any]:
    """The result, with its origin, written to the run's folder."""
    digest = examples_digest(item.example for item in items)
    result = score(done, items, plan, stored)
    result["provenance"] = provenance(plan.seed, sys.argv, digest)
    write_json(out / RESULT, result)
    return result


# -- answering ----------------------------------------------------------------------------------


class _Answerer:
    """Answers batches of items by mode."""

    def __init__(
        self,
        model: Adapter | Backbone,
        encoder: InputProcessor,
        plan: EvaluationSettings,
        policy: ExitPolicy | None,
        runtime: Runtime | None = None,
    ) -> None:
        _check_runtime(runtime, plan)
        self.runtime = runtime
        adapter = model if isinstance(model, Adapter) else None
        self.backbone = model.backbone if isinstance(model, Adapter) else model
        self.exits = adapter.exits if adapter else None
        self.encoder, self.plan = encoder, plan
        if adapter is None and (plan.mode != "full" or policy is not None):
            raise InputError(
                f"{'A policy' if plan.mode == 'full' else f'Mode {plan.mode}'} needs exits, and a "
                "backbone has none.",
                "Give an adapter, or evaluate with mode 'full'.",
            )
        early = policy if policy is not None else adapter.policy if adapter else FULL
        self.policies = {"full": FULL, "early_exit": early}
        self._by_kind = adapter if policy is None else None
        if adapter and plan.mode != "full" and not adapter.spares_layers(early):
            log.warning("The policy has no thresholds, so no token exits early.")
        if plan.task == "dialogue" and early.shortlist:
            log.warning(
                "An exit gives what its shortlist lacks no likelihood; the full model ranks in "
                "both modes. Train with --shortlist 0 to rank with the exits."
            )

    def stored(self) -> dict[str, Any]:
        """What the answers depend on: a run with other values is not resumed."""
        policy = self.policies["early_exit"]
        return {
            "format": FORMAT,
            "task": self.plan.task,
            "backbone": self.backbone.name,
            "fingerprint": digest_rows([dump_fingerprint(fingerprint(self.backbone))]),
            "exits": None if self.exits is None else tensors_digest(self.exits.modules),
            # Every field, so that none can change unnoticed.
            "policy": policy_to_json(policy) if self.exits is not None else None,
            "layers": self.backbone.depth,
            "dtype": str(self.backbone.dtype).removeprefix("torch."),
            "device": self.backbone.device.type,
            "batch_size": self.plan.batch_size,
            "max_new_tokens": self.plan.longest,
            **(
                {"kernels": kernels(self.backbone)}
                if self.runtime is None
                else {"runtime": self.runtime.name}
            ),
            **({"shrink_on_load": True} if self.encoder.smallest_side else {}),
            **({} if self.backbone.tower is None else {"vision": self.backbone.vision_engine}),
        }

    def answer(self, items: Sequence[Item], mode: str) -> list[Row]:
        """A row for each item; seconds only for batches of one."""
        from transformers import StoppingCriteriaList

        from offramp.evaluation.timing import FirstToken

        inputs = self.encoder.prompts([item.example for item in items])
        self.encoder.check_room(inputs, [(item.key, self.plan.longest) for item in items])
        clock = FirstToken()
        begin = time.perf_counter()
        result = self._generate(inputs, self._policy(items, mode), StoppingCriteriaList([clock]))
        end = time.perf_counter()
        assert clock.seconds is not None
        alone = self.plan.batch_size == 1
        times: dict[str, Any] = {
            "seconds": end - begin if alone else None,
            "decode_seconds": end - clock.seconds if alone else None,
        }
        if alone and (result.rounds or any(result.offers)):  # drafts
            times["rounds"] = [list(pair) for pair in result.rounds]
        return [
            {
                "key": item.key,
                "mode": mode,
                "answer": answer.text,
                "ids": list(answer.ids),
                "depths": list(answer.depths),
                **times,
                **self._ranked(item, mode),
            }
            for item, answer in zip(items, answers_of(result, self.encoder), strict=True)
        ]

    def warm(self, items: Sequence[Item], mode: str) -> None:
        """Generate once without a clock."""
        inputs = self.encoder.prompts([item.example for item in items])
        self._generate(inputs, self._policy(items, mode), None)

    def _policy(self, items: Sequence[Item], mode: str) -> ExitPolicy:
        if mode != "early_exit" or self._by_kind is None:
            return self.policies[mode]
        where = None if self.runtime is None else self.runtime.name
        first, *others = (
            self._by_kind.policy_of(item.example.prompt, engine=where) for item in items
        )
        return first if all(policy == first for policy in others) else self.policies[mode]

    def _generate(
        self, inputs: Mapping[str, Any], policy: ExitPolicy, stop: Any
    ) -> GenerationOutput:
        options = {**GREEDY, "max_new_tokens": self.plan.longest, "stopping_criteria": stop}
        if self.runtime is not None:
            return self.runtime.generate(inputs, policy=policy, **options)
        return generate(self.backbone, inputs, exits=self.exits, policy=policy, **options)

    def _ranked(self, item: Item, mode: str) -> dict[str, Any]:
        if self.plan.task != "dialogue":
            return {}
        policy = self.policies[mode] if follows_policy(self.policies[mode]) else FULL
        scores = candidate_scores(
            self.encoder,
            item.example,
            item.candidates,
            exits=self.exits,
            policy=policy,
            at_once=self.plan.candidates_at_once,
        )
        return {"candidate_scores": scores, "ranked_by": "policy" if policy.thresholds else "full"}


def _check_runtime(runtime: Runtime | None, plan: EvaluationSettings) -> None:
    """Raise `InputError` where `runtime` cannot do what is planned."""
    if runtime is None:
        return
    if plan.task == "dialogue":
        raise InputError(
            f"The runtime {runtime.name} ranks no candidates, which dialogue needs.",
            "Evaluate dialogue with --engine torch.",
        )
    if plan.batch_size > runtime.rows:
        raise InputError(
            f"The runtime {runtime.name} answers {runtime.rows} at a time, not {plan.batch_size}.",
            f"Use --batch-size {runtime.rows}.",
        )


def _fill(rows: RunLog, answerer: _Answerer, items: Sequence[Item], progress: Any) -> None:
    """Answer what is not answered yet; modes take turns, so that drift falls on both alike."""
    plan = answerer.plan
    left = [i for i in items if any((m, i.key) not in rows.done for m in plan.modes)]
    batches = [left[i : i + plan.batch_size] for i in range(0, len(left), plan.batch_size)]
    if batches and plan.batch_size == 1:
        for mode in plan.modes:  # first calls are slow
            answerer.warm(batches[0], mode)
    for turn, batch in enumerate(progress(batches)):
        for mode in plan.modes if turn % 2 == 0 else plan.modes[::-1]:
            todo = [item for item in batch if (mode, item.key) not in rows.done]
            for row in answerer.answer(todo, mode) if todo else ():
                rows.add(row)
