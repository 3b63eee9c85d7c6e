"""Kinds of prompts: what those that were calibrated have in common, and of which another is."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

FRAMES = 8
"""Kinds of prompts that are told apart by their first word; of more, all are one kind. No more are
shown."""
OTHER = "\0"
"""Stands for what no example asks: of several turns, images or none, or written otherwise."""


def prompt_frames(prompts: Sequence[str]) -> list[list[str]]:
    """Return prompts as frames: [prompt] for one that stays the same, and [before, after] for a
    template whose middle changes.

    Prompts with the same first word share a frame. With more than `FRAMES` first words all share
    one, but for a prompt that at least one in `FRAMES` examples asks, which stays a kind; beside
    such a prompt, others that have no word in common are of no frame. A prompt with no word in
    common with the others is a frame of its own.
    """
    kinds: dict[str, set[str]] = {}
    for prompt in prompts:
        kinds.setdefault(re.split(r"[\s:]", prompt, maxsplit=1)[0], set()).add(prompt)
    if len(kinds) > FRAMES:
        often = {prompt for prompt, n in Counter(prompts).items() if n * FRAMES >= len(prompts)}
        others = _frames(sorted({*prompts} - often))
        alone = [[prompt] for prompt in sorted(often)]
        return alone + (others if not alone or len(others) == 1 else [])
    return [frame for word in sorted(kinds) for frame in _frames(sorted(kinds[word]))]


def _frames(prompts: Sequence[str]) -> list[list[str]]:
    first, last = prompts[0], prompts[-1]  # sorted: these two share the least from the start
    before = _common(first, last)
    backwards = sorted(prompt[::-1] for prompt in prompts)
    behind = _common(backwards[0], backwards[-1])[::-1]
    # Whole words alone: questions that happen to begin with one letter have no template.
    before = before[: max((m.end() for m in re.finditer(r"\W", before)), default=0)]
    starts = [m.start() for m in re.finditer(r"\W", behind)]
    behind = behind[starts[0] :] if starts else ""
    if len(prompts) == 1 or not _has_word(before + behind):
        return [[prompt] for prompt in prompts]
    return [[before, behind]]


def kind_of(prompt: str, frames: Sequence[Sequence[str]]) -> str:
    """Return the kind of a prompt, named by its frame: the prompt, or "before ... after" of a
    template; "" where no frame fits, or where too many frames are single prompts."""
    alone = [frame for frame in frames if len(frame) == 1]
    for frame in frames:
        if fits(prompt, [frame]):
            return (
                ""
                if len(frame) == 1 and len(alone) > FRAMES
                else " ... ".join(map(str.strip, frame))
            )
    return ""


def point_of(calibration: Mapping[str, Any] | None, kind: str) -> dict[int, float] | None:
    """Return the point of a calibrated path for prompts of a kind; None: one point for all. See
    `offramp.core.decoding.policy.ExitPolicy.moved`."""
    kinds = (calibration or {}).get("kinds") or ()
    said = next((each.get("point") for each in kinds if each.get("kind") == kind), None)
    return {int(depth): level for depth, level in said.items()} if said else None


def _has_word(text: str) -> bool:
    """Else any text would fit what is left of a template."""
    return re.search(r"\w", text) is not None


def _common(one: str, other: str) -> str:
    n = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    return one[: min(len(one), len(other)) if n is None else n]


def fits(prompt: str, frames: Sequence[Sequence[str]]) -> bool:
    """Return True if a prompt fits one of the frames."""
    for before, *behind in frames:
        if not behind and prompt == before:
            return True
        # Calibrations of earlier versions hold templates without a word.
        template = behind and _has_word(before + behind[0])
        if template and prompt.startswith(before) and prompt.endswith(behind[0]):
            return True
    return False
