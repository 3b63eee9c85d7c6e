"""Keys and values alone of a layer, without the rest of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class _KeysStored(Exception):
    """Raised out of a layer once its keys and values are in the cache."""


def store_keys(
    cache: Any, layer: nn.Module, hidden: Tensor, args: tuple[Any, ...], kw: dict[str, Any]
) -> None:
    """Run a layer no further than until its keys and values are in `cache`."""
    own = getattr(cache, "self_attention_cache", cache)
    store = own.update

    def store_and_stop(*a: Any, **k: Any) -> None:
        store(*a, **k)
        raise _KeysStored

    own.update = store_and_stop
    try:
        layer._call_impl(hidden, *args, **kw)  # type: ignore[no-untyped-call]
    except _KeysStored:
        pass
    finally:
        del own.update  # the instance attribute; the method shows again
