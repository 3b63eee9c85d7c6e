"""Plots that the lab alone draws, as `offramp.report.plots` draws: SVG text, the same bytes of the
same data."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

from offramp.common.depth_color import depth_color
from offramp.report.plots import COLORS, INK, SHORT, SIZE, drawn, legend, percent

MARKERS = "osD^vPX*"
_PRINTED = "#1b2027"  # the ink on white ground
_TITLE = 22  # points above a plot for its title


class Band(NamedTuple):
    """Speeds at one level of quality: the mean over seeds, and their range."""

    quality: float
    speed: float
    low: float
    high: float


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


def _listed(
    names: Sequence[str],
    what: str,
    draw: Callable[[Any], None],
    size: tuple[float, float],
    title: str = "",
) -> str:
    """What `draw` puts at 0, 1, ... for these names, one below the other. title: else `what`."""

    def whole(axes: Any) -> None:
        draw(axes)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlabel(what)
        axes.grid(axis="y", visible=False)

    return drawn(f"{title or what}: {', '.join(names)}", whole, size)


def intervals(rows: Mapping[str, tuple[float, float, float]], what: str) -> str:
    """A value with its interval for each name: (value, low, high)."""

    def draw(axes: Any) -> None:
        values, low, high = (list(column) for column in zip(*rows.values(), strict=True))
        at = range(len(rows))
        axes.hlines(at, low, high, color=COLORS[0], lw=2.5, alpha=0.6)
        axes.plot(values, at, "o", color=COLORS[0], markersize=5)
        axes.axvline(1.0, color=INK, lw=1, linestyle=":")
        axes.margins(y=0.08)

    return _listed([*rows], what, draw, (5.6, 1.0 + 0.27 * len(rows)))


def parts(rows: Mapping[str, Mapping[str, float]], what: str) -> str:
    """What each row is made of, as a bar whose parts add up."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))

    def draw(axes: Any) -> None:
        for at, row in enumerate(rows.values()):
            start = 0.0
            for color, name in zip(COLORS, names, strict=False):
                if name in row:
                    axes.barh(at, row[name], left=start, height=0.6, color=color)
                    start += row[name]
            axes.text(start, at, f" {start:,.0f}", va="center")
        for color, name in zip(COLORS, names, strict=False):
            axes.barh(0, 0, color=color, label=name)
        axes.margins(x=0.18)
        legend(axes)

    return _listed([*rows], what, draw, (5.6, 1.4 + 0.36 * len(rows)))


def strips(rows: Mapping[str, Sequence[int]], layers: int, what: str) -> str:
    """The depth of each token of an answer, a bar a token, one answer below the other."""

    def draw(axes: Any) -> None:
        for at, depths in enumerate(rows.values()):
            for place, depth in enumerate(depths):
                height = 0.85 * depth / layers
                axes.bar(
                    place,
                    height,
                    bottom=at,
                    width=0.86,
                    color=depth_color(depth, layers),
                    edgecolor=INK,
                    linewidth=0.3,
                )
        axes.set_yticks([at + 0.4 for at in range(len(rows))], list(rows))
        axes.set_ylim(0, len(rows))
        axes.set_xlabel(what)
        axes.grid(visible=False)

    return drawn(f"{what}: {', '.join(rows)}", draw, (5.6, 0.8 + 0.8 * len(rows)))


def dots(rows: Mapping[str, Sequence[float]], limit: float, what: str) -> str:
    """Values above 0 of each row on a logarithmic axis, and the limit; zeros stand at the left."""
    least = min(v for values in rows.values() for v in values if v > 0) / 3

    def draw(axes: Any) -> None:
        for at, (values, marker) in enumerate(zip(rows.values(), MARKERS, strict=False)):
            heights = [at + 0.5 * ((7 * n % 11) / 11 - 0.5) for n in range(len(values))]
            axes.plot(
                [max(v, least) for v in values],
                heights,
                marker,
                color=COLORS[at % len(COLORS)],
                ms=3.5,
                alpha=0.7,
                linestyle="none",
            )
        axes.axvline(limit, color=INK, lw=1, linestyle=":")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0e}")

    return _listed([*rows], what, draw, (5.6, 1.0 + 0.5 * len(rows)))


def powers(rows: Sequence[Mapping[str, Any]], tests: Mapping[str, str]) -> str:
    """The share of attempts that pass by their images: a colour for each true risk, a stroke for
    each test. rows: of the record `simulated`. tests: their titles."""

    def draw(axes: Any) -> None:
        risks = sorted({row["risk"] for row in rows})
        strokes = dict(zip(tests, ("-", ":", "--"), strict=True))
        for row in rows:
            color = COLORS[risks.index(row["risk"])]
            name = f"true risk {row['risk']:.1%}, {tests[row['test']]}"
            axes.plot(
                row["images"], row["passes"], strokes[row["test"]], color=color, lw=1.6, label=name
            )
        axes.set_xlabel("images")
        axes.set_ylabel("first attempts that pass")
        percent(axes.yaxis)
        legend(axes)

    return drawn("first attempts that pass, by images", draw, (SIZE[0], SIZE[1] + 0.6))


def speed_bands(
    curves: Mapping[str, Sequence[Band]],
    what: str,
    ours: str | None = None,
    speed_of: str = "decoding speed",
) -> str:
    """Quality against speed: a line for each name through the means over seeds, and a band over the
    seeds' range; `ours`, a name of `curves`, stands out."""

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
        axes.set_xlabel(f"{speed_of} (full depth = 1)")
        axes.set_ylabel(what)
        percent(axes.yaxis)
        legend(axes)

    height = SIZE[1] + 0.2 * len(curves) / (2 if max(map(len, curves)) <= SHORT else 1)
    title = f"{what} against {speed_of}: {', '.join(curves)}"
    return drawn(title, draw, (SIZE[0], height))
