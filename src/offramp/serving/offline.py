"""Answers to many examples, a line each, in a file that a later run goes on from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offramp.data.example import Example
from offramp.errors import DataError, InputError, OfframpError
from offramp.serving.batch_engine import BatchEngine
from offramp.serving.request import Handle
from offramp.storage import JsonlLog


def map_examples(
    engine: BatchEngine, examples: Iterable[Example], *, ahead: int | None = None, **options: Any
) -> Iterator[tuple[Example, Handle]]:
    """Submit examples and give each back with its finished request, in order of completion.

    Examples are taken as places are free, so that `examples` may be longer than memory. ahead: how
    many are under way at most (default: slots, and as many again). options: as of `submit`.
    """
    slots = engine.core.config.slots
    most = min(2 * slots if ahead is None else max(1, ahead), slots + engine.queue)
    under_way: dict[Handle, Example] = {}
    try:
        for example in examples:
            under_way[engine.submit(example, wait=True, **options)] = example
            while len(under_way) >= most:
                yield from _finished(under_way)
        while under_way:
            yield from _finished(under_way)
    finally:  # a caller that stops iterating wants no more
        for handle in under_way:
            engine.cancel(handle)


def _finished(under_way: dict[Handle, Example]) -> Iterator[tuple[Example, Handle]]:
    for handle in wait(list(under_way), return_when=FIRST_COMPLETED).done:
        assert isinstance(handle, Handle)
        yield under_way.pop(handle), handle


@dataclass(frozen=True)
class Written:
    """Examples that were answered, that were answered before, and that failed."""

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
    in the file are not asked again; those with an error are. progress: wraps the examples as they
    are done, for a bar.

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
        for example, handle in progress(map_examples(engine, left(), **options)):
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
