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
    columns = ("model", "risk", "at most", "on test", "decoding", "end to end", "quality drop")
    return table(rows, columns)


def needed_images() -> str:
    """Images that a first attempt at 95% confidence needs, by the target."""
    rows = [
        (f"{row['target']:.0%}", f"{row['at_no_loss']:,}", f"{row['at_half_the_target']:,}")
        for row in images_needed()
    ]
    return table(rows, ("target", "nothing lost", "half the target lost"))


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
    "labels": labels,
    "recipe": recipe,
}
FIGURES: dict[str, Make] = {
    "guarantee-violations": lambda: str(_worst()["violations"]),
    "guarantee-settings": lambda: str(len(_splits())),
    "guarantee-expected": _expected,
}
