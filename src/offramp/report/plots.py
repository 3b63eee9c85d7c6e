"""Plots as SVG text: for a file, or to stand inside a page, in whose text colour they draw.

The same data give the same bytes. A plot is as wide as a telephone, so that its text stays readable
there; wider, it is scaled up.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from xml.sax.saxutils import quoteattr

COLORS = ("#2b83c6", "#e07b00", "#1b9e77", "#c95a9b", "#8a78e8", "#a98a12")
"""Distinguishable with any colour vision, on light and on dark ground."""
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


def drawn(title: str, draw: Callable[[Any], None], size: tuple[float, float] = SIZE) -> str:
    """Return a plot as SVG text. draw: draws on a pair of axes. title: for readers who cannot see
    it."""
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
    """Put the legend above the plot, where it covers nothing; long names stand in one column."""
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


def depth_histogram(shares: Mapping[str, float], layers: int) -> str:
    """Plot the shares of tokens by depth, under early exit."""

    def draw(axes: Any) -> None:
        axes.bar([int(depth) for depth in shares], list(shares.values()), 0.8, color=COLORS[0])
        _depth_axis(axes, layers, "depth at which a token exits")
        axes.set_ylabel("share of tokens")
        percent(axes.yaxis)

    return drawn("share of tokens by depth: early exit", draw)


def forecast(depths: Sequence[Mapping[str, Any]], layers: int) -> str:
    """Plot the speed of decoding with a calibrated exit against the share of answers that may
    change, with its 95% interval, by depth; losslessly, none does."""

    def draw(axes: Any) -> None:
        for place, (row, color) in enumerate(zip(depths, COLORS, strict=False)):
            told = {"0": [row["lossless"]] * 3, **row["calibrated"]}
            shares = [float(target) + 0.0006 * (place - len(depths) / 2) for target in told]
            speeds, lows, highs = zip(*told.values(), strict=True)
            ends = [
                [max(0.0, speed - low) for speed, low in zip(speeds, lows, strict=True)],
                [max(0.0, high - speed) for speed, high in zip(speeds, highs, strict=True)],
            ]
            axes.errorbar(
                shares,
                speeds,
                ends,
                color=color,
                marker="o",
                markersize=4.5,
                capsize=2,
                label=f"exit at {row['depth']} of {layers}",
            )
        axes.axhline(1.0, color=INK, lw=1, linestyle=":")
        axes.set_xlabel("share of answers that may change")
        axes.set_ylabel("decoding speed (full depth 1)")
        percent(axes.xaxis)
        legend(axes)

    return drawn("speed foretold by the share of answers that may change", draw)


def calibration_curve(
    risks: Sequence[float], bounds: Sequence[float | None], target: float, chosen: int | None
) -> str:
    """Plot the measured risk and its bound along the path of thresholds, the target and the chosen
    point."""

    def draw(axes: Any) -> None:
        steps = range(1, len(risks) + 1)
        axes.plot(steps, risks, color=COLORS[0], marker="o", markersize=4.5, label="measured risk")
        if any(bound is not None for bound in bounds):
            axes.plot(
                steps,
                bounds,
                color=COLORS[1],
                marker="s",
                markersize=4.5,
                linestyle="--",
                label="upper bound",
            )
        axes.axhline(target, color=INK, lw=1, linestyle=":", label="target")
        if chosen is not None:
            axes.plot(
                [chosen + 1],
                [risks[chosen]],
                color=COLORS[2],
                marker="o",
                markersize=11,
                fillstyle="none",
                linestyle="none",
                label="chosen",
            )
        whole(axes.xaxis)
        axes.set_xlabel("thresholds along the path, safest first")
        axes.set_ylabel("share of answers changed")
        percent(axes.yaxis)
        legend(axes)

    return drawn("risk along the path of thresholds", draw)


def sweep_curves(rows: Sequence[Any]) -> str:
    """Plot the share of changed answers against the speed of decoding, by score."""

    def draw(axes: Any) -> None:
        for color, score in zip(COLORS, dict.fromkeys(row.score for row in rows), strict=False):
            points = [(row.speed, row.changed) for row in rows if row.score == score]
            axes.plot(*zip(*points, strict=True), color=color, marker="o", ms=3.5, label=score)
        axes.set_xlabel("speed of decoding, over full depth")
        axes.set_ylabel("share of answers changed")
        percent(axes.yaxis)
        legend(axes)

    return drawn("changed answers against speed, by score", draw)
