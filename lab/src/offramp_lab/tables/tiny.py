"""The tiny models that ship: the demo, calibrated thresholds, what labels are worth."""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import product

from offramp.calibration.asked import Guarantee
from offramp.report.html import times
from offramp.report.table import Table, Told, told
from offramp_lab.experiments.comparison.equal_quality import equal_quality
from offramp_lab.tables.markdown import KINDS, Make, MakeTable, Value, level, record, tiny


def demo() -> Table:
    """What `make demo` measures."""

    def right(task: str) -> str:
        return f"{{full[quality][{task}]:.1%}} / {{early_exit[quality][{task}]:.1%}}"

    return Table.grid(
        {
            "mean depth of a token": "{early_exit[mean_depth]:.2f} of {layers} layers",
            "early exit: decoding, over exits off": "**{early_exit[speedup_decode]:.2f}x**",
            "early exit: end to end, vision and prompt included": (
                "{early_exit[speedup_end_to_end]:.2f}x"
            ),
            "answers identical to the full model's": "{early_exit[agreement]:.1%}",
            "captions right, full / early exit": right("captions"),
            "questions right, full / early exit": right("questions"),
            "lossless: decoding, over exits off": "{lossless[speedup_decode]:.2f}x",
        },
        {tiny(kind): {**of, **of["modes"]} for kind in KINDS for of in [record("demo")[kind]]},
        told,
    )


def calibrated() -> Table:
    """Thresholds with a guarantee, on answers that calibration did not see."""
    return Table.of(
        [
            {**row, "model": tiny(kind)}
            for kind in KINDS
            for row in record("calibrated")[kind]
            if row["risk"] == "disagreement"
        ],
        {
            "model": "{model}",
            "answers that differ, at most": "{risk_target:.0%}",
            "on test": "{risk_test:.2%}",
            "decoding": "**{speedup_decode:.2f}x**",
            "end to end": "{speedup_end_to_end:.2f}x",
            "quality drop": "{quality_drop:+.2%}",
        },
    )


def needed_images() -> Table:
    """Images that a first attempt at 95% confidence needs, by the target."""

    def of(share: float) -> Callable[[Guarantee], str]:
        return lambda asked: f"{asked.images_for(share * asked.target):,}"

    return Table.of(
        [Guarantee(target) for target in (0.01, 0.02, 0.05)],
        {
            "target": lambda asked: f"{asked.target:.0%}",
            "risk 0": lambda asked: f"{asked.images_needed():,}",
            "a tenth of the target": of(0.1),
            "three tenths": of(0.3),
            "half": of(0.5),
        },
    )


def needs_more(test: str) -> str:
    """How many more images a test needs than an exact one, for a pass in four of five trials."""
    found = [row[test] / row["exact"] - 1 for row in record("simulated")["needed"]]
    return f"{100 * min(found):.0f} to {max(found):.0%}"


def fractions_need() -> str:
    """How many fewer images a first look needs than bets alone, for losses between 0 and 1."""
    found = [1 - row["sharp"] / row["bets"] for row in record("simulated")["fractions"]]
    return f"{100 * min(found):.0f} to {max(found):.0%}"


KEPT = {
    "groups": ("{images:,} images in groups of {size}, correlation 0.5", "each counted alone"),
    "rare_groups": ("1 of 2,000 groups of 400 images", "each image alike"),
    "forgotten": ("ten settings on the same images", "each after a fresh set"),
    "handed": ("six attempts, of which three hand their errors on", ""),
    "kinds": ("60% captions at 0.2%, questions above the target", "all together"),
    "grown": ("a file that grows, tested 17 times", "each look as the first"),
    "two_steps": ("40 pairs of thresholds, ordered on 300 images, tested on 700", ""),
}
"""What is simulated, and what is done without the rule, if that was."""


def _cases(name: str) -> list[Value]:
    """Of the simulations."""
    found = record("simulated")[name]
    return found if isinstance(found, list) else [found]


def kept() -> Table:
    """Promises of what came later: groups, kinds, a search, a file that grows."""
    cells = [
        (
            what.format_map(case),
            f"{case['broken_before']:.1%} ({without})" if without else "",
            f"{case['broken']:.1%} {_between(case)} of {case['trials']}",
        )
        for name, (what, without) in KEPT.items()
        for case in _cases(name)
    ]
    return Table(("what", "broken without the rule", "broken with it"), cells)


def _between(row: Value) -> str:
    low, high = row["interval"]
    return f"[{low:.1%}, {high:.1%}]"


def unlike(part: str, columns: Mapping[str, Told]) -> Table:
    """What is called unlike the calibrated answers or photographs, by what its images are."""
    return Table.of(
        record("likeness")[part],
        {
            "images": "{images}",
            **columns,
            "called unlike": lambda row: f"{row['unlike']:.1%} {_between(row)}",
        },
    )


def broken() -> Table:
    """How often a promise was given at a risk above the target, without each rule and with it."""
    rows: dict[str, tuple[Told, ...]] = {
        "lookalikes": (
            "{photographs} photographs at 0.05% and {charts} charts at 8%",
            "{risk:.2%}",
            "{broken_before:.1%} (charts as one image)",
            "{broken_now:.1%}",
        ),
        "still_merged": (
            "{merged} of {images} images merged though each is its own",
            "{risk:.2%}",
            "{broken_before:.1%} (counted as one)",
            "{broken_now:.1%}",
        ),
        "unequal_rows": (
            "images with 1 or 40 answers, by answer",
            "{risk_by_answer:.2%}",
            "{passed_by_image:.1%} (by image)",
            "{passed_by_answer:.1%}",
        ),
        "choices": (
            "the first of {candidates} adapters that passes",
            _at_target,
            "{broken_before:.1%} (each at the full level)",
            "{broken_now:.1%}",
        ),
        "boundary": (
            "{images} images, a risk barely above the target",
            _at_target,
            "",
            "{broken:.1%}",
        ),
    }
    cells = [
        [told(what, case) for what in row]
        for name, row in rows.items()
        for case in _cases(name)
        if case.get("method") in (None, "sharp")
    ]
    return Table(("population", "true risk", "passes without the rule", "passes with it"), cells)


def _at_target(case: Value) -> str:
    return f"{1.001 * case['target']:.2%}"


def _splits() -> list[Value]:
    return [row for kind in KINDS for row in record("calibrated")["violations"][kind]]


def _worst() -> Value:
    return max(_splits(), key=lambda row: row["violations"])


def _expected() -> str:
    return f"{_worst()['splits'] * record('calibrated')['violations']['stated_share']:.1f}"


# -- what labels are worth ------------------------------------------------------------------------

EXITS = {
    "free": "FREE, no labels",
    "distillation": "distillation alone, no labels",
    "free_supervised": "FREE, all labels",
    "cross_entropy": "cross-entropy, all labels",
    "cross_entropy_few": "cross-entropy, 10% of the labels",
    "logit_lens": "logit lens",
}
SHOWN = (0.01, 0.05)
"""Drops of quality."""
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
        if pair in measured and (pair[0] == "cross_entropy" or pair[1] == "max_probability")
    ]
    return Table(
        ("exits", *(f"{tiny(kind)}, {level(at)}" for kind in KINDS for at in SHOWN)),
        [
            (EXITS[o] + POLICIES[p], *(times(s) for m in models.values() for s in _speeds(m, o, p)))
            for o, p in shown
        ],
    )


def _speeds(model: Value, objective: str, policy: str) -> list[float]:
    """At the levels shown; with the largest probability at the first depths alone."""
    points = [p for p in model["points"] if (p["objective"], p["policy"]) == (objective, policy)]
    if policy == "max_probability":
        points = [p for p in points if p["depths"] == model["plan"]["depths"]]
    speeds = equal_quality(points)["curves"][0]["speedup_decode"]
    return [speeds[str(at)] for at in SHOWN]


TABLES: dict[str, MakeTable] = {
    "demo": demo,
    "calibrated": calibrated,
    "images-needed": needed_images,
    "guarantee-kept": kept,
    "likeness": partial(
        unlike, "tiny", {"answers": "{answers}", "by scores alone": "{scores_alone:.1%}"}
    ),
    "likeness-photo": partial(unlike, "photo", {"number": "{answers}"}),
    "guarantee-broken": broken,
    "labels": labels,
}
FIGURES: dict[str, Make] = {
    "tests-need-more": partial(needs_more, "sharp"),
    "tests-need-bets": partial(needs_more, "bets"),
    "fractions-need": fractions_need,
    "guarantee-kept-splits": lambda: str(_worst()["splits"] - _worst()["violations"]),
    "guarantee-settings": lambda: str(len(_splits())),
    "guarantee-expected": _expected,
}
