"""What a run of photographs leaves is what the tables read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from offramp.core.decoding.policy import ExitPolicy
from offramp_lab import tables
from offramp_lab.experiments.factors import STAGES, Measured
from offramp_lab.records.photographs import (
    end_to_end,
    five_layers,
    opened,
    quantised,
    runtimes,
    trust,
)
from offramp_lab.records.photographs.told import Spec, Told
from offramp_lab.tables import markdown

SHIPPED = ExitPolicy({4: 0.3, 12: 0.3}, first={4: 0.5, 12: 0.5}, drafts={4: 0.0})
TOLD = {
    end_to_end: ("photo-factors", "end-to-end"),
    five_layers: ("five-layers",),
    runtimes: ("runtimes-speeds", "runtimes-torch", "runtimes-identical"),
    quantised: ("quantised-speeds", "quantised-answers"),
    trust: (),
}
COUNT = 6


def measured(seed: int, metric: str) -> Measured:
    draw = np.random.default_rng(seed)
    return Measured(
        draw.integers(2, 20, COUNT).tolist(),
        draw.uniform(1, 9, (COUNT, len(STAGES))),
        {metric: draw.uniform(0, 1, COUNT).tolist()},
        draw.integers(0, 2, (COUNT, 3)).tolist(),
    )


@pytest.mark.parametrize("module", TOLD)
def test_tables_read_what_a_record_is_made_of(
    module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch.save({"steps": 1, "seconds": 60.0, "student": {}}, tmp_path / "student.pt")
    weights = torch.nn.Linear(2, 2)
    adapter: Any = SimpleNamespace(
        policy=SHIPPED,
        exits=SimpleNamespace(depths=(4, 12), modules=weights),
        backbone=SimpleNamespace(model=weights, layers=weights),
        metrics={"seconds": 60.0},
    )
    ways: Any = SimpleNamespace(
        adapter=adapter,
        student=tmp_path,
        compiled=True,
        loaded=lambda *_: (adapter, None),
        encoder=SimpleNamespace(texts=lambda ids: [str(ids.tolist())]),
    )
    spec: Spec = module.SPEC
    captions, questions = (
        {name: measured(place, metric) for place, name in enumerate(spec.of(kind, ways))}
        for kind, metric in (("captions", "CIDEr"), ("questions", "right"))
    )
    examples: Any = [SimpleNamespace(key=str(n)) for n in range(COUNT)]
    batch = {(f"batch of {end_to_end.SLOTS}", opened.EARLY, opened.TOWER): measured(99, "CIDEr")}
    monkeypatch.setattr(end_to_end, "together", lambda told: batch)
    made = spec.figures(Told(ways, examples, captions, questions))
    before = markdown.record(spec.record.name)
    for table in TOLD[module]:
        make = tables.TABLES[table]
        committed = make().markdown()
        source = make.__globals__ if hasattr(make, "__globals__") else make.func.__globals__
        monkeypatch.setitem(
            source, "record", lambda name: {**before, **made} if name == spec.record.name else None
        )
        own = make().markdown()
        assert own != committed and own.count("\n") == committed.count("\n")
        monkeypatch.undo()
