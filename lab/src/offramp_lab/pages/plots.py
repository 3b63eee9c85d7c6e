"""Draw the records: `python -m offramp_lab.pages.plots` writes docs/plots."""

from offramp.core.storage import write_atomic
from offramp_lab.experiments.comparison.equal_quality import drawn
from offramp_lab.experiments.drawing import (
    Band,
    dots,
    intervals,
    parts,
    powers,
    speed_bands,
    standalone,
    strips,
)
from offramp_lab.places import DOCS
from offramp_lab.tables.end_to_end import by_stage
from offramp_lab.tables.markdown import KINDS, by, record, tiny
from offramp_lab.tables.photographs import METHODS, curves
from offramp_lab.tables.trust import by_way

AT = "0.01"


def plots() -> dict[str, tuple[str, str]]:
    """Title and SVG of each plot by the name of its file."""
    photographs = record("end_to_end")["photographs"]
    return {
        **{
            f"compare-{kind}": (f"Equal quality, {tiny(kind)}", drawn(record("compare")[kind]))
            for kind in KINDS
        },
        "compare-photo": ("FREE beside each method, photographs", methods()),
        "end-to-end": (
            "A caption from the file to the text",
            parts(by_stage(), f"CPU milliseconds a caption, {photographs} photographs"),
        ),
        "matmul": ("Calls by their rows, beside the limit", matmul()),
        "quantisation": ("Weights of the photo model in memory", quantisation()),
        "guarantees": ("Risk on fresh images, over the promised risk", guarantees()),
        "models": ("How near decoding is to the model itself", models()),
        "decoding": ("Depth of each token, photo model", decoding()),
        "power": ("How often an attempt passes", power()),
        "trust": ("Trust beside thresholds, photo model", trust()),
    }


def matmul() -> str:
    """CPU milliseconds of calls in q8_0 by their rows: the limit, and the rest, as SVG. The limit
    is arithmetic at the peak, or reading the weights, 34 bytes for 32 of them."""
    found, rows = record("matmul")["AVX-512"], dict[str, dict[str, float]]()
    for count, took in found["q8_0"].items():
        arithmetic = took["share"] * took["ms"]
        weights = 0.5e6 * found["peak"] * arithmetic / int(count)
        limit = max(arithmetic, 1e-6 * weights * 34 / 32 / found["memory"])
        for kernels, name in {"offramp": "ms", "llama.cpp": "llama.cpp"}.items():
            rows[f"{count} row{'s' * (count != '1')}, {kernels}"] = {
                "the processor's limit": limit,
                "beyond it": took[name] - limit,
            }
    return parts(rows, f"CPU milliseconds of a call, q8_0, {found['provenance']['generation']}")


def quantisation() -> str:
    """Megabytes by number format: the decoder layers, and the rest, as SVG."""
    memory = record("quantised")["timings"]["memory"]
    rows = {
        name: {
            "decoder layers": held["layers"] / 1e6,
            "the rest": (held["model"] - held["layers"]) / 1e6,
        }
        for name, held in memory.items()
        if "packed" not in name  # in place: no more
    }
    return parts(rows, "MB")


def guarantees() -> str:
    """Of fifty calibrations each, the mean and the largest risk on fresh images, as SVG."""
    rows = {}
    for kind in KINDS:
        for entry in record("calibrated")["violations"][kind]:
            if entry["method"] == "auto" and entry["promised"]:
                at = entry["risk_target"]
                mean, most = entry["mean_risk_test"] / at, entry["largest_risk_test"] / at
                rows[f"{tiny(kind)}, {entry['risk'].replace('_', ' ')}, {at:g}"] = (
                    mean,
                    mean,
                    most,
                )
    return intervals(rows, "risk over promise: mean, largest")


def models() -> str:
    """By what was checked, how far each model type's logits are from its own, as SVG."""
    found = record("models")["types"].values()
    titles = {
        "plain": "full depth",
        "exits": "exits",
        "first_token": "first token exits",
        "lossless": "lossless",
    }
    rows = {
        title: [
            float(kind["3"][name])
            for kind in found
            if "3" in kind and isinstance(kind["3"].get(name), int | float)
        ]
        for name, title in titles.items()
    }
    limit = next(kind["allowed"] for kind in found if "allowed" in kind)
    return dots(rows, limit, "largest difference of logits; dotted: allowed")


def decoding() -> str:
    """One caption token by token, with early exits and by the full model, as SVG."""
    shown = record("photographer")
    names = {"full": "full", "early_exit": "early exit"}
    rows = {title: shown["modes"][mode]["depths"] for mode, title in names.items()}
    return strips(rows, shown["layers"], "token")


def power() -> str:
    """How often a first attempt at 1% passes, by its images, of three tests, as SVG."""
    tests = {"sharp": "ours", "exact": "exact, no images later", "bets": "bets alone"}
    return powers(record("simulated")["power"], tests)


def trust() -> str:
    """By engine and way, the share of full depth's own answers against speed, as SVG."""
    return speed_bands(
        {
            f"{title}, {way}": [
                Band(1 - e["changed"], *(e["whole"][n] for n in ("times", "low", "high")))
                for e in entries
            ]
            for title, ways in by_way().items()
            for way, entries in ways.items()
        },
        "answers that are full depth's",
        speed_of="speed of a whole answer",
    )


def methods() -> str:
    """By how much FREE is faster than each method where CIDEr drops by at most 1%, as SVG."""
    named = by(curves(), "objective", "policy")
    rows = {
        title: (named[name]["free_over"][AT], *named[name]["free_over_interval"][AT])
        for name, title in METHODS.items()
        if name != ("free", "max_probability")
    }
    return intervals(rows, "speed of FREE over each method's, CIDEr drop 1%")


def main() -> None:
    for name, (title, svg) in plots().items():
        write_atomic(DOCS / "plots" / f"{name}.svg", standalone(svg, title))


if __name__ == "__main__":
    main()
