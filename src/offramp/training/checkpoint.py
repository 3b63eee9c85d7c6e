"""Where a training run stands: saved whole, taken up bit for bit, or refused."""

from __future__ import annotations

import io
import json
import pickle
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from offramp.errors import TrainingError
from offramp.storage import JsonlLog, write_atomic

STATE, HISTORY = "training/state.pt", "training/log.jsonl"


@dataclass
class Progress:
    """How far a run is: everything that resuming needs besides tensors.

    step: steps done. validated: the step of the last validation, -1 before the first. best: the
    best mean agreement, found at best_step. stale: validations since then.
    """

    step: int = 0
    validated: int = -1
    best: float = -1.0
    best_step: int = 0
    stale: int = 0


def save_state(folder: Path, made_of: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write the checkpoint: `state`, and what it was `made_of` (options, data, backbone)."""
    buffer = io.BytesIO()
    torch.save({"made_of": dict(made_of), **state}, buffer)
    write_atomic(folder / STATE, buffer.getvalue())


def load_state(
    folder: Path, made_of: Mapping[str, Any], device: torch.device
) -> dict[str, Any] | None:
    """The checkpoint in `folder`, None where there is none.

    Raises:
        TrainingError: it is damaged, or was made of something else (the text says what differs).
    """
    path = folder / STATE
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        then = state["made_of"]
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise TrainingError(
            f"The checkpoint {path} is damaged ({type(error).__name__}).",
            "Delete it and train again without --resume.",
        ) from error
    changed = [name for name in made_of if made_of[name] != then.get(name)]
    if changed:
        raise TrainingError(
            f"The checkpoint in {folder} was made with other {', '.join(changed)}.",
            "Resume with the same options and data, or train into another folder.",
        )
    return state


def trim_history(folder: Path, progress: Progress) -> None:
    """Drop the log's rows that the run will write again; all of them where it starts afresh."""
    path = folder / HISTORY
    if not path.exists():
        return
    kept = [
        row
        for row in JsonlLog.read(path)
        if (
            row["step"] <= progress.validated if "agreement" in row else row["step"] < progress.step
        )
    ]
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))


@contextmanager
def undisturbed() -> Iterator[None]:
    """Hold Ctrl-C back until the block is done, so that no step is half in the weights."""
    before = signal.getsignal(signal.SIGINT)
    held: list[tuple[Any, ...]] = []
    try:
        signal.signal(signal.SIGINT, lambda *details: held.append(details))
    except ValueError:  # not the main thread, which alone receives it
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held and callable(before):
        before(*held[0])
