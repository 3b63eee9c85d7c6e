"""Ten lines of an analysis, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from offramp.report.html import fine, percent, with_interval
from offramp.report.table import Table

_CURVES = {
    "agreement": ("teacher_forced", "tokens as the final layer's"),
    "accuracy": ("teacher_forced", "tokens right"),
    "identical": ("free_running", "answers as the full model's"),
    "quality": ("free_running", "quality of answers"),
}


def summary(result: Mapping[str, Any]) -> str:
    """What an analysis found, for a terminal: at the depths of the exits, or of a few of the
    lens."""
    layers, exits, running = result["layers"], result["exits"], result["free_running"]
    kind = "exits" if exits else "lens"
    own = result["teacher_forced"][kind]["agreement"]["depths"]
    shown = exits or sorted({min(own, key=lambda d: abs(d - layers * q / 4)) for q in (1, 2, 3)})

    def at(place: tuple[str, str, str], depth: int) -> str:
        part, of, name = place
        found = result[part].get(of, {}).get(name)
        if found is None or depth not in found["depths"]:
            return "-"
        return percent(found["values"][found["depths"].index(depth)]["value"])

    rows = {
        title + (f", {of}" if name == "agreement" and exits else ""): (part, of, name)
        for name, (part, title) in _CURVES.items()
        for of in (("lens", kind) if name == "agreement" and exits else (kind,))
        if name in result[part][of]
    }
    columns = {f"at {d}": d for d in shown} | {f"at {layers}, the full model": layers}
    falls = [
        f"{_CURVES[name][1]} ({of}) by {percent(found['dip']['fall'])} from "
        f"{found['dip']['from_depth']} to {found['dip']['to_depth']}"
        for name, (part, _) in _CURVES.items()
        for of in ("lens", "exits")
        if (found := result[part].get(of, {}).get(name)) and found["dip"]["found"]
    ]
    needed = result["needed_depth"]
    lines = [
        f"{result['backbone']}: {layers} layers, "
        f"{'exits at ' + ', '.join(map(str, exits)) if exits else 'no exits'}; "
        f"{result['n']} examples of {result['pictures']} images"
        + (f"; quality is {running['metric']}" if "metric" in running else ""),
        Table.grid(rows, columns, at).plain(),
        "a token needs "
        + ", ".join(f"{of['all']['mean_depth']:.1f} layers ({n})" for n, of in needed.items())
        + "; dips: "
        + (", ".join(falls) or "none is found"),
    ]
    if thought := result.get("overthinking"):
        early = thought[kind]["overthought"]["share"]
        lines.append(
            f"overthought: {with_interval(early, fine)} of the labelled tokens ({kind}) are right "
            "at some depth and wrong at the last"
        )
    if policy := running.get("policy"):
        better = f", quality {100 * policy['difference']['value']:+.2f}%" if thought else ""
        lines.append(
            f"the adapter's policy: mean depth {policy['mean_depth']:.2f}, "
            f"{with_interval(policy['identical'])} of the answers the full model's{better}"
        )
    return "\n".join(lines)
