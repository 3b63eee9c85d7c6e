"""The tiny models that ship: the demo, calibrated thresholds, what labels are worth, the recipe."""

from collections.abc import Mapping
from itertools import product
from typing import Any

from offramp.calibration.risk_control import images_needed
from offramp_lab.experiments.comparison.equal_quality import LEVELS, equal_quality
from offramp_lab.tables.markdown import KINDS, Make, bold, level, record, table, times, tiny

Value = Mapping[str, Any]


def demo() -> str:
    """What `make demo` measures."""

    def column(report: Value) -> dict[str, str]:
        full, early, lossless = (report["modes"][n] for n in ("full", "early_exit", "lossless"))

        def right(task: str) -> str:
            return f"{full['quality'][task]:.1%} / {early['quality'][task]:.1%}"

        return {
            "decoder layers; exits at": f"{report['layers']}; {report['exits']}",
            "mean depth of a token": f"{early['mean_depth']:.2f}",
            "decoding, against our full-depth loop": bold(times(early["speedup_decode"])),
            "end to end, vision and prompt included": times(early["speedup_end_to_end"]),
            "decoding, against stock `generate`": times(early["speedup_vs_generate"]),
            "our full-depth loop against `generate`": times(report["full_vs_generate"]),
            "answers identical to the full model's": f"{early['agreement']:.1%}",
            "captions fully right, full / early exit": right("captions"),
            "questions right, full / early exit": right("questions"),
            "lossless: decoding": times(lossless["speedup_decode"]),
            "lossless: end to end": times(lossless["speedup_end_to_end"]),
            "lossless: identical to the full model": "yes" if lossless["identical"] else "NO",
            "training the exits": f"{report['training_seconds']:.0f} s",
        }

    columns = [column(record(f"demo-{kind}")) for kind in KINDS]
    rows = [(title, *(c[title] for c in columns)) for title in columns[0]]
    return table(rows, ("", *map(tiny, KINDS)))


RISKS = {
    "disagreement": "answers that differ from the full model's",
    "exact_match_drop": "right answers lost",
}


def calibrated() -> str:
    """Thresholds with a guarantee, on answers that calibration did not see."""
    rows = [
        (
            tiny(kind),
            RISKS[row["risk"]],
            f"{row['risk_target']:.0%}",
            f"{row['risk_test']:.2%}",
            bold(times(row["speedup_decode"])),
            times(row["speedup_end_to_end"]),
            f"{row['quality_drop']:+.2%}",
        )
        for kind in KINDS
        for row in record("calibrated")[kind]
    ]
    columns = (
        "model",
        "risk, by image",
        "at most",
        "on test",
        "decoding",
        "end to end",
        "quality drop",
    )
    return table(rows, columns)


def needed_images() -> str:
    """Images that a first attempt at 95% confidence needs, by the target."""
    rows = [
        (
            f"{row['target']:.0%}",
            f"{row['at_no_loss']:,}",
            f"{row['at_half_the_target']:,}",
            f"{row['declared_at_half_the_target']:,}",
        )
        for row in images_needed()
    ]
    columns = ("target", "nothing lost", "half the target measured", "declared, half is the truth")
    return table(rows, columns)


def broken() -> str:
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
    return table([*alike, *more, *at], ("population", "true risk", "before", "now"))


def _power() -> Value:
    """Of a target of 1%."""
    row: Value = record("simulated")["needed"][0]
    return row


def alike() -> str:
    """As how many images those that look alike count."""
    rows = [
        (row["kind"], f"{row['images']}", f"{row['before']}", f"{row['now']}")
        for row in record("simulated")["counted"]
    ]
    return table(rows, ("different", "images", "by thumbnails", "as they count"))


def at_boundary() -> str:
    """How often halves of a pool certified a threshold whose risk over the pool is too large."""
    rows = [
        (
            f"{row['risk_target']:.0%}",
            row["unit"],
            f"{row['threshold']:g}",
            f"{row['risk']:.2%}",
            f"{row['certified']} of {row['halves']}",
        )
        for row in record("violations")["shipped"]["entries"]
    ]
    columns = ("target", "by", "threshold", "its risk over the pool", "certified by")
    return table(rows, columns)


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


def labels() -> str:
    """Speed at equal quality, with and without labels."""
    models = {kind: record("compare")[kind] for kind in KINDS}
    measured = {(p["objective"], p["policy"]) for p in models["opt"]["points"]}
    shown = [
        pair
        for pair in product(EXITS, POLICIES)
        if pair in measured and (pair[0] != "free" or pair[1] == "max_probability")
    ]
    rows = [
        (EXITS[o] + POLICIES[p], *(times(s) for m in models.values() for s in _speeds(m, o, p)))
        for o, p in shown
    ]
    return table(rows, ("exits", *(f"{tiny(k)}, {level(at)}" for k in KINDS for at in LEVELS)))


def _speeds(model: Value, objective: str, policy: str) -> list[float]:
    """At every level; with the largest probability at the first depths alone."""
    points = [p for p in model["points"] if (p["objective"], p["policy"]) == (objective, policy)]
    if policy == "max_probability":
        points = [p for p in points if p["depths"] == model["plan"]["depths"]]
    return list(equal_quality(points)["curves"][0]["speedup_decode"].values())


# -- the recipe -----------------------------------------------------------------------------------


def recipe() -> str:
    """What the tiny models themselves reach on the test split."""

    def column(model: Value) -> dict[str, str]:
        training = model["training"]
        return {
            "questions right": f"{model['question_accuracy']:.3f}",
            "captions fully right": f"{model['captions_right']:.3f}",
            "captions of four objects": f"{model['four_object_captions_right']:.3f}",
            "dialogue turns right (own history)": f"{model['dialogue_accuracy']:.3f}",
            **{
                f"questions: {kind}": f"{share:.3f}"
                for kind, share in model["question_accuracy_by_kind"].items()
            },
            "parameters, million": f"{model['parameters'] / 1e6:.2f}",
            "folder, MB": f"{model['folder_bytes'] / 1e6:.1f}",
            "steps, stage 1 (shared)": f"{training['see_steps']:,}",
            "steps, stage 2": f"{training['speak_steps']:,}",
            "seconds, stage 2": f"{training['speak_seconds']:,}",
        }

    columns = [column(record("recipe")[kind]) for kind in KINDS]
    return table([(t, *(c[t] for c in columns)) for t in columns[0]], ("", "OPT", "T5"))


TABLES: dict[str, Make] = {
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
    "power-measured-half": lambda: f"{_power()['passes_at_measured_half']:.0%}",
    "power-four-of-five": lambda: f"{_power()['four_of_five']:,}",
    "power-declared": lambda: f"{_power()['declared']:,}",
    "guarantee-violations": lambda: str(_worst()["violations"]),
    "guarantee-settings": lambda: str(len(_splits())),
    "guarantee-expected": _expected,
}
