"""Quality at every depth, with and without training: dips, overthinking, and how deep tokens go.

Two steps: a model is observed on the examples, and what was seen is counted. Observed twice:
teacher-forced, one pass over known answers reads every depth at every token, so that tokens can be
compared one by one; free-running, whole answers are decoded with every token exiting at one depth,
which is what an answer really loses there, for an exit also has to live with its own mistakes.
"Lens" is the logit lens (nostalgebraist 2020): the state at a depth read by the final norm and LM
head, untrained.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from offramp.adapter import Adapter
from offramp.answers import Answer
from offramp.calibration.replay import Array
from offramp.calibration.risk_functions import Quality
from offramp.data.decontamination import check_no_overlap
from offramp.data.example import Example, examples_digest, picture_of
from offramp.errors import DataError
from offramp.models.backbone import Backbone
from offramp.models.input_processor import InputProcessor
from offramp.provenance import provenance
from offramp.report.plots import analysis_plots
from offramp.storage import write_atomic, write_json
from offramp_lab.experiments.analysis.config import DEFAULT, AnalysisConfig, metric_for
from offramp_lab.experiments.analysis.depth_curves import (
    by_depth,
    by_policy,
    curve,
    overthinking,
    overthought,
)
from offramp_lab.experiments.analysis.needed_depth import TokenClass, needed_depths, word_class
from offramp_lab.experiments.analysis.observe import Observed, Seen, observe
from offramp_lab.experiments.experiment import identical
from offramp_lab.experiments.statistics import Bootstrap

FORMAT = 1
RESULT = "analysis.json"


def analyse(
    model: Adapter | Backbone,
    encoder: InputProcessor,
    examples: Sequence[Example],
    config: AnalysisConfig = DEFAULT,
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
        InputError: a decode depth is not one of the backbone's, or the metric is not known.
    """
    adapter = model if isinstance(model, Adapter) else None
    if not examples:
        raise DataError("There are no examples to analyse.", "Give at least one.")
    if adapter is not None and not allow_seen:
        check_no_overlap(
            adapter.seen,
            examples,
            ("train", "calibration"),
            "Analyse other images, or allow these with --allow-seen: figures on images that the "
            "exits know are too good.",
        )
    labelled = [example for example in examples if example.answers]
    name, judge = config.metric or "quality", quality
    if judge is None:
        name, judge = metric_for(labelled, config.metric)
    seen = observe(adapter, encoder, examples, config, progress)
    measures = _measures(seen.full, examples, judge, config)
    thought = _overthinking(seen, measures["quality"]) if labelled else {}
    own = {kind: of.own for kind, of in seen.kinds.items()}
    result = {
        "format": FORMAT,
        "backbone": encoder.backbone.name,
        "layers": encoder.backbone.depth,
        "exits": list(adapter.exits.depths) if adapter else [],
        "n": len(examples),
        "pictures": len(set(map(picture_of, examples))),
        "settings": asdict(config),
        "teacher_forced": {kind: _forced(of, measures) for kind, of in seen.kinds.items()},
        "free_running": {
            **({"metric": name} if labelled else {}),
            **{
                kind: {name: measure.by_depth(of.forced) for name, measure in measures.items()}
                for kind, of in seen.kinds.items()
            },
            **_own_policy(seen, measures, thought),
        },
        **({"overthinking": thought} if labelled else {}),
        "needed_depth": needed_depths(own, encoder, token_class),
        "provenance": provenance(config.seed, sys.argv, examples_digest(examples)),
    }
    if out is not None:
        write_json(Path(out) / RESULT, result)
        for name, svg in analysis_plots(result).items():
            write_atomic(Path(out) / f"{name}.svg", svg)
    return result


# -- what was seen --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measure:
    """A figure of answers to all examples.

    of: what each example adds [N]; of those alone that have it. draws: over their images.
    """

    of: Callable[[Sequence[Answer]], Array]
    draws: Bootstrap

    def by_depth(self, forced: Mapping[int, Sequence[Answer]]) -> dict[str, Any]:
        """Where every token exits at one depth, by that."""
        values = {depth: self.of(answers) for depth, answers in forced.items()}
        return by_depth(values, np.ones(len(self.draws.groups)), self.draws)


def _measures(
    full: Sequence[Answer], examples: Sequence[Example], quality: Quality, config: AnalysisConfig
) -> dict[str, Measure]:
    """`identical`, of all examples, and `quality`, of labelled ones, where there are any."""
    labelled = [example for example in examples if example.answers]

    def judged(answers: Sequence[Answer]) -> Array:
        asked = [a for a, e in zip(answers, examples, strict=True) if e.answers]
        return np.asarray(quality(asked, labelled), dtype=np.float64)

    measures = {"identical": Measure(partial(identical, full), config.draws(examples))}
    return measures | ({"quality": Measure(judged, config.draws(labelled))} if labelled else {})


def _forced(seen: Seen, measures: Mapping[str, Measure]) -> dict[str, Any]:
    """Tokens by depth, along known answers."""
    curves = {"agreement": curve(seen.own, seen.own.final, measures["identical"].draws)}
    if (known := seen.labelled) is not None:
        curves["accuracy"] = curve(known, known.targets, measures["quality"].draws)
    return curves


def _own_policy(
    seen: Observed, measures: Mapping[str, Measure], thought: Mapping[str, Any]
) -> dict[str, Any]:
    """`policy`, where the adapter has one. thought: of `_overthinking`."""
    if seen.policy is None:
        return {}
    depths = [depth for answer in seen.policy for depth in answer.depths]
    told: dict[str, Any] = {"mean_depth": float(np.mean(depths))}
    told |= {name: one.draws.mean(one.of(seen.policy)) for name, one in measures.items()}
    if "answers" in thought:
        told["difference"] = thought["answers"]["difference"]
    return {"policy": told}


def _overthinking(seen: Observed, quality: Measure) -> dict[str, Any]:
    """Of labelled answers: tokens by kind of exit, and what the adapter's policy makes of them."""
    known = {kind: of.labelled for kind, of in seen.kinds.items() if of.labelled is not None}
    thought = {kind: overthinking(replayed, quality.draws) for kind, replayed in known.items()}
    if seen.policy is not None:
        tokens = overthought(known["exits"])
        answers = quality.of(seen.policy), quality.of(seen.full)
        thought["answers"] = _against_full(*answers, np.asarray(tokens.any(1)), quality.draws)
        if (ran := seen.policy_replay) is not None:
            thought["policy"] = by_policy(ran.replay, ran.depths(), quality.draws, tokens)
    return thought


def _against_full(early: Array, full: Array, subset: Array, draws: Bootstrap) -> dict[str, Any]:
    """Labelled answers [N] that are better and worse than the full model's; and of a `subset`."""
    within = draws.within(subset)
    return {
        "n": len(full),
        "better": int((early > full).sum()),
        "worse": int((early < full).sum()),
        "difference": draws.mean(early, full),
        "with_overthought_tokens": {
            "n": int(subset.sum()),
            "policy": within.mean(early[subset]),
            "full": within.mean(full[subset]),
        },
    }
