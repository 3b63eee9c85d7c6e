"""Progress of long jobs: a bar on a terminal, and elsewhere a line every tenth.

`logging.getLogger("offramp").setLevel(logging.WARNING)` silences both.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

log = logging.getLogger(__name__)
LONG = 5.0
"""Seconds after which a job is long enough for lines."""


def progress(iterable: Iterable[Any], title: str, *, tell: bool = True) -> Any:
    """Return `iterable` with a progress bar over its iteration. tell: False shows nothing."""
    return progress_bar(title, iterable, tell=tell)


def progress_bar(
    title: str,
    iterable: Iterable[Any] | None = None,
    *,
    total: int | None = None,
    done: int = 0,
    tell: bool = True,
) -> Any:
    """Return a tqdm bar over `iterable`, or over `total` steps that the caller counts.

    done: steps taken before. tell: False shows nothing.
    """
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)  # type: ignore[arg-type]
    silent = not tell or logging.getLogger("offramp").level > logging.INFO
    options: dict[str, Any] = {"desc": title, "total": total, "initial": done, "leave": False}
    if silent or _on_a_terminal() or not total:
        return tqdm(iterable, disable=silent or None, **options)
    return tqdm(
        iterable,
        file=_Lines(),
        position=0,  # else tqdm moves the cursor for a bar within a bar
        delay=LONG,
        mininterval=0,
        maxinterval=math.inf,
        miniters=math.ceil(total / 10),
        bar_format="{desc}: {n_fmt} of {total_fmt} after {elapsed}, about {remaining} left",
        **options,
    )


def duration(seconds: float) -> str:
    """Return a duration for people: "40 seconds", "3 minutes", "2 hours"."""
    for unit, size in (("hour", 3600), ("minute", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}s"
    number = max(1, round(seconds))
    return f"{number} second{'s' if number > 1 else ''}"


def _on_a_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


class _Lines:
    """A file for tqdm that logs what is drawn as lines."""

    def write(self, text: str) -> None:
        line = text.strip()
        if line:
            log.info("%s", line)

    def flush(self) -> None:
        """Nothing is held back."""
