"""What a batch engine writes with: what reads prompts, runs the layers and asks the exits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

from offramp.adapter.runtime import Runtime
from offramp.core.decoding.executor import Executor
from offramp.core.decoding.plan import Plan
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.decoding.reader import PrefillBackend, TokenSampler
from offramp.core.decoding.sequence import Sequence
from offramp.serving.request import Request

if TYPE_CHECKING:
    from offramp.adapter.adapter import Adapter
    from offramp.features.vision_cache import VisionCache


class OnSettled(Protocol):
    """A listener for each token that can no longer change: its place in the answer, id, depth and
    score."""

    def __call__(self, place: int, token: int, depth: int, score: float) -> None: ...


@dataclass(frozen=True, eq=False)
class Opened:
    """A request whose prompt will be read.

    reader: reads `given` into the host's executor, as a prompt with `columns` columns. sampler: of
    the answer. longest: tokens of the answer; 0: unknown. ids: of the prompt.
    """

    reader: PrefillBackend
    given: Any
    sampler: TokenSampler
    longest: int
    ids: Any


CheckRoom = Callable[[int, int], None]
"""Raises `InputError` where so many tokens of a prompt and its answer do not fit a slot."""


class Host(Protocol):
    """The layers of one engine, in PyTorch or in a runtime. plan: by which it writes answers."""

    plan: Plan

    def executor(self) -> Executor:
        """Return an executor without any prompt."""
        ...

    def renew(self, request: Request) -> bool:
        """Make a new plan if the model has changed; return True if so, with another executor.
        Called while no answer is being written."""
        ...

    def stale(self, request: Request) -> bool:
        """Return True where the model has changed since the plan was made."""
        ...

    def alone(self, request: Request, streamer: Any, check_room: CheckRoom) -> Any:
        """Return the answer of a request that cannot share the slots, as `output` does; None: it
        can. streamer: gets its tokens."""
        ...

    def tokens(self, request: Request) -> int:
        """Return the number of the prompt's tokens that take columns of a slot.

        Raises:
            InputError: the request is not one prompt for one answer.
        """
        ...

    def positions(self, prompt: int) -> int | None:
        """Return the most tokens of this prompt and its answer, by the model's positions; None: no
        limit."""
        ...

    def open(self, request: Request, on_token: OnSettled) -> Opened:
        """Prepare a request's prompt and the rules of its answer."""
        ...

    def output(self, ids: Any, sequence: Sequence) -> Any:
        """Return the result of `generate` for the request alone. ids: of the prompt."""
        ...


class BatchRuntime(Runtime, Protocol):
    """A runtime whose rows are answers of a batch engine, each to its prompt in its own mode."""

    adapter: Adapter

    @property
    def context(self) -> int:
        """The most tokens of a prompt and its answer."""
        ...

    def host(self, policy: ExitPolicy, vision_cache: VisionCache | None = None) -> Host:
        """Return the host of the one engine that uses this runtime from now on."""
        ...


def is_runtime(model: Any) -> TypeGuard[BatchRuntime]:
    """Return True if a model is a `BatchRuntime` with several rows."""
    return hasattr(model, "host") and model.rows > 1
