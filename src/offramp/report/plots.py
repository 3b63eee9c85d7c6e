"""Plots as SVG text: for a file, or to stand inside a page, in whose text colour they draw.

The same data give the same bytes. A plot is as wide as a telephone, so that its text stays readable
there; wider, it is scaled up.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from xml.sax.saxutils import quoteattr

from offramp.depth_color import depth_color

COLORS = ("#2b83c6", "#e07b00", "#1b9e77", "#c95a9b", "#8a78e8", "#a98a12")
"""Distinguishable with any colour vision, on light and on dark ground."""
MARKERS = "osD^vPX*"
INK = "#0a0b0c"  # replaced by the colour of the text around the plot
SIZE = (4.4, 3.1)  # inches
SHORT = 24  # letters of a name that leaves room for another beside it
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "offramp",
    "text.parse_math": False,  # a name may hold anything
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "legend.frameon": False,
    "legend.fontsize": 9,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
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


def drawn(title: str, draw: Callable[[Any], None], size: tuple[float, float] = SIZE) -> str:
    """Return what `draw` puts on a pair of axes, as SVG text with `title` for who cannot see it."""
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
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label={quoteattr(title)}', 1)


def legend(axes: Any) -> None:
    """Above the plot, where it covers nothing; long names stand in one column."""
    names = axes.get_legend_handles_labels()[1]
    if names:
        columns = 2 if max(map(len, names)) <= SHORT else 1
        axes.figure.legend(loc="outside upper left", ncols=columns, borderpad=0)


def _depth_axis(axes: Any, layers: int, label: str = "depth (decoder layers run)") -> None:
    axes.set_xlim(0.4, layers + 0.6)
    whole(axes.xaxis)
    axes.set_xlabel(label)


def whole(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))


def percent(axis: Any) -> None:
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
        percent(axes.yaxis)
        legend(axes)

    return drawn(f"{what} by depth: {', '.join(curves)}", draw)


def depth_histogram(shares: Mapping[str, float], layers: int) -> str:
    """Shares of tokens by depth, under early exit."""

    def draw(axes: Any) -> None:
        axes.bar([int(depth) for depth in shares], list(shares.values()), 0.8, color=COLORS[0])
        _depth_axis(axes, layers, "depth at which a token exits")
        axes.set_ylabel("share of tokens")
        percent(axes.yaxis)

    return drawn("share of tokens by depth: early exit", draw)


def depths_by_kind(kinds: Mapping[str, Mapping[str, Any]], layers: int) -> str:
    """Draw for each kind of token a bar of shares by depth, shallow to deep, and the mean depth.

    kinds: by name `n`, `mean_depth` and `depth_shares`.
    """

    def draw(axes: Any) -> None:
        for row, kind in enumerate(kinds.values()):
            left = 0.0
            for depth, part in kind["depth_shares"].items():
                color = depth_color(int(depth), layers)
                axes.barh(row, part, 0.72, left, color=color, edgecolor=INK, lw=0.3)
                left += part
            axes.text(1.015, row, f"{kind['mean_depth']:.1f}", va="center")
        names = [n if len(n) <= SHORT else f"{n[: SHORT - 1]}\u2026" for n in kinds]
        labels = [f"{n} ({s['n']})" for n, s in zip(names, kinds.values(), strict=True)]
        axes.set_yticks(range(len(kinds)), labels)
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.text(1.015, -0.75, "mean", va="center")
        axes.set_xlabel("share of tokens (darker is deeper)")
        axes.grid(axis="y", visible=False)
        percent(axes.xaxis)

    height = 0.9 + 0.27 * len(kinds)
    return drawn(f"depth that tokens need: {', '.join(kinds)}", draw, (SIZE[0], height))


def speed_bands(curves: Mapping[str, Sequence[Band]], what: str, ours: str | None = None) -> str:
    """Quality against decoding speed: a line for each name through the means over seeds, and a band
    over the seeds' range; `ours`, a name of `curves`, stands out."""

    def draw(axes: Any) -> None:
        colors = iter(COLORS)
        for name, rows in curves.items():
            mine = name == ours
            color = INK if mine else next(colors)
            quality, speed, low, high = zip(*rows, strict=True)
            width, order = (2.6, 3) if mine else (1.6, 2)
            axes.plot(speed, quality, color=color, linewidth=width, zorder=order, label=name)
            axes.plot(speed[-1], quality[-1], "o", color=color, markersize=4, zorder=order)
            axes.fill_betweenx(quality, low, high, color=color, alpha=0.15, lw=0)
        axes.set_xlabel("decoding speed (full depth = 1)")
        axes.set_ylabel(what)
        percent(axes.yaxis)
        legend(axes)

    height = SIZE[1] + 0.2 * len(curves) / (2 if max(map(len, curves)) <= SHORT else 1)
    title = f"{what} against decoding speed: {', '.join(curves)}"
    return drawn(title, draw, (SIZE[0], height))


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
        axes.axhline(target, color=INK, lw=1, linestyle=":", label="target")
        if chosen is not None:
            axes.plot(
                [chosen + 1], [risks[chosen]], color=COLORS[2], marker="o", markersize=11,
                fillstyle="none", linestyle="none", label="chosen",
            )  # fmt: skip
        whole(axes.xaxis)
        axes.set_xlabel("thresholds along the path, safest first")
        axes.set_ylabel("share of answers changed")
        percent(axes.yaxis)
        legend(axes)

    return drawn("risk along the path of thresholds", draw)


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
