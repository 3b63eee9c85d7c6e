"""The model of photographs: quality, thresholds, talking, methods."""

from collections.abc import Sequence

from offramp.report.table import Table
from offramp_lab.tables.markdown import Make, MakeTable, Value, minutes, record, with_range


def photo_model() -> Table:
    """The photo model's, on the half of the photographs that chose nothing."""
    ours = record("photo-model")

    def count(decoding: str) -> str:
        return f"{ours['captions'][decoding]['count']:,}"

    columns = {
        f"greedy ({count('greedy')})": ours["captions"]["greedy"]["figures"],
        f"beam of 3 ({count('beam')})": ours["captions"]["beam"]["figures"],
    }
    rows = [
        (name.replace("_", "-"), *(_ranged(figures[name], ".3f") for figures in columns.values()))
        for name in ("CIDEr", "Bleu_4", "METEOR", "ROUGE_L")
    ]
    right = _ranged(ours["questions"]["greedy"]["figures"]["accuracy"], ".1%")
    rows.append(("DAQUAR accuracy", right, ""))
    return Table(("metric", *columns), rows)


def _ranged(figure: Value, form: str) -> str:
    """With its interval, where the metric has one."""
    value = format(figure["value"], form)
    return with_range(value, figure["interval"], form)


# -- talked to ------------------------------------------------------------------------------------


def talk_questions() -> Table:
    """Right answers by kind of question, beside the best constant answer's."""
    return Table.of(
        [{**of, "kind": kind} for kind, of in record("talk")["questions"].items()],
        {
            "question": "{kind}",
            "asked": "{count}",
            "right": "{right:.0%}",
            "best constant answer": '{constant_right:.0%}, "{constant}"',
            "above it": lambda of: with_range(f"{of['above']:+.0%}", of["above_interval"], "+.0%"),
        },
    )


def talk_exits() -> Table:
    """By task: what the exits say as full depth does, and how deep tokens are at two shares of
    changed answers, by one threshold on one exit or on all."""
    tasks = record("talk")["exits"]
    depths = list(next(iter(tasks.values()))["exits"])
    columns = (
        "task",
        "answers",
        *(f"tokens as full depth's at {d}" for d in depths),
        *(f"confidence at {d}" for d in depths),
        "mean depth at 5% changed",
        "at 20% changed",
        "changed, all at 4",
    )
    rows = []
    for task, of in tasks.items():
        exits = of["exits"].values()
        rows.append(
            (
                task,
                f"{of['answers']}",
                *(f"{e['same']:.0%}" for e in exits),
                *(f"{e['confidence']:.2f}" for e in exits),
                _shallowest(of["ways"], 0.05),
                _shallowest(of["ways"], 0.2),
                f"{next(w for w in of['ways'] if w['way'] == 'static 4')['changed']:.0%}",
            )
        )
    return Table(columns, rows)


def _shallowest(ways: Sequence[Value], changed: float) -> str:
    """The least mean depth of the ways that change at most this share of the answers."""
    kept = [way for way in ways if way["changed"] <= changed]
    if not kept:
        return "none"
    best = min(kept, key=lambda way: float(way["mean_depth"]))
    return f"{best['mean_depth']:.1f} ({best['way']})"


# -- methods --------------------------------------------------------------------------------------

METHODS = {
    ("free", "max_probability"): "FREE, no labels",
    ("distillation", "max_probability"): "distillation alone, no labels",
    ("cross_entropy_own", "max_probability"): "cross-entropy, the model's own captions",
    ("cross_entropy", "max_probability"): "cross-entropy, all human captions",
    ("cross_entropy_few", "max_probability"): "cross-entropy, 10% of the human captions",
    ("free", "agreement"): "FREE, agreement of three exits (BEEM)",
    ("free", "patience"): "FREE, patience of three exits (PABEE)",
    ("free", "saturation"): "FREE, saturation (MuE)",
    ("logit_lens", "saturation"): "logit lens, saturation (MuE)",
    ("logit_lens", "max_probability"): "logit lens",
}


def curves() -> list[Value]:
    return list(record("compare-photo")["equal_quality"]["curves"])


TABLES: dict[str, MakeTable] = {
    "photo-model": photo_model,
    "talk-questions": talk_questions,
    "talk-exits": talk_exits,
}
FIGURES: dict[str, Make] = {
    "photo-card-minutes": lambda: minutes(
        sum(stage["trained"]["cpu_seconds"] for stage in record("photo-card")["stages"])
    )
}
