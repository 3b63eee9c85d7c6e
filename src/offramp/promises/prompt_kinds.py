"""Kinds of prompts: what those that were calibrated have in common, and of which another is."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from offramp.inputs.control import WRITTEN

TURN = "turn of a dialogue"
"""The kind of prompts that hold the turns before, in the form of a chat template."""
FRAMES = 8
"""Kinds of prompts that are told apart by their first word; of more, all are one kind. No more are
shown."""
OTHER = "\0"
"""Stands for what no example asks: of several images or none, or written otherwise."""


def prompt_frames(prompts: Sequence[str]) -> list[list[str]]:
    """Return prompts as frames: [prompt] for one that stays the same, and [before, after] for a
    template whose middle changes.

    Prompts with the same first word share a frame. With more than `FRAMES` first words all share
    one, but for what at least one in `FRAMES` examples asks, which stays a kind: a prompt, or a
    template with words on both sides, as turns of dialogues have. Beside such a kind, others that
    have no word in common are of no frame. A prompt with no word in common with the others is a
    frame of its own.
    """
    kinds: dict[str, set[str]] = {}
    for prompt in prompts:
        kinds.setdefault(re.split(r"[\s:]", prompt, maxsplit=1)[0], set()).add(prompt)
    if len(kinds) <= FRAMES:
        return [frame for word in sorted(kinds) for frame in _frames(sorted(kinds[word]))]
    counts = Counter(prompts)

    def often(some: set[str]) -> bool:
        return sum(counts[prompt] for prompt in some) * FRAMES >= len(prompts)

    alone = {prompt for prompt in counts if often({prompt})}
    own = [[prompt] for prompt in sorted(alone)]
    left = {*prompts} - alone
    for word in sorted(kinds):
        match _frames(sorted(kinds[word])):
            case [[before, behind]] if _has_word(before) and _has_word(behind):
                if often(kinds[word]) and not kinds[word] & alone:
                    own.append([before, behind])
                    left -= kinds[word]
    others = _frames(sorted(left)) if left else []
    return own + (others if not own or len(others) == 1 else [])


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
    """Return the kind of a prompt, named by its frame: the prompt, "before ... after" of a
    template, or `TURN`; "" where no frame fits, or where too many frames are single prompts."""
    alone = [frame for frame in frames if len(frame) == 1]
    frame = next((frame for frame in frames if fits(prompt, [frame])), None)
    if frame is None or (len(frame) == 1 and len(alone) > FRAMES):
        return ""
    return TURN if frame[0].startswith(WRITTEN) else " ... ".join(map(str.strip, frame))


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
