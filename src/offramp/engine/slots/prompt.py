"""Reads prompts one at a time, as Hugging Face prepares them, for rows of a slot cache.

`generate` of the model itself checks the options and makes the logits processors, the stopping
criteria and the cache; the prompt then runs at full depth, the exits storing their keys along. A
long one runs in chunks, the cache growing, so that others need not wait for all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offramp.engine.generate import check_inputs, check_options
from offramp.engine.kv_cache import add_exit_entries, store_exit_keys
from offramp.engine.prefill import Prefill, Prepared, prepare
from offramp.engine.prefix_cache import PrefixCache, can_shorten
from offramp.engine.slots.runner import States
from offramp.errors import InputError
from offramp.models.backbone import Backbone, LayerCall
from offramp.models.exits import Exits, ExitSet
from offramp.models.intercept import InterceptedModel
from offramp.models.vision_cache import VisionCache


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt that was run, and the rules for what follows it.

    prepared: its token ids [1, T], processors, criteria and configuration. cache: keys and values
    of the layers, and of the exits behind them. positions: its position ids [..., 1, T], or None.
    real: which of its columns [T] are no padding. logits: of the first token [1, V], at full depth.
    looks: what the exits made of the first token; empty where they may not say it.
    """

    prepared: Prepared
    cache: Any
    positions: Tensor | None
    real: Tensor | None
    logits: Tensor
    looks: States


class PromptReader:
    """The layer handler of prompts; not for two threads at once.

    depths: of the exits in use. vision_cache, prefix_cache: as in `generate`. first_may_exit: let
    the exits look at the first token, as `first_token_may_exit` has it; behind an encoder they
    always do. chunk: tokens that are run at once, where the prompt is causal and nothing but tokens
    and positions go with it; None: all. between: called before each of several chunks, the vision
    tower having run.
    """

    def __init__(
        self,
        backbone: Backbone,
        exits: ExitSet | Exits | None,
        depths: Sequence[int],
        *,
        vision_cache: VisionCache | None = None,
        prefix_cache: PrefixCache | None = None,
        first_may_exit: bool = False,
        chunk: int | None = None,
        between: Callable[[], None] = lambda: None,
    ) -> None:
        self.backbone, self.exits = backbone, exits
        self.intercepted = InterceptedModel(backbone, self)
        if chunk is not None and backbone.family.causal_prompt and not backbone.is_encoder_decoder:
            self._chunk, self._between = chunk, between
            self._run_stack = self.intercepted.stack.forward
            self.intercepted.stack.forward = self._in_chunks
        if vision_cache is not None:
            self.intercepted.remember_images(backbone, vision_cache)
        self._prefix_cache = prefix_cache
        self._looks_at_first = backbone.is_encoder_decoder or first_may_exit
        self._depths = tuple(depths)
        self.exits_on: tuple[int, ...] = ()
        self.cache: Any = None
        self._looks: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._before: Tensor | None = None

    def read(
        self, inputs: Mapping[str, Any], options: Mapping[str, Any], *, use_exits: bool
    ) -> Prompt:
        """Run one prompt. inputs: what the processor returned for it; options: as of `generate`.

        use_exits: whether the exits store their keys, and look at a decoder's first token.

        Raises:
            InputError: more than one row, options that rows of a batch cannot have.
        """
        config = options.get("generation_config")
        asked = {**inputs, **{name: v for name, v in options.items() if v is not None}}
        check_options(lambda name: asked.get(name, getattr(config, name, None)))
        check_inputs(inputs, self.intercepted.model)
        if asked.get("num_return_sequences", 1) != 1:
            raise InputError(
                f"A request is one row, and num_return_sequences={asked['num_return_sequences']} "
                "asks for several.",
                "Submit it as often as answers are wanted, each with a seed of its own.",
            )
        if len(inputs["input_ids"]) != 1:
            raise InputError(
                f"A request of {len(inputs['input_ids'])} rows was submitted.",
                "Submit each prompt as a request of its own.",
            )
        self.exits_on = self._depths if use_exits else ()
        self._looks = {}
        try:
            with torch.inference_mode():
                prepared = prepare(self.intercepted.model, inputs, **options)
                check_options(lambda name: getattr(prepared.config, name, None))
                return self._read(prepared)
        finally:
            self.cache, self._looks, self._before = None, {}, None

    def _read(self, prepared: Prepared) -> Prompt:
        self.cache = prepared.cache
        if self.exits_on and self.exits is not None:
            add_exit_entries(self.cache, self.exits.entries)
        served = None if self._prefix_cache is None else self._prefix_cache.serve(self)  # type: ignore[arg-type]
        prefill = Prefill(self.intercepted, prepared)
        if served is not None:
            served.end()
        real, mask = None, prepared.arguments.get("attention_mask")
        if not self.backbone.is_encoder_decoder and mask is not None:
            real = mask[0].bool()
        entries, exits, previous = (
            {depth: look[part] for depth, look in self._looks.items()} for part in range(3)
        )
        looks = States(prefill.logits, entries, exits, previous)
        return Prompt(prepared, self.cache, prefill.positions, real, prefill.logits, looks)

    def _in_chunks(self, *args: Any, **kw: Any) -> Any:
        """The stack's forward pass; what it returns is of the last chunk."""
        embeds, mask = kw.get("inputs_embeds"), kw.get("attention_mask")
        if (
            args
            or embeds is None
            or embeds.shape[1] <= self._chunk
            or not can_shorten(kw, self.cache)
        ):
            return self._run_stack(*args, **kw)
        past, total = int(self.cache.get_seq_length()), embeds.shape[1]
        for start in range(0, total, self._chunk):
            self._between()
            end = min(total, start + self._chunk)
            part = {**kw, "inputs_embeds": embeds[:, start:end]}
            if mask is not None:
                part["attention_mask"] = mask[:, : past + end]
            for name in ("position_ids", "cache_position"):
                if kw.get(name) is not None:
                    part[name] = kw[name][..., start:end]
            out = self._run_stack(**part)
        return out

    def layer(self, call: LayerCall) -> Any:
        """The layer's own output; before it, the exit that stands there."""
        newest = call.hidden[:, -1]
        if call.index in self.exits_on:
            assert self.exits is not None
            if self._looks_at_first:
                state = self.exits.run(call.index, call)
                assert self._before is not None
                self._looks[call.index] = (newest, state[:, -1], self._before)
            else:
                store_exit_keys(self.cache, self.exits, call)
        self._before = newest
        return call.run(call.layer)
