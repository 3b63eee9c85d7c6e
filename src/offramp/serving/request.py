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

    inputs: of the processor, one row, or of another kind that the engine takes. mode: one of
    `MODES`; None: the adapter's own policy. thresholds: by depth, instead of the policy's; early
    exit only. point: of the calibrated path, for the prompt's kind
    (`offramp.core.decoding.policy.ExitPolicy.moved`); None: the common one. seed: of sampled
    tokens; None: any. streamer, on_token: get the prompt's ids and each token's, or each token with
    its depth and score; they run in the engine's thread and must be quick. options: Hugging Face's
    generation options, or others of the engine. salt: cache entries of this request are found only
    by requests with the same salt; None: by all without a salt.

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
    """An answer, with its timing.

    tokens: with their depths and scores. output: the result of `generate` for the request alone;
    None from an engine without PyTorch. early_exit: whether its tokens may have exited; False where
    the full model answered, asked for or not. queued, first, total: seconds from submission to the
    prompt's turn, to the first token, and to the last. gaps: seconds between its tokens.
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
    """The future answer to a request. `cancel` also stops a running one.

    arrival: a number that grows from handle to handle.
    """

    def __init__(self, request: Request) -> None:
        super().__init__()
        self.request = request
        self.arrival: int = next(_arrivals)
        self._stop = threading.Event()

    def cancel(self) -> bool:
        """Cancel the request; its slot is free within a round. Return False where it was over
        already."""
        if self.done():
            return self.cancelled()
        self._stop.set()
        return True

    @property
    def unwanted(self) -> bool:
        """Return True if the request was cancelled."""
        return self._stop.is_set()

    def drop(self) -> None:
        """End the request without an answer: waiters get `concurrent.futures.CancelledError`."""
        super().cancel()
        self.set_running_or_notify_cancel()
