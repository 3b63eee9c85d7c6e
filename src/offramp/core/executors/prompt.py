"""Reads prompts, as Hugging Face prepares them, for an executor to take over.

`generate` of the model itself checks the options and makes the logits processors, the stopping
criteria and the cache. The prompt then runs through the model's own stack, the exits storing their
keys along. Where every row's first token exits, it *waits* there: the layers above run over it when
a later token needs them. A long prompt runs in chunks, the cache growing, so that others
need not wait for all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from offramp.core.decoding.reader import Decide
from offramp.core.errors import InputError
from offramp.core.executors.bare import BareModules
from offramp.core.executors.kv_cache import (
    CACHE_NAMES,
    add_exit_entries,
    self_attention,
    store_exit_keys,
)
from offramp.core.executors.prefill import Prefill, Prepared, Use, itself, within_checked
from offramp.core.executors.segments import ExitOutput
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import ExitSet
from offramp.core.models.intercept import ImageMemory, InterceptedModel
from offramp.core.models.opened import LayerCall

_INPUTS = "inputs_embeds position_ids attention_mask input_ids cache_position"
_KNOWN = frozenset((*_INPUTS.split(), *CACHE_NAMES, "use_cache", "return_dict"))
"""Arguments of a stack that can be shortened; with others, every prompt is run whole."""


class PromptMemory(Protocol):
    """Keeps keys and values of prompts for later prompts with the same beginning."""

    def serving(self, run: Any) -> AbstractContextManager[Any]:
        """Serve kept keys and values to the reader `run` while it reads a prompt. Once the stack
        was called, `keeps` of the context says whether the prompt must run whole; None: not
        served."""
        ...


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt that was read, and the rules for its answer.

    prepared: its token ids [B, T], processors, criteria and configuration. cache: keys and values
    of the layers, and of the exits after them. prefill: arguments that later calls of the stack
    repeat. real: which columns [B, T] are no padding; None: all. encoder: the states of an encoder
    [B, S, D], and which of them are no padding. logits: of the first token [B, V], at full depth;
    None: the prompt waits. waits: the depth at whose exit the prompt waits (0: before the first
    layer), and the states [B, N, D] of its last columns that have yet to run the layers above;
    None: all ran. kept: the drafting exit's states [B, D] of each row's newest token, if they were
    to be kept.
    """

    prepared: Prepared
    cache: Any
    prefill: Prefill
    real: Tensor | None
    encoder: tuple[Tensor, Tensor | None] | None
    logits: Tensor | None
    waits: tuple[int, Tensor] | None
    kept: Tensor | None = None

    @property
    def positions(self) -> Tensor | None:
        """Position ids [..., B, T]; None where the stack takes none."""
        return self.prefill.positions

    @property
    def rows(self) -> int:
        return len(self.prepared.ids)

    @property
    def columns(self) -> int:
        """The number of columns T, padding included."""
        given = (self.prefill.prefill.get(name) for name in ("inputs_embeds", "input_ids"))
        entered = next((int(each.shape[1]) for each in given if each is not None), 0)
        return int(self_attention(self.cache).get_seq_length()) or entered


class PromptReader:
    """The layer handler of prompts; not for two threads at once.

    depths: of the exits in use. vision_cache: image features kept between calls. prefix_cache: keys
    and values of prompts kept between calls. chunk: tokens in one call of the stack, where the
    prompt is causal and consists of tokens and positions alone; None: all. between: called between
    two chunks, after the vision tower ran.
    """

    def __init__(
        self,
        backbone: Backbone,
        exits: ExitSet | None,
        depths: Sequence[int],
        *,
        vision_cache: ImageMemory | None = None,
        prefix_cache: PromptMemory | None = None,
        chunk: int | None = None,
        between: Callable[[], None] = lambda: None,
    ) -> None:
        self.backbone: Backbone = backbone
        self.exits: ExitSet | None = exits
        self._exits = {} if exits is None else exits.by_depth()
        self._entries = () if exits is None else exits.entries
        self.intercepted: InterceptedModel = InterceptedModel(backbone, self)
        if backbone.decoding.exact_batches:  # parts of a prompt are other sums than the whole
            chunk = prefix_cache = None
        self._chunk, self._between = chunk, between
        if chunk is not None and backbone.reads_in_parts:
            self._run_stack = self.intercepted.stack.forward
            self.intercepted.stack.forward = self._in_chunks
        if vision_cache is not None:
            self.intercepted.remember_images(backbone, vision_cache)
        self._serving: Callable[[], Any] = (
            nullcontext if prefix_cache is None else partial(prefix_cache.serving, self)
        )
        self._served: Any | None = None
        self._depths = tuple(depths)
        self.exits_on: tuple[int, ...] = ()
        self.cache: Any = None
        caller = type(self.intercepted.stack).forward.__module__
        self._instead = BareModules(caller) if backbone.decoding.lean else None
        self._decide: Decide | None = None
        self._asks: frozenset[int] = frozenset()
        self._last = True  # whether the newest token is in the current chunk
        self._before: Tensor | None = None
        self.waits: tuple[int, Tensor] | None = None
        """As of the `Prompt` that is being read."""
        self._keep: int | None = None
        self._opens = self._may_enter = self._enters = False
        self._kept: Tensor | None = None

    def prepare(self, inputs: Mapping[str, Any], options: Mapping[str, Any]) -> Prepared:
        """Return the request with which the model's own `generate` would begin, checked."""
        made: Prepared = self.within(inputs, options)[0]
        return made

    def within(
        self, inputs: Mapping[str, Any], options: Mapping[str, Any], use: Use = itself
    ) -> tuple[Any, Any]:
        """Do as `within_checked`, on the model whose layers ask this reader."""
        own, model = self.backbone.model, self.intercepted.model

        def here(prepared: Prepared) -> Any:  # a `generate` hung onto a model knows that alone
            return use(replace(prepared, model=model) if prepared.model is own else prepared)

        return within_checked(model, inputs, options, here)

    def read(
        self,
        prepared: Prepared,
        *,
        use_exits: bool = True,
        decide: Decide | None = None,
        asks: frozenset[int] = frozenset(),
        keep: int | None = None,
        waits: bool = False,
        enters: bool = False,
    ) -> Prompt:
        """Run a prompt of one or more rows; arguments as of `PrefillBackend.read`.

        Raises:
            InputError: longer than the backbone's positions; a cache that exits cannot share;
                several rows, where batches are to be exact.
        """
        if self.backbone.decoding.exact_batches and len(prepared.ids) > 1:
            raise InputError(
                f"Exact batches read prompts one at a time, and {len(prepared.ids)} rows came.",
                "Generate for each by itself, or submit each to a BatchEngine (offramp serve).",
            )
        self.exits_on = self._depths if use_exits else ()
        self._decide, self._asks, self.waits, self._last = decide, asks, None, True
        whole = self.backbone
        causal = whole.is_encoder_decoder or whole.family.causal_prompt
        self.cache, self._keep, self._opens = prepared.cache, keep, waits and causal
        self._may_enter, self._enters = enters, False
        try:
            with torch.inference_mode():
                return self._read(prepared)
        finally:
            self.cache = self._decide = self._before = self.waits = None
            self._keep = self._kept = self._served = None

    def _read(self, prepared: Prepared) -> Prompt:
        add_exit_entries(self.cache, self._entries if self.exits_on else (), self.backbone.depth)
        with self._serving() as self._served:
            prefill = Prefill(self.intercepted, prepared)
        mask, encoder = prepared.arguments.get("attention_mask"), None
        if self.backbone.is_encoder_decoder or "encoder_hidden_states" in prefill.prefill:
            states = prefill.prefill.get("encoder_hidden_states")
            if states is not None:
                encoder = states, prefill.prefill.get("encoder_attention_mask")
        if self.backbone.is_encoder_decoder:  # the other is the encoder's
            mask = prefill.prefill.get("attention_mask")
        real = mask.bool() if mask is not None and mask.dim() == 2 else None
        logits = prefill.logits if self.waits is None else None
        return Prompt(prepared, self.cache, prefill, real, encoder, logits, self.waits, self._kept)

    def _in_chunks(self, *args: Any, **kw: Any) -> Any:
        """The stack's forward pass; what it returns is of the last chunk."""
        embeds, mask = kw.get("inputs_embeds"), kw.get("attention_mask")
        assert self._chunk is not None
        if args or embeds is None or not can_shorten(kw, self.cache, self.backbone):
            return self._run_stack(*args, **kw)
        if embeds.shape[1] <= self._chunk:
            self._enters = self._may_enter and self._served is None
            return self._run_stack(**kw)
        past, total = int(self.cache.get_seq_length()), embeds.shape[1]
        for start in range(0, total, self._chunk):
            self._between()
            end = min(total, start + self._chunk)
            self._last = end == total
            part = part_of(kw, start, end)
            if mask is not None:
                part["attention_mask"] = mask[:, : past + end]
            out = self._run_stack(**part)
        return out

    def layer(self, call: LayerCall) -> Any:
        """Return the layer's own output; the exit before the layer is asked first."""
        if self.waits is not None:
            return self.backbone.skipped_layer_output(call)
        if self._enters:
            self.waits = 0, call.hidden
            return self.backbone.skipped_layer_output(call)
        here, newest, call.instead = self.backbone.here, call.hidden[:, -1], self._instead
        if call.index in self.exits_on:
            keeps = call.index == self._keep
            asks = self._decide is not None and call.index in self._asks
            if not self._last or not (keeps or asks):
                if self.backbone.is_encoder_decoder:  # an encoder's keys are made after its own
                    call.run(self._exits[call.index])
                else:
                    assert self.exits is not None
                    store_exit_keys(self.cache, self.exits, call)
            else:
                state = here(call.state(self._exits[call.index])[:, -1])
                if keeps:
                    self._kept, ends = state, self._opens and self._served is None
                else:
                    assert self._decide is not None
                    ends = self._decide(call.index, ExitOutput(here(newest), state, self._before))
                if ends and not (self._served is not None and self._served.keeps):
                    self.waits = call.index, call.hidden
                    return self.backbone.skipped_layer_output(call)
        self._before = here(newest)
        return call.run(call.layer)


def part_of(kw: dict[str, Any], start: int, end: int) -> dict[str, Any]:
    """Return a stack's call cut to the tokens from `start` up to, and without, `end`."""
    part = {**kw, "inputs_embeds": kw["inputs_embeds"][:, start:end]}
    for name in ("position_ids", "cache_position"):
        if kw.get(name) is not None:
            part[name] = kw[name][..., start:end]
    return part


def can_shorten(kw: dict[str, Any], cache: Any, backbone: Backbone) -> bool:
    """Return True if a stack's call on one row's embeddings can be cut to a part of its tokens."""
    if backbone.has_own_frequencies(kw["inputs_embeds"].shape[1]):
        return False  # a part would be read by other frequencies
    present = {name for name, value in kw.items() if value is not None}
    mask = kw.get("attention_mask")
    flat = mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)
    return flat and len(kw["inputs_embeds"]) == 1 and not present - _KNOWN and _plain(cache)


def _plain(cache: Any) -> bool:
    """Whether every entry of the cache holds all tokens."""
    from transformers.cache_utils import DynamicLayer

    return all(type(entry) is DynamicLayer for entry in getattr(cache, "layers", [None]))
