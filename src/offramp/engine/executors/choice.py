"""Which executor runs a backbone: slots where they are exact, else the model's own stack."""

from __future__ import annotations

from collections.abc import Sequence

from offramp.engine.decoding.executor import Executor
from offramp.engine.executors.slots.executor import SlotExecutor
from offramp.engine.executors.stack import StackExecutor
from offramp.errors import UnsupportedBackboneError
from offramp.models.backbone import Backbone
from offramp.models.exits import ExitSet


def executor_for(
    backbone: Backbone,
    exits: ExitSet | None,
    depths: Sequence[int],
    *,
    slots: int,
    kv: str = "recompute",
    watches: bool = False,
) -> Executor:
    """The executor of a backbone.

    slots: sequences at a time. kv: as of `ExitPolicy`. watches: whether scores read the state
    before an exit's entry.
    """
    if kv == "propagate":
        return StackExecutor(backbone, exits, depths, propagate=bool(depths), watches=watches)
    if not backbone.sharded and not backbone.rare_layers and not backbone.reads_ids:
        try:
            return SlotExecutor(backbone, exits, depths, slots=slots, watches=watches)
        except UnsupportedBackboneError:
            pass
    return StackExecutor(backbone, exits, depths, watches=watches)
