"""Five layers of thirty: what confidence adds to a small static model; rewrites five_layers.json.

`python -m offramp_lab.records.five_layers --student FOLDER` needs photographs, onnxruntime and what
`offramp_lab.records.student` left in the folder as `student.pt`. In PyTorch, float32, every
photograph is captioned, and every question answered, in all ways in turn: full depth, also by way
of the exit's shortlist; every token at the exit, which is a static model of five layers; a student
of five layers; and exits by their confidence, at the thresholds that ship and at the fastest. What
was answered is kept in runs/five_layers, so that a run that was cut off goes on.
"""

from __future__ import annotations

from pathlib import Path

from offramp_lab.experiments.factors import STAGES, Name, entries_of
from offramp_lab.places import RUNS
from offramp_lab.records.end_to_end import (
    PLAIN,
    TOWER,
    Stages,
    Way,
    last_exit,
    measured,
    modes,
    torch_way,
)
from offramp_lab.records.record import Record, asked
from offramp_lab.records.student import wear
from offramp_lab.records.subjects import halves, load_photo

RECORD = Record("five_layers")
ASKED = ("full", "static", "early exit", "early exit, careful")


def bases(name: Name) -> dict[str, Name]:
    return {"full": (PLAIN, "full", TOWER)}


def main() -> None:
    arguments = asked(__doc__, photo=True, photographs=200, questions=200, student=Path)
    stages = Stages()
    adapter, encoder = load_photo(arguments.adapter, vision=TOWER)
    learnt, _ = load_photo(arguments.adapter, vision=TOWER)
    took = wear(learnt, arguments.student / "student.pt")
    for each in (adapter, learnt):
        stages.watch(each.backbone)
    policies = modes(adapter.policy)
    short = last_exit(adapter)
    ways: dict[Name, Way] = {
        (PLAIN, mode, TOWER): torch_way(stages, encoder, of, policy)
        for mode, of, policy in (
            *((mode, adapter, policies[mode]) for mode in ASKED),
            ("full, shortlist", short, short.policy),
            ("student", learnt, policies["static"]),
        )
    }
    work = RUNS / RECORD.name
    captions = halves(arguments.data)[1][: arguments.photographs]
    questions = halves(arguments.data, "questions_val")[1][: arguments.questions]
    told = {
        kind: measured(ways, examples, kind, encoder, work)
        for kind, examples in (("captions", captions), ("questions", questions))
    }
    RECORD.write(
        {
            "photographs": len(captions),
            "questions": len(questions),
            "stages": list(STAGES),
            "student": took,
            "exit_seconds": adapter.metrics["seconds"],
            "captioned": entries_of(told["captions"], bases),
            "questioned": entries_of(told["questions"], bases),
        }
    )


if __name__ == "__main__":
    main()
