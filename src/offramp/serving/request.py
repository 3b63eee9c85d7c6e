"""What a client asks of an engine, and what it holds until the answer is there."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from offramp.core.decoding.policy import MODES
from offramp.core.decoding.sequence import Token
from offramp.core.errors import InputError, check_known

OnToken = Callable[[Token], None]


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt and how to answer it.

    inputs: what the processor returned for it, one row, or what else the engine takes. mode: one of
    `MODES`; None: the adapter's own policy. thresholds: by depth, instead of the policy's; early
    exit only. point: of the calibrated path, that the prompt's kind is answered by
    (`offramp.core.decoding.policy.ExitPolicy.moved`); None: that of all. seed: which sample, where
    tokens are sampled; None: any. streamer, on_token: get the prompt's ids and each token's, or
    each token with its depth and score; they run in the engine's thread and must be quick. options:
    Hugging Face's generation options, or what else the engine takes. salt: what is kept of it is
    found by requests of the same salt alone; None: by all that have none.

    Raises:
        InputError: an unknown mode, thresholds in another mode than early exit.
    """

    inputs: Mapping[str, Any]
    mode: str | None = None
    thresholds: Mapping[int, float] | None = None
    seed: int | None = None
    streamer: Any = None
    on_token: OnToken | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    salt: str | None = None
    point: Mapping[int, float] | None = None

    def __post_init__(self) -> None:
        if self.mode is not None:
            check_known("Mode", [self.mode], MODES)
        if self.thresholds is not None and self.mode not in (None, "early_exit"):
            raise InputError(
                f"Thresholds were given to a request in {self.mode} mode.",
                "Leave them out, or use mode='early_exit'.",
            )


@dataclass(frozen=True)
class Completion:
    """An answer, and how long it took.

    tokens: with their depths and scores. output: what `generate` would return for the request
    alone; of an engine without PyTorch None. early_exit: whether its tokens may
    have exited; False where the full model's were given, asked for or not. queued, first, total:
    seconds from submission to the prompt's turn, to the first token, and to the last. gaps: seconds
    between its tokens.
    """

    tokens: tuple[Token, ...]
    output: Any
    early_exit: bool
    queued: float
    first: float
    total: float
    gaps: tuple[float, ...]


_arrivals = itertools.count()


class Handle(Future[Completion]):
    """The future answer to a request. `cancel` also stops one that is being written.

    arrival: larger than that of every handle that was made before.
    """

    def __init__(self, request: Request) -> None:
        super().__init__()
        self.request = request
        self.arrival: int = next(_arrivals)
        self._stop = threading.Event()

    def cancel(self) -> bool:
        """Cancel the request; its slot is free within a round. False where it was over already."""
        if self.done():
            return self.cancelled()
        self._stop.set()
        return True

    @property
    def unwanted(self) -> bool:
        """Return True if its end was asked for."""
        return self._stop.is_set()

    def drop(self) -> None:
        """End the request without an answer: waiters get `concurrent.futures.CancelledError`."""
        super().cancel()
        self.set_running_or_notify_cancel()
