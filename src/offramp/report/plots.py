"""Plots as SVG text: for a file, or to stand inside a page, in whose text colour they draw.

The same data give the same bytes. A plot is as wide as a telephone, so that its text stays readable
there; wider, it is scaled up.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape, quoteattr

from offramp.depth_color import depth_color
from offramp.storage import write_atomic

COLORS = ("#2b83c6", "#e07b00", "#1b9e77", "#c95a9b", "#8a78e8", "#a98a12")
"""Distinguishable with any colour vision, on light and on dark ground."""
MARKERS = "osD^vPX*"
_INK = "#0a0b0c"  # replaced by the colour of the text around the plot
_PRINTED = "#1b2027"  # the ink on white ground
_TITLE = 22  # points above a plot for its title
_SIZE = (4.4, 3.1)  # inches
_SHORT = 24  # letters of a name that leaves room for another beside it
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "offramp",
    "text.parse_math": False,  # a name may hold anything
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _INK,
    "grid.alpha": 0.12,
    "legend.frameon": False,
    "legend.fontsize": 9,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK
    ),
}


class Band(NamedTuple):
    """Speeds at one level of quality: the mean over seeds, and their range."""

    quality: float
    speed: float
    low: float
    high: float


Curve = Mapping[str, Any]
"""`depths`, and as many `values`, each with `value`, `low` and `high`; perhaps its `dip`."""


def _drawn(title: str, draw: Callable[[Any], None], size: tuple[float, float] = _SIZE) -> str:
    """What `draw` puts on a pair of axes, as SVG text with `title` for who cannot see it."""
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {**matplotlib.rcParamsDefault, **_STYLE}
    with matplotlib.rc_context(style):
        figure = Figure(size, layout="constrained")
        draw(figure.add_subplot())
        text = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label={quoteattr(title)}', 1)


def standalone(svg: str, title: str) -> str:
    """A plot as a file of its own: on white ground with a title, so that it can be read as an image
    on a page of any colour."""
    head = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt" viewBox="0 0 ([\d. ]+)"', svg)
    assert head is not None, "not a plot of this module"
    width, height = float(head[1]), float(head[2]) + _TITLE
    size = (
        f'width="{width:g}pt" height="{height:g}pt" viewBox="0 {-_TITLE} {width:g} {height:g}" '
        f'color="{_PRINTED}"'
    )
    ground = (
        f"<title>{escape(title)}</title>"
        f'<rect x="0" y="{-_TITLE}" width="{width:g}" height="{height:g}" rx="6" fill="#fff"/>'
        f'<text x="10" y="-7" fill="{_PRINTED}" '
        f'style="font: 600 12px system-ui, sans-serif">{escape(title)}</text>'
    )
    whole = svg.replace(head[0], size, 1)
    opening = whole.index(">") + 1
    return whole[:opening] + ground + whole[opening:]


def _legend(axes: Any) -> None:
    """Above the plot, where it covers nothing; long names stand in one column."""
    names = axes.get_legend_handles_labels()[1]
    if names:
        columns = 2 if max(map(len, names)) <= _SHORT else 1
        axes.figure.legend(loc="outside upper left", ncols=columns, borderpad=0)


def _depth_axis(axes: Any, layers: int, label: str = "depth (decoder layers run)") -> None:
    axes.set_xlim(0.4, layers + 0.6)
    _whole(axes.xaxis)
    axes.set_xlabel(label)


def _whole(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))


def _percent(axis: Any) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0, decimals=None))


def by_depth(curves: Mapping[str, Curve], layers: int, what: str) -> str:
    """Curves over depth by name, with their intervals, and their dips where one was found."""

    def draw(axes: Any) -> None:
        for (name, curve), color, marker in zip(curves.items(), COLORS, MARKERS, strict=False):
            depths, values = curve["depths"], [v["value"] for v in curve["values"]]
            axes.plot(depths, values, color=color, marker=marker, markersize=4.5, label=name)
            ends = [(v["low"], v["high"]) for v in curve["values"]]
            if all(low is not None for low, _ in ends):
                axes.fill_between(depths, *zip(*ends, strict=True), color=color, alpha=0.18, lw=0)
            dip = curve.get("dip", {"found": False})
            if dip["found"]:
                start, stop = dip["from_depth"], dip["to_depth"]
                axes.axvspan(start, stop, color=color, alpha=0.1, lw=0)
                at = [values[depths.index(start)], values[depths.index(stop)]]
                arrow = {"arrowstyle": "->", "color": color}
                axes.annotate("", (stop, at[1]), (stop, at[0]), arrowprops=arrow)
        _depth_axis(axes, layers)
        axes.set_ylabel(what)
        _percent(axes.yaxis)
        _legend(axes)

    return _drawn(f"{what} by depth: {', '.join(curves)}", draw)


def depth_histogram(shares: Mapping[str, Mapping[str, float]], layers: int) -> str:
    """Shares of tokens by depth, for each name of `shares`."""

    def draw(axes: Any) -> None:
        width = 0.8 / len(shares)
        for slot, (name, by_depth) in enumerate(shares.items()):
            shift = (slot + 0.5) * width - 0.4
            at = [int(depth) + shift for depth in by_depth]
            axes.bar(
                at, list(by_depth.values()), width, color=COLORS[slot % len(COLORS)], label=name
            )
        _depth_axis(axes, layers, "depth at which a token exits")
        axes.set_ylabel("share of tokens")
        _percent(axes.yaxis)
        if len(shares) > 1:
            _legend(axes)

    return _drawn(f"share of tokens by depth: {', '.join(shares)}", draw)


def depths_by_kind(kinds: Mapping[str, Mapping[str, Any]], layers: int) -> str:
    """For each kind of token a bar of shares by depth, shallow to deep, and the mean depth.

    kinds: by name `n`, `mean_depth` and `depth_shares`.
    """

    def draw(axes: Any) -> None:
        for row, kind in enumerate(kinds.values()):
            left = 0.0
            for depth, part in kind["depth_shares"].items():
                color = depth_color(int(depth), layers)
                axes.barh(row, part, 0.72, left, color=color, edgecolor=_INK, lw=0.3)
                left += part
            axes.text(1.015, row, f"{kind['mean_depth']:.1f}", va="center")
        names = [n if len(n) <= _SHORT else f"{n[: _SHORT - 1]}\u2026" for n in kinds]
        labels = [f"{n} ({s['n']})" for n, s in zip(names, kinds.values(), strict=True)]
        axes.set_yticks(range(len(kinds)), labels)
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.text(1.015, -0.75, "mean", va="center")
        axes.set_xlabel("share of tokens (darker is deeper)")
        axes.grid(axis="y", visible=False)
        _percent(axes.xaxis)

    height = 0.9 + 0.27 * len(kinds)
    return _drawn(f"depth that tokens need: {', '.join(kinds)}", draw, (_SIZE[0], height))


def tradeoff(
    series: Mapping[str, Sequence[tuple[float, ...]]], what: str, ours: str | None = None
) -> str:
    """Quality against decoding speed: points by series, joined by speed; `ours`, a name of
    `series`, stands out.

    series: points (speedup, quality) or, with the interval of the quality, (speedup, quality, low,
        high).
    """

    def draw(axes: Any) -> None:
        for slot, (name, points) in enumerate(series.items()):
            style: dict[str, Any] = {
                "color": COLORS[slot % len(COLORS)],
                "linestyle": ("-", "--", ":")[slot // len(COLORS) % 3],
                "linewidth": 1.2,
            }
            if name == ours:
                style = {"color": _INK, "linewidth": 2.6, "zorder": 3}
            marker = MARKERS[slot % len(MARKERS)]
            speed, quality, *ends = zip(*sorted(points), strict=True)
            axes.plot(speed, quality, marker=marker, markersize=5, label=name, **style)
            if ends:
                axes.vlines(speed, *ends, color=style["color"], lw=1.2, alpha=0.5)
        axes.set_xlabel("decoding speed (full depth = 1)")
        axes.set_ylabel(what)
        _percent(axes.yaxis)
        _legend(axes)

    height = _SIZE[1] + 0.2 * len(series) / (2 if max(map(len, series)) <= _SHORT else 1)
    return _drawn(f"{what} against decoding speed: {', '.join(series)}", draw, (_SIZE[0], height))


def speed_bands(curves: Mapping[str, Sequence[Band]], what: str, ours: str | None = None) -> str:
    """Quality against decoding speed: a line for each name through the means over seeds, and a band
    over the seeds' range; `ours`, a name of `curves`, stands out."""

    def draw(axes: Any) -> None:
        colors = iter(COLORS)
        for name, rows in curves.items():
            mine = name == ours
            color = _INK if mine else next(colors)
            quality, speed, low, high = zip(*rows, strict=True)
            width, order = (2.6, 3) if mine else (1.6, 2)
            axes.plot(speed, quality, color=color, linewidth=width, zorder=order, label=name)
            axes.plot(speed[-1], quality[-1], "o", color=color, markersize=4, zorder=order)
            axes.fill_betweenx(quality, low, high, color=color, alpha=0.15, lw=0)
        axes.set_xlabel("decoding speed (full depth = 1)")
        axes.set_ylabel(what)
        _percent(axes.yaxis)
        _legend(axes)

    height = _SIZE[1] + 0.2 * len(curves) / (2 if max(map(len, curves)) <= _SHORT else 1)
    title = f"{what} against decoding speed: {', '.join(curves)}"
    return _drawn(title, draw, (_SIZE[0], height))


def intervals(rows: Mapping[str, tuple[float, float, float]], what: str) -> str:
    """A value with its interval for each name, one below the other: (value, low, high)."""

    def draw(axes: Any) -> None:
        values, low, high = (list(column) for column in zip(*rows.values(), strict=True))
        at = range(len(rows))
        axes.hlines(at, low, high, color=COLORS[0], lw=2.5, alpha=0.6)
        axes.plot(values, at, "o", color=COLORS[0], markersize=5)
        axes.axvline(1.0, color=_INK, lw=1, linestyle=":")
        axes.set_yticks(at, list(rows))
        axes.invert_yaxis()
        axes.margins(y=0.08)
        axes.set_xlabel(what)
        axes.grid(axis="y", visible=False)

    return _drawn(f"{what}: {', '.join(rows)}", draw, (5.6, 1.0 + 0.27 * len(rows)))


def parts(rows: Mapping[str, Mapping[str, float]], what: str, *, factors: bool = False) -> str:
    """What each row is made of, as a bar. factors: its parts multiply, on a logarithmic axis from
    1; else they add up."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))

    def draw(axes: Any) -> None:
        for at, row in enumerate(rows.values()):
            start = 1.0 if factors else 0.0
            for color, name in zip(COLORS, names, strict=False):
                if name in row:
                    end = start * row[name] if factors else start + row[name]
                    axes.barh(at, end - start, left=start, height=0.6, color=color)
                    start = end
            shown = f"{start:.2f}x" if factors else f"{start:,.0f}"
            axes.text(start, at, f" {shown}", va="center")
        for color, name in zip(COLORS, names, strict=False):
            axes.barh(0, 0, color=color, label=name)
        if factors:
            axes.set_xscale("log")
            ticks = [1, 2, 4, 8, 16]
            axes.set_xticks(ticks, [f"{tick}x" for tick in ticks])
            axes.minorticks_off()
        axes.set_yticks(range(len(rows)), list(rows))
        axes.invert_yaxis()
        axes.margins(x=0.18)
        axes.set_xlabel(what)
        axes.grid(axis="y", visible=False)
        _legend(axes)

    return _drawn(f"{what}: {', '.join(rows)}", draw, (5.6, 1.4 + 0.36 * len(rows)))


def strips(rows: Mapping[str, Sequence[int]], layers: int, what: str) -> str:
    """The depth of each token of an answer, a bar a token, one answer below the other."""

    def draw(axes: Any) -> None:
        for at, depths in enumerate(rows.values()):
            for place, depth in enumerate(depths):
                height = 0.85 * depth / layers
                axes.bar(
                    place, height, bottom=at, width=0.86, color=depth_color(depth, layers),
                    edgecolor=_INK, linewidth=0.3,
                )  # fmt: skip
        axes.set_yticks([at + 0.4 for at in range(len(rows))], list(rows))
        axes.set_ylim(0, len(rows))
        axes.set_xlabel(what)
        axes.grid(visible=False)

    return _drawn(f"{what}: {', '.join(rows)}", draw, (5.6, 0.8 + 0.8 * len(rows)))


def dots(rows: Mapping[str, Sequence[float]], limit: float, what: str) -> str:
    """Values above 0 of each row on a logarithmic axis, and the limit; zeros stand at the left."""
    least = min(v for values in rows.values() for v in values if v > 0) / 3

    def draw(axes: Any) -> None:
        for at, (values, marker) in enumerate(zip(rows.values(), MARKERS, strict=False)):
            heights = [at + 0.5 * ((7 * n % 11) / 11 - 0.5) for n in range(len(values))]
            axes.plot(
                [max(v, least) for v in values], heights, marker, color=COLORS[at % len(COLORS)],
                ms=3.5, alpha=0.7, linestyle="none",
            )  # fmt: skip
        axes.axvline(limit, color=_INK, lw=1, linestyle=":")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
        axes.set_yticks(range(len(rows)), list(rows))
        axes.invert_yaxis()
        axes.set_xlabel(what)
        axes.grid(axis="y", visible=False)

    return _drawn(f"{what}: {', '.join(rows)}", draw, (5.6, 1.0 + 0.5 * len(rows)))


def speeds(peers: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Decoding speed of every peer that ran, a bar for each backbone.

    peers: by backbone what `offramp_lab.experiments.benchmark.peers.time_peers` found.
    """
    ran = {
        backbone: {
            name: p["speedup_decode"] for name, p in by_name.items() if "speedup_decode" in p
        }
        for backbone, by_name in peers.items()
    }
    names = list(dict.fromkeys(name for by_name in ran.values() for name in by_name))
    height = 0.8 / len(ran)

    def draw(axes: Any) -> None:
        for slot, (backbone, speed_of) in enumerate(ran.items()):
            at = [names.index(name) + (slot + 0.5) * height - 0.4 for name in speed_of]
            bars = axes.barh(
                at, list(speed_of.values()), height, color=COLORS[slot], label=backbone
            )
            axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=9)
        axes.axvline(1.0, color=_INK, lw=1, linestyle=":")
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel("decoding speed (full depth = 1)")
        axes.grid(axis="y", visible=False)
        _legend(axes)

    size = (_SIZE[0], 1.1 + 0.22 * len(names) * (1 + len(ran)))
    return _drawn(f"decoding speed: {', '.join(names)}", draw, size)


def throughput(series: Mapping[str, Mapping[int, float]], reference: str) -> str:
    """Tokens a second by rows at once, a line for each name of `series`; `reference` is dotted."""
    rows = sorted({count for by_rows in series.values() for count in by_rows})

    def draw(axes: Any) -> None:
        colors = iter(COLORS)
        for (name, by_rows), marker in zip(series.items(), MARKERS, strict=False):
            dotted = name == reference
            color, line = (_INK, ":") if dotted else (next(colors), "-")
            at, speed = zip(*sorted(by_rows.items()), strict=True)
            axes.plot(at, speed, color=color, linestyle=line, marker=marker, ms=4.5, label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(rows, [str(count) for count in rows])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("rows at once")
        axes.set_ylabel("tokens a second")
        _legend(axes)

    height = _SIZE[1] + 0.1 * len(series)
    title = f"tokens a second by rows at once: {', '.join(series)}"
    return _drawn(title, draw, (_SIZE[0], height))


def calibration_curve(
    risks: Sequence[float], bounds: Sequence[float | None], target: float, chosen: int | None
) -> str:
    """Measured risk and its bound along the path of thresholds, the target and what was chosen."""

    def draw(axes: Any) -> None:
        steps = range(1, len(risks) + 1)
        axes.plot(steps, risks, color=COLORS[0], marker="o", markersize=4.5, label="measured risk")
        if any(bound is not None for bound in bounds):
            axes.plot(
                steps, bounds, color=COLORS[1], marker="s", markersize=4.5, linestyle="--",
                label="upper bound",
            )  # fmt: skip
        axes.axhline(target, color=_INK, lw=1, linestyle=":", label="target")
        if chosen is not None:
            axes.plot(
                [chosen + 1], [risks[chosen]], color=COLORS[2], marker="o", markersize=11,
                fillstyle="none", linestyle="none", label="chosen",
            )  # fmt: skip
        _whole(axes.xaxis)
        axes.set_xlabel("thresholds along the path, safest first")
        axes.set_ylabel("share of answers changed")
        _percent(axes.yaxis)
        _legend(axes)

    return _drawn("risk along the path of thresholds", draw)


# -- an analysis -----------------------------------------------------------------------------------

NAMES = {"lens": "untrained (logit lens)", "exits": "trained exits"}


def analysis_plots(result: Mapping[str, Any]) -> dict[str, str]:
    """The plots of `offramp_lab.experiments.analysis.analyse.analyse`'s result by name."""
    layers, plots = result["layers"], {}
    parts = {"forced": result["teacher_forced"], "free": result["free_running"]}
    titles = {
        "agreement": "agreement with the final layer",
        "accuracy": "token accuracy (teacher-forced)",
        "identical": "answers as the full model's",
        "quality": f"quality ({result['free_running'].get('metric', '')})",
    }
    for part in parts.values():
        for measure, title in titles.items():
            curves = {n: part[k][measure] for k, n in NAMES.items() if measure in part.get(k, {})}
            if curves:
                plots[measure] = by_depth(curves, layers, title)
    for name, needed in result["needed_depth"].items():
        kinds = {**{k: v for k, v in needed["position"].items() if k != "end"}, **needed["class"]}
        plots[f"needed-{name}"] = depths_by_kind({"all": needed["all"], **kinds}, layers)
    return plots


def save_analysis(result: Mapping[str, Any], folder: Path) -> None:
    """Write the plots of an analysis as SVG files."""
    for name, svg in analysis_plots(result).items():
        write_atomic(folder / f"{name}.svg", svg)
