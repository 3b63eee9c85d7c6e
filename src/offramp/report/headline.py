"""A result in one sentence, as HTML, and its key figures.

Here are the numbers; the sentences stand in the template.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from markupsafe import Markup

from offramp.promises.likeness import LIKE
from offramp.report.html import between, fine, metric, percent, render, times

Value = Mapping[str, Any]
Cards = list[tuple[str, str, str]]
"""Of each figure what it is, the number and a remark."""
Headline = tuple[Markup, Cards]
NOTHING = Markup("")
"""No sentence."""


def evaluated(value: Value) -> Headline:
    """Return speed, agreement and the first metrics of a run, with intervals."""
    early, full = (value["modes"].get(name) for name in ("early_exit", "full"))
    both = value.get("compared") or {"speedup": {}, "agreement": {"value": None}}
    speeds, same = both["speedup"], both["agreement"]
    sentence = NOTHING
    if early:
        speed = speeds.get("end_to_end") or speeds.get("decode")
        sentence = render(
            "headline",
            kind="eval",
            same=same["value"],
            **_most(early),
            depth=early["mean_depth"],
            speed=speed and speed["value"],
            whole=bool(speeds.get("end_to_end")),
        )
    cards: Cards = []
    for name, title in (("decode", "decoding speed"), ("end_to_end", "speed end to end")):
        if ratio := speeds.get(name):
            cards.append((title, times(ratio["value"]), between(ratio, times)))
    if same["value"] is not None:
        cards.append(("answers as the full model's", percent(same["value"]), between(same)))
    mode = early or full
    if early and early["mean_depth"]:
        cards.append(("mean depth", f"{early['mean_depth']:.2f}", f"of {early['layers']} layers"))
    for name, measure in list(mode["metrics"].items())[-4:] if mode else ():
        remark = between(measure, partial(metric, name))
        if early and full:
            remark = f"full model {metric(name, full['metrics'][name]['value'])}"
        cards.append((name, metric(name, measure["value"]), remark))
    return sentence, cards


def _most(early: Value) -> dict[str, Any]:
    """The exit at which most tokens were written, and their share; None without one."""
    shares = {int(d): s for d, s in early["depth_shares"].items()}
    exits = {depth: share for depth, share in shares.items() if depth != early["layers"] and share}
    shallow = max(exits, key=lambda depth: exits[depth]) if exits else None
    return {"layers": early["layers"], "shallow": shallow, "share": exits.get(shallow or 0)}


def demo(value: Value) -> Headline:
    """Return the speed of both modes, and quality against the full model's."""
    early, full, layers = value["modes"]["early_exit"], value["modes"]["full"], value["layers"]
    depth, exits = early["mean_depth"], value["exits"]
    # Of one exit the share follows from the mean.
    share = (layers - depth) / (layers - exits[0]) if len(exits) == 1 else None
    sentence = render(
        "headline",
        kind="demo",
        same=early["agreement"],
        depth=depth,
        shallow=exits[0],
        share=share,
        layers=layers,
        speed=early["speedup_end_to_end"],
        whole=True,
    )
    cards: Cards = [
        ("decoding speed, early exit", times(early["speedup_decode"]), "full depth = 1"),
        ("speed end to end, early exit", times(early["speedup_end_to_end"]), "full depth = 1"),
        ("answers as the full model's", percent(early["agreement"]), ""),
        ("mean depth", f"{early['mean_depth']:.2f}", f"of {layers} layers"),
    ]
    if lossless := value["modes"].get("lossless"):
        same = "identical" if lossless["identical"] else "NOT identical"
        cards.insert(
            2,
            (
                "decoding speed, lossless",
                times(lossless["speedup_decode"]),
                f"answers {same} to the full model's",
            ),
        )
    for name, quality in early["quality"].items():
        remark = f"full model {percent(full['quality'][name])}"
        cards.append((f"{name} right", percent(quality), remark))
    return sentence, cards


def forecast(value: Value) -> Headline:
    """Return whether exits would pay, and the seconds of answers with them."""
    best = next(row for row in value["depths"] if row["depth"] == value["best"])
    cards: Cards = [("decoding speed, lossless", times(best["lossless"]), "no answer changes")]
    cards += [
        (
            f"decoding speed, {float(risk):.0%} of answers change",
            times(speed),
            f"{times(low)} to {times(high)}",
        )
        for risk, (speed, low, high) in best["calibrated"].items()
    ]
    whole, after = value["seconds"][0], value["seconds_with"]
    cards += [
        ("1,000 answers now", _took(1000 * whole), "of this machine, one at a time"),
        ("with the exit", _took(1000 * after), "times its price an hour: what they cost"),
    ]
    return Markup("{}").format(value["verdict"]), cards


def _took(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def adapter(value: Value) -> Headline:
    """Return the guarantee of an adapter, if it has one."""
    guarantee = value.get("calibration")
    if not guarantee or guarantee.get("measured") is None:
        return NOTHING, []
    cards: Cards = [
        (
            "guaranteed risk, at most",
            fine(guarantee["target"]),
            f"{guarantee['risk']}, at {percent(guarantee['confidence'], 0)} confidence, {LIKE}",
        ),
        (
            "measured risk",
            fine(guarantee["measured"]),
            f"at most {fine(guarantee['bound'])}, n = {guarantee['n']}",
        ),
    ]
    asked = {name: guarantee[name] for name in ("confidence", "risk", "target")}
    return render("headline", kind="adapter", **asked), cards
