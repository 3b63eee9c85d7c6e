"""The colour of a depth, on the server's page, in reports, pictures and notebooks."""

from __future__ import annotations

STOPS = (
    "#f0d846",
    "#d2c060",
    "#b5a86f",
    "#999277",
    "#7e7d78",
    "#676a71",
    "#4e566c",
    "#31436d",
    "#003070",
)
"""From shallow to deep, at equal steps: cividis, pale to dark to any colour vision."""
_DARK = 0.179  # the luminance on which black and white have the same contrast, 4.58


def depth_color(depth: int, layers: int) -> str:
    """Return the colour of a depth as "#rrggbb": pale for shallow, dark for deep."""
    at = (depth - 1) / max(1, layers - 1) * (len(STOPS) - 1)
    low = min(int(at), len(STOPS) - 2)
    pairs = zip(_parts(STOPS[low]), _parts(STOPS[low + 1]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * (at - low)):02x}" for a, b in pairs)


def ink_on(color: str) -> str:
    """Return black or white, whichever is readable on "#rrggbb"."""
    return "#000" if _luminance(color) > _DARK else "#fff"


def _parts(color: str) -> list[int]:
    return [int(color[i : i + 2], 16) for i in (1, 3, 5)]


def _luminance(color: str) -> float:
    """Relative luminance in [0, 1] of "#rrggbb" (WCAG 2)."""
    parts = [part / 255 for part in _parts(color)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
