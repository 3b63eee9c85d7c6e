"""Quality at every depth, with and without training: dips, overthinking, and how deep tokens go.

Two views of the same examples. Teacher-forced: one pass over known answers reads every depth at
every token, so that tokens can be compared one by one. Free-running: whole answers are decoded with
every token exiting at one depth, which is what an answer really loses there. "Lens" is the logit
lens (nostalgebraist 2020): the state at a depth read by the final norm and LM head, untrained.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from offramp.adapter import Adapter
from offramp.answers import Answer, generate_answers
from offramp.calibration.replay import Array, PolicyReplay, Replay, can_replay, replay
from offramp.calibration.risk_functions import Quality
from offramp.data.decontamination import check_no_overlap
from offramp.data.example import Example, examples_digest
from offramp.engine.policy import ExitPolicy
from offramp.engine.teacher_forcing import Answered
from offramp.errors import DataError, InputError
from offramp.evaluation.statistics import Bootstrap
from offramp.models.backbone import Backbone
from offramp.models.exits import Exits, ExitSet, check_depths
from offramp.models.input_processor import InputProcessor
from offramp.provenance import provenance
from offramp.storage import write_json
from offramp_lab.experiments.analysis.depth_curves import (
    POSITIONS,
    by_kind,
    by_policy,
    curve,
    first_agreement,
    overthinking,
    overthought,
    positions,
    settled,
)
from offramp_lab.experiments.analysis.free_running import FreeRunning, metric_for

log = logging.getLogger(__name__)

FORMAT = 1
RESULT = "analysis.json"
_FREQUENT, _SHOWN, _DECODED = 10, 24, 12

TokenClass = Callable[[str, int], str]
"""The class of a token from its text and its rank by frequency, from 0."""


def word_class(text: str, rank: int) -> str:
    """Numbers, punctuation, and words by how frequent they are in the answers."""
    word = text.strip()
    if not word:
        return "blank"
    if word.isdigit():
        return "number"
    if not any(letter.isalnum() for letter in word):
        return "punctuation"
    return f"{_FREQUENT} most frequent" if rank < _FREQUENT else "other words"


@dataclass(frozen=True)
class AnalysisConfig:
    """What is measured and how.

    metric: of `offramp_lab.experiments.analysis.free_running.METRICS`; None: see `metric_for`.
    decode_depths: depths of free-running decoding; None: all, or twelve spread evenly.
    exit_in_prefill: whether first tokens exit early too, where the prompt is causal; None: as the
        adapter's policy has it, and where a depth is forced they do.
    max_new_tokens: longest answer.
    batch_size: changes memory and time, not results.
    confidence, resamples, seed: of the bootstrap intervals.
    """

    metric: str | None = None
    decode_depths: tuple[int, ...] | None = None
    exit_in_prefill: bool | None = None
    max_new_tokens: int = 40
    batch_size: int = 32
    confidence: float = 0.95
    resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("max_new_tokens", "batch_size", "resamples")
        wrong = [f"{n} is {getattr(self, n)}" for n in counts if getattr(self, n) < 1]
        if not 0 < self.confidence < 1:
            wrong.append(f"confidence is {self.confidence}")
        if wrong:
            raise InputError(
                f"This analysis cannot start: {'; '.join(wrong)}.",
                "Give counts of 1 or more, and a confidence between 0 and 1.",
            )


def analyse(
    model: Adapter | Backbone | nn.Module,
    encoder: InputProcessor,
    examples: Sequence[Example],
    config: AnalysisConfig = AnalysisConfig(),
    *,
    quality: Quality | None = None,
    token_class: TokenClass = word_class,
    out: str | Path | None = None,
    allow_seen: bool = False,
    progress: Any = iter,
) -> dict[str, Any]:
    """Measure every depth on held-out examples; write analysis.json and plots to `out`.

    Args:
        model: an adapter, or a backbone for the lens alone.
        examples: accuracy and quality are measured on those with answers, agreement on all. Of
            several answers the first is the one whose tokens count as right.
        quality: of answers, instead of `METRICS`; `config.metric` then only names it.
        token_class: groups tokens for `needed_depth`; the end token is always "end".
        allow_seen: take images that the adapter was trained or calibrated on.

    Returns:
        `layers`, `exits`, `n` examples, `pictures`; by kind of exit ("lens", "exits"):
        `teacher_forced`: `agreement` with the final layer on its own greedy answers and `accuracy`
            on labelled answers, each with `depths` (the full depth last), `values` and `dip`, see
            `offramp_lab.experiments.analysis.depth_curves.dip`;
        `free_running`: `quality` (with `metric`) and `identical`, the share of answers that are
            the full model's, in the same form; besides, `policy`: the adapter's own;
        `overthinking`: see `depth_curves.overthinking`; besides, `policy`, see
            `by_policy`, and `answers`: free-running answers better and worse than the full model's;
        `needed_depth`: by `position`, `class` and `token`: for the lens the depth from which on
            every depth says the final token, for exits the first that says it.
        What cannot be measured is absent. Values have `value`, `low`, `high`.

    Raises:
        DataError: no examples, a prompt leaves no room for an answer, or images are shared with
            the adapter's training or calibration.
        InputError: a decode depth is not one of the backbone's.
    """
    model = model if isinstance(model, Adapter) else Backbone.of(model)
    _check_examples(model, examples, allow_seen)
    run = _Run.of(model, encoder, examples, config, progress)
    result = {
        "format": FORMAT,
        "backbone": encoder.backbone.name,
        "layers": encoder.backbone.depth,
        "exits": list(run.adapter.exits.depths) if run.adapter else [],
        "n": len(examples),
        "pictures": len(set(_pictures(examples))),
        "settings": asdict(config),
        **run.measure(quality, token_class),
        "provenance": provenance(config.seed, sys.argv, examples_digest(examples)),
    }
    if out is not None:
        from offramp.report.plots import save_analysis

        write_json(Path(out) / RESULT, result)
        save_analysis(result, Path(out))
    return result


def _check_examples(
    model: Adapter | Backbone, examples: Sequence[Example], allow_seen: bool
) -> None:
    if not examples:
        raise DataError("There are no examples to analyse.", "Give at least one.")
    if isinstance(model, Adapter) and not allow_seen:
        check_no_overlap(
            model.seen,
            examples,
            ("train", "calibration"),
            "Analyse other images, or allow these with --allow-seen: figures on images that the "
            "exits know are too good.",
        )


@dataclass(frozen=True)
class _Run:
    """One analysis: the examples, and the exits that look at them ("lens", "exits")."""

    adapter: Adapter | None
    encoder: InputProcessor
    examples: Sequence[Example]
    config: AnalysisConfig
    sets: Mapping[str, ExitSet]
    progress: Any

    @classmethod
    def of(
        cls,
        model: Adapter | Backbone,
        encoder: InputProcessor,
        examples: Sequence[Example],
        config: AnalysisConfig,
        progress: Any,
    ) -> _Run:
        backbone = encoder.backbone
        sets = {"lens": ExitSet(Exits(backbone, range(1, backbone.depth), kind="lens"))}
        adapter = model if isinstance(model, Adapter) else None
        if adapter is not None:
            sets["exits"] = adapter.exits
            if (first := config.exit_in_prefill) is not None:
                policy = replace(adapter.policy, exit_in_prefill=first)
                adapter = replace(adapter, policy=policy)
        return cls(adapter, encoder, examples, config, sets, progress)

    def draws(self, examples: Sequence[Example]) -> Bootstrap:
        config = self.config
        return Bootstrap(_pictures(examples), config.confidence, config.resamples, config.seed)

    def measure(self, quality: Quality | None, token_class: TokenClass) -> dict[str, Any]:
        labelled = [e for e in self.examples if e.answers]
        name, metric = self.config.metric or "quality", quality
        if metric is None:
            name, metric = metric_for(labelled, self.config.metric)
        depths = _decode_depths(self.config, self.encoder.backbone.depth)
        options = {
            "max_new_tokens": self.config.max_new_tokens,
            "batch_size": self.config.batch_size,
            "progress": self.progress,
        }
        full = generate_answers(self.encoder.backbone, self.encoder, self.examples, **options)
        forced_policy = ExitPolicy(exit_in_prefill=self.config.exit_in_prefill is not False)
        free = FreeRunning(
            self.encoder, self.examples, full, metric, self.draws, options, forced_policy
        )
        written = [
            Answered(example, answer.ids, labelled=False)
            for example, answer in zip(self.examples, full, strict=True)
        ]
        people = [
            Answered(e, tuple(self.encoder.answer_ids(e.prompt, e.answers[0])), labelled=True)
            for e in labelled
        ]
        own = {n: self._replay(exits, written) for n, exits in self.sets.items()}
        true = {n: self._replay(e, people) for n, e in self.sets.items()} if people else {}
        forced = {n: {"agreement": curve(r, r.final, self.draws(self.examples))}
                  for n, r in own.items()}  # fmt: skip
        for n, r in true.items():
            forced[n]["accuracy"] = curve(r, r.targets, self.draws(labelled))
        running: dict[str, Any] = {"metric": name} if people else {}
        for n, exits in self.sets.items():
            running[n] = free.curves(exits, depths if n == "lens" else exits.depths)
        overthinking_by = {n: overthinking(r, self.draws(labelled)) for n, r in true.items()}
        if self.adapter is not None and self.adapter.policy.thresholds:
            answers = free.decode(self.adapter, self.adapter.policy)
            running["policy"] = free.by_policy(answers)
            if true:
                overthinking_by |= self._policy(self.adapter, free, answers, people, true["exits"])
        return {
            "teacher_forced": forced,
            "free_running": running,
            **({"overthinking": overthinking_by} if true else {}),
            "needed_depth": _needed(own, self.encoder, token_class),
        }

    def _replay(self, exits: ExitSet, rows: Sequence[Answered]) -> Replay:
        """What exits say when they read the whole vocabulary."""
        return replay(
            self.encoder, exits, rows,
            batch_size=self.config.batch_size, progress=self.progress,
        )  # fmt: skip

    def _policy(
        self,
        adapter: Adapter,
        free: FreeRunning,
        answers: Sequence[Answer],
        people: Sequence[Answered],
        true: Replay,
    ) -> dict[str, Any]:
        """What the adapter's own policy makes of labelled examples, its `answers` to all given:
        of answers against the full model's and, if the policy can be replayed, of tokens.

        people: the labelled answers. true: what the exits say along them.
        """
        tokens = overthought(true)
        figures = {"answers": free.against_full(answers, np.asarray(tokens.any(1)))}
        if not can_replay(adapter.policy):
            log.warning("This policy cannot be replayed, so it is judged by its answers alone.")
            return figures
        replayed = PolicyReplay.of(
            self.encoder, adapter.exits, people, adapter.policy,
            batch_size=self.config.batch_size, progress=self.progress,
        )  # fmt: skip
        draws = self.draws(free.labelled)
        return {**figures, "policy": by_policy(replayed.replay, replayed.depths(), draws, tokens)}


def _pictures(examples: Sequence[Example]) -> list[str]:
    return [example.group or example.key for example in examples]


def _needed(
    own: Mapping[str, Replay], encoder: InputProcessor, token_class: TokenClass
) -> dict[str, Any]:
    """How deep the tokens of the model's own answers need to go, by kind of token."""
    targets = own["lens"].targets
    texts, classes = _classes(targets, encoder, token_class)
    kinds = {
        "position": (positions(targets, encoder.eos), POSITIONS),
        "class": (classes, sorted(set(classes.flat) - {""})),
        "token": (texts, [t for t, _ in Counter(texts.flat).most_common(_SHOWN + 1) if t]),
    }
    needed_by_exits: dict[str, Any] = {}
    for name, replayed in own.items():
        depths = settled(replayed) if name == "lens" else first_agreement(replayed)
        everything = np.where(depths > 0, "all", "")
        needed_by_exits[name] = {"all": by_kind(depths, everything, ["all"])["all"]}
        needed_by_exits[name] |= {by: by_kind(depths, *kind) for by, kind in kinds.items()}
    return needed_by_exits


def _decode_depths(config: AnalysisConfig, layers: int) -> tuple[int, ...]:
    if config.decode_depths is not None:
        return check_depths(config.decode_depths, layers)
    spread = np.linspace(1, layers - 1, min(_DECODED, layers - 1))
    return tuple(sorted({round(d) for d in spread.tolist()}))


def _classes(
    targets: Array, encoder: InputProcessor, token_class: TokenClass
) -> tuple[Array, Array]:
    """The text and the class of each token [N, A]; "" where there is none, "end" for the end."""
    times = Counter(targets[targets >= 0].tolist())
    texts, classes = {-1: "", encoder.eos: "end"}, {-1: "", encoder.eos: "end"}
    words = [i for i, _ in times.most_common() if i != encoder.eos]
    for rank, token in enumerate(words):
        text = str(encoder.tokenizer.decode([token]))
        texts[token], classes[token] = text.strip() or repr(text), token_class(text, rank)
    look = [[(texts[i], classes[i]) for i in row] for row in targets.tolist()]
    both = np.array(look, dtype=object)
    return both[..., 0], both[..., 1]
