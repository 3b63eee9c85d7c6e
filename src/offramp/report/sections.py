"""What the report shows of each kind of result, as HTML; "" where the result does not hold it.

Here are the numbers; the sentences stand in the templates.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from markupsafe import Markup

from offramp.report.headline import NOTHING, Value
from offramp.report.html import fine, metric, percent, render, times, with_interval
from offramp.report.plots import calibration_curve, depth_histogram
from offramp.report.plots import forecast as forecast_plot
from offramp.report.table import Table

TITLES = {
    "generate": "stock generate",
    "full": "full model",
    "early_exit": "early exit",
    "lossless": "lossless",
}


def _thresholds(value: Any) -> str:
    if not value:
        return "-"
    return ", ".join(f"{d}: {t:g}" for d, t in value.items() if t is not None) or "off"


def histogram(value: Value) -> Markup:
    """Return the section on the depths at which tokens of a run exited."""
    early = value["modes"].get("early_exit")
    if not early:
        return NOTHING
    shares = early["depth_shares"]
    by_depth = Table(
        ("depth", "tokens"), [(f"{d} of {early['layers']}", percent(s)) for d, s in shares.items()]
    )
    plot = depth_histogram(shares, early["layers"])
    return render(
        "exits", svg=plot, shares=by_depth, tokens=early["tokens"], mean_depth=early["mean_depth"]
    )


def forecast(value: Value) -> Markup:
    """Return the section on how fast exits at each depth would be."""
    plot = forecast_plot(value["depths"], value["layers"])
    return render("forecast", svg=plot, **{n: value[n] for n in ("tokens", "prompts", "planned")})


def foretold(value: Value) -> Markup:
    """Return the section with all figures of a forecast and, where exits would pay, the next
    commands."""
    first, *_ = value["depths"]
    columns: dict[str, Any] = {
        "depth": lambda row: f"{row['depth']} of {value['layers']}",
        "words as the full model's": lambda row: percent(row["agreement"]),
    }
    columns |= {
        f"settled, {float(level):.0%} stay": lambda row, level=level: percent(row["settled"][level])
        for level in first["settled"]
    }
    columns["speed, lossless"] = lambda row: times(row["lossless"])
    columns |= {
        f"speed, {float(risk):.0%} change": lambda row, risk=risk: times(row["calibrated"][risk][0])
        for risk in first["calibrated"]
    }
    return render("foretold", rows=Table.of(value["depths"], columns), command=value["next"])


def calibration(value: Value) -> Markup:
    """Return the section on the guarantee, and the path of thresholds it was found on."""
    guarantee = value.get("calibration")
    if not guarantee:
        return render("calibration", guarantee=None)
    path = guarantee.get("path") or ()
    passed = [i for i, p in enumerate(path) if p["risk"] == guarantee["measured"]]
    chosen = passed[-1] if passed else None
    svg = ""
    if path:
        risks, bounds = [p["risk"] for p in path], [p["bound"] for p in path]
        svg = calibration_curve(risks, bounds, guarantee["target"], chosen)
    by_trust = guarantee["policy"].get("trust") is not None
    tried = "Levels of trust" if by_trust else "Thresholds"
    walked = Table.of(
        path,
        {
            f"{tried.lower()} by depth": lambda p: _thresholds(p["thresholds"]),
            "risk": lambda p: fine(p["risk"]),
            "bound": lambda p: fine(p["bound"]),
            "a token, predicted": lambda p: (
                "-" if p["seconds"] is None else f"{1e3 * p['seconds']:.2f} ms"
            ),
        },
    )
    ways = Table.of(
        guarantee.get("ways") or (),
        {
            "way": lambda w: w["name"],
            "setting": lambda w: w["setting"],
            "speed of full depth": lambda w: times(w["times"]),
            "risk": lambda w: "none" if w["risk"] is None else fine(w["risk"]),
            "": lambda w: "promised" if w["promised"] else "" if w["risk"] is None else "estimated",
        },
    )
    return render(
        "calibration",
        guarantee=guarantee,
        chosen=chosen is not None,
        svg=svg,
        path=walked,
        ways=ways,
        tried=tried,
    )


# -- all figures -----------------------------------------------------------------------------------

_LATENCIES = (
    ("an answer, median", "seconds", "p50"),
    ("an answer, 95th percentile", "seconds", "p95"),
    ("its decoding, median", "decode_seconds", "p50"),
    ("its decoding, 95th percentile", "decode_seconds", "p95"),
)


def measured_eval(value: Value) -> Markup:
    """Return the section with every metric of a run by mode, its groups, and the times."""
    modes, both = value["modes"], value.get("compared", {})
    titles = [TITLES[m] for m in modes]
    rows = []
    for name in next(iter(modes.values()))["metrics"]:
        form = partial(metric, name)
        cells = [with_interval(modes[m]["metrics"].get(name), form) for m in modes]
        if both:
            cells.append(with_interval(both["difference"].get(name), form))
        rows.append((name, *cells))
    timed = any(mode.get("latency") for mode in modes.values())
    latency = Table.grid(
        {title: place for title, *place in (_LATENCIES if timed else ())},
        {TITLES[name]: mode.get("latency") for name, mode in modes.items()},
        lambda place, of: _latency(of, *place),
    )
    measured = Table(("metric", *titles, *(["difference"] if both else [])), rows)
    return render(
        "figures",
        kind="eval",
        n=value["n"],
        measured=measured,
        latency=latency,
        missing=next(iter(modes.values()))["unavailable"],
    )


def _latency(value: Value | None, name: str, part: str) -> str:
    return f"{1e3 * value[name][part]:.1f} ms" if value else "-"


def demo_modes(value: Value) -> Table:
    """Return a table with every mode of a demo."""
    tasks = list(value["modes"]["full"]["quality"])
    columns: dict[str, Any] = {
        "mode": "{mode}",
        "tokens/s": "{tokens_per_second:.0f}",
        "seconds": "{seconds_end_to_end:.2f}",
        "decoding": lambda mode: times(mode.get("speedup_decode")),
        "end to end": lambda mode: times(mode.get("speedup_end_to_end")),
        "against generate": lambda mode: times(mode.get("speedup_vs_generate")),
        **{f"{t} right": lambda mode, t=t: percent(mode["quality"][t]) for t in tasks},
    }
    modes = [{**mode, "mode": TITLES.get(name, name)} for name, mode in value["modes"].items()]
    return Table.of(modes, columns)


def measured_demo(value: Value) -> Markup:
    """Return the section on a demo's modes."""
    return render("figures", kind="demo", measured=demo_modes(value))


def origins(named: Sequence[tuple[str, Value]]) -> Markup:
    """Return the section on the origin of each result: command, machine, versions, data."""
    where = [{**v["provenance"], "result": name} for name, v in named if v.get("provenance")]
    columns: dict[str, Any] = {
        "result": "{result}",
        "command": "{command}",
        "date": "{date:.10}",
        "machine": lambda of: (
            f"{of.get('accelerator') or of['processor']}, {of['threads']} threads, {of['platform']}"
        ),
        "versions": lambda of: ", ".join(f"{k} {v}" for k, v in of["versions"].items() if v),
        "seed": lambda of: str(of.get("seed")),
        "data digest": lambda of: str(of.get("data_digest"))[:16],
    }
    return render("origin", origins=Table.of(where, columns)) if where else NOTHING
