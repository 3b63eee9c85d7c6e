"""A request inside an engine, and when what happened to it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from offramp.core.decoding.sequence import Token
from offramp.serving.request import Completion, Handle, Request


@dataclass(eq=False)
class Job:
    """A streamer's stand-in, which notes times and passes tokens on to the request's own streamer.

    clock: returns seconds. started: when its prompt's turn came. tokens: the time of each. ids: of
    its prompt, once that was read.
    """

    handle: Handle
    clock: Callable[[], float]
    submitted: float = field(init=False)
    started: float = 0.0
    tokens: list[float] = field(default_factory=list)
    ids: Any = None

    def __post_init__(self) -> None:
        self.submitted = self.clock()

    def put(self, value: Any) -> None:
        if self.handle.request.streamer is not None:
            self.handle.request.streamer.put(value)

    def settled(self, place: int, token: int, depth: int, score: float) -> None:
        """Note the token at a place of the answer, and pass it on."""
        self.tokens.append(self.clock())
        if self.handle.request.streamer is not None:
            import torch  # which streamers are of

            self.handle.request.streamer.put(torch.tensor([token]))
        if self.handle.request.on_token is not None:
            self.handle.request.on_token(Token(token, depth, score))

    def end(self) -> None:
        if self.handle.request.streamer is not None:
            self.handle.request.streamer.end()

    def finish(self, tokens: Sequence[Token], output: Any, *, early_exit: bool) -> None:
        """Complete the request with its answer. output: as of `Completion`. early_exit: whether its
        tokens might exit."""
        begin, times = self.submitted, self.tokens
        self.handle.set_result(
            Completion(
                tuple(tokens),
                output,
                early_exit,
                self.started - begin,
                times[0] - begin,
                self.clock() - begin,
                tuple(b - a for a, b in pairwise(times)),
            )
        )


class Jobs:
    """A queue in order of arrival, however long an image takes to open. clock: returns seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self._queue: deque[Job] = deque()

    def add(self, request: Request | Handle) -> Handle:
        """Queue a request; any thread may. The answer comes in later rounds."""
        handle = request if isinstance(request, Handle) else Handle(request)
        place = len(self._queue)
        while place and self._queue[place - 1].handle.arrival > handle.arrival:
            place -= 1
        self._queue.insert(place, Job(handle, self.clock))
        return handle

    @property
    def waiting(self) -> int:
        """The number of requests in the queue."""
        return len(self._queue)

    @property
    def queued(self) -> set[Handle]:
        """Return the jobs in the queue; for the thread that makes the rounds."""
        return {job.handle for job in self._queue}

    @property
    def running(self) -> int:
        """The number of requests being answered."""
        return len(self._seated)

    @property
    def idle(self) -> bool:
        """Return True if no request is waiting or running."""
        return not self._queue and not self.running

    def cancel_all(self) -> None:
        """Cancel all requests; the next round, or token, drops them."""
        for job in [*self._seated, *self._queue]:
            job.handle.cancel()

    @property
    def _seated(self) -> list[Job]:
        """The jobs that are being written."""
        raise NotImplementedError

    def _drop_unwanted(self) -> None:
        for job in [job for job in self._queue if job.handle.unwanted]:
            self._queue.remove(job)
            job.handle.drop()


class Steps:
    """A streamer that gets every token with its depth and score.

    Raises `CancelledError` out of the generation once its request was cancelled.
    """

    def __init__(self, job: Job, pause: Callable[[], None]) -> None:
        self._job, self._pause = job, pause
        self.end = job.end

    def put(self, value: Any) -> None:
        """Pass on the prompt's ids [1, T]; tokens come with their depths, in `step`."""
        if value.dim() > 1:
            self._job.put(value)

    def step(self, tokens: Any, depths: Any, scores: Any) -> None:
        """Pass on one row's token [1], with its depth and score."""
        self._job.settled(-1, int(tokens[0]), int(depths[0]), float(scores[0]))
        self._pause()
        if self._job.handle.unwanted:
            raise CancelledError


def tokens_of(output: Any) -> list[Token]:
    """Return the tokens of the only row of a `GenerationOutput`."""
    columns = (output.new_tokens, output.depths, output.scores)
    return [*map(Token, *(each[0].tolist() for each in columns))]
