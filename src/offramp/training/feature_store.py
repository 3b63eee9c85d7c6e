"""Recorded batches of states: in memory, on disk, or computed again each time they are read."""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from offramp.core.errors import InputError
from offramp.core.models.fingerprint import dump_fingerprint, fingerprint
from offramp.core.storage import digest_rows, write_atomic
from offramp.features.input_processor import InputProcessor
from offramp.features.teacher_forcing import Answered, Batch, group, record
from offramp.inputs.example import examples_digest
from offramp.training.config import CACHES
from offramp.training.sharding import Share, in_step, of_all


class FeatureStore:
    """Recorded batches, in memory, on disk, or recomputed each time they are read."""

    def __init__(
        self,
        encoder: InputProcessor,
        rows: Sequence[Answered],
        depths: Sequence[int],
        *,
        batch_size: int,
        cache: str = "auto",
        folder: Path | None = None,
        memory_bytes: int = 4 << 30,
        teacher: AbstractContextManager[Any] | None = None,
        share: Share | None = None,
    ) -> None:
        """Record a batch, from which `nbytes` is estimated; `fill` records the others.

        teacher: is entered while the backbone runs; None: it runs as it is.
        share: of which `rows` are; a group's processes record together, and one of them writes.
        """
        if cache not in CACHES:
            raise InputError(
                f"Feature cache {cache!r} is not known.", f"Use one of {', '.join(CACHES)}."
            )
        self._encoder, self._depths, self._folder = encoder, tuple(depths), folder
        self._teacher = nullcontext() if teacher is None else teacher
        self._share = share or Share()
        self._groups = group(rows, batch_size)
        self._batches: list[Batch] = []
        self._place: Path | None = None
        probe = len(self._groups) // 2
        part = len(self._groups[probe]) / len(rows)
        with in_step(encoder.backbone.layers):
            first = self._record(probe)
        self.nbytes: int = int(first.nbytes / part)
        kinds = of_all(encoder.backbone.model, self._choose(cache, memory_bytes))
        self.kind: str = max(kinds, key=CACHES.index)
        if self.kind == "disk":
            assert folder is not None
            self._place = folder / self._digest()[:16]
        self._probed = {probe: first} if self.kind == "memory" else {}

    def __len__(self) -> int:
        return len(self._groups)

    @property
    def answers(self) -> list[tuple[int, ...]]:
        """Token ids of every answer, in the order of the batches."""
        return [row.ids for rows in self._groups for row in rows]

    def _choose(self, cache: str, memory_bytes: int) -> str:
        if cache != "auto":
            kind = cache
        elif self.nbytes <= memory_bytes:
            kind = "memory"
        else:
            kind = "disk" if self._folder is not None else "stream"
        if kind != "disk":
            return kind
        if self._folder is None:
            raise InputError("A disk cache needs a folder.", "Name one, or use cache='memory'.")
        self._folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._folder).free
        if self.nbytes > 0.9 * free:
            if cache == "auto":
                return "stream"
            raise InputError(
                f"The features need about {self.nbytes / 1e9:.1f} GB and {free / 1e9:.1f} GB are "
                f"free at {self._folder}.",
                "Use cache='stream', fewer examples, or another folder.",
            )
        return kind

    def fill(self, progress: Any = iter) -> None:
        """Record all batches, unless they are streamed. `progress` wraps the iterable."""
        if self.kind == "stream":
            return
        with in_step(self._encoder.backbone.layers):
            for index in progress(range(len(self))):
                if self.kind == "memory":
                    probed = self._probed.pop(index, None)
                    self._batches.append(self._record(index) if probed is None else probed)
                elif not all(self._share.of_group(self._file(index).exists())):
                    self._write(self._record(index), self._file(index))

    def _write(self, batch: Batch, file: Path) -> None:
        """Write a batch: once, or, where processes share no disk, once by each."""
        if self._share.leads:
            _save(batch, file)
        self._share.of_group(None)  # when the first has written
        if not file.exists():
            _save(batch, file)

    def __getitem__(self, index: int) -> Batch:
        if self.kind == "memory":
            return self._batches[index]
        if self.kind == "disk":
            return _load(self._file(index), self._encoder.backbone.device)
        with in_step(self._encoder.backbone.layers):
            return self._record(index)

    def _record(self, index: int) -> Batch:
        with self._teacher:
            return record(self._encoder, self._groups[index], self._depths)

    def clear(self) -> None:
        """Drop all batches, on disk too."""
        self._batches.clear()
        if self._place is not None:
            shutil.rmtree(self._place, ignore_errors=True)

    def _file(self, index: int) -> Path:
        assert self._place is not None
        return self._place / f"batch-{index:06d}.pt"

    def _digest(self) -> str:
        """The digest of what the states depend on, so that another run's files are not reused."""
        backbone = self._encoder.backbone
        rows = [row for group in self._groups for row in group]
        with self._teacher:
            ran = dump_fingerprint(fingerprint(backbone))
        made_of = [
            ran,
            [part.name for part in fields(Batch)],
            str(backbone.dtype),
            self._depths,
            examples_digest(row.example for row in rows),
            [[[row.ids, row.labelled] for row in group] for group in self._groups],
        ]
        return digest_rows(made_of)


def _save(batch: Batch, path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(batch.__dict__, buffer)
    write_atomic(path, buffer.getvalue())


def _load(path: Path, device: torch.device) -> Batch:
    return Batch(**torch.load(path, map_location=device, weights_only=True))
