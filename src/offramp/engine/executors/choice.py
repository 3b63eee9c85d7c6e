"""Which executor runs a backbone: slots where they are exact, else the model's own stack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from offramp.engine.decoding.executor import Executor
from offramp.engine.drafter import Drafter
from offramp.engine.executors.slots.executor import SlotExecutor
from offramp.engine.executors.stack import StackExecutor
from offramp.errors import UnsupportedBackboneError
from offramp.models.backbone import Backbone
from offramp.models.exits import ExitSet

EXECUTORS = ("slots", "stack")
"""In the order in which they are tried."""


def executor_for(
    backbone: Backbone,
    exits: ExitSet | None,
    depths: Sequence[int],
    *,
    longest: int = 0,
    **settings: Any,
) -> Executor:
    """The executor that a backbone was found to be exact by.

    longest: tokens that the longest prompt may have; slots hold none that is read by frequencies of
    its own (`Backbone.room`). settings: as of `make_executor`.
    """
    engine = backbone.engine or "slots"
    if backbone.room(longest) != backbone.room(0):
        engine = "stack"
    return make_executor(engine, backbone, exits, depths, **settings)


def make_executor(
    engine: str,
    backbone: Backbone,
    exits: ExitSet | None,
    depths: Sequence[int],
    *,
    slots: int,
    limit: int | None = None,
    watches: bool = False,
    drafter: Drafter | None = None,
) -> Executor:
    """An executor of one of `EXECUTORS`.

    slots: sequences at a time. limit: as of `SlotExecutor`. watches: whether scores read the state
    before an exit's entry. drafter: of the exit that drafts on, one of `depths`.

    Raises:
        UnsupportedBackboneError: slots, of a model that they cannot hold; exact batches, of one
            that slots do not run.
    """
    if engine == "stack":
        if backbone.decoding.exact_batches:
            raise UnsupportedBackboneError(
                f"Exact batches are of slots, and {backbone.name} is run by its own stack.",
                "Leave exact batches out: answers then differ by rounding alone.",
            )
        return StackExecutor(backbone, exits, depths, watches=watches, drafter=drafter)
    if backbone.sharded or backbone.rare_layers or backbone.reads_ids:
        raise UnsupportedBackboneError(
            f"{backbone.name} does not run in slots: its layers are of several kinds, on several "
            "devices, or read the tokens again.",
            "Its own stack runs it, a sequence at a time.",
        )
    return SlotExecutor(
        backbone, exits, depths,
        slots=slots, limit=limit, watches=watches, drafter=drafter,
    )  # fmt: skip
