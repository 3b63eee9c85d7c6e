"""Stored answers as a result: quality with intervals, depth, latency, and full against early."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from offramp.core.errors import DataError
from offramp.data.item import Item
from offramp.evaluation.answer_quality import ANSWER_QUALITIES
from offramp.evaluation.caption_metrics import caption_scores
from offramp.evaluation.metrics import Measured, gold_rank, ndcg, rank_measures
from offramp.evaluation.run_log import Done, Row
from offramp.evaluation.statistics import Measure, interval, mean_of, mean_of_some
from offramp.evaluation.tasks import EvaluationSettings
from offramp.evaluation.timing import decoding

log = logging.getLogger(__name__)

Pairs = Sequence[tuple[Item, Row]]


def score(
    done: Done, items: Sequence[Item], plan: EvaluationSettings, stored: Mapping[str, Any]
) -> dict[str, Any]:
    """Return metrics of the existing answers; see `evaluate` for the keys.

    stored: the settings that the answers depend on.
    """
    answered = [i for i in items if all((m, i.key) in done for m in plan.modes)]
    if not answered:
        raise DataError("None of these examples has been answered.", "Evaluate them first.")
    missing = len(items) - len(answered)
    if missing:
        log.warning("%d of %d examples have no answer and are left out.", missing, len(items))
    pairs = {m: [(i, _beside_full(done, m, i.key)) for i in answered] for m in plan.modes}
    measured = {m: _MEASURERS[plan.task](pairs[m], plan) for m in plan.modes}
    for metric, why in measured[plan.modes[0]].unavailable.items():
        log.warning("%s is unavailable: %s.", metric, why)
    if note := measured[plan.modes[0]].tokenizer_note:
        log.warning("Captions were split into words %s.", note)
    scoring = {n: getattr(plan, n) for n in ("confidence", "resamples", "seed")}
    result = {
        "task": plan.task,
        "n": len(answered),
        "missing": missing,
        "settings": {**stored, "scoring": scoring},
        "modes": {
            m: {"layers": stored["layers"], **_mode(pairs[m], measured[m], plan)}
            for m in plan.modes
        },
    }
    if len(plan.modes) == 2:
        result["compared"] = _compared(answered, pairs, measured, plan)
    return result


def _beside_full(done: Done, mode: str, key: str) -> Row:
    """A row; where drafts wrote it and full depth answered too, its decoding is counted as
    `decoding` says."""
    row, full = done[mode, key], done.get(("full", key))
    if "rounds" not in row or full is None or full["seconds"] is None:
        return row
    own, other = ((each["seconds"], each["decode_seconds"]) for each in (row, full))
    return {**row, "decode_seconds": decoding(own, other)}


# -- quality -------------------------------------------------------------------------------------


def _measure_captions(pairs: Pairs, plan: EvaluationSettings) -> Measured:
    return caption_scores(
        {item.key: row["answer"] for item, row in pairs},
        {item.key: item.references for item, _ in pairs},
        metrics=plan.wanted,
        tokenizer=plan.tokenizer,
    )


def _measure_questions(pairs: Pairs, plan: EvaluationSettings) -> Measured:
    answers = [row["answer"] for _, row in pairs]
    references = [item.references for item, _ in pairs]
    return Measured({n: mean_of(ANSWER_QUALITIES[n](answers, references)) for n in plan.wanted})


def _measure_dialogue(pairs: Pairs, plan: EvaluationSettings) -> Measured:
    """NDCG is over the rounds of which a candidate is relevant: of others it is not defined."""
    scored = [(item, row["candidate_scores"]) for item, row in pairs]
    measures = rank_measures([gold_rank(scores, item.gold or 0) for item, scores in scored])
    if "ndcg" in plan.wanted and any(any(item.relevance) for item, _ in scored):
        gains = [ndcg(scores, i.relevance) if any(i.relevance) else None for i, scores in scored]
        measures["ndcg"] = mean_of_some(gains)
    missing = "the data came without dense annotations"
    return Measured(
        {name: measure for name, measure in measures.items() if name in plan.wanted},
        {name: missing for name in plan.wanted if name not in measures},
    )


_MEASURERS: dict[str, Callable[[Pairs, EvaluationSettings], Measured]] = {
    "captions": _measure_captions,
    "vqa": _measure_questions,
    "okvqa": _measure_questions,
    "gqa": _measure_questions,
    "dialogue": _measure_dialogue,
}


def _metrics(
    measures: Mapping[str, Measure], pairs: Pairs, plan: EvaluationSettings
) -> dict[str, Any]:
    items = [item for item, _ in pairs]
    return {name: _shown(measure, items, plan) for name, measure in measures.items()}


def _shown(
    measure: Measure, items: Sequence[Item], plan: EvaluationSettings, minus: Measure | None = None
) -> dict[str, Any]:
    """A metric as JSON; questions about one image are resampled together."""
    ends = interval(
        measure,
        [item.example.group or item.key for item in items],
        minus=minus,
        confidence=plan.confidence,
        resamples=plan.resamples,
        seed=plan.seed,
    )
    low, high = ends or (None, None)
    value = measure.value - (minus.value if minus is not None else 0.0)
    note = {"note": measure.note} if measure.note else {}
    return {"value": value, "low": low, "high": high, **note}


def _by_group(pairs: Pairs, plan: EvaluationSettings) -> dict[str, Any]:
    """Metrics within each group that the data names, such as VQA's answer types."""
    groups: dict[str, Any] = {}
    for name, value in sorted({group for item, _ in pairs for group in item.groups.items()}):
        members = [(item, row) for item, row in pairs if item.groups.get(name) == value]
        measures = _MEASURERS[plan.task](members, plan).measures
        groups.setdefault(name, {})[value] = {
            "n": len(members),
            **_metrics(measures, members, plan),
        }
    return groups


# -- one mode ------------------------------------------------------------------------------------


def _mode(pairs: Pairs, measured: Measured, plan: EvaluationSettings) -> dict[str, Any]:
    rows = [row for _, row in pairs]
    depths = Counter(depth for row in rows for depth in row["depths"])
    tokens = sum(depths.values())
    figures: dict[str, Any] = {
        "metrics": _metrics(measured.measures, pairs, plan),
        "unavailable": measured.unavailable,
        "by_group": _by_group(pairs, plan),
        "tokens": tokens,
        "mean_depth": sum(d * n for d, n in depths.items()) / tokens if tokens else None,
        "depth_shares": {str(d): n / tokens for d, n in sorted(depths.items())},
        "latency": _latency(rows),
    }
    if measured.tokenizer is not None:
        figures["tokenizer"] = measured.tokenizer
        if measured.tokenizer_note:
            figures["tokenizer_note"] = measured.tokenizer_note
    if rounds := [pair for row in rows for pair in row.get("rounds", ())]:
        figures["drafted"], figures["accepted"] = (sum(pair[k] for pair in rounds) for k in (0, 1))
    if plan.task == "dialogue":
        figures["ranked_by"] = sorted({row["ranked_by"] for row in rows})
    return figures


def _latency(rows: Sequence[Row]) -> dict[str, Any] | None:
    """Seconds an answer takes, from processed input on; None where batches were larger than 1."""
    if any(row.get("seconds") is None for row in rows):
        return None
    latency: dict[str, Any] = {}
    for name in ("seconds", "decode_seconds"):
        p50, p95 = np.percentile([row[name] for row in rows], [50, 95])
        latency[name] = {"p50": float(p50), "p95": float(p95)}
    decoded = sum(len(row["ids"]) - 1 for row in rows)
    took = sum(row["decode_seconds"] for row in rows)
    latency["tokens_per_second"] = decoded / took if took > 0 and decoded else None
    return latency


# -- full against early --------------------------------------------------------------------------


def _compared(
    items: Sequence[Item],
    pairs: Mapping[str, Pairs],
    measured: Mapping[str, Measured],
    plan: EvaluationSettings,
) -> dict[str, Any]:
    before, after = measured["full"].measures, measured["early_exit"].measures
    rows = [(a, b) for (_, a), (_, b) in zip(pairs["full"], pairs["early_exit"], strict=True)]
    same = mean_of([float(a["ids"] == b["ids"]) for a, b in rows])
    ratios = {"end_to_end": _speedup(rows, "seconds"), "decode": _speedup(rows, "decode_seconds")}
    return {
        "agreement": _shown(same, items, plan),
        "difference": {n: _shown(after[n], items, plan, before[n]) for n in after if n in before},
        "speedup": {n: ratio and _shown(ratio, items, plan) for n, ratio in ratios.items()},
    }


def _speedup(rows: Sequence[tuple[Row, Row]], name: str) -> Measure | None:
    """Seconds of the full model over those of early exit, summed over examples."""
    pairs = [(a[name], b[name]) for a, b in rows]
    if any(a is None or b is None for a, b in pairs) or not sum(b for _, b in pairs) > 0:
        return None
    sums = np.asarray(pairs, dtype=np.float64)
    return Measure(float(sums[:, 0].sum() / sums[:, 1].sum()), sums)
