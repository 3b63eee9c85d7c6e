"""How processes that split a backbone's weights share the work of recording what it makes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import distributed, nn

from offramp.core.models.sharding import device_of, is_dtensor, is_fsdp, is_split

T = TypeVar("T")


@contextmanager
def in_step(layers: Sequence[Any]) -> Iterator[None]:
    """Keep processes with different numbers of decoder passes together: FSDP2 gathers each layer
    with all processes, so those that are done go on gathering until all are."""
    units = [layer for layer in layers if is_fsdp(layer)]
    if not units:
        yield
        return

    def working(count: int) -> int:
        flag = torch.tensor(count, device=device_of(units[0]))
        distributed.all_reduce(flag)
        return int(flag)

    hook = units[0].register_forward_pre_hook(lambda *_: working(1) and None, prepend=True)
    try:
        yield
    finally:
        hook.remove()
    while working(0):
        for unit in units:
            unit.unshard()
            unit.reshard()


@dataclass(frozen=True)
class Share:
    """A process's part of the data. Processes that split each layer's weights read the same
    batches.

    count, index: number of parts, and the place of this one, from 0. group: the processes with this
    part.
    """

    count: int = 1
    index: int = 0
    group: tuple[int, ...] = (0,)

    @classmethod
    def of(cls, model: nn.Module, processes: int, rank: int) -> Share:
        """Return the share of process `rank` of `processes`."""
        group = _tensor_group(model) or (rank,)
        if len(group) == 1:
            return cls(processes, rank, group)
        groups = sorted(set(_all(group)))
        return cls(len(groups), groups.index(group), group)

    @property
    def leads(self) -> bool:
        """Return True if this process writes on behalf of its group."""
        return len(self.group) == 1 or distributed.get_rank() == self.group[0]

    def of_group(self, value: T) -> list[T]:
        """Return the values of all processes of the group."""
        if len(self.group) == 1:
            return [value]
        everyone = _all(value)
        return [everyone[rank] for rank in self.group]


def of_all(model: nn.Module, value: T) -> list[T]:
    """Return the values of all processes that hold a part of the model."""
    return _all(value) if is_split(model) else [value]


def _all(value: T) -> list[T]:
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, value)
    return found


def _tensor_group(model: nn.Module) -> tuple[int, ...]:
    """The processes that compute each layer together with this one; (): it computes alone."""
    for parameter in model.parameters():
        if is_dtensor(parameter):
            mesh: Any = parameter.device_mesh  # type: ignore[attr-defined]
            if mesh.ndim > 1 or any(map(is_fsdp, model.modules())):  # those of FSDP2 hold weights
                mesh = mesh["tp"] if "tp" in (mesh.mesh_dim_names or ()) else None
            if mesh is not None:
                return tuple(mesh.mesh.flatten().tolist())
    return ()
