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
    """Return an executor of one of `EXECUTORS`.

    engine: None: the executor that was found exact for the backbone, or that can hold it.
    own_frequencies: whether the prompt has rotary frequencies of its own
    (`Backbone.has_own_frequencies`); slots hold no such prompt. slots: sequences at a time. limit:
    as of `SlotExecutor`. more: as of `SegmentRunner`.

    Raises:
        UnsupportedBackboneError: slots, of a model that they cannot hold; exact batches, of one
            that slots do not run.
    """
    asked = engine or backbone.engine
    if asked != "stack" and not (engine is None and own_frequencies):
        try:
            return _slots(backbone, exits, depths, slots=slots, limit=limit, **more)
        except UnsupportedBackboneError:
            if asked is not None or backbone.decoding.exact_batches:
                raise
    if backbone.decoding.exact_batches:
        raise UnsupportedBackboneError(
            f"Exact batches are of slots, and {backbone.name} is run by its own stack.",
            "Leave exact batches out: answers then differ by rounding alone.",
        )
    from offramp.core.executors.stack import StackExecutor  # few models need it

    return StackExecutor(backbone, exits, depths, **more)


def _slots(backbone: Backbone, *made_of: Any, **more: Any) -> SlotExecutor:
    if backbone.sharded or backbone.rare_layers or backbone.reads_ids:
        raise UnsupportedBackboneError(
            f"{backbone.name} does not run in slots: its layers are of several kinds, on several "
            "devices, or read the tokens again.",
            "Its own stack runs it, a sequence at a time.",
        )
    return SlotExecutor(backbone, *made_of, **more)
