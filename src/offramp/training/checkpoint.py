"""The checkpoint of a training run: saved whole, resumed to the same bits, or refused."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from offramp.adapter.records import read_records
from offramp.common.folders import check_writable, locked_folder
from offramp.common.jsonl_log import JsonlLog
from offramp.core.errors import DataError, InputError, TrainingError
from offramp.core.save_and_load import ATTEMPTS, CONFIG, read_config
from offramp.core.storage import check_plain, digest_file, write_atomic

FOLDER = "training"
STATE, DIGEST, HISTORY = f"{FOLDER}/state.pt", f"{FOLDER}/state.sha256", f"{FOLDER}/log.jsonl"


@dataclass
class Progress:
    """The state of a run that a resumed run needs besides tensors.

    step: steps done. validated: the step of the last validation, -1 before the first. best: the
    best mean agreement, found at best_step. stale: validations since then.
    """

    step: int = 0
    validated: int = -1
    best: float = -1.0
    best_step: int = 0
    stale: int = 0


def check_out(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise unless a run may write to `folder`; nothing there is touched.

    Raises:
        InputError: it holds an adapter or a checkpoint, and neither `resume` nor `overwrite`.
        StorageError: it cannot be written.
    """
    check_writable(folder, folder=True)
    if resume or overwrite:
        return
    for name, what in ((CONFIG, "an adapter"), (STATE, "a checkpoint")):
        if os.path.lexists(folder / name):
            raise InputError(
                f"{folder} already holds {what}.",
                "Give --resume to continue that run, --overwrite to replace it, or another --out.",
            )


def held(adapter: str | Path) -> AbstractContextManager[None]:
    """Lock an adapter's folder while this is open, so that no other process writes between our
    reading and our writing. A hub name needs no lock.

    Raises:
        StorageError: another process holds it, or it cannot be written.
    """
    return locked_folder(adapter, f"{FOLDER}/.lock") if os.path.isdir(adapter) else nullcontext()


def check_uncalibrated(folder: Path) -> None:
    """Raise unless a resumed run may replace the adapter in `folder`.

    Raises:
        InputError: it was calibrated, or that was attempted. AdapterError: it is damaged.
    """
    known = os.path.lexists(folder / CONFIG) and read_records(read_config(folder))
    if os.path.lexists(folder / ATTEMPTS) or (known and known.calibration):
        raise InputError(
            f"{folder} holds a calibration or attempts at one, which would be lost.",
            f"Train into another --out, or copy the folder and remove {CONFIG} and {ATTEMPTS} "
            "from it.",
        )


def forget_run(folder: Path) -> None:
    """Remove an earlier run's checkpoint and log; its adapter stays until the first better one."""
    for name in (STATE, DIGEST, HISTORY):
        (folder / name).unlink(missing_ok=True)


def save_state(folder: Path, made_of: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write the checkpoint: `state`, and the options, data and backbone that it was `made_of`.

    Its SHA-256 is written first, beside that of the previous checkpoint, so that after a crash
    between the two writes the checkpoint still matches one of them.
    """
    buffer = io.BytesIO()
    torch.save({"made_of": dict(made_of), **state}, buffer)
    payload = buffer.getvalue()
    known = [hashlib.sha256(payload).hexdigest()]
    if (folder / STATE).is_file():
        known.append(digest_file(folder / STATE))
    write_atomic(folder / DIGEST, "\n".join(known) + "\n")
    write_atomic(folder / STATE, payload)


def load_state(
    folder: Path, made_of: Mapping[str, Any], device: torch.device
) -> dict[str, Any] | None:
    """Return the checkpoint in `folder`; None where there is none.

    Raises:
        TrainingError: it is damaged, or was made of something else (the text says what differs).
    """
    path = folder / STATE
    if not os.path.exists(path):
        return None
    _check_digest(path, folder / DIGEST)
    try:
        check_plain(path)
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        then = dict(state["made_of"])
    except Exception as error:  # unpickling a damaged file raises nearly every builtin
        raise _damaged(path, type(error).__name__) from error
    changed = [name for name in made_of if made_of[name] != then.get(name)]
    if changed:
        raise TrainingError(
            f"The checkpoint in {folder} was made with other {', '.join(changed)}.",
            "Resume with the same options and data, or train into another folder.",
        )
    return state


@contextmanager
def restored(folder: Path) -> Iterator[None]:
    """Raise `TrainingError` where the block cannot load a checkpoint's entries, because they are
    damaged."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise _damaged(folder / STATE, f"{type(error).__name__}: {error}") from error


def _check_digest(path: Path, digest: Path) -> None:
    """Raise `TrainingError` where the checkpoint is not the one that was written; those of runs
    from before there were digests are taken as they are."""
    if not digest.exists():
        return
    try:
        check_plain(digest)
        known = digest.read_bytes().decode("ascii").split()
        actual = digest_file(path)
    except (OSError, ValueError) as error:
        raise _damaged(digest, type(error).__name__) from error
    if actual not in known:
        raise _damaged(path, "its SHA-256 differs")


def _damaged(path: Path, reason: str) -> TrainingError:
    return TrainingError(
        f"The checkpoint {path} is damaged ({reason}).",
        "Restore it, or train again with --overwrite instead of --resume.",
    )


def trim_history(folder: Path, progress: Progress) -> None:
    """Drop the log's rows that a resumed run will write again; all rows for a new run."""
    path = folder / HISTORY
    if not path.exists():
        return
    rows = JsonlLog.read(path)
    for number, row in enumerate(rows, 1):
        if type(row.get("step")) is not int:
            raise DataError(f"{path}, row {number} has no step.", "Delete that line.")
    current = [
        row
        for row in rows
        if (
            row["step"] <= progress.validated if "agreement" in row else row["step"] < progress.step
        )
    ]
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in current))


STOPPING = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
"""Signals that end a run: Ctrl-C, a scheduler's stop, a closed terminal."""


@contextmanager
def undisturbed() -> Iterator[None]:
    """Delay the signals `STOPPING` until the block is done, so that no step is half in the
    weights."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    held: list[tuple[int, Any]] = []
    try:
        for number in STOPPING:
            # One that is ignored, as under nohup, stays so.
            if before[number] is not signal.SIG_IGN:
                signal.signal(number, lambda *details: held.append(details))
    except ValueError:  # not the main thread, which alone receives them
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)
    if held:
        handler = before[signal.Signals(held[0][0])]
        if callable(handler):
            handler(*held[0])
        else:
            signal.raise_signal(held[0][0])
