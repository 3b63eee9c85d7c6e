"""What each idea is worth: objectives and policies through one loop, at equal quality.

Every objective trains exits at the same depths for the same steps; every policy is tried on FREE's
exits. Each pair is a curve of points, one for each threshold: quality of free-running answers on
test images, and decoding speed in interleaved rounds, where points that do the same work run as
one. Compared is the speed at equal quality, a mean over seeds; see
`offramp_lab.experiments.comparison.equal_quality`.

A run's folder holds exits/ (a training run for each objective), points.jsonl (what is measured is
not measured again), compare.json and compare.svg.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from offramp.calibration.risk_functions import QUALITIES, Quality
from offramp.common.jsonl_log import JsonlLog
from offramp.common.provenance import provenance
from offramp.core.errors import DataError, InputError
from offramp.core.models.backbone import Backbone
from offramp.core.models.fingerprint import dump_fingerprint, fingerprint
from offramp.core.storage import digest_rows, write_atomic, write_json
from offramp.data.decontamination import check_no_overlap, picture_digests
from offramp.inputs.example import Example, examples_digest, picture_of
from offramp_lab.experiments.comparison.equal_quality import Samples, drawn, equal_quality
from offramp_lab.experiments.comparison.grid import Grid
from offramp_lab.experiments.comparison.methods import DEFAULT, Plan
from offramp_lab.experiments.comparison.points import Entry, PointMeasurer
from offramp_lab.experiments.experiment import bar

Row = dict[str, Any]
"""What was measured of a point, or of the points of a seed."""


def compare(
    backbone: Backbone,
    processor: Any,
    train: Sequence[Example],
    test: Sequence[Example],
    out: str | Path,
    plan: Plan = DEFAULT,
    *,
    quality: Quality | None = None,
) -> dict[str, Any]:
    """Train every objective, measure every point, and write compare.json and compare.svg in `out`.

    Run again with the same arguments, it goes on where it stopped; with other objectives, policies,
    more seeds or another timing, what is there is not trained or judged again, but all points
    are timed anew.

    train, test: of different images.
    quality: of `QUALITIES` or one's own; None: 1 for an answer that is the full model's, else 0,
        which needs no reference.

    Returns:
        `quality_full`; `n_train` and `n_test`, of examples; `points`, each with `seed`,
        `objective`, `policy`, `score`, `depths`, `thresholds`, `quality`, `quality_drop` (relative
        to the full model), `agreement` (share of answers that are the full model's), `mean_depth`,
        `speedup_decode` and `speedup_end_to_end` (against the full model in the same loop);
        `equal_quality`; `plan` and `provenance`.

    Raises:
        InputError: `out` holds another comparison.
        DataError: the examples cannot be used, or train and test share images.
    """
    if not train or not test:
        raise DataError("There are no examples to compare on.", "Give some to train and to test.")
    used = {"train": sorted(picture_digests(train))}
    check_no_overlap(used, test, ("train",), "Split by image (split_examples).")
    log, settings = Path(out) / "points.jsonl", _settings(backbone, train, test, plan, quality)
    known = _rows_of(log, settings)
    measurer = PointMeasurer(backbone, processor, test, plan, quality)
    entries = Grid(measurer, list(train), Path(out)).entries()
    with JsonlLog(log) as rows:
        if not known:
            rows.append({"settings": settings})
        points, samples = _measured(measurer, entries, known, rows)
    comparison = {
        "quality_full": measurer.quality_full,
        "n_train": len(train),
        "n_test": len(test),
        "points": points,
        "equal_quality": equal_quality(points, samples),
        "plan": asdict(plan),
        "provenance": provenance(plan.training.seed, sys.argv, examples_digest([*train, *test])),
    }
    write_json(Path(out) / "compare.json", comparison)
    write_atomic(Path(out) / "compare.svg", drawn(comparison))
    return comparison


def _settings(
    backbone: Backbone,
    train: Sequence[Example],
    test: Sequence[Example],
    plan: Plan,
    quality: Quality | None,
) -> dict[str, Any]:
    """What every point depends on. Objectives, policies, pairs and seeds may be added later, and
    the timing be another."""
    fixed = asdict(plan)
    for name in ("objectives", "policies", "pairs", "seeds", "timed", "rounds"):
        del fixed[name]
    if plan.exit_in_prefill:  # so it always was before it was a choice, and those runs go on
        del fixed["exit_in_prefill"]
    return {
        "backbone": dump_fingerprint(fingerprint(backbone)),
        "train": examples_digest(train),
        "test": examples_digest(test),
        "plan": digest_rows([fixed]),
        "quality": _name_of(quality),
    }


def _measured(
    measurer: PointMeasurer, entries: Sequence[Entry], known: dict[str, Row], rows: JsonlLog
) -> tuple[list[Row], Samples]:
    """Every entry's point, and what its figures are made of. known: what `rows` holds by key, which
    is not measured again."""

    def row(key: str, measure: Callable[[], Row]) -> Row:
        if key not in known:
            known[key] = measure()
            rows.append({"key": key, "row": known[key]})
        return known[key]

    for entry in bar("quality")(entries):
        row(digest_rows([entry.name]), partial(measurer.figures, entry))
    points, qualities, seconds = [], [], []
    for _, same in groupby(entries, key=lambda entry: entry.seed):
        by_key = {digest_rows([entry.name]): entry for entry in same}
        timed = digest_rows([measurer.plan.timed, measurer.plan.rounds, *by_key])
        measured = row(timed, partial(measurer.time, by_key))
        for key in by_key:
            point = {**known[key], **measured[key]}
            qualities.append(point.pop("each"))
            seconds.append((measured["full"]["decode"], point.pop("decode")))
            points.append(point)
    groups = [picture_of(example) for example in measurer.test]
    full, early = np.array(seconds).swapaxes(0, 1)
    return points, Samples(measurer.qualities_full, np.array(qualities), groups, full, early)


def _name_of(quality: Quality | None) -> str:
    if quality is None:
        return "agreement"
    known = (name for name, candidate in QUALITIES.items() if candidate is quality)
    return next(known, getattr(quality, "__qualname__", type(quality).__name__))


def _rows_of(path: Path, settings: Mapping[str, Any]) -> dict[str, Row]:
    """What the log holds by key, or `InputError` if it is another comparison's."""
    if not path.exists():
        return {}
    rows = JsonlLog.read(path)
    differs = [n for n in settings if rows and rows[0]["settings"].get(n) != settings[n]]
    if differs:
        raise InputError(
            f"{path.parent} holds a comparison with another {', '.join(differs)}.",
            "Give the arguments of that run, or another folder.",
        )
    return {row["key"]: row["row"] for row in rows[1:]}
