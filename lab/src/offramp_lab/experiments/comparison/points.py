"""Points of a comparison: whose exits exit by which rule, their quality and their speed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from offramp.adapter.adapter import Adapter
from offramp.adapter.answers import Answer, answers_to
from offramp.calibration.risk_functions import Quality
from offramp.core.decoding.policy import FULL, ExitPolicy, GenerationOutput, Thresholds
from offramp.core.engine.generate import generate
from offramp.core.models.backbone import Backbone
from offramp.evaluation.timing import generate_fn, speedup, timed
from offramp.features.input_processor import InputProcessor
from offramp.inputs.example import Example
from offramp_lab.experiments.comparison.methods import Plan
from offramp_lab.experiments.experiment import Experiment, identical


@dataclass(frozen=True)
class Entry:
    """A point to be measured: what it is called, and whose exits are used by which rule."""

    seed: int
    objective: str
    policy: str
    adapter: Adapter
    rule: ExitPolicy

    @property
    def name(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "objective": self.objective,
            "policy": self.policy,
            "score": self.rule.score,
            "depths": list(self.rule.thresholds),
            "thresholds": Thresholds(self.rule.thresholds).to_json(),
        }


class PointMeasurer:
    """The test examples with the full model's answers; measures any point against these."""

    def __init__(
        self,
        backbone: Backbone,
        processor: Any,
        test: Sequence[Example],
        plan: Plan,
        quality: Quality | None,
    ) -> None:
        self.backbone, self.plan = backbone, plan
        self.test, self.quality = list(test), quality
        self._options: dict[str, Any] = {"max_new_tokens": plan.max_new_tokens, "do_sample": False}
        self.encoder = InputProcessor(backbone, processor)
        self._batches = _Inputs(self.encoder, self.test, plan.batch_size)
        self.full = self.answers(None, FULL, self._batches)
        self.qualities_full = self._qualities(self.full)
        self.quality_full = float(self.qualities_full.mean())

    def figures(self, entry: Entry) -> dict[str, Any]:
        """Quality of the answers by a point, and how deep their tokens ran; with its name."""
        answers = self.answers(entry.adapter, entry.rule, self._batches)
        qualities = self._qualities(answers)
        quality = float(qualities.mean())
        return {
            **entry.name,
            "quality": quality,
            "quality_drop": (self.quality_full - quality) / max(self.quality_full, 1e-9),
            "agreement": float(identical(answers, self.full).mean()),
            "mean_depth": float(np.mean([depth for a in answers for depth in a.depths])),
            "each": np.round(qualities, 6).tolist(),
        }

    def _qualities(self, answers: Sequence[Answer]) -> Any:
        if self.quality is not None:
            return self.quality(answers, self.test)
        return identical(answers, self.full)

    def answers(
        self, adapter: Adapter | None, rule: ExitPolicy, batches: Iterable[Mapping[str, Any]]
    ) -> list[Answer]:
        """Answers to some batches; without an adapter the full model's."""
        longest = self.plan.max_new_tokens
        model = self.backbone if adapter is None else adapter
        return answers_to(model, self.encoder, batches, rule, max_new_tokens=longest)

    def sample(self, n: int) -> list[Example]:
        """About `n` test examples, spread over all, since kinds of examples may come one by one."""
        return self.test[:: max(1, len(self.test) // n)][:n]

    def time(self, entries: Mapping[str, Entry]) -> dict[str, dict[str, Any]]:
        """Speeds against the full model and each round's seconds of decoding, by key.

        All points of a seed take turns. Those that do the same work on an answer get the mean of
        what they took: that the machine was slower for one says nothing about them.
        """
        methods = {"full": self._method(None)}
        methods |= {key: self._method(entry) for key, entry in entries.items()}
        inputs = [self.encoder.prompts([example]) for example in self.sample(self.plan.timed)]
        runs = Experiment(methods, inputs, self.plan.rounds, warm=1, title="timing").run()
        spent: dict[str, Any] = defaultdict(float)  # whole answers, and decoding [rounds, 2]
        for place in range(len(inputs)):
            works = {key: rounds[0][place].work for key, rounds in runs.items()}
            alike = defaultdict(list)
            for key, rounds in runs.items():
                alike[works[key]].append([taken[place].seconds for taken in rounds])
            for key, work in works.items():
                spent[key] = spent[key] + np.mean(alike[work], 0)
        full = spent["full"]
        return {
            key: {
                "speedup_decode": speedup(full[:, 1], own[:, 1]),
                "speedup_end_to_end": speedup(full[:, 0], own[:, 0]),
                "decode": own[:, 1].tolist(),
            }
            for key, own in spent.items()
        }

    def _method(self, entry: Entry | None) -> Callable[[Any], _Taken]:
        """Answers an input by a point; None: by the full model."""
        exits, rule = (None, FULL) if entry is None else (entry.adapter.exits, entry.rule)
        run = partial(generate, self.backbone, exits=exits, policy=rule)

        def method(inputs: Any) -> _Taken:
            made: list[GenerationOutput] = []
            whole, decode, _ = timed(generate_fn(run, made.append, **self._options), inputs)
            return _Taken((whole, decode), "full" if entry is None else _work(entry, made[0]))

        return method


class _Taken(NamedTuple):
    """Seconds of an answer, whole and of its decoding; and what was done for it."""

    seconds: tuple[float, float]
    work: str


def _work(entry: Entry, made: GenerationOutput) -> str:
    """A name for what a point computed for an answer: where it looked, at what, and how deep each
    token went. Weights and thresholds differ within it, but for 0, where nothing looks."""
    exits, rule = entry.adapter.exits, entry.rule
    unseen = {depth: threshold == 0 for depth, threshold in rule.thresholds.items()}
    kind = type(exits.at(exits.depths[0])).__name__
    return str((kind, exits.depths, rule.score, rule.shortlist, unseen, made.depths.tolist()))


class _Inputs:
    """Batches of examples, encoded when they come up; the first ones, within a GiB, are kept."""

    def __init__(self, encoder: InputProcessor, examples: Sequence[Example], size: int) -> None:
        self._encoder, self._room = encoder, 1 << 30
        self._chunks = [examples[i : i + size] for i in range(0, len(examples), size)]
        self._kept: dict[int, dict[str, Any]] = {}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, chunk in enumerate(self._chunks):
            inputs = self._kept.get(number) or self._encoder.prompts(chunk)
            size = sum(tensor.nbytes for tensor in inputs.values())
            if number not in self._kept and size <= self._room:
                self._kept[number] = inputs
                self._room -= size
            yield inputs
