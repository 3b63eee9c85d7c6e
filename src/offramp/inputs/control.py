"""Control tokens: where somebody types them in a message, they are text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

WRITTEN = "<|im_start|>"
"""Begins a prompt that has the form of the photo model's chat template already."""
_SIGNS = re.compile(r"[<\[|]")
"""Of which control tokens have one; words that merely are tokens have none."""


def as_text(tokens: Iterable[str]) -> Callable[[str], str]:
    """Return a function that puts a space into each of these control tokens in a text, which keeps
    a message from ending its turn and beginning others."""
    known = sorted({*filter(_SIGNS.search, tokens)}, key=len, reverse=True)
    marks = re.compile("|".join(map(re.escape, known)) or "(?!)")

    def said(text: str) -> str:
        return marks.sub(_apart, text) if _SIGNS.search(text) else text

    return said


def _apart(mark: re.Match[str]) -> str:
    return f"{mark[0][0]} {mark[0][1:]}"
