"""Kinds of exit by name. Names need no PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offramp.core.plugins import check_registered, offered

if TYPE_CHECKING:
    from torch import nn

    from offramp.core.models.backbone import Backbone

BUILT_IN = ("layer", "drafting", "lens")
"""Kinds that `offramp.core.models.exits` registers."""


@dataclass(frozen=True)
class ExitKind:
    """A kind of exit, and how it is built.

    build: from the backbone, the depth and the indices of the exit's own cache entries, a module
        that is called as a decoder layer is: `module(hidden, *args, **kw)`, hidden [B, T, D], with
        that layer's mask, positions and cache; it returns the estimate [B, T, D] of the final
        state, alone or first in a tuple.
    entries: cache entries of its own, one for each layer in it that attends.
    """

    build: Callable[[Backbone, int, Sequence[int]], nn.Module]
    entries: int = 1


EXIT_KINDS: dict[str, ExitKind] = {}
"""By name, those that are registered; see `exit_kind`."""


def kinds_of_exit() -> tuple[str, ...]:
    """Return all names, the built-in ones first."""
    return tuple(dict.fromkeys((*BUILT_IN, *EXIT_KINDS, *offered("exits"))))


def exit_kind(name: str) -> ExitKind:
    """Return the kind with this name. Raise `InputError` if there is none."""
    check_registered("Kind of exit", "exits", name, lambda: EXIT_KINDS)
    return EXIT_KINDS[name]
