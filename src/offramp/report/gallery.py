"""Images with their answers, each word in the colour of its depth, as HTML."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from markupsafe import Markup

from offramp.common.depth_color import depth_color, ink_on
from offramp.evaluation.run_log import ROWS, Done, Row
from offramp.inputs.example import Example
from offramp.report.html import render

_SIDE = 240  # pixels of the longer side of an image
_SMALL = 100  # up to here an image is kept exactly
_MOST = 6  # answers of a group


def gallery(done: Done, layers: int, pictures: Mapping[str, Example], tokenizer: Any) -> Markup:
    """Return a gallery of a run's answers that early exit changed, and of some that it did not.

    done: rows by mode and key; may be empty. pictures: known examples by key. tokenizer: turns ids
    into words; None: answers are shown as texts.
    """
    early = {key: row for (mode, key), row in done.items() if mode == "early_exit"}
    full = {key: row for (mode, key), row in done.items() if mode == "full"}
    both = [key for key in early if key in full]
    changed = [key for key in both if early[key]["ids"] != full[key]["ids"]]
    same = [key for key in (both or early) if key not in changed]
    same.sort(key=lambda key: mean(early[key]["depths"] or [layers]))
    unchanged = same[:: max(1, len(same) // _MOST)][:_MOST]  # from the fastest to the slowest
    depths, groups = {layers}, []
    for of, keys in ((changed, changed[:_MOST]), (same, unchanged)):
        said = [_answer(early[k], full.get(k), layers, pictures.get(k), tokenizer) for k in keys]
        groups.append({"changed": of is changed, "n": len(of), "of": len(both), "answers": said})
        depths.update(depth for key in keys for depth in early[key]["depths"])
    return render(
        "answers",
        foretold="",
        not_here="" if done else ROWS,
        groups=groups if early else [],
        layers=layers,
        pictures=any(key in pictures for key in early),
        worded=tokenizer is not None,
        legend=[token("full" if d == layers else "exit", d, layers) for d in sorted(depths)],
    )


def foretold(done: Done, layers: int, pictures: Mapping[str, Example], tokenizer: Any) -> Markup:
    """Return a gallery of the full model's answers, each word in the colour of its forecast depth.
    Arguments as of `gallery`."""
    rows = [row for (mode, _), row in done.items() if mode == "early_exit"]
    said = [_answer(row, None, layers, pictures.get(str(row["key"])), tokenizer) for row in rows]
    depths = {layers, *(depth for row in rows for depth in row["depths"])}
    heading = "The model's own answers; each word is on the colour of the depth foretold of it"
    return render(
        "answers",
        foretold=heading,
        not_here="",
        groups=[{"answers": said}],
        layers=layers,
        pictures=bool(pictures),
        worded=tokenizer is not None,
        legend=[token("full" if d == layers else "exit", d, layers) for d in sorted(depths)],
    )


def _answer(
    early: Row, full: Row | None, layers: int, example: Example | None, tokenizer: Any
) -> dict[str, Any]:
    said = None
    if tokenizer is not None:
        pairs = zip(words(early["ids"], tokenizer), early["depths"], strict=True)
        said = [token(text, depth, layers) for text, depth in pairs]
    return {
        "key": str(early["key"]),
        "picture": picture(example) if example is not None else None,
        "prompt": example.prompt if example is not None else "",
        "depth": mean(early["depths"]) if early["depths"] else layers,
        "words": said,
        "text": early["answer"],
        "same": full is not None and full["ids"] == early["ids"],
        "full": None if full is None else full["answer"],
        "reference": example.answers[0] if example is not None and example.answers else "",
    }


def words(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """Return the text of each token; "end" for special ones."""
    special = set(tokenizer.all_special_ids)
    return ["end" if i in special else str(tokenizer.decode([i])).strip() or "\u2423" for i in ids]


def token(text: str, depth: int, layers: int) -> dict[str, Any]:
    """Return a word with its depth and the depth's colour."""
    color = depth_color(depth, layers)
    where = "full depth" if depth == layers else f"depth {depth} of {layers}"
    return {"text": text, "depth": depth, "color": color, "ink": ink_on(color), "where": where}


def picture(example: Example) -> dict[str, Any]:
    """Return the example's image as a data URI, scaled down; small ones exactly as they are."""
    image = example.open_image()
    image.thumbnail((_SIDE, _SIDE))
    kind = "png" if max(image.size) <= _SMALL else "jpeg"
    data = io.BytesIO()
    image.save(data, kind, optimize=True, quality=80)  # a PNG has no quality and ignores it
    source = f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"
    return {"source": source, "width": image.width, "height": image.height}
