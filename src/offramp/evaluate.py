"""Full model and early exit over a task, through the same loop: quality, depth and latency.

Answers are free-running and greedy. Every answer is on disk before the next one is begun, one JSON
object a line, so an interrupted run goes on where it stopped and a finished one is scored again
without a model. A run's folder holds

rows.jsonl    the settings, then for each example and mode: key, mode, answer, ids, depths, seconds,
              decode_seconds, prompt_digest; in dialogue also candidate_scores and ranked_by; in
              lossless mode rounds, the (drafted, accepted) tokens of each
result.json   what `evaluate` returns
"""

from __future__ import annotations

import copy
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from offramp import metrics as quality
from offramp.adapter import Adapter
from offramp.backbone import Backbone, View, dump_fingerprint
from offramp.decode import generate
from offramp.encode import Encoder
from offramp.errors import DataError, InputError, did_you_mean
from offramp.examples import Example, content_digest, examples_digest
from offramp.exits import Exits, first
from offramp.metrics import CAPTION_METRICS, Measure
from offramp.official import Item
from offramp.policy import FULL, Generation, Policy
from offramp.reading import Reading
from offramp.records import JsonlLog, digest_rows, provenance, write_json
from offramp.run import Judge, Run

FORMAT = 1
ROWS, RESULT = "rows.jsonl", "result.json"
MODES = ("full", "early_exit", "both")
RANKINGS = ("sum", "mean")
TASKS = ("captions", "vqa", "okvqa", "gqa", "dialogue")
_VQA = ("vqa_accuracy",)
TASK_METRICS: dict[str, tuple[str, ...]] = {
    "captions": CAPTION_METRICS,
    "vqa": _VQA,
    "okvqa": _VQA,
    "gqa": ("exact_match", "exact_match_normalised"),
    "dialogue": ("recall@1", "recall@5", "recall@10", "mean_rank", "mrr", "ndcg"),
}
_LONGEST = {"captions": 40, "vqa": 10, "okvqa": 10, "gqa": 10, "dialogue": 20}


@dataclass(frozen=True)
class Settings:
    """One evaluation. What changes an answer is stored with the answers.

    mode: "full", "early_exit", or "both", which takes turns at every example.
    batch_size: 1 measures latency; more measures quality only.
    max_new_tokens: longest answer; None: by task (captions 40, questions 10, dialogue 20).
    ranking: a candidate's score is the "sum" of its tokens' log-probabilities, its end included
        (the likelihood itself), or their "mean" (length-normalised).
    candidates_at_once: candidates scored in one pass; changes memory and speed, not the scores.
    metrics: those of `TASK_METRICS` to compute; None: all of the task's.
    tokenizer: of captions; see `offramp.metrics.caption_scores`.
    confidence, resamples, seed: of the bootstrap intervals.
    """

    task: str
    mode: str = "both"
    batch_size: int = 1
    max_new_tokens: int | None = None
    ranking: str = "sum"
    candidates_at_once: int = 25
    metrics: tuple[str, ...] | None = None
    tokenizer: str = "auto"
    confidence: float = 0.95
    resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("Task", self.task, TASKS),
            ("Mode", self.mode, MODES),
            ("Ranking", self.ranking, RANKINGS),
            ("Tokenizer", self.tokenizer, quality.TOKENIZERS),
        ):
            if value not in allowed:
                raise InputError(f"{name} {value!r} is not known.", did_you_mean(value, allowed))
        quality.check_metrics(self.metrics or (), TASK_METRICS[self.task])
        counts = ("batch_size", "candidates_at_once", "resamples", "longest")
        wrong = [f"{n} is {getattr(self, n)}" for n in counts if getattr(self, n) < 1]
        if not 0 < self.confidence < 1:
            wrong.append(f"confidence is {self.confidence}")
        if wrong:
            raise InputError(
                f"This evaluation cannot start: {'; '.join(wrong)}.",
                "Give counts of 1 or more, and a confidence between 0 and 1.",
            )

    @property
    def modes(self) -> tuple[str, ...]:
        return ("full", "early_exit") if self.mode == "both" else (self.mode,)

    @property
    def longest(self) -> int:
        return _LONGEST[self.task] if self.max_new_tokens is None else self.max_new_tokens

    @property
    def wanted(self) -> tuple[str, ...]:
        return TASK_METRICS[self.task] if self.metrics is None else self.metrics


def evaluate(
    model: Adapter | Backbone,
    encoder: Encoder,
    examples: Sequence[Item | Example],
    task: str,
    policy: Policy | None = None,
    *,
    out: str | Path,
    resume: bool = False,
    progress: Any = iter,
    **settings: Any,
) -> dict[str, Any]:
    """Answer every example, full and with early exits, and score the answers.

    Args:
        model: an adapter; or a backbone, for the full model alone (mode "full").
        examples: with references; for dialogue, `Item`s with candidates.
        task: of `TASKS`.
        policy: when tokens leave early. Default: the adapter's.
        out: the run's folder; see the module for its files.
        resume: go on with the run in `out`; what is answered there is kept.
        progress: wraps the batches that are still to do.
        settings: fields of `Settings`.

    Returns:
        `n` examples; by mode `metrics` (each with value, low, high and maybe a note), `unavailable`
        (metric: why), `by_group`, `tokens`, `mean_depth`, `depth_shares`, `latency`, for dialogue
        `ranked_by`, in lossless mode `drafted` and `accepted` tokens; with both modes `compared`:
        `agreement`, `difference` (early exit minus full) and `speedup`, with intervals from the
        same draws. `provenance` says what ran, and when.

    Raises:
        InputError: an argument or setting cannot be used, or `out` holds another run.
        DataError: the examples cannot be evaluated on this task.
        StorageError: a file cannot be read or written.
    """
    plan = Settings(task, **settings)
    items = as_items(examples, plan)
    judge = _Answerer(model, encoder, plan, policy)
    rows = _Rows(Path(out) / ROWS, judge.stored(), resume=resume)
    digests = {item.key: prompt_digest(item) for item in items}
    rows.check(digests)
    with rows:
        _fill(rows, judge, items, digests, progress)
    return _scored(rows.done, items, plan, judge.stored(), Path(out))


def rescore(
    out: str | Path, examples: Sequence[Item | Example], task: str, **settings: Any
) -> dict[str, Any]:
    """Score the answers in a run's folder again, with other metrics or data; no model runs.

    Examples that have no answer there are left out and counted under `missing`.
    """
    plan = Settings(task, **settings)
    items = as_items(examples, plan)
    stored, done = _read_rows(Path(out) / ROWS)
    if stored.get("task") != task:
        raise InputError(
            f"{out} holds answers to the task {stored.get('task')!r}, not {task!r}.",
            "Give the task that was run.",
        )
    _check_digests(done, {item.key: prompt_digest(item) for item in items}, Path(out) / ROWS)
    modes = tuple(m for m in plan.modes if any(mode == m for mode, _ in done))
    if not modes:
        raise DataError(
            f"{out} holds no answers of mode {plan.mode}.", "Run offramp eval without --rescore."
        )
    mode = "both" if len(modes) == 2 else modes[0]
    return _scored(done, items, replace(plan, mode=mode), stored, Path(out))


def _scored(
    done: Done, items: Sequence[Item], plan: Settings, stored: Mapping[str, Any], out: Path
) -> dict[str, Any]:
    """The result, with its origin, written to the run's folder."""
    digest = examples_digest(item.example for item in items)
    result = score(done, items, plan, stored)
    result["provenance"] = provenance(plan.seed, sys.argv, digest)
    write_json(out / RESULT, result)
    return result


def as_items(examples: Sequence[Item | Example], plan: Settings) -> list[Item]:
    """Examples with what the task needs, before anything is generated.

    Raises:
        DataError: an example lacks it.
        InputError: a package that the task's metrics need is not installed.
    """
    items = [e if isinstance(e, Item) else Item(e) for e in examples]
    if not items:
        raise DataError("There are no examples to evaluate.", "Give at least one.")
    twice = next((key for key, n in Counter(i.key for i in items).items() if n > 1), None)
    if twice is not None:
        raise DataError(
            f"Two examples have the key {twice!r}.", "Give every example a key of its own."
        )
    for item in items:
        if plan.task == "dialogue" and (len(item.candidates) < 2 or item.gold is None):
            raise DataError(
                f"Example {item.key!r} has no candidates to rank.",
                "Use VisDial's files for --task dialogue, or another task for free answers.",
            )
        if not item.references:
            raise DataError(
                f"Example {item.key!r} has no reference to compare an answer with.",
                "Add 'captions' or 'answers' to the data.",
            )
        if plan.task in ("vqa", "okvqa"):
            quality.vqa_accuracy("", item.references)  # refuses another number than its own
    if plan.task == "captions":
        quality.need_pycocoevalcap()
    return items


def prompt_digest(item: Item) -> str:
    """SHA-256 over what the model is asked: prompt, picture and candidates."""
    asked = [item.example.prompt, content_digest(item.example.image), list(item.candidates)]
    return digest_rows([asked])


# -- answering ----------------------------------------------------------------------------------


class _Answerer:
    """Answers batches of items by mode."""

    def __init__(
        self,
        model: Adapter | Backbone,
        encoder: Encoder,
        plan: Settings,
        policy: Policy | None,
    ) -> None:
        self.adapter = model if isinstance(model, Adapter) else None
        self.backbone = model.backbone if isinstance(model, Adapter) else model
        self.encoder, self.plan = encoder, plan
        if self.adapter is None and (plan.mode != "full" or policy is not None):
            raise InputError(
                f"{'A policy' if plan.mode == 'full' else f'Mode {plan.mode}'} needs exits, and a "
                "backbone has none.",
                "Give an adapter, or evaluate with mode 'full'.",
            )
        given = policy if policy is not None else self.adapter.policy if self.adapter else FULL
        self.policies = {"full": FULL, "early_exit": given}
        if plan.mode != "full" and not given.thresholds:
            logging.warning("The policy has no thresholds, so no token leaves early.")
        if plan.task == "dialogue" and given.kv != "recompute":
            logging.warning(
                "Under KV policy %s a candidate's likelihood depends on where earlier tokens left; "
                "the full model ranks in both modes.", given.kv,
            )  # fmt: skip

    def stored(self) -> dict[str, Any]:
        """What the answers depend on: a run with other values is not gone on with."""
        adapter = self.adapter
        trained: list[nn.Module] = (
            [m for m in (adapter.exits, adapter.discriminators) if m] if (adapter) else []
        )
        return {
            "format": FORMAT,
            "task": self.plan.task,
            "backbone": self.backbone.name,
            "fingerprint": digest_rows([dump_fingerprint(self.backbone.fingerprint())]),
            "exits": _digest(trained) if trained else None,
            "policy": _policy_json(self.policies["early_exit"]) if adapter else None,
            "layers": self.backbone.depth,
            "dtype": str(self.backbone.dtype).removeprefix("torch."),
            "device": self.backbone.device.type,
            "batch_size": self.plan.batch_size,
            "max_new_tokens": self.plan.longest,
            "ranking": self.plan.ranking if self.plan.task == "dialogue" else None,
        }

    def answer(self, items: Sequence[Item], mode: str) -> list[dict[str, Any]]:
        """A row for each item; seconds only for batches of one."""
        from transformers import StoppingCriteriaList

        from offramp.measure import FirstToken

        examples = [item.example for item in items]
        inputs = self.encoder.prompts(examples)
        self.encoder.check_room(inputs, [(item.key, self.plan.longest) for item in items])
        clock = FirstToken()
        begin = time.perf_counter()
        result = self._generate(inputs, mode, StoppingCriteriaList([clock]))
        end = time.perf_counter()
        assert clock.seconds is not None
        alone = self.plan.batch_size == 1
        times: dict[str, Any] = {
            "seconds": end - begin if alone else None,
            "decode_seconds": end - clock.seconds if alone else None,
        }
        if alone and result.rounds:  # lossless
            times["rounds"] = [list(pair) for pair in result.rounds]
        texts = self.encoder.texts(result.new_tokens)
        live = result.depths > 0
        rows = []
        for place, (item, text) in enumerate(zip(items, texts, strict=True)):
            ids, depths = result.new_tokens[place], result.depths[place]
            keep = live[place]
            rows.append(
                {"key": item.key, "mode": mode, "answer": text, "ids": ids[keep].tolist(),
                 "depths": depths[keep].tolist(), **times, **self._ranked(item, mode)}
            )  # fmt: skip
        return rows

    def warm(self, items: Sequence[Item], mode: str) -> None:
        """Generate once without a clock."""
        self._generate(self.encoder.prompts([item.example for item in items]), mode, None)

    def _generate(self, inputs: Mapping[str, Any], mode: str, stop: Any) -> Generation:
        return generate(
            self.backbone,
            inputs,
            exits=self.adapter.exits if self.adapter else None,
            policy=self.policies[mode],
            discriminators=self.adapter.discriminators if self.adapter else None,
            max_new_tokens=self.plan.longest,
            do_sample=False,
            num_beams=1,
            stopping_criteria=stop,
        )

    def _ranked(self, item: Item, mode: str) -> dict[str, Any]:
        if self.plan.task != "dialogue":
            return {}
        policy = self.policies[mode]
        followed = follows_policy(policy)
        scores = candidate_scores(
            self.encoder,
            item.example,
            item.candidates,
            exits=self.adapter.exits if self.adapter else None,
            policy=policy if followed else FULL,
            discriminators=self.adapter.discriminators if self.adapter else None,
            ranking=self.plan.ranking,
            at_once=self.plan.candidates_at_once,
        )
        by = "policy" if followed and policy.thresholds else "full"
        return {"candidate_scores": scores, "ranked_by": by}


def _policy_json(policy: Policy) -> dict[str, Any]:
    """Every field of a policy, so that none can change unnoticed."""
    return {**asdict(policy), "thresholds": {str(d): t for d, t in policy.thresholds.items()}}


def _digest(modules: Sequence[nn.Module]) -> str:
    """SHA-256 over the tensors of trained modules."""
    import hashlib

    found = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            found.update(name.encode())
            found.update(tensor.detach().cpu().float().numpy().tobytes())
    return found.hexdigest()


def _fill(
    rows: _Rows,
    answerer: _Answerer,
    items: Sequence[Item],
    digests: Mapping[str, str],
    progress: Any,
) -> None:
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
                rows.add({**row, "prompt_digest": digests[row["key"]]})


Done = dict[tuple[str, str], dict[str, Any]]
"""Rows by mode and key."""


class _Rows:
    """The answers on disk: what is there already, and a log to add to."""

    def __init__(self, path: Path, stored: Mapping[str, Any], *, resume: bool) -> None:
        self.path = path
        self.done: Done = {}
        started = path.exists() and path.stat().st_size > 0
        if started:
            if not resume:
                raise InputError(
                    f"{path.parent} already holds answers.",
                    "Give --resume to go on with that run, or another --out.",
                )
            before, self.done = _read_rows(path)
            differs = [n for n in stored if stored[n] != before.get(n)]
            if differs:
                name = differs[0]
                raise InputError(
                    f"{path.parent} holds a run with other settings: {', '.join(differs)} "
                    f"({name} was {before.get(name)}, now {stored[name]}).",
                    "Give the settings of that run, or another --out.",
                )
        self._log = JsonlLog(path)
        if not started:
            self._log.append({"settings": dict(stored)})

    def check(self, digests: Mapping[str, str]) -> None:
        try:
            _check_digests(self.done, digests, self.path)
        except DataError:
            self._log.close()
            raise

    def add(self, row: dict[str, Any]) -> None:
        self._log.append(row)
        self.done[row["mode"], row["key"]] = row

    def __enter__(self) -> _Rows:
        return self

    def __exit__(self, *_: object) -> None:
        self._log.close()


def _read_rows(path: Path) -> tuple[dict[str, Any], Done]:
    """The settings and the answers of a run."""
    rows = JsonlLog.read(path)
    stored = rows[0].get("settings") if rows else None
    whole = ("key", "mode", "answer", "ids", "depths", "prompt_digest")
    if not isinstance(stored, dict) or not all(n in row for row in rows[1:] for n in whole):
        raise DataError(
            f"{path} was not written by this version of offramp eval.",
            "Evaluate again into another folder.",
        )
    return stored, {(row["mode"], row["key"]): row for row in rows[1:]}


def _check_digests(done: Done, digests: Mapping[str, str], path: Path) -> None:
    for (_, key), row in done.items():
        if digests.get(key, row["prompt_digest"]) != row["prompt_digest"]:
            raise DataError(
                f"Example {key!r} asks something else than it did when {path} was written.",
                "Evaluate the data that was used there, or give another --out.",
            )


# -- ranking ------------------------------------------------------------------------------------


def follows_policy(policy: Policy) -> bool:
    """Whether the likelihood of a given text is well defined under this policy.

    With exact keys and values the logits at (token, depth) do not depend on where earlier tokens
    left, so one pass over a candidate tells every token's exit and its probability there. With
    propagated ones they do; candidates are then ranked by the full model. So they are in lossless
    mode, where what comes out is the full model's.
    """
    return policy.kv == "recompute" and not policy.lossless


class _ReadAll:
    """A driver that runs every layer and, on the way, the exits at `depths`."""

    def __init__(self, backbone: Backbone, exits: Exits | None, depths: Sequence[int]) -> None:
        self._exits, self._depths, self._last = exits, frozenset(depths), backbone.depth - 1
        self.entries: dict[int, Tensor] = {}
        self.states: dict[int, Tensor] = {}

    def layer(
        self,
        index: int,
        layer: nn.Module,
        hidden: Tensor,
        args: tuple[Any, ...],
        kw: dict[str, Any],
    ) -> Any:
        if index in self._depths:
            assert self._exits is not None
            self.entries[index] = hidden
            self.states[index] = self._exits.run(index, hidden, args, kw)
        out = layer(hidden, *args, **kw)
        if index == self._last:
            self.states[self._last + 1] = first(out)
        return out

    def take(self, start: int) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Entries and states by depth of the last call, from token `start` on; L is the model's."""
        return (
            {depth: hidden[:, start:] for depth, hidden in self.entries.items()},
            {depth: state[:, start:] for depth, state in self.states.items()},
        )


@torch.inference_mode()
def candidate_scores(
    encoder: Encoder,
    example: Example,
    candidates: Sequence[str],
    *,
    exits: Exits | None = None,
    policy: Policy = FULL,
    discriminators: nn.ModuleDict | None = None,
    ranking: str = "sum",
    at_once: int = 25,
) -> list[float]:
    """Log-likelihood of each candidate after the example's prompt, its end token included.

    The prompt is read once; candidates follow it teacher-forced, `at_once` in a pass. Under a
    policy each token counts with its probability at the depth where it would leave. All layers
    run all the same, so this takes as long as the full model.

    Raises:
        DataError: a candidate is longer than the backbone's positions.
    """
    backbone = encoder.backbone
    ids = [encoder.answer_ids(example.prompt, text) for text in candidates]
    prompts = encoder.prompts([example])
    encoder.check_room(prompts, [(example.key, max(map(len, ids)))])
    run = Run(backbone, exits, policy, discriminators)
    driver = _ReadAll(backbone, exits, tuple(run.thresholds))
    view = View(backbone, driver)
    pick = _Pick(backbone, run.thresholds, policy, discriminators)
    found: list[float] = []

    def read(model: Any, input_ids: Tensor, generation_config: Any = None, **kw: Any) -> Tensor:
        for name in ("logits_processor", "stopping_criteria"):
            kw.pop(name, None)
        run.adopt(kw["cache"] if "cache" in kw else kw["past_key_values"])
        reading = Reading(view, model, input_ids, kw)
        prompt = driver.take(-1)
        for start in range(0, len(ids), at_once):
            rows, mask = encoder.pad(ids[start : start + at_once])
            states = [_repeat_states(part, len(rows)) for part in prompt]
            if rows.shape[1] > 1:
                again = copy.copy(reading)  # `advance` moves its positions on
                kw = _repeated(again.advance(rows.shape[1] - 1), len(rows))
                view.stack(input_ids=rows[:, :-1], **kw)
                states = [_join(a, b) for a, b in zip(states, driver.take(0), strict=True)]
            log_p = torch.where(mask, pick(states[0], states[1], rows), 0.0).double().sum(1)
            found.extend((log_p / mask.sum(1) if ranking == "mean" else log_p).tolist())
        return input_ids

    view.model.generate(**prompts, custom_generate=read, max_new_tokens=1)
    return found


class _Pick:
    """Log-probabilities of given tokens, each at the depth where the policy lets it leave."""

    def __init__(
        self,
        backbone: Backbone,
        thresholds: Mapping[int, float],
        policy: Policy,
        discriminators: nn.ModuleDict | None,
    ) -> None:
        self._backbone, self._thresholds = backbone, thresholds
        self._judge = Judge(backbone, policy.score, discriminators) if thresholds else None
        # The first token comes out of the prompt's own pass; see `offramp.decode`.
        self._from_prompt = backbone.is_encoder_decoder or (
            policy.exit_in_prefill and backbone.family.causal_prompt
        )

    def __call__(
        self, entries: Mapping[int, Tensor], states: Mapping[int, Tensor], ids: Tensor
    ) -> Tensor:
        """[B, A] for ids [B, A] and, by depth, what predicts them [B, A, D]."""
        full = self._backbone.finish(states[self._backbone.depth])
        found = _log_p(self._backbone.read(full), ids)
        open_ = torch.ones_like(ids, dtype=torch.bool)
        open_[:, 0] = self._from_prompt
        for depth, threshold in sorted(self._thresholds.items()):
            assert self._judge is not None
            state, entry = states[depth].flatten(0, 1), entries[depth].flatten(0, 1)
            logits, score = self._judge(depth, state, entry)
            leaves = open_ & (score.view_as(ids) >= threshold)
            found = torch.where(leaves, _log_p(logits.view(*ids.shape, -1), ids), found)
            open_ &= ~leaves
        return found


def _log_p(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def _repeat_states(states: Mapping[int, Tensor], rows: int) -> dict[int, Tensor]:
    return {depth: state.expand(rows, -1, -1) for depth, state in states.items()}


def _join(before: Mapping[int, Tensor], after: Mapping[int, Tensor]) -> dict[int, Tensor]:
    return {depth: torch.cat([before[depth], after[depth]], 1) for depth in before}


def _repeated(kw: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The stack's arguments for one row, for many; the cache is copied, not shared."""
    many: dict[str, Any] = {}
    for name, value in kw.items():
        if name in ("cache", "past_key_values"):
            many[name] = copy.deepcopy(value)
            many[name].batch_repeat_interleave(rows)
        elif name == "position_ids":  # [1, T], and in some families [3, 1, T]
            many[name] = value.repeat_interleave(rows, -2)
        elif isinstance(value, Tensor):
            many[name] = value.repeat_interleave(rows, 0)
        else:
            many[name] = value
    return many


# -- scoring ------------------------------------------------------------------------------------


def score(
    done: Done, items: Sequence[Item], plan: Settings, stored: Mapping[str, Any]
) -> dict[str, Any]:
    """Metrics of the answers that are there; see `evaluate` for the result's keys."""
    answered = [i for i in items if all((m, i.key) in done for m in plan.modes)]
    if not answered:
        raise DataError("None of these examples has been answered.", "Evaluate them first.")
    missing = len(items) - len(answered)
    if missing:
        logging.warning("%d of %d examples have no answer and are left out.", missing, len(items))
    rows = {m: [done[m, i.key] for i in answered] for m in plan.modes}
    measured = {m: _measured(rows[m], answered, plan) for m in plan.modes}
    for metric, why in measured[plan.modes[0]].unavailable.items():
        logging.warning("%s is unavailable: %s.", metric, why)
    if note := measured[plan.modes[0]].tokenizer_note:
        logging.warning("Captions were split into words %s.", note)
    result = {
        "task": plan.task,
        "n": len(answered),
        "missing": missing,
        "settings": {**stored, "scoring": _scoring(plan)},
        "modes": {m: _mode(rows[m], answered, plan, measured[m], stored) for m in plan.modes},
    }
    if len(plan.modes) == 2:
        result["compared"] = _compared(rows, answered, plan, measured)
    return result


def _scoring(plan: Settings) -> dict[str, Any]:
    kept = ("confidence", "resamples", "seed")
    return {n: v for n, v in asdict(plan).items() if n in kept}


@dataclass(frozen=True)
class _Measured:
    measures: dict[str, Measure]
    unavailable: dict[str, str]
    tokenizer: str | None = None
    tokenizer_note: str = ""


def _measured(rows: Sequence[dict[str, Any]], items: Sequence[Item], plan: Settings) -> _Measured:
    """The task's metrics of these rows, in the order of the items."""
    return _MEASURERS[plan.task](rows, items, plan)


def _measure_captions(
    rows: Sequence[dict[str, Any]], items: Sequence[Item], plan: Settings
) -> _Measured:
    found = quality.caption_scores(
        {item.key: row["answer"] for item, row in zip(items, rows, strict=True)},
        {item.key: item.references for item in items},
        metrics=plan.wanted,
        tokenizer=plan.tokenizer,
    )
    return _Measured(found.measures, found.unavailable, found.tokenizer, found.tokenizer_note)


def _measure_questions(
    rows: Sequence[dict[str, Any]], items: Sequence[Item], plan: Settings
) -> _Measured:
    pairs = [(row["answer"], item.references) for item, row in zip(items, rows, strict=True)]
    judges: dict[str, Callable[[str, Sequence[str]], float]] = {
        "vqa_accuracy": quality.vqa_accuracy,
        "exact_match": quality.exact_match,
        "exact_match_normalised": lambda a, b: quality.exact_match(a, b, normalise=True),
    }
    return _Measured(
        {n: quality.mean_of([judges[n](a, b) for a, b in pairs]) for n in plan.wanted}, {}
    )


def _measure_dialogue(
    rows: Sequence[dict[str, Any]], items: Sequence[Item], plan: Settings
) -> _Measured:
    both = list(zip([row["candidate_scores"] for row in rows], items, strict=True))
    ranks = [quality.gold_rank(scores, item.gold or 0) for scores, item in both]
    measures = quality.rank_measures(ranks)
    unavailable = {}
    gains = [quality.ndcg(s, i.relevance) if i.relevance else None for s, i in both]
    if any(gain is not None for gain in gains):
        measures["ndcg"] = quality.mean_of_some(gains)
    elif "ndcg" in plan.wanted:
        unavailable["ndcg"] = "the data came without dense annotations"
    return _Measured({n: m for n, m in measures.items() if n in plan.wanted}, unavailable)


_MEASURERS: dict[str, Callable[[Sequence[dict[str, Any]], Sequence[Item], Settings], _Measured]] = {
    "captions": _measure_captions,
    "vqa": _measure_questions,
    "okvqa": _measure_questions,
    "gqa": _measure_questions,
    "dialogue": _measure_dialogue,
}


def _mode(
    rows: Sequence[dict[str, Any]],
    items: Sequence[Item],
    plan: Settings,
    measured: _Measured,
    stored: Mapping[str, Any],
) -> dict[str, Any]:
    depths = Counter(depth for row in rows for depth in row["depths"])
    tokens = sum(depths.values())
    found: dict[str, Any] = {
        "metrics": _with_intervals(measured.measures, items, plan),
        "unavailable": measured.unavailable,
        "by_group": _by_group(rows, items, plan),
        "tokens": tokens,
        "layers": stored["layers"],
        "mean_depth": sum(d * n for d, n in depths.items()) / tokens if tokens else None,
        "depth_shares": {str(d): n / tokens for d, n in sorted(depths.items())},
        "latency": _latency(rows),
    }
    if measured.tokenizer is not None:
        found["tokenizer"] = measured.tokenizer
        if measured.tokenizer_note:
            found["tokenizer_note"] = measured.tokenizer_note
    if rounds := [pair for row in rows for pair in row.get("rounds", ())]:
        found["drafted"], found["accepted"] = (sum(pair[k] for pair in rounds) for k in (0, 1))
    if plan.task == "dialogue":
        found["ranked_by"] = sorted({row["ranked_by"] for row in rows})
    return found


def _with_intervals(
    measures: Mapping[str, Measure], items: Sequence[Item], plan: Settings
) -> dict[str, Any]:
    return {name: _shown(measure, items, plan) for name, measure in measures.items()}


def _shown(
    measure: Measure, items: Sequence[Item], plan: Settings, minus: Measure | None = None
) -> dict[str, Any]:
    """A metric as JSON; questions about one picture are resampled together."""
    ends = quality.interval(
        measure,
        [item.example.group or item.key for item in items],
        minus=minus,
        confidence=plan.confidence,
        resamples=plan.resamples,
        seed=plan.seed,
    )
    low, high = ends or (None, None)
    value = measure.value - (minus.value if minus is not None else 0.0)
    found: dict[str, Any] = {"value": value, "low": low, "high": high}
    if measure.note:
        found["note"] = measure.note
    return found


def _by_group(
    rows: Sequence[dict[str, Any]], items: Sequence[Item], plan: Settings
) -> dict[str, Any]:
    """Metrics within each group that the data names, such as VQA's answer types."""
    found: dict[str, Any] = {}
    for name in sorted({n for item in items for n in item.groups}):
        values = sorted({item.groups[name] for item in items if name in item.groups})
        for value in values:
            places = [k for k, item in enumerate(items) if item.groups.get(name) == value]
            some = [items[k] for k in places]
            measured = _measured([rows[k] for k in places], some, plan)
            shown = {"n": len(some), **_with_intervals(measured.measures, some, plan)}
            found.setdefault(name, {})[value] = shown
    return found


def _latency(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Seconds an answer takes, from processed input on; None where batches were larger than 1."""
    if any(row.get("seconds") is None for row in rows):
        return None
    found: dict[str, Any] = {}
    for name in ("seconds", "decode_seconds"):
        p50, p95 = np.percentile([row[name] for row in rows], [50, 95])
        found[name] = {"p50": float(p50), "p95": float(p95)}
    decoded = sum(len(row["ids"]) - 1 for row in rows)
    took = sum(row["decode_seconds"] for row in rows)
    found["tokens_per_second"] = decoded / took if took > 0 and decoded else None
    return found


def _compared(
    rows: Mapping[str, Sequence[dict[str, Any]]],
    items: Sequence[Item],
    plan: Settings,
    measured: Mapping[str, _Measured],
) -> dict[str, Any]:
    full, early = rows["full"], rows["early_exit"]
    same = quality.mean_of([float(a["ids"] == b["ids"]) for a, b in zip(full, early, strict=True)])
    before, after = measured["full"].measures, measured["early_exit"].measures
    return {
        "agreement": _shown(same, items, plan),
        "difference": {n: _shown(after[n], items, plan, before[n]) for n in after if n in before},
        "speedup": {
            n: _speedup(full, early, name, items, plan)
            for n, name in (("end_to_end", "seconds"), ("decode", "decode_seconds"))
        },
    }


def _speedup(
    full: Sequence[dict[str, Any]],
    early: Sequence[dict[str, Any]],
    name: str,
    items: Sequence[Item],
    plan: Settings,
) -> dict[str, Any] | None:
    """Seconds of the full model over those of early exit, summed over examples."""
    pairs = [(a[name], b[name]) for a, b in zip(full, early, strict=True)]
    if any(a is None or b is None for a, b in pairs) or not sum(b for _, b in pairs) > 0:
        return None
    sums = np.asarray(pairs, dtype=np.float64)
    ratio = float(sums[:, 0].sum() / sums[:, 1].sum())
    return _shown(Measure(ratio, sums), items, plan)
