"""Answers to many examples, a line each, in a file that a later run goes on from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offramp.common.jsonl_log import JsonlLog
from offramp.core.errors import DataError, InputError, OfframpError
from offramp.inputs.example import Example
from offramp.serving.batch_engine import BatchEngine


@dataclass(frozen=True)
class Written:
    """Numbers of examples that were answered now, that were answered before, and that failed."""

    answered: int
    skipped: int
    failed: int


def write_answers(
    engine: BatchEngine,
    examples: Iterable[Example],
    out: str | Path,
    *,
    progress: Callable[[Iterator[Any]], Iterable[Any]] = iter,
    **options: Any,
) -> Written:
    """Answer all examples into `out`, one JSON object a line, in order of completion.

    A line has `key`, `answer`, `tokens` and `mean_depth`, or `key` and `error`. Keys with an answer
    in the file are skipped; those with an error are tried again. progress: wraps the finished
    examples, for a bar.

    Raises:
        InputError: an engine without a processor; two examples with one key.
        DataError: the file holds something else.
        StorageError: the file cannot be read or written; the lines before are whole.
    """
    if engine.processor is None:
        raise InputError(
            "Answers cannot be written out as text without a processor.",
            "Give BatchEngine(..., processor=InputProcessor(backbone, processor)).",
        )
    known = _answered(Path(out))
    counts = {"answered": 0, "skipped": 0, "failed": 0}
    seen: set[str] = set()

    def left() -> Iterator[Example]:
        for example in examples:
            if example.key in seen:
                raise InputError(
                    f"Two examples have the key {example.key!r}.", "Give each a key of its own."
                )
            seen.add(example.key)
            if example.key in known:
                counts["skipped"] += 1
            else:
                yield example

    with JsonlLog(out) as log:
        for example, handle in progress(engine.map(left(), **options)):
            error = handle.exception()
            if error is None:
                output = handle.result().output
                [text] = engine.processor.texts(output.new_tokens)
                row = {
                    "key": example.key,
                    "answer": text,
                    "tokens": output.depths.shape[1],
                    "mean_depth": output.mean_depth,
                }
            else:
                problem = error.problem if isinstance(error, OfframpError) else repr(error)
                row = {"key": example.key, "error": problem}
            log.append(row)
            counts["failed" if error is not None else "answered"] += 1
    return Written(**counts)


def _answered(out: Path) -> set[str]:
    """Keys that the file has an answer for."""
    if not out.is_file():
        return set()
    rows = JsonlLog.read(out)
    if wrong := next((row for row in rows if "key" not in row), None):
        raise DataError(
            f"{out} has a line without a key ({', '.join(wrong)}): it holds no answers.",
            "Name another file.",
        )
    return {str(row["key"]) for row in rows if "answer" in row}
