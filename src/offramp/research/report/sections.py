"""What the report says of each kind of result, as HTML; "" where the result does not tell it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from offramp.research.comparison.equal_quality import by_name
from offramp.research.comparison.methods import FREE
from offramp.research.report.html import (
    between,
    cards,
    figures,
    folded,
    metric,
    paragraph,
    percent,
    table,
    times,
    with_interval,
)
from offramp.research.report.plots import (
    NAMES,
    Band,
    analysis_plots,
    calibration_curve,
    depth_histogram,
    speed_bands,
)

Value = Mapping[str, Any]
Cards = list[tuple[str, str, str]]
MODES = {"generate": "stock generate", "full": "full model", "early_exit": "early exit",
         "lossless": "lossless"}  # fmt: skip


# -- headline --------------------------------------------------------------------------------------


def headline_eval(value: Value) -> str:
    """Speed, agreement and the first metrics of a run, with intervals."""
    early = value["modes"].get("early_exit")
    full = value["modes"].get("full")
    found: Cards = []
    if both := value.get("compared"):
        for name, title in (("decode", "decoding speed"), ("end_to_end", "speed end to end")):
            if ratio := both["speedup"].get(name):
                found.append((title, times(ratio["value"]), between(ratio, times)))
        same = both["agreement"]
        found.append(("answers as the full model's", percent(same["value"]), between(same)))
    mode = early or full
    if early and early["mean_depth"]:
        found.append(("mean depth", f"{early['mean_depth']:.2f}", f"of {early['layers']} layers"))
    for name, one in list(mode["metrics"].items())[-4:] if mode else ():
        remark = between(one, partial(metric, name))
        if early and full:
            remark = f"full model {metric(name, full['metrics'][name]['value'])}"
        found.append((name, metric(name, one["value"]), remark))
    return cards(found)


def headline_demo(value: Value) -> str:
    """Speed of both modes, and quality against the full model's."""
    early, full = value["modes"]["early_exit"], value["modes"]["full"]
    found: Cards = [
        ("decoding speed, early exit", times(early["speedup_decode"]), "full depth = 1"),
        ("speed end to end, early exit", times(early["speedup_end_to_end"]), "full depth = 1"),
        ("answers as the full model's", percent(early["agreement"]), ""),
        ("mean depth", f"{early['mean_depth']:.2f}", f"of {value['layers']} layers"),
    ]
    if lossless := value["modes"].get("lossless"):
        same = "identical" if lossless["identical"] else "NOT identical"
        found.insert(2, ("decoding speed, lossless", times(lossless["speedup_decode"]),
                         f"answers {same} to the full model's"))  # fmt: skip
    for name, quality in early["quality"].items():
        remark = f"full model {percent(full['quality'][name])}"
        found.append((f"{name} right", percent(quality), remark))
    return cards(found)


def headline_adapter(value: Value) -> str:
    """The promise, where there is one."""
    promise = value.get("calibration")
    if not promise or promise.get("measured") is None:
        return ""
    return cards([
        ("promised risk, at most", percent(promise["target"], 2),
         f"{promise['risk']}, at {percent(promise['confidence'], 0)} confidence"),
        ("measured risk", percent(promise["measured"], 2),
         f"at most {percent(promise['bound'], 2)}, n = {promise['n']}"),
    ])  # fmt: skip


# -- speed and depth -------------------------------------------------------------------------------


def tradeoffs(value: Value) -> str:
    """Quality against measured decoding speed, by objective and policy."""
    points = [p for p in value["points"] if p.get("speedup_decode") is not None]
    if not points:
        return paragraph("No point of this comparison was timed.", "soft")
    plots = [
        (speed_bands(some, "quality kept", ours), title) for title, some, ours in _curves(points)
    ]
    rows = [
        (
            _way(p), str(p.get("seed", "-")),
            percent(_mean(p["quality"]), 2), percent(_mean(p["quality_drop"]), 2),
            percent(p.get("agreement")), times(p["speedup_decode"]),
            "-" if p.get("mean_depth") is None else f"{p['mean_depth']:.2f}",
            _thresholds(p.get("thresholds")),
        )
        for p in sorted(points, key=lambda p: (_way(p), p["speedup_decode"]))
    ]  # fmt: skip
    head = ("objective, policy", "seed", "quality", "drop", "answers as full", "decoding",
            "mean depth", "thresholds")  # fmt: skip
    everything = table("Up and to the right is better", head, rows)
    return figures(plots) + _merit(value) + folded(f"All {len(points)} points", everything)


def _curves(points: Sequence[Value]) -> list[tuple[str, dict[str, list[Band]], str]]:
    """Titles, curves and the one of FREE: of objectives, and of policies if there are several."""
    exits = [p for p in points if p["policy"] == "max_probability"]
    # Truncation reads a depth by the backbone's own head, whatever exits there are.
    policies = [p for p in points if p["objective"] == FREE or p["policy"] == "truncation"]
    found: list[tuple[str, dict[str, list[Band]], str]] = []
    for by, title, ours, some in (
        ("objective", "Exits by how they were trained, with the largest probability as confidence",
         FREE, exits),
        ("policy", "Policies, on the exits of FREE", "max probability", policies),
    ):  # fmt: skip
        curves = {_words(n): c for n, c in by_name((p[by], p) for p in some).items()}
        if len(curves) > 1 or not found:
            text = f"{title}. Up and to the right is better; bands span the seeds."
            found.append((text, curves, ours))
    return found


def _merit(value: Value) -> str:
    """Decoding speed at equal quality, the fastest first."""
    curves = value.get("equal_quality", {}).get("curves")
    if not curves:
        return ""
    levels = list(curves[0]["speedup_decode"])
    ordered = sorted(curves, key=lambda c: -c["speedup_decode"][levels[0]])
    rows = [(_way(c), *(times(c["speedup_decode"][at]) for at in levels)) for c in ordered]
    head = ("objective, policy", *(f"{100 * float(at):g}% drop" for at in levels))
    return table("Decoding speed at equal quality", head, rows)


def _way(point: Value) -> str:
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


_CAPTIONS = {
    "agreement": "Share of tokens at which a depth says what the final layer says, along the "
    "model's own answers. Shaded: interval over pictures.",
    "accuracy": "Share of reference tokens that a depth says, given the reference up to there "
    "(teacher-forced).",
    "identical": "Whole answers decoded with every token leaving at one depth: the share that "
    "stays the full model's.",
    "quality": "The same answers, judged against the references.",
    "needed-lens": "How deep tokens go, untrained: the depth from which on every depth says the "
    "final token.",
    "needed-exits": "The same with trained exits: the first exit that says the final token.",
}


_MEASURES = {
    "agreement": "agreement",
    "accuracy": "token accuracy",
    "identical": "the share of unchanged answers",
    "quality": "quality",
}


def depths(value: Value) -> str:
    """Curves over depth, before and after training, and what is said of dips."""
    plots = analysis_plots(value)
    text = "".join(paragraph(line) for line in dips(value))
    return text + figures([(svg, _CAPTIONS[name]) for name, svg in plots.items()])


def dips(value: Value) -> list[str]:
    """A sentence for each set of exits: where its quality dips, or that it does not."""
    found = []
    parts = (value["teacher_forced"], value["free_running"])
    for name, title in NAMES.items():
        measured = {k: c for part in parts for k, c in part.get(name, {}).items()}
        real = [
            f"{_MEASURES[k]} falls by {_fine(c['dip']['fall'])} ({between(c['dip'])}) "
            f"from depth {c['dip']['from_depth']} to {c['dip']['to_depth']}"
            for k, c in measured.items()
            if c["dip"]["found"]
        ]
        if measured:
            text = "; ".join(real) or "no mid-crisis: no fall from a depth to a deeper one is " \
                "larger than chance explains"  # fmt: skip
            found.append(f"{title[0].upper()}{title[1:]}: {text}.")
    return found


def histogram(value: Value) -> str:
    """At which depths tokens of a run left."""
    early = value["modes"].get("early_exit")
    if not early:
        return ""
    shares = early["depth_shares"]
    rows = [(f"{d} of {early['layers']}", percent(s)) for d, s in shares.items()]
    plot = depth_histogram({"early exit": shares}, early["layers"])
    text = f"{early['tokens']} tokens, mean depth {early['mean_depth']:.2f}."
    shares_table = table("Share of tokens by depth", ("depth", "tokens"), rows)
    return figures([(plot, text)], shares_table)


# -- overthinking and calibration ------------------------------------------------------------------


def overthinking(value: Value) -> str:
    """Tokens that some exit has right and the final layer wrong, and the reverse."""
    found = value.get("overthinking")
    if not found:
        return paragraph("The examples had no answers that tell which token is right.", "soft")
    names = {n: t for n, t in NAMES.items() if n in found}
    lines = {
        "overthought": "some depth right, final layer wrong",
        "at_risk": "final layer right, some depth wrong",
        "only_final": "only the final layer right",
    }
    rows = [("labelled tokens", *(str(found[n]["tokens"]) for n in names))]
    rows += [(line, *(_counted(found[n][k]) for n in names)) for k, line in lines.items()]
    rows += [
        (line, *(with_interval(found[n][k], _fine) for n in names))
        for k, line in (("final", "final layer right"), ("oracle", "right at any depth"))
    ]
    parts = [table("Tokens of labelled answers, teacher-forced", ("", *names.values()), rows)]
    if policy := found.get("policy"):
        parts.insert(0, cards([
            ("overthought tokens", str(policy["n_overthought"]), "an exit right, the final wrong"),
            ("of these right by policy", percent(policy["on_overthought"]["value"]),
             between(policy["on_overthought"]) or "final layer: 0 by definition"),
            ("policy minus final layer", metric("", policy["difference"]["value"], signed=True),
             f"all labelled tokens; {between(policy['difference'], _fine)}"),
        ]))  # fmt: skip
    if answers := found.get("answers"):
        some = answers["with_overthought_tokens"]
        parts.append(paragraph(
            f"Whole answers, free-running: early exit is better in {answers['better']} and worse "
            f"in {answers['worse']} of {answers['n']}; mean difference "
            f"{with_interval(answers['difference'], _fine)}. In the {some['n']} answers with an "
            f"overthought token: {with_interval(some['policy'])} by policy, "
            f"{with_interval(some['full'])} by the full model."
        ))  # fmt: skip
    return "".join(parts)


def _fine(value: float | None) -> str:
    return percent(value, 2)


def _counted(value: Value) -> str:
    return f"{value['n']}: {with_interval(value['share'], _fine)}"


def calibration(value: Value) -> str:
    """The promise, and the path of thresholds it was found on."""
    promise = value.get("calibration")
    if not promise:
        return paragraph("This adapter is not calibrated: nothing is promised.", "soft")
    path = promise.get("path") or ()
    passed = [i for i, p in enumerate(path) if p["risk"] == promise["measured"]]
    chosen = passed[-1] if passed and promise["policy"]["thresholds"] else None
    if chosen is None:
        text = f"Nothing could be promised. {promise.get('reason') or ''}"
    else:
        text = (
            f"With {percent(promise['confidence'], 0)} confidence the risk "
            f"({promise['risk']}) is at most {percent(promise['target'], 2)} on data like these: "
            f"measured {percent(promise['measured'], 2)} on n = {promise['n']}, bound "
            f"{percent(promise['bound'], 2)}, by {promise['method']}."
        )
    if not path:
        return paragraph(text)
    plot = calibration_curve(
        [p["risk"] for p in path], [p["bound"] for p in path], promise["target"], chosen
    )
    rows = [
        (_thresholds(p["thresholds"]), percent(p["risk"], 2), percent(p["bound"], 2),
         "-" if p["seconds"] is None else f"{1e3 * p['seconds']:.2f} ms")
        for p in path
    ]  # fmt: skip
    head = ("thresholds by depth", "risk", "bound", "a token, predicted")
    caption = "Thresholds were tried from the safest on, until the bound passed the target."
    return paragraph(text) + figures([(plot, caption)], table("The path", head, rows))


# -- all figures -----------------------------------------------------------------------------------


def measured_eval(value: Value) -> str:
    """Every metric of a run by mode, its groups, and the times."""
    modes, both = value["modes"], value.get("compared", {})
    names = list(next(iter(modes.values()))["metrics"])
    head = ["metric", *(MODES[m] for m in modes), *(["difference"] if both else [])]
    rows = []
    for name in names:
        form = partial(metric, name)
        cells = [with_interval(modes[m]["metrics"].get(name), form) for m in modes]
        if both:
            cells.append(with_interval(both["difference"].get(name), form))
        rows.append((name, *cells))
    parts = [table(f"Quality, n = {value['n']}", head, rows)]
    times_ = [
        (title, *(_latency(modes[m].get("latency"), key, part) for m in modes))
        for title, key, part in (
            ("an answer, median", "seconds", "p50"),
            ("an answer, 95th percentile", "seconds", "p95"),
            ("its decoding, median", "decode_seconds", "p50"),
            ("its decoding, 95th percentile", "decode_seconds", "p95"),
        )
    ]  # fmt: skip
    if any(mode.get("latency") for mode in modes.values()):
        parts.append(table("Time, one example at a time", ("", *(MODES[m] for m in modes)), times_))
    missing = next(iter(modes.values()))["unavailable"]
    parts += [paragraph(f"{name} is missing: {why}.", "soft") for name, why in missing.items()]
    return "".join(parts)


def _latency(value: Value | None, name: str, part: str) -> str:
    return f"{1e3 * value[name][part]:.1f} ms" if value else "-"


def measured_demo(value: Value) -> str:
    """Every mode of a demo."""
    tasks = list(value["modes"]["full"]["quality"])
    rows = [
        (MODES.get(name, name), f"{mode['tokens_per_second']:.0f}",
         f"{mode['seconds_end_to_end']:.2f}", times(mode.get("speedup_decode")),
         times(mode.get("speedup_end_to_end")), times(mode.get("speedup_vs_generate")),
         *(percent(mode["quality"][task]) for task in tasks))
        for name, mode in value["modes"].items()
    ]  # fmt: skip
    head = ("mode", "tokens/s", "seconds", "decoding", "end to end", "against generate",
            *(f"{task} right" for task in tasks))  # fmt: skip
    return table("Medians of interleaved rounds, batch 1", head, rows)


def origins(named: Sequence[tuple[str, Value]]) -> str:
    """Where each result comes from: command, machine, versions, data."""
    rows = []
    for name, value in named:
        if where := value.get("provenance"):
            versions = ", ".join(f"{k} {v}" for k, v in where["versions"].items() if v)
            machine = where.get("accelerator") or where["processor"]
            rows.append((name, where["command"], where["date"][:10],
                         f"{machine}, {where['threads']} threads, {where['platform']}", versions,
                         str(where.get("seed")), str(where.get("data_digest"))[:16]))  # fmt: skip
    head = ("result", "command", "date", "machine", "versions", "seed", "data digest")
    return table("Where the figures come from", head, rows, "words") if rows else ""
