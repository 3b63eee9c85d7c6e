"""Which executor runs a backbone: slots where they are exact, else the model's own stack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from offramp.core.decoding.executor import Executor
from offramp.core.errors import UnsupportedBackboneError
from offramp.core.executors.slots.executor import SlotExecutor
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import ExitSet

EXECUTORS = ("slots", "stack")
"""In the order in which they are tried."""


def executor_for(
    backbone: Backbone,
    exits: ExitSet | None,
    depths: Sequence[int],
    *,
    engine: str | None = None,
    own_frequencies: bool = False,
    slots: int,
    limit: int | None = None,
    **more: Any,
) -> Executor:
    """An executor of one of `EXECUTORS`.

    engine: None: the one that the backbone was found to be exact by. own_frequencies: of a prompt
    (`Backbone.has_own_frequencies`); slots hold none that has.
    slots: sequences at a time. limit: as of `SlotExecutor`. more: as of `SegmentRunner`.

    Raises:
        UnsupportedBackboneError: slots, of a model that they cannot hold; exact batches, of one
            that slots do not run.
    """
    if engine is None:
        engine = "stack" if own_frequencies else backbone.engine or "slots"
    if engine == "stack":
        if backbone.decoding.exact_batches:
            raise UnsupportedBackboneError(
                f"Exact batches are of slots, and {backbone.name} is run by its own stack.",
                "Leave exact batches out: answers then differ by rounding alone.",
            )
        from offramp.core.executors.stack import StackExecutor  # few models need it

        return StackExecutor(backbone, exits, depths, **more)
    if backbone.sharded or backbone.rare_layers or backbone.reads_ids:
        raise UnsupportedBackboneError(
            f"{backbone.name} does not run in slots: its layers are of several kinds, on several "
            "devices, or read the tokens again.",
            "Its own stack runs it, a sequence at a time.",
        )
    return SlotExecutor(backbone, exits, depths, slots=slots, limit=limit, **more)
