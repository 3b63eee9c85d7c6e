"""Keys and values of one generation: Hugging Face's cache, with entries of the exits after it.

Every entry has a length of its own, so that layers which early exits skipped may lag behind. What
Hugging Face asks of a cache as a whole (lengths, masks) it reads from the first entry of each kind:
where other layers run than those, a stand-in is handed over that points at the right entries.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

from offramp.core.errors import InputError
from offramp.core.models.exits import Exits, ExitSet
from offramp.core.models.opened import LayerCall
from offramp.core.models.sharding import free

CACHE_NAMES = ("cache", "past_key_values")
"""A stack's argument for the cache: transformers 5.24 renamed the second to the first."""


def cache_name(arguments: Mapping[str, Any]) -> str:
    """Return the name, of `CACHE_NAMES`, under which a call's arguments hold the cache."""
    return next((name for name in reversed(CACHE_NAMES) if name in arguments), CACHE_NAMES[0])


def cache_parameter(stack: Any) -> str:
    """Return the parameter's name, of `CACHE_NAMES`, by which a stack takes the cache."""
    known = inspect.signature(type(stack).forward).parameters
    return next((name for name in CACHE_NAMES if name in known), CACHE_NAMES[1])


def self_attention(cache: Any) -> Any:
    """Return the self-attention cache: the whole cache, or an encoder-decoder's own part."""
    return getattr(cache, "self_attention_cache", cache)


def add_exit_entries(cache: Any, depths: Sequence[int], layers: int = 0) -> None:
    """Give the exits at `depths` entries of their own, after those of the layers, kind for kind.

    layers: L of the backbone.

    Raises:
        InputError: the cache is no empty dynamic one.
    """
    halves = [cache]
    if hasattr(cache, "cross_attention_cache"):
        halves = [cache.self_attention_cache, cache.cross_attention_cache]
    _check(halves)
    for half in halves:
        if depths:  # a cache made without a configuration grows when it is written to
            missing = range(len(half.layers), layers)
            half.layers.extend(DynamicLayer() for _ in missing)  # type: ignore[no-untyped-call]
        half.layers.extend(copy.deepcopy(half.layers[depth]) for depth in depths)
    if len(halves) == 2:
        cache.is_updated.update(dict.fromkeys(range(len(halves[0].layers)), False))


def _check(halves: Sequence[Any]) -> None:
    for half in halves:
        if not isinstance(half, DynamicCache) or half.offloading:
            raise InputError(
                f"KV cache {type(half).__name__} is not supported with exits.",
                "Leave cache_implementation unset (the dynamic cache).",
            )
        if any(map(_length, half.layers)):
            raise InputError(
                "A KV cache from an earlier call was passed in, which lacks the exits' entries.",
                "Pass the whole prompt and no cache.",
            )


def _length(entry: Any) -> int:
    """Tokens in an entry; 0 for one that keeps a state instead (convolution, linear attention)."""
    return int(entry.get_seq_length()) if hasattr(entry, "get_seq_length") else 0


def stand_in(
    cache: Any,
    layers: int,
    running: range,
    also: Sequence[int] = (),
    *,
    rare: Collection[int] = (),
    tokens: int = 0,
) -> Any:
    """Return a cache of the same entries, with lengths and masks as the layers `running` see them.

    layers: L of the backbone. also: entries of exits that run too. A layer that does not run is
    replaced by an entry of its kind that does run, or by an empty one of the right length. rare:
    layers whose keys are not of the text. tokens: tokens seen by the running layers, where none of
    them keeps keys.
    """
    own = self_attention(cache)
    entries = [own.layers[index] for index in (*running, *also) if index not in rare]
    seen_by_them = max(map(_length, entries), default=0) or tokens

    def entry_of(index: int) -> Any:
        if index in running:
            return own.layers[index]
        alike = (entry for entry in entries if type(entry) is type(own.layers[index]))
        return next(alike, None) or _blank(own.layers[index], seen_by_them)

    seen = Cache(layers=[entry_of(index) for index in range(layers)] + own.layers[layers:])
    if own is cache:
        return seen
    both = EncoderDecoderCache(seen, cache.cross_attention_cache)
    both.is_updated = cache.is_updated
    return both


def _blank(entry: Any, tokens: int) -> Any:
    """An entry of the same kind with this many tokens, for masks alone: no layer that runs writes
    to it."""
    made = copy.copy(entry)
    if hasattr(made, "get_seq_length"):
        made.keys = made.values = torch.zeros(1).expand(1, 1, tokens, 1)
        made.is_initialized = True
        if hasattr(made, "cumulative_length"):
            made.cumulative_length = tokens
    return made


def crop(cache: Any, tokens: Mapping[int, int]) -> None:
    """Remove the last tokens from cache entries, by index; sliding windows shrink."""
    for index, entry in enumerate(self_attention(cache).layers):
        # An exit that is off or keeps no keys never writes to its own.
        if index in tokens and _is_written(entry):
            entry.crop(-tokens[index])


def _is_written(entry: Any) -> bool:
    states = getattr(entry, "is_conv_states_initialized", {})
    return bool(getattr(entry, "is_initialized", False)) or any(states.values())


def croppable(cache: Any) -> bool:
    """Return True if tokens can be removed again from a cache that holds a prompt."""
    return not any(
        any(getattr(entry, "is_recurrent_states_initialized", {}).values())
        for entry in self_attention(cache).layers
    )


class _KeysStored(Exception):
    """Raised out of a layer once its keys and values are in the cache."""


def store_keys(cache: Any, module: nn.Module, call: LayerCall) -> None:
    """Run a layer or exit, uncompiled, only until its keys and values are in the cache."""
    own = self_attention(cache)
    store = own.update

    def store_and_stop(*a: Any, **k: Any) -> None:
        store(*a, **k)
        raise _KeysStored

    own.update = store_and_stop
    try:
        call.run(module._call_impl)
    except _KeysStored:
        pass
    finally:
        del own.update  # the instance attribute; the method shows again
        free(module)


def store_exit_keys(cache: Any, exits: ExitSet | Exits, call: LayerCall) -> None:
    """Fill the keys and values of the exit that stands before the called layer.

    All of an exit with several entries runs: the later ones read what the earlier layers make.
    """
    depth = call.index
    if exits.entries.count(depth) > 1:
        exits.run(depth, call)
    else:
        store_keys(cache, exits.at(depth), call)
