"""What is evaluated: the tasks with their metrics, an item of one, and the settings of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from offramp.core.errors import DataError, InputError, check_known
from offramp.data.item import Item
from offramp.evaluation.caption_metrics import CAPTION_METRICS, TOKENIZERS, need_pycocoevalcap
from offramp.evaluation.metrics import vqa_accuracy
from offramp.inputs.example import Example

WHICH = ("full", "early_exit", "both")
_VQA = ("vqa_accuracy",)
TASK_METRICS: dict[str, tuple[str, ...]] = {
    "captions": CAPTION_METRICS,
    "vqa": _VQA,
    "okvqa": _VQA,
    "gqa": ("exact_match", "exact_match_normalised"),
    "dialogue": ("recall@1", "recall@5", "recall@10", "mean_rank", "mrr", "ndcg"),
}
TASKS = tuple(TASK_METRICS)
_LONGEST = {"captions": 40, "dialogue": 20}
_LONGEST_ANSWER = 10  # to a question


@dataclass(frozen=True)
class EvaluationSettings:
    """The settings of one evaluation. Those that change an answer are stored with the answers.

    mode: "full", "early_exit", or "both", which takes turns at every example. batch_size: 1
    measures latency; more measures quality only. max_new_tokens: longest answer; None: by task
    (captions 40, questions 10, dialogue 20). candidates_at_once: candidates scored in one pass;
    changes memory and speed, not the scores. metrics: of `TASK_METRICS`; None: all of the task's.
    tokenizer: for captions; see `offramp.evaluation.caption_metrics.caption_scores`. confidence,
    resamples, seed: of the bootstrap intervals.
    """

    task: str
    mode: str = "both"
    batch_size: int = 1
    max_new_tokens: int | None = None
    candidates_at_once: int = 25
    metrics: tuple[str, ...] | None = None
    tokenizer: str = "auto"
    confidence: float = 0.95
    resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        check_known("Task", [self.task], TASKS)
        check_known("Mode", [self.mode], WHICH)
        check_known("Tokenizer", [self.tokenizer], TOKENIZERS)
        check_known("Metric", self.wanted, TASK_METRICS[self.task])
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
        if self.max_new_tokens is None:
            return _LONGEST.get(self.task, _LONGEST_ANSWER)
        return self.max_new_tokens

    @property
    def wanted(self) -> tuple[str, ...]:
        return TASK_METRICS[self.task] if self.metrics is None else self.metrics


def as_items(examples: Sequence[Item | Example], task: str) -> list[Item]:
    """Return examples as items with all that the task needs, before anything is generated.

    Raises:
        DataError: an example lacks something that the task needs.
        InputError: a package that the task's metrics need is not installed.
    """
    items = [e if isinstance(e, Item) else Item(e) for e in examples]
    if not items:
        raise DataError("There are no examples to evaluate.", "Give at least one.")
    key, times = Counter(item.key for item in items).most_common(1)[0]
    if times > 1:
        raise DataError(f"Two examples have the key {key!r}.", "Give every example its own key.")
    for item in items:
        if task == "dialogue" and (len(item.candidates) < 2 or item.gold is None):
            raise DataError(
                f"Example {item.key!r} has no candidates to rank.",
                "Use VisDial's files for --task dialogue, or another task for free answers.",
            )
        if not item.references:
            raise DataError(
                f"Example {item.key!r} has no reference to compare an answer with.",
                "Add 'captions' or 'answers' to the data.",
            )
        if task in ("vqa", "okvqa"):
            vqa_accuracy("", item.references)  # refuses another number than its own
    if task == "captions":
        need_pycocoevalcap()
    return items
