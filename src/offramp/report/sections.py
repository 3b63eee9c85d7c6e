"""What the report shows of each kind of result, as HTML; "" where the result does not hold it.

Here are the numbers; the sentences stand in the templates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from markupsafe import Markup

from offramp.report.headline import NOTHING, Cards, Value
from offramp.report.html import between, fine, metric, percent, render, times, with_interval
from offramp.report.plots import (
    NAMES,
    Band,
    analysis_plots,
    calibration_curve,
    depth_histogram,
    speed_bands,
)
from offramp.report.table import Table, told
from offramp.report.tradeoff import FREE, by_name

TITLES = {
    "generate": "stock generate",
    "full": "full model",
    "early_exit": "early exit",
    "lossless": "lossless",
}


# -- speed and depth -------------------------------------------------------------------------------


def tradeoffs(value: Value) -> Markup:
    """Quality against measured decoding speed, by objective and policy."""
    points = [p for p in value["points"] if p.get("speedup_decode") is not None]
    every = Table.of(
        sorted(points, key=lambda p: (_pair(p), p["speedup_decode"])),
        {
            "objective, policy": _pair,
            "seed": lambda p: str(p.get("seed", "-")),
            "quality": lambda p: fine(_mean(p["quality"])),
            "drop": lambda p: fine(_mean(p["quality_drop"])),
            "answers as full": lambda p: percent(p.get("agreement")),
            "decoding": lambda p: times(p["speedup_decode"]),
            "mean depth": lambda p: "-" if (d := p.get("mean_depth")) is None else f"{d:.2f}",
            "thresholds": lambda p: _thresholds(p.get("thresholds")),
        },
    )
    curves = _curves(points) if points else []
    return render("tradeoff", points=every, curves=curves, speeds=_equal_quality(value))


def _curves(points: Sequence[Value]) -> list[dict[str, Any]]:
    """A plot of the objectives, and one of the policies if there are several."""
    exits = [p for p in points if p["policy"] == "max_probability"]
    # Truncation reads a depth by the backbone's own head, whatever exits there are.
    policies = [p for p in points if p["objective"] == FREE or p["policy"] == "truncation"]
    plots: list[dict[str, Any]] = []
    for by, ours, chosen in (
        ("objective", _words(FREE), exits),
        ("policy", "max probability", policies),
    ):
        curves: dict[str, list[Band]] = {
            _words(name): curve for name, curve in by_name((p[by], p) for p in chosen).items()
        }
        if len(curves) > 1 or (curves and not plots):
            plots.append({"by": by, "svg": speed_bands(curves, "quality kept", ours)})
    return plots


def _equal_quality(value: Value) -> Table | None:
    """Decoding speed at equal quality, the fastest first; None: it was not compared."""
    curves = value.get("equal_quality", {}).get("curves")
    if not curves:
        return None
    levels = {f"{100 * float(at):g}% drop": at for at in curves[0]["speedup_decode"]}
    first = next(iter(levels.values()))
    ordered = sorted(curves, key=lambda c: -c["speedup_decode"][first])
    return Table.grid(
        {_pair(curve): curve["speedup_decode"] for curve in ordered},
        levels,
        lambda speeds, at: times(speeds[at]),
        "objective, policy",
    )


def _pair(point: Value) -> str:
    return f"{_words(point['objective'])}, {_words(point['policy'])}"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _mean(value: Any) -> float:
    """A number, an estimate's value, or the mean over tasks."""
    if isinstance(value, Mapping):
        parts = [value["value"]] if "value" in value else [_mean(v) for v in value.values()]
        return float(sum(parts) / len(parts))
    return float(value)


def _thresholds(value: Any) -> str:
    if not value:
        return "-"
    return ", ".join(f"{d}: {t:g}" for d, t in value.items() if t is not None) or "off"


_MEASURES = {
    "agreement": "agreement",
    "accuracy": "token accuracy",
    "identical": "the share of unchanged answers",
    "quality": "quality",
}


def depths(value: Value) -> Markup:
    """Curves over depth, before and after training, and where they dip."""
    return render("depth", dips=_dips(value), plots=analysis_plots(value))


def _dips(value: Value) -> list[dict[str, Any]]:
    """For each set of exits where its quality falls from a depth to a deeper one."""
    dips = []
    parts = (value["teacher_forced"], value["free_running"])
    for name, title in NAMES.items():
        measured = {k: c for part in parts for k, c in part.get(name, {}).items()}
        falls = [
            {
                "measure": _MEASURES[k], "fall": c["dip"]["fall"], "between": between(c["dip"]),
                "start": c["dip"]["from_depth"], "stop": c["dip"]["to_depth"],
            }
            for k, c in measured.items()
            if c["dip"]["found"]
        ]  # fmt: skip
        if measured:
            dips.append({"title": title[0].upper() + title[1:], "falls": falls})
    return dips


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


# -- overthinking and calibration ------------------------------------------------------------------

_OVERTHINKING = {
    "overthought": "some depth right, final layer wrong",
    "at_risk": "final layer right, some depth wrong",
    "only_final": "only the final layer right",
}


def overthinking(value: Value) -> Markup:
    """Tokens that some exit has right and the final layer wrong, and the reverse."""
    figures = value.get("overthinking")
    if not figures:
        return render("overthinking", figures=None)
    names = {n: t for n, t in NAMES.items() if n in figures}
    lines: dict[str, Any] = {"labelled tokens": "{tokens}"}
    lines |= {line: partial(_counted, k) for k, line in _OVERTHINKING.items()}
    lines |= {
        line: partial(_share_right, k)
        for k, line in (("final", "final layer right"), ("oracle", "right at any depth"))
    }
    tokens = Table.grid(lines, {title: figures[n] for n, title in names.items()}, told)
    return render(
        "overthinking", figures=figures, tokens=tokens,
        policy=_policy_cards(figures.get("policy")), answers=_whole_answers(figures.get("answers")),
    )  # fmt: skip


def _policy_cards(policy: Value | None) -> Cards:
    if not policy:
        return []
    right, difference = policy["on_overthought"], policy["difference"]
    return [
        ("overthought tokens", str(policy["n_overthought"]), "an exit right, the final wrong"),
        ("of these right by policy", percent(right["value"]),
         between(right) or "final layer: 0 by definition"),
        ("policy minus final layer", metric("", difference["value"], signed=True),
         f"all labelled tokens; {between(difference, fine)}"),
    ]  # fmt: skip


def _whole_answers(answers: Value | None) -> dict[str, Any] | None:
    if not answers:
        return None
    overthought = answers["with_overthought_tokens"]
    return {
        **{name: answers[name] for name in ("better", "worse", "n")},
        "difference": with_interval(answers["difference"], fine),
        "overthought": overthought["n"],
        "policy": with_interval(overthought["policy"]),
        "full": with_interval(overthought["full"]),
    }


def _counted(name: str, figures: Value) -> str:
    return f"{figures[name]['n']}: {with_interval(figures[name]['share'], fine)}"


def _share_right(name: str, figures: Value) -> str:
    return with_interval(figures[name], fine)


def calibration(value: Value) -> Markup:
    """The guarantee, and the path of thresholds it was found on."""
    guarantee = value.get("calibration")
    if not guarantee:
        return render("calibration", guarantee=None)
    path = guarantee.get("path") or ()
    passed = [i for i, p in enumerate(path) if p["risk"] == guarantee["measured"]]
    chosen = passed[-1] if passed and guarantee["policy"]["thresholds"] else None
    svg = ""
    if path:
        risks, bounds = [p["risk"] for p in path], [p["bound"] for p in path]
        svg = calibration_curve(risks, bounds, guarantee["target"], chosen)
    walked = Table.of(
        path,
        {
            "thresholds by depth": lambda p: _thresholds(p["thresholds"]),
            "risk": lambda p: fine(p["risk"]),
            "bound": lambda p: fine(p["bound"]),
            "a token, predicted": lambda p: (
                "-" if p["seconds"] is None else f"{1e3 * p['seconds']:.2f} ms"
            ),
        },
    )
    return render(
        "calibration", guarantee=guarantee, chosen=chosen is not None, svg=svg, path=walked
    )


# -- all figures -----------------------------------------------------------------------------------

_LATENCIES = (
    ("an answer, median", "seconds", "p50"),
    ("an answer, 95th percentile", "seconds", "p95"),
    ("its decoding, median", "decode_seconds", "p50"),
    ("its decoding, 95th percentile", "decode_seconds", "p95"),
)


def measured_eval(value: Value) -> Markup:
    """Every metric of a run by mode, its groups, and the times."""
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
        "figures", kind="eval", n=value["n"], measured=measured, latency=latency,
        missing=next(iter(modes.values()))["unavailable"],
    )  # fmt: skip


def _latency(value: Value | None, name: str, part: str) -> str:
    return f"{1e3 * value[name][part]:.1f} ms" if value else "-"


def measured_demo(value: Value) -> Markup:
    """Every mode of a demo."""
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
    return render("figures", kind="demo", measured=Table.of(modes, columns))


def origins(named: Sequence[tuple[str, Value]]) -> Markup:
    """Return where each result comes from: command, machine, versions, data."""
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
