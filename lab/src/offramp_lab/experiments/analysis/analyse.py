"""Quality at every depth, with and without training: dips, overthinking, and how deep tokens go.

Two steps: a model is observed on the examples, and what was seen is counted. Observed twice:
teacher-forced, one pass over known answers reads every depth at every token, so that tokens can be
compared one by one; free-running, whole answers are decoded with every token exiting at one depth,
which is what an answer really loses there, for an exit also has to live with its own mistakes.
"Lens" is the logit lens (nostalgebraist 2020): the state at a depth read by the final norm and LM
head, untrained.
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

from offramp.adapter import Adapter
from offramp.answers import Answer, generate_answers
from offramp.calibration.replay import Array, PolicyReplay, Replay, can_replay, replay
from offramp.calibration.risk_functions import QUALITIES, Quality
from offramp.data.decontamination import check_no_overlap
from offramp.data.example import Example, examples_digest, picture_of
from offramp.engine.policy import ExitPolicy
from offramp.engine.teacher_forcing import Answered
from offramp.errors import DataError, InputError, check_known
from offramp.evaluation.statistics import Bootstrap
from offramp.models.backbone import Backbone
from offramp.models.exits import Exits, ExitSet, check_depths
from offramp.models.input_processor import InputProcessor
from offramp.options import option
from offramp.provenance import provenance
from offramp.report.html import fine, percent, with_interval
from offramp.report.plots import save_analysis
from offramp.report.table import Table
from offramp.storage import write_json
from offramp_lab.experiments.analysis.depth_curves import (
    POSITIONS,
    by_kind,
    by_policy,
    curve,
    dip,
    first_agreement,
    overthinking,
    overthought,
    positions,
    settled,
)

log = logging.getLogger(__name__)

FORMAT = 1
RESULT = "analysis.json"
_FREQUENT, _SHOWN, _DECODED = 10, 24, 12
_LONG = 5  # words
METRICS = tuple(name for name in QUALITIES if name != "cider")
"""Qualities that are shares, in [0, 1]."""

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
    """What is measured and how. The command's flags and their help come from here."""

    metric: str | None = option(
        None,
        "quality of answers",
        choices=METRICS,
        shown="rouge_l for answers of more than five words, else exact_match_normalised",
    )
    decode_depths: tuple[int, ...] | None = option(
        None, "decode with every token exiting at these", shown="all, or twelve spread evenly"
    )
    exit_in_prefill: bool | None = option(
        None,
        "let first tokens exit early too, where the prompt is causal",
        shown="as the adapter's policy has it; where a depth is forced they do",
    )
    max_new_tokens: int = option(40, "longest answer")
    batch_size: int = option(32, "examples at once; changes memory and time, not results")
    confidence: float = option(0.95, "of the bootstrap's intervals")
    resamples: int = option(1000, "of the bootstrap")
    seed: int = option(0, "of the bootstrap")

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

    def draws(self, examples: Sequence[Example]) -> Bootstrap:
        """Intervals over the images of examples."""
        images = list(map(picture_of, examples))
        return Bootstrap(images, self.confidence, self.resamples, self.seed)


def analyse(
    model: Adapter | Backbone,
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
        "needed_depth": _needed(seen.kinds, encoder, token_class),
        "provenance": provenance(config.seed, sys.argv, examples_digest(examples)),
    }
    if out is not None:
        write_json(Path(out) / RESULT, result)
        save_analysis(result, Path(out))
    return result


def metric_for(examples: Sequence[Example], name: str | None) -> tuple[str, Quality]:
    """The metric `name`; None: rouge_l where answers have more than five words on average, else
    exact_match_normalised. Raise `InputError` if it is not known.
    """
    check_known("Metric", [name] if name else [], METRICS)
    words = [len(answer.split()) for e in examples for answer in e.answers]
    long = bool(words) and sum(words) / len(words) > _LONG
    name = name or ("rouge_l" if long else "exact_match_normalised")
    return name, QUALITIES[name]


# -- what a model does ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What a kind of exit says at every depth.

    own, labelled: along the full model's own answers, and along the data's; None: it has none.
    forced: answers to all examples where every token exits at one depth, the full model's last.
    """

    own: Replay
    labelled: Replay | None
    forced: Mapping[int, Sequence[Answer]]


@dataclass(frozen=True)
class Observed:
    """All that a model was asked for. kinds: of exit ("lens", "exits").

    policy: the answers by the adapter's own policy; None: it has none. policy_replay: the depths
    that it gives to the data's answers; None: it cannot be replayed, or there are none.
    """

    kinds: Mapping[str, Seen]
    full: Sequence[Answer]
    policy: Sequence[Answer] | None
    policy_replay: PolicyReplay | None


def observe(
    adapter: Adapter | None,
    encoder: InputProcessor,
    examples: Sequence[Example],
    config: AnalysisConfig,
    progress: Any = iter,
) -> Observed:
    """Decode and replay; see `Observed`."""
    backbone = encoder.backbone
    size: dict[str, Any] = {"batch_size": config.batch_size, "progress": progress}
    asked = {"max_new_tokens": config.max_new_tokens, **size}
    full = generate_answers(backbone, encoder, examples, **asked)
    written = [Answered(e, a.ids, labelled=False) for e, a in zip(examples, full, strict=True)]
    people = [
        Answered(e, tuple(encoder.answer_ids(e.prompt, e.answers[0])), labelled=True)
        for e in examples
        if e.answers
    ]
    # A threshold of 0: every token exits, the first one too where the prompt allows it.
    rule = ExitPolicy(exit_in_prefill=config.exit_in_prefill is not False)

    def seen(exits: ExitSet, depths: Sequence[int]) -> Seen:
        at_one = Adapter(backbone, exits)
        forced = {
            depth: generate_answers(
                at_one, encoder, examples, replace(rule, thresholds={depth: 0.0}), **asked
            )
            for depth in depths
        }
        own = replay(encoder, exits, written, **size)
        labelled = replay(encoder, exits, people, **size) if people else None
        return Seen(own, labelled, {**forced, backbone.depth: full})

    lens = ExitSet(Exits(backbone, range(1, backbone.depth), kind="lens"))
    kinds = {"lens": seen(lens, _decode_depths(config, backbone.depth))}
    if adapter is None:
        return Observed(kinds, full, None, None)
    kinds["exits"] = seen(adapter.exits, adapter.exits.depths)
    policy, answers, replayed = adapter.policy, None, None
    if (first := config.exit_in_prefill) is not None:
        policy = replace(policy, exit_in_prefill=first)
    if policy.thresholds:
        answers = generate_answers(adapter, encoder, examples, policy, **asked)
        if people and can_replay(policy):
            replayed = PolicyReplay.of(encoder, adapter.exits, people, policy, **size)
        elif people:
            log.warning("This policy cannot be replayed, so it is judged by its answers alone.")
    return Observed(kinds, full, answers, replayed)


def _decode_depths(config: AnalysisConfig, layers: int) -> tuple[int, ...]:
    if config.decode_depths is not None:
        return check_depths(config.decode_depths, layers)
    spread = np.linspace(1, layers - 1, min(_DECODED, layers - 1))
    return tuple(sorted({round(d) for d in spread.tolist()}))


# -- what was seen --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measure:
    """A figure of answers to all examples.

    of: what each example adds [N]; of those alone that have it. draws: over their images.
    """

    of: Callable[[Sequence[Answer]], Array]
    draws: Bootstrap

    def by_depth(self, forced: Mapping[int, Sequence[Answer]]) -> dict[str, Any]:
        """Where every token exits at one depth, by that; and its dip."""
        values = np.stack([self.of(answers) for answers in forced.values()], 1)
        return {
            "depths": list(forced),
            "values": [self.draws.mean(column) for column in values.T],
            "dip": dip(list(forced), values, np.ones(len(values)), self.draws),
        }


def _measures(
    full: Sequence[Answer], examples: Sequence[Example], quality: Quality, config: AnalysisConfig
) -> dict[str, Measure]:
    """`identical`, of all examples, and `quality`, of labelled ones, where there are any."""
    labelled = [example for example in examples if example.answers]

    def identical(answers: Sequence[Answer]) -> Array:
        """Which answers [N] are the full model's, as 1 and 0."""
        return np.array([float(a.ids == b.ids) for a, b in zip(answers, full, strict=True)])

    def judged(answers: Sequence[Answer]) -> Array:
        asked = [a for a, e in zip(answers, examples, strict=True) if e.answers]
        return np.asarray(quality(asked, labelled), dtype=np.float64)

    measures = {"identical": Measure(identical, config.draws(examples))}
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


def _needed(
    seen: Mapping[str, Seen], encoder: InputProcessor, token_class: TokenClass
) -> dict[str, Any]:
    """How deep the tokens of the model's own answers need to go, by kind of token."""
    targets = seen["lens"].own.targets
    texts, classes = _classes(targets, encoder, token_class)
    kinds = {
        "position": (positions(targets, encoder.eos), POSITIONS),
        "class": (classes, sorted(set(classes.flat) - {""})),
        "token": (texts, [t for t, _ in Counter(texts.flat).most_common(_SHOWN + 1) if t]),
    }
    needed_by_exits: dict[str, Any] = {}
    for name, of in seen.items():
        depths = settled(of.own) if name == "lens" else first_agreement(of.own)
        everything = np.where(depths > 0, "all", "")
        needed_by_exits[name] = {"all": by_kind(depths, everything, ["all"])["all"]}
        needed_by_exits[name] |= {by: by_kind(depths, *kind) for by, kind in kinds.items()}
    return needed_by_exits


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


# -- ten lines of it ------------------------------------------------------------------------------

_CURVES = {
    "agreement": ("teacher_forced", "tokens as the final layer's"),
    "accuracy": ("teacher_forced", "tokens right"),
    "identical": ("free_running", "answers as the full model's"),
    "quality": ("free_running", "quality of answers"),
}


def summary(result: Mapping[str, Any]) -> str:
    """What an analysis found, for a terminal: at the depths of the exits, or of a few of the
    lens."""
    layers, exits, running = result["layers"], result["exits"], result["free_running"]
    kind = "exits" if exits else "lens"
    own = result["teacher_forced"][kind]["agreement"]["depths"]
    shown = exits or sorted({min(own, key=lambda d: abs(d - layers * q / 4)) for q in (1, 2, 3)})

    def at(place: tuple[str, str, str], depth: int) -> str:
        part, of, name = place
        found = result[part].get(of, {}).get(name)
        if found is None or depth not in found["depths"]:
            return "-"
        return percent(found["values"][found["depths"].index(depth)]["value"])

    rows = {
        title + (f", {of}" if name == "agreement" and exits else ""): (part, of, name)
        for name, (part, title) in _CURVES.items()
        for of in (("lens", kind) if name == "agreement" and exits else (kind,))
        if name in result[part][of]
    }
    columns = {f"at {d}": d for d in shown} | {f"at {layers}, the full model": layers}
    falls = [
        f"{_CURVES[name][1]} ({of}) by {percent(found['dip']['fall'])} from "
        f"{found['dip']['from_depth']} to {found['dip']['to_depth']}"
        for name, (part, _) in _CURVES.items()
        for of in ("lens", "exits")
        if (found := result[part].get(of, {}).get(name)) and found["dip"]["found"]
    ]
    needed = result["needed_depth"]
    lines = [
        f"{result['backbone']}: {layers} layers, "
        f"{'exits at ' + ', '.join(map(str, exits)) if exits else 'no exits'}; "
        f"{result['n']} examples of {result['pictures']} images"
        + (f"; quality is {running['metric']}" if "metric" in running else ""),
        Table.grid(rows, columns, at).plain(),
        "a token needs "
        + ", ".join(f"{of['all']['mean_depth']:.1f} layers ({n})" for n, of in needed.items())
        + "; dips: "
        + (", ".join(falls) or "none is found"),
    ]
    if thought := result.get("overthinking"):
        early = thought[kind]["overthought"]["share"]
        lines.append(
            f"overthought: {with_interval(early, fine)} of the labelled tokens ({kind}) are right "
            "at some depth and wrong at the last"
        )
    if policy := running.get("policy"):
        better = f", quality {100 * policy['difference']['value']:+.2f}%" if thought else ""
        lines.append(
            f"the adapter's policy: mean depth {policy['mean_depth']:.2f}, "
            f"{with_interval(policy['identical'])} of the answers the full model's{better}"
        )
    return "\n".join(lines)
