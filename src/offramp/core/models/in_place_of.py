"""What stands in a module's place in a twin of a model, and looks like the module."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn import Parameter


class InPlaceOf(nn.Module):
    """A module that is called in the place of another; a subclass defines the call.

    Models ask a module for its signature, parameters, precision, device and other attributes: all
    of these are the original module's. The original and its parameters are not registered here.
    """

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.__dict__["_own"] = own  # past nn.Module's registration

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_own"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        own = self.__dict__.get("_own")
        if own is None or name in self.__dict__:
            super().__setattr__(name, value)
        else:  # a model may hand a layer what it is to read, as its `vis`
            setattr(own, name, value)

    @property
    def forward(self) -> Callable[..., Any]:  # type: ignore[override]
        """Return the call, with the original module's signature."""
        return with_signature(self.__call__, self.__dict__["_own"])

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        return self._own.parameters(recurse)  # type: ignore[no-any-return]

    def named_parameters(self, *args: Any, **kw: Any) -> Iterator[tuple[str, Parameter]]:
        return self._own.named_parameters(*args, **kw)  # type: ignore[no-any-return]

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        return self._own.buffers(recurse)  # type: ignore[no-any-return]

    def named_buffers(self, *args: Any, **kw: Any) -> Iterator[tuple[str, Tensor]]:
        return self._own.named_buffers(*args, **kw)  # type: ignore[no-any-return]


def with_signature(call: Callable[..., Any], own: nn.Module) -> Callable[..., Any]:
    """Return a call that `inspect.signature` takes for the original module's `forward`."""

    @functools.wraps(own.forward)
    def forward(*args: Any, **kw: Any) -> Any:
        return call(*args, **kw)

    return forward
