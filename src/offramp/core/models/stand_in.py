"""What stands in a vision tower's place, where an inference engine runs the tower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

TORCH = "torch"


class StandIn(nn.Module):
    """A replacement of a vision tower. Thread-safe.

    name: of the tower's engine. tower: the model's own. beside: replacements of other modules, by
    their paths from the model.
    """

    name: str
    tower: nn.Module
    beside: Mapping[str, nn.Module]

    def __init__(
        self, name: str, tower: nn.Module, beside: Mapping[str, nn.Module] | None = None
    ) -> None:
        super().__init__()
        self.name, self.tower = name, tower
        self.__dict__["beside"] = beside or {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("tower"), name)
