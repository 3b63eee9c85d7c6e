"""The answers of an evaluation on disk: an append-only log from which a run resumes.

rows.jsonl    the settings, then for each example and mode: key, mode, answer, ids, depths, seconds,
              decode_seconds, prompt_digest; in dialogue also candidate_scores and ranked_by; in
              lossless mode rounds, the (drafted, accepted) tokens of each
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from offramp.common.jsonl_log import JsonlLog
from offramp.core.errors import DataError, InputError
from offramp.data.item import Item

ROWS = "rows.jsonl"
Row = dict[str, Any]
Done = dict[tuple[str, str], Row]
"""Rows by mode and key."""
_UNSAID = {"kernels": "plain", "vision": "torch", "shrink_on_load": False}
"""Settings that runs of earlier versions, or of other models, do not name, as they were."""


class RunLog(JsonlLog):
    """The log of a run's answers, with the answers of earlier starts."""

    def __init__(
        self, path: Path, stored: Mapping[str, Any], items: Sequence[Item], *, resume: bool
    ) -> None:
        self.done: Done = {}
        started = path.exists() and path.stat().st_size > 0
        if started and not resume:
            raise InputError(
                f"{path.parent} already holds answers.",
                "Give --resume to continue that run, or another --out.",
            )
        if started:
            before, self.done = read_rows(path)
            was, now = {**_UNSAID, **before}, {**_UNSAID, **stored}
            differs = [n for n in dict.fromkeys([*now, *was]) if now.get(n) != was.get(n)]
            if differs:
                name = differs[0]
                raise InputError(
                    f"{path.parent} holds a run with other settings: {', '.join(differs)} "
                    f"({name} was {was.get(name)}, now {now.get(name)}).",
                    "Give the settings of that run, or another --out.",
                )
        self._digests = {item.key: item.digest() for item in items}
        check_digests(self.done, self._digests, path)
        super().__init__(path)
        if not started:
            self.append({"settings": dict(stored)})

    def add(self, row: Row) -> None:
        """Store an answer, with the digest of its question."""
        row = {**row, "prompt_digest": self._digests[row["key"]]}
        self.append(row)
        self.done[row["mode"], row["key"]] = row


def read_rows(path: Path) -> tuple[dict[str, Any], Done]:
    """Return the settings and the answers of a run."""
    rows = JsonlLog.read(path)
    stored = rows[0].get("settings") if rows else None
    whole = ("key", "mode", "answer", "ids", "depths", "prompt_digest")
    if not isinstance(stored, dict) or not all(n in row for row in rows[1:] for n in whole):
        raise DataError(
            f"{path} was not written by this version of offramp eval.",
            "Evaluate again into another folder.",
        )
    return stored, {(row["mode"], row["key"]): row for row in rows[1:]}


def check_digests(done: Done, digests: Mapping[str, str], path: Path) -> None:
    """Raise `DataError` where an example's question differs from that of its stored answer."""
    for (_, key), row in done.items():
        if digests.get(key, row["prompt_digest"]) != row["prompt_digest"]:
            raise DataError(
                f"Example {key!r} asks something else than it did when {path} was written.",
                "Evaluate the data that was used there, or give another --out.",
            )
