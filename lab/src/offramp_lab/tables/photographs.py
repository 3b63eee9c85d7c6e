"""The models of photographs: quality, talking, training, methods."""

from functools import partial

from offramp.calibration.risk_functions import CIDER_CAP
from offramp.report.table import Table
from offramp_lab.experiments.factors import LOSSLESS
from offramp_lab.tables.end_to_end import EARLY, FULL, MODES, PLAIN, Q8, THRESHOLDS
from offramp_lab.tables.markdown import (
    Make,
    MakeTable,
    Value,
    by,
    record,
    times_with_range,
    with_range,
)


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


def talk() -> Table:
    """By task: right answers, how far above the best constant answer, the answers that change where
    every token leaves at one exit, and the mean layers of a token where few change by confidence.
    """
    told = record("talk")

    def exits(task: str) -> list[str]:
        ways = told["exits"][task]["ways"]
        changed = [way["changed"] for way in ways if way["way"].startswith("static")]
        layers = min(way["mean_depth"] for way in ways if way["changed"] <= FEW_CHANGED)
        return [*(f"{share:.0%}" for share in changed), f"{layers:.1f}"]

    rows = [
        (
            kind,
            f"{of['right']:.0%}",
            with_range(f"{of['above']:+.0%}", of["above_interval"], "+.0%"),
            *exits(kind),
        )
        for kind, of in told["questions"].items()
    ]
    counts, shares = (told["dialogues"][name] for name in ("answers_by_turn", "right_by_turn"))
    right = sum(counts[turn] * shares[turn] for turn in counts) / sum(counts.values())
    rows += [
        ("turns of dialogues", f"{right:.0%}", "", *exits("dialogues")),
        ("captions", "", "", *exits("captions")),
    ]
    every = [f"all at {depth}" for depth in told["exits"]["captions"]["exits"]]
    return Table(("task", "right", "above", *every, f"layers at {FEW_CHANGED:.0%}"), rows)


FEW_CHANGED = 0.05


def talk_speeds() -> Table:
    """By task and mode: how many times as fast as full depth, and whose answers those are. Turns of
    dialogues stand in `dialogues`, which keeps what the turns before made."""
    rows = []
    for task in ("questions", "captions"):
        of = record("talk")["speeds"][task]
        for mode in [name for name in ("lossless", "early exit") if name in of]:
            own = of[mode]
            rows.append(
                (
                    f"{task}, {mode}",
                    times_with_range(own["whole"]),
                    times_with_range(own["decoding"]),
                    f"{own['same']} of {of['answers']}",
                )
            )
    return Table(("task and mode", "pixels to text", "decoding", "answers full depth's"), rows)


def dialogues() -> Table:
    """By mode and engine: how many times as fast as full depth a dialogue is behind the
    photograph's reading, and the share of its turns that have full depth's answer."""
    found = by(record("dialogues")["dialogues"]["entries"], "engine", "mode")
    rows = []
    for mode in (LOSSLESS, EARLY, "trust 0"):
        own = [found[engine, mode] for engine in (PLAIN, Q8)]
        told = [(times_with_range(e["after_reading_over_full"]), _percent(e["same"])) for e in own]
        rows.append((MODES[mode], *told[0], *told[1]))
    same = "turns as full depth"
    return Table(("mode", "PyTorch, float32", same, "q8_0", same), rows)


def _percent(score: Value) -> str:
    return f"{score['value']:.1%}"


def long_answers() -> Table:
    """By mode and engine: milliseconds of tower, prompt and decoding, and how many times as fast as
    full depth all of it is."""
    found = by(record("dialogues")["long"]["entries"], "engine", "mode")
    rows = []
    for mode in (FULL, LOSSLESS, THRESHOLDS):
        own = [found[engine, mode] for engine in (PLAIN, Q8)]
        told = [
            (_stages(entry["milliseconds"]), times_with_range(entry["over_full"])) for entry in own
        ]
        rows.append((MODES[mode], *told[0], *told[1]))
    stages = "tower / prompt / decoding"
    over = "of full depth"
    return Table(("mode", f"PyTorch, float32: {stages}", over, f"q8_0: {stages}", over), rows)


def _stages(took: Value) -> str:
    return " / ".join(f"{took[stage]:,.0f}" for stage in ("tower", "prompt", "decoding"))


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


def _trained(card: str) -> str:
    """CPU minutes of all stages of a model's training."""
    seconds = sum(stage["trained"]["cpu_seconds"] for stage in record(card)["stages"])
    return f"{seconds / 60:.0f}"


def _promised() -> str:
    """What captions may lose of CIDEr at the thresholds that ship."""
    return f"{CIDER_CAP * record('photo-adapter')['calibration']['target']:g}"


TABLES: dict[str, MakeTable] = {
    "photo-model": photo_model,
    "talk": talk,
    "talk-speeds": talk_speeds,
    "dialogues": dialogues,
    "long-answers": long_answers,
}
FIGURES: dict[str, Make] = {
    "photo-card-minutes": partial(_trained, "photo-card"),
    "talk-card-minutes": partial(_trained, "talk-card"),
    "photo-promised-cider": _promised,
}
