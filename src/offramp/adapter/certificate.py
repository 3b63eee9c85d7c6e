"""What `offramp verify` found of an adapter, kept beside it: which ways to decode were held to
what, on which machine, and whether they came to the same.

A run is of one engine in one precision on one kind of device; a later one of the same replaces it.
It counts for the exits that it was made with, which it names by their file's SHA-256.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from offramp.core.errors import DataError, InputError, printable
from offramp.core.storage import digest_rows, read_json, schema, write_json
from offramp.core.storage.schema import Amount, Count

ROWS = (2, 4, 8, 16, 32)
SLOTS = 8
_LARGEST = 2**24
"""Bytes of the largest file that is read."""
_AGAIN = "Delete it, and run `offramp verify` again."


@dataclass(frozen=True)
class VerificationSettings:
    """Sizes of a verification.

    rows: of static batches. slots: of the batch engine. longest: tokens of an answer, at most.

    Raises:
        InputError: a batch of fewer than 2 rows, or another number below 1.
    """

    rows: Sequence[int] = ROWS
    slots: int = SLOTS
    longest: int = 40

    def __post_init__(self) -> None:
        wrong = [r for r in self.rows if r < 2] + [n for n in (self.slots, self.longest) if n < 1]
        if wrong:
            raise InputError(
                f"Nothing can be verified with {wrong[0]} rows, slots or tokens.",
                "Give batches of 2 rows and more, and slots and lengths from 1.",
            )


@dataclass(frozen=True)
class PathResult:
    """The comparison of one way to decode with another.

    path, against: names of the two ways. promised: whether they must be equal, token for token.
    answers, tokens: pairs of (compared, different); a token differs by its id, by its depth where
    both have one, or by its absence. logits_apart: largest difference of logits, over the 32
    largest of each token up to the first that differs, relative to the largest; None: not compared.
    scores_apart: largest difference of scores, in [0, 1]. refused: why nothing was compared; None:
    compared. declined: whether this was refused with an error in words, so that no wrong answer was
    given.
    """

    path: str
    against: str
    promised: bool
    answers: Count = 0
    answers_differ: Count = 0
    tokens: Count = 0
    tokens_differ: Count = 0
    logits_apart: Amount | None = None
    scores_apart: Amount | None = None
    refused: str | None = None
    declined: bool = False

    @property
    def exact(self) -> bool:
        """Return True if all answers were compared and none differs."""
        return self.refused is None and self.tokens_differ == 0

    @property
    def broken(self) -> bool:
        """Return True if answers differ that must be equal."""
        return self.promised and not self.exact and not self.declined


@dataclass(frozen=True)
class Run:
    """The findings of one run of `offramp verify`.

    engine: of the command line, with its part that ran: "torch (slots)". quantized: scheme of the
    layers' weights; "" for none. exits, backbone, policy: digests of the verified parts.
    thresholds: of the run, in words. prompts: their number. longest: tokens of the longest answer.
    provenance: versions, machine and date; see `offramp.common.provenance`.
    """

    engine: str
    quantized: str
    dtype: str
    device: str
    exits: str
    backbone: str
    policy: str
    thresholds: str
    prompts: Count
    longest: Count
    paths: Sequence[PathResult]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def where(self) -> tuple[str, str, str, str]:
        """Return a key; a later run with the same key replaces this one."""
        return self.engine, self.quantized, self.dtype, self.device

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def words(self) -> str:
        """Return the run in one line, for people."""
        promised = [path for path in self.paths if path.promised]
        hold, declined = sum(p.exact for p in promised), sum(p.declined for p in promised)
        found = [f"{hold} of {len(promised)} promises hold"] if promised else []
        if declined:
            found.append(f"{declined} refused")
        others = [path for path in self.paths if not path.promised and path.refused is None]
        if others:
            differ, tokens = (
                sum(getattr(p, name) for p in others) for name in ("tokens_differ", "tokens")
            )
            found.append(f"{differ} of {tokens} tokens differ where rounding may")
        precision = self.quantized or self.dtype
        date = str(self.provenance.get("date", ""))[:10]
        at = f"thresholds {self.thresholds}" if self.thresholds else "no thresholds"
        where = f"{self.engine}, {precision} on {self.device}, {at}, {date}"
        text = f"{'; '.join(found) or 'nothing was compared'} ({where})"
        return printable(text)


@dataclass(frozen=True)
class Certificate:
    """The runs of `offramp verify` on an adapter's exits."""

    runs: Sequence[Run] = ()

    def with_run(self, run: Run) -> Certificate:
        """Return the certificate with a run, which replaces the earlier one of the same engine,
        precision and device."""
        return Certificate([*(r for r in self.runs if r.where != run.where), run])

    def of_exits(self, digest: str | None) -> Certificate | None:
        """Return the runs on exits with this SHA-256; None without any."""
        runs = [run for run in self.runs if run.exits == digest]
        return Certificate(runs) if runs else None

    def write(self, path: str | Path) -> None:
        """Write the certificate to a file, whole or not at all. Raise `StorageError` where that
        fails."""
        runs = [run.to_json() for run in self.runs]
        write_json(path, {"runs": runs, "digest": digest_rows(runs)})

    @classmethod
    def read(cls, path: str | Path) -> Certificate:
        """Return the certificate that `write` wrote.

        Raises:
            DataError: the file is damaged, or was changed. StorageError: it cannot be read.
        """
        try:
            content = read_json(path, largest=_LARGEST, unique=True)
        except DataError as error:
            raise DataError(error.problem, _AGAIN) from error
        try:
            if content["digest"] != digest_rows(content["runs"]):
                raise ValueError("its digest does not fit")
            return cls(schema.shaped(content["runs"], list[Run]))
        except (TypeError, KeyError, ValueError) as error:
            said = str(error) if isinstance(error, ValueError) else "an entry is missing, or odd"
            raise DataError(f"{path} is no certificate: {said.rstrip('.')}.", _AGAIN) from error


# -- for people ------------------------------------------------------------------------------------

NOT_FINITE = 1e308
"""Stands for a difference that is NaN or infinite, which JSON does not have."""
COLUMNS = ("path", "held to", "tokens", "differ", "largest difference", "exact")


def rows(paths: Iterable[PathResult]) -> list[tuple[str, ...]]:
    """Return the cells of a table, by `COLUMNS`, for each path."""
    return [(p.path, p.against, str(p.tokens), _differing(p), _apart(p), _exact(p)) for p in paths]


def _differing(path: PathResult) -> str:
    answers = f" in {path.answers_differ} of {path.answers} answers" if path.tokens_differ else ""
    return f"{path.tokens_differ}{answers}"


def _apart(path: PathResult) -> str:
    parts = (("logits", path.logits_apart), ("scores", path.scores_apart))
    told = [f"{name} {_amount(value)}" for name, value in parts if value is not None]
    return ", ".join(told) or "-"


def _amount(value: float) -> str:
    return f"{value:.1e}" if value < NOT_FINITE else "missing on one side"


def _exact(path: PathResult) -> str:
    if path.refused is not None:
        return f"refused: {path.refused}"
    return "yes" if path.exact else "NO" if path.promised else "no (rounding)"


def finite(value: float) -> float:
    """Return a number as JSON allows it: NaN and infinity become the largest float."""
    return value if math.isfinite(value) else NOT_FINITE
