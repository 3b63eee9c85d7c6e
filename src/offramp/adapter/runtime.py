"""What generates for an adapter where PyTorch's decoder does not; imports no PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from offramp.core.decoding.policy import ExitPolicy, GenerationOutput


@runtime_checkable
class Runtime(Protocol):
    """An engine's model in an adapter's place, which generates without PyTorch's decoder.

    name: with all that changes its answers, such as the number format. rows: in one call, at most.
    """

    @property
    def name(self) -> str: ...

    @property
    def rows(self) -> int: ...

    def generate(
        self, inputs: Mapping[str, Any], *, policy: ExitPolicy | None = None, **options: Any
    ) -> GenerationOutput:
        """Generate as `Adapter.generate` does."""
        ...


@runtime_checkable
class Asked(Protocol):
    """An engine that reads images itself, such as a server's: it is asked by examples.

    name, rows: as of `Runtime`. drafts: whether it has the drafts of the adapter's exits.
    """

    @property
    def name(self) -> str: ...

    @property
    def rows(self) -> int: ...

    @property
    def drafts(self) -> bool: ...

    def answers(
        self, examples: Sequence[Any], policy: ExitPolicy | None, **options: Any
    ) -> list[Any]:
        """Return an `Answer` to each `Example`; arguments as of `generate_answers`."""
        ...
