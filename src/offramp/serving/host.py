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
    """Is told a token that can no longer change: its place in the answer, id, depth and score."""

    def __call__(self, place: int, token: int, depth: int, score: float) -> None: ...


@dataclass(frozen=True, eq=False)
class Opened:
    """A request whose prompt is to be read.

    reader: reads `given` into the host's executor, as a prompt that has `columns`. sampler: of the
    answer. longest: tokens of the answer; 0: not known. ids: of the prompt.
    """

    reader: PrefillBackend
    given: Any
    sampler: TokenSampler
    longest: int
    ids: Any


CheckRoom = Callable[[int, int], None]
"""Raises `InputError` where so many tokens of a prompt and its answer do not fit a slot."""


class Host(Protocol):
    """The layers of one engine, in PyTorch or in a runtime. plan: by which answers are written."""

    plan: Plan

    def executor(self) -> Executor:
        """Return what runs the layers, no prompt being there."""
        ...

    def renew(self, request: Request) -> bool:
        """Make the plan anew where the model is not what it was made of; True where that was so,
        and its executor is another. Nothing is being written then."""
        ...

    def stale(self, request: Request) -> bool:
        """Return True where the model is not what the plan was made of."""
        ...

    def alone(self, request: Request, streamer: Any, check_room: CheckRoom) -> Any:
        """Return the answer of a request that is not written beside others, as `output` does; None:
        it is. streamer: is told of its tokens."""
        ...

    def tokens(self, request: Request) -> int:
        """Return the prompt's tokens, as far as they take columns of a slot.

        Raises:
            InputError: the request is not one prompt for one answer.
        """
        ...

    def positions(self, prompt: int) -> int | None:
        """Return the longest prompt and answer that the model has positions for; None: any."""
        ...

    def open(self, request: Request, on_token: OnSettled) -> Opened:
        """Prepare a request's prompt and the rules of its answer."""
        ...

    def output(self, ids: Any, sequence: Sequence) -> Any:
        """Return what `generate` would return for the request alone. ids: of the prompt."""
        ...


class BatchRuntime(Runtime, Protocol):
    """A runtime whose rows are answers of a batch engine, each to a prompt in its own mode."""

    adapter: Adapter

    @property
    def context(self) -> int:
        """Tokens of a prompt and its answer."""
        ...

    def host(self, policy: ExitPolicy, vision_cache: VisionCache | None = None) -> Host:
        """Return the host of the one engine that it decodes for from here on."""
        ...


def is_runtime(model: Any) -> TypeGuard[BatchRuntime]:
    """Return True if a model is one, several at a time."""
    return hasattr(model, "host") and model.rows > 1
