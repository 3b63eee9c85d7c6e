"""Pictures with their answers, each token in the colour of its depth, as HTML."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from statistics import mean
from typing import Any

from offramp.data.example import Example
from offramp.evaluation.run_log import Done, Row
from offramp.research.report.html import heading, paragraph
from offramp.research.report.plots import depth_color

_SIDE = 240  # pixels of the longer side of a picture
_SMALL = 100  # up to here a picture is kept exactly
_DARK = 0.179  # the luminance on which black and white have the same contrast, 4.58


def gallery(
    done: Done, layers: int, pictures: Mapping[str, Example], tokenizer: Any, each: int = 6
) -> str:
    """Answers of a run that early exit changed, and some that it did not.

    done: rows by mode and key. pictures: examples by key, as far as they are known.
    tokenizer: turns ids into words; None: answers are shown whole.
    """
    early = {key: row for (mode, key), row in done.items() if mode == "early_exit"}
    full = {key: row for (mode, key), row in done.items() if mode == "full"}
    if not early:
        return paragraph("This run has no early-exit answers.")
    both = [key for key in early if key in full]
    changed = [key for key in both if early[key]["ids"] != full[key]["ids"]]
    same = [key for key in (both or early) if key not in changed]
    same.sort(key=lambda key: mean(early[key]["depths"] or [layers]))
    kept = same[:: max(1, len(same) // each)][:each]  # from the fastest to the slowest
    seen = sorted({d for k in (*changed[:each], *kept) for d in early[k]["depths"]} | {layers})
    parts = [_legend(seen, layers)]
    if tokenizer is None:
        parts.append(paragraph("The tokenizer is not on this machine: answers are shown whole.",
                               "soft"))  # fmt: skip
    shown = {
        f"Changed by early exit: {len(changed)} of {len(both)} answers": changed[:each],
        f"As the full model's, from the fastest to the slowest: {len(same)} answers": kept,
    }
    for title, keys in shown.items():
        if keys:
            some = [
                _answer(early[k], full.get(k), layers, pictures.get(k), tokenizer) for k in keys
            ]
            parts += [heading(title), f'<div class="answers">{"".join(some)}</div>']
    return "\n".join(parts)


def _answer(
    early: Row, full: Row | None, layers: int, example: Example | None, tokenizer: Any
) -> str:
    key = str(early["key"])
    parts = [picture(example, key) if example is not None else ""]
    if example is not None and example.prompt:
        parts.append(f'<p><span class="label">prompt</span>{escape(example.prompt)}</p>')
    said = (
        escape(early["answer"])
        if tokenizer is None
        else "".join(
            token(text, depth, layers)
            for text, depth in zip(words(early["ids"], tokenizer), early["depths"], strict=True)
        )
    )
    depth = mean(early["depths"]) if early["depths"] else layers
    parts.append(
        f'<p class="said"><span class="label">early exit, mean depth {depth:.1f} of {layers}</span>'
        f"{said}</p>"
    )
    if full is not None and full["ids"] == early["ids"]:
        parts.append('<p class="tag same">= the full model\'s answer</p>')
    elif full is not None:
        parts.append(
            '<p><span class="label tag changed">the full model says</span>'
            f"{escape(full['answer'])}</p>"
        )
    if example is not None and example.answers:
        parts.append(f'<p><span class="label">reference</span>{escape(example.answers[0])}</p>')
    return f'<article class="answer" aria-label="{escape(key)}">{"".join(parts)}</article>'


def words(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """The text of each token; "end" for special ones."""
    special = set(tokenizer.all_special_ids)
    return ["end" if i in special else str(tokenizer.decode([i])).strip() or "\u2423" for i in ids]


def token(text: str, depth: int, layers: int) -> str:
    """A token in the colour of its depth, which it also names."""
    color = depth_color(depth, layers)
    ink = ink_on(color)
    where = "full depth" if depth == layers else f"depth {depth} of {layers}"
    return (
        f'<span class="t" style="background:{color};color:{ink}" title="{where}">{escape(text)}'
        f"<sub>{depth}</sub></span>"
    )


def _legend(depths: Sequence[int], layers: int) -> str:
    each = "".join(token("full" if d == layers else "depth", d, layers) for d in depths)
    return f'<p class="legend">Each token with the decoder layers it ran: {each}</p>'


def picture(example: Example, name: str) -> str:
    """The example's picture inside the page, scaled down; small ones exactly as they are."""
    image = example.open_image()
    image.thumbnail((_SIDE, _SIDE))
    kind = "png" if max(image.size) <= _SMALL else "jpeg"
    data = io.BytesIO()
    image.save(data, kind, optimize=True, quality=80)  # a PNG has no quality and ignores it
    source = f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"
    width, height = image.size
    return f'<img src="{source}" alt="{escape(name)}" width="{width}" height="{height}">'


def ink_on(color: str) -> str:
    """Black or white, whichever can be read on "#rrggbb"."""
    return "#000" if _luminance(color) > _DARK else "#fff"


def _luminance(color: str) -> float:
    """Relative luminance in [0, 1] of "#rrggbb" (WCAG 2)."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
