"""The process in which files that are not known are tried out: what ends it ends nothing else."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from offramp_llama_cpp.projector import MARKER, Projector, no_words, tokenizer_of
from offramp_llama_cpp.segment import EngineOptions, Segment

_CONTEXT, _ROWS = 64, 6
_SIDE = 64
"""Pixels of a picture's sides."""


def _try(asked: Mapping[str, Any], options: EngineOptions) -> None:
    options = replace(options, context=_CONTEXT, threads=1)
    if "projector" in asked:
        _try_projector(asked, options)
    for file, tap in asked.get("segments", ()):
        segment = Segment(Path(file), options, tap_layer=tap)
        rows = np.ones((_ROWS, segment.width), dtype=np.float32)
        if segment.looks_ahead:
            segment.feed(rows, 0, ahead=True)
        segment.feed(rows, _ROWS)
        segment.logits(_ROWS)
        segment.crop(_ROWS // 2)
        for row in rows[: _ROWS // 2]:
            segment.feed(row[None], 1)
        segment.close()


def _try_projector(asked: Mapping[str, Any], options: EngineOptions) -> None:
    words = asked["words"]
    model = no_words() if words is None else tokenizer_of(words)
    width, features = asked["width"], asked["features"]
    projector = Projector(
        asked["projector"], model, options, width=width, features=features, owns_model=True
    )
    picture = np.full((_SIDE, _SIDE, 3), 128, dtype=np.uint8)
    with projector.chunks(MARKER, [picture]) as parts:
        for part in filter(projector.is_image, parts):
            projector.rows(part)


if __name__ == "__main__":
    _asked, _options = json.loads(sys.argv[1])
    _try(_asked, EngineOptions(**_options))
