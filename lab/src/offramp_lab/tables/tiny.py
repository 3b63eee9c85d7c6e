"""The tiny models that ship: the demo, calibrated thresholds, what labels are worth, the recipe."""

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

from offramp.calibration.risk_control import images_needed
from offramp.report.html import times
from offramp.report.table import Table
from offramp_lab.experiments.comparison.equal_quality import LEVELS, equal_quality
from offramp_lab.tables.markdown import KINDS, Make, MakeTable, Value, bold, level, record, tiny


def _told(told: Mapping[str, Callable[[Any], str]], columns: Mapping[str, Value]) -> Table:
    """What is told of each column, a line each."""
    return Table.grid(told, columns, lambda tell, of: tell(of))


def demo() -> Table:
    """What `make demo` measures."""

    def right(task: str) -> Callable[[Value], str]:
        return lambda r: " / ".join(
            f"{r['modes'][mode]['quality'][task]:.1%}" for mode in ("full", "early_exit")
        )

    def early(name: str, mode: str = "early_exit") -> Callable[[Value], str]:
        return lambda report: times(report["modes"][mode][name])

    return _told(
        {
            "decoder layers; exits at": lambda r: f"{r['layers']}; {r['exits']}",
            "mean depth of a token": lambda r: f"{r['modes']['early_exit']['mean_depth']:.2f}",
            "decoding, against our full-depth loop": lambda r: bold(early("speedup_decode")(r)),
            "end to end, vision and prompt included": early("speedup_end_to_end"),
            "decoding, against stock `generate`": early("speedup_vs_generate"),
            "our full-depth loop against `generate`": lambda r: times(r["full_vs_generate"]),
            "answers identical to the full model's": lambda r: (
                f"{r['modes']['early_exit']['agreement']:.1%}"
            ),
            "captions fully right, full / early exit": right("captions"),
            "questions right, full / early exit": right("questions"),
            "lossless: decoding": early("speedup_decode", "lossless"),
            "lossless: end to end": early("speedup_end_to_end", "lossless"),
            "lossless: identical to the full model": lambda r: (
                "yes" if r["modes"]["lossless"]["identical"] else "NO"
            ),
            "training the exits": lambda r: f"{r['training_seconds']:.0f} s",
        },
        {tiny(kind): record(f"demo-{kind}") for kind in KINDS},
    )


RISKS = {
    "disagreement": "answers that differ from the full model's",
    "exact_match_drop": "right answers lost",
}


def calibrated() -> Table:
    """Thresholds with a guarantee, on answers that calibration did not see."""
    return Table.of(
        [(kind, row) for kind in KINDS for row in record("calibrated")[kind]],
        {
            "model": lambda of: tiny(of[0]),
            "risk, by image": lambda of: RISKS[of[1]["risk"]],
            "at most": lambda of: f"{of[1]['risk_target']:.0%}",
            "on test": lambda of: f"{of[1]['risk_test']:.2%}",
            "decoding": lambda of: bold(times(of[1]["speedup_decode"])),
            "end to end": lambda of: times(of[1]["speedup_end_to_end"]),
            "quality drop": lambda of: f"{of[1]['quality_drop']:+.2%}",
        },
    )


def needed_images() -> Table:
    """Images that a first attempt at 95% confidence needs, by the target."""
    return Table.of(
        images_needed(),
        {
            "target": lambda row: f"{row['target']:.0%}",
            "nothing lost": lambda row: f"{row['at_no_loss']:,}",
            "half the target measured": lambda row: f"{row['at_half_the_target']:,}",
            "declared, half is the truth": lambda row: f"{row['declared_at_half_the_target']:,}",
        },
    )


def broken() -> Table:
    """How often a promise was given at a risk above the target, without each rule and with it."""
    found = record("simulated")
    alike = [
        (
            f"{row['photographs']} photographs at 0.05% and {row['charts']} charts at 8%",
            f"{row['risk']:.2%}",
            f"{row['broken_before']:.1%} with charts as one image",
            f"{row['broken_now']:.1%}",
        )
        for row in found["lookalikes"]
    ]
    merged, rows, choices = found["still_merged"], found["unequal_rows"], found["choices"]
    more = [
        (
            f"{merged['merged']} of {merged['images']} images merged though each is its own",
            f"{merged['risk']:.2%}",
            f"{merged['broken_before']:.1%} counted as one",
            f"{merged['broken_now']:.1%}",
        ),
        (
            "images with 1 or 40 answers, by answer",
            f"{rows['risk_by_answer']:.2%}",
            f"{rows['passed_by_image']:.1%} by image, whose risk is {rows['risk_by_image']:.2%}",
            f"{rows['passed_by_answer']:.1%}",
        ),
        (
            f"the first of {choices['candidates']} adapters that passes",
            f"{1.001 * choices['target']:.2%}",
            f"{choices['broken_before']:.1%} each at the full level",
            f"{choices['broken_now']:.1%}",
        ),
    ]
    at = [
        (
            f"{row['method']} on {row['images']} images, at the boundary",
            f"{1.001 * row['target']:.2%}",
            "",
            f"{row['broken']:.1%}",
        )
        for row in found["boundary"]
    ]
    return Table(("population", "true risk", "before", "now"), [*alike, *more, *at])


def alike() -> Table:
    """As how many images those that look alike count."""
    return Table.of(
        record("simulated")["counted"],
        {
            "different": lambda row: row["kind"],
            "images": lambda row: str(row["images"]),
            "by thumbnails": lambda row: str(row["before"]),
            "as they count": lambda row: str(row["now"]),
        },
    )


def at_boundary() -> Table:
    """How often halves of a pool certified a threshold whose risk over the pool is too large."""
    return Table.of(
        record("violations")["shipped"]["entries"],
        {
            "target": lambda row: f"{row['risk_target']:.0%}",
            "by": lambda row: row["unit"],
            "threshold": lambda row: f"{row['threshold']:g}",
            "its risk over the pool": lambda row: f"{row['risk']:.2%}",
            "certified by": lambda row: f"{row['certified']} of {row['halves']}",
        },
    )


def _splits() -> list[Value]:
    return [row for kind in KINDS for row in record("violations")[kind]]


def _worst() -> Value:
    return max(_splits(), key=lambda row: row["violations"])


def _expected() -> str:
    return f"{_worst()['splits'] * record('violations')['stated_share']:.1f}"


# -- what labels are worth ------------------------------------------------------------------------

EXITS = {
    "free": "FREE, no labels",
    "distillation": "distillation alone, no labels",
    "free_supervised": "FREE, all labels",
    "cross_entropy": "cross-entropy, all labels",
    "cross_entropy_few": "cross-entropy, 10% of the labels",
    "logit_lens": "logit lens",
}
POLICIES = {
    "max_probability": "",
    "patience": ", patience (PABEE)",
    "saturation": ", saturation (MuE)",
}


def labels() -> Table:
    """Speed at equal quality, with and without labels."""
    models = {kind: record("compare")[kind] for kind in KINDS}
    measured = {(p["objective"], p["policy"]) for p in models["opt"]["points"]}
    shown = [
        pair
        for pair in product(EXITS, POLICIES)
        if pair in measured and (pair[0] != "free" or pair[1] == "max_probability")
    ]
    return Table(
        ("exits", *(f"{tiny(kind)}, {level(at)}" for kind in KINDS for at in LEVELS)),
        [
            (EXITS[o] + POLICIES[p], *(times(s) for m in models.values() for s in _speeds(m, o, p)))
            for o, p in shown
        ],
    )


def _speeds(model: Value, objective: str, policy: str) -> list[float]:
    """At every level; with the largest probability at the first depths alone."""
    points = [p for p in model["points"] if (p["objective"], p["policy"]) == (objective, policy)]
    if policy == "max_probability":
        points = [p for p in points if p["depths"] == model["plan"]["depths"]]
    return list(equal_quality(points)["curves"][0]["speedup_decode"].values())


# -- the recipe -----------------------------------------------------------------------------------


def recipe() -> Table:
    """What the tiny models themselves reach on the test split."""
    made = record("recipe")

    def of(name: str, form: str = ".3f", *, part: str | None = None) -> Callable[[Value], str]:
        return lambda model: format((model if part is None else model[part])[name], form)

    kinds = "question_accuracy_by_kind"
    return _told(
        {
            "questions right": of("question_accuracy"),
            "captions fully right": of("captions_right"),
            "captions of four objects": of("four_object_captions_right"),
            "dialogue turns right (own history)": of("dialogue_accuracy"),
            **{f"questions: {kind}": of(kind, part=kinds) for kind in made[KINDS[0]][kinds]},
            "parameters, million": lambda model: f"{model['parameters'] / 1e6:.2f}",
            "folder, MB": lambda model: f"{model['folder_bytes'] / 1e6:.1f}",
            "steps, stage 1 (shared)": of("see_steps", ",", part="training"),
            "steps, stage 2": of("speak_steps", ",", part="training"),
            "seconds, stage 2": of("speak_seconds", ",", part="training"),
        },
        {kind.upper(): made[kind] for kind in KINDS},
    )


TABLES: dict[str, MakeTable] = {
    "demo": demo,
    "calibrated": calibrated,
    "images-needed": needed_images,
    "guarantee-broken": broken,
    "look-alikes": alike,
    "guarantee-boundary": at_boundary,
    "labels": labels,
    "recipe": recipe,
}
FIGURES: dict[str, Make] = {
    "guarantee-violations": lambda: str(_worst()["violations"]),
    "guarantee-settings": lambda: str(len(_splits())),
    "guarantee-expected": _expected,
}
