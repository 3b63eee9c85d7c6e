"""Reads prompts one at a time, as Hugging Face prepares them, for rows of a slot cache.

`generate` of the model itself checks the options and makes the logits processors, the stopping
criteria and the cache; the prompt then runs at full depth, the exits storing their keys along.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from offramp.engine.generate import check_inputs, check_options
from offramp.engine.prefill import Prefill
from offramp.engine.prefix_cache import PrefixCache
from offramp.engine.slots.keys import store_keys
from offramp.engine.slots.runner import States
from offramp.errors import InputError
from offramp.models.backbone import Backbone
from offramp.models.exits import Exits, ExitSet
from offramp.models.intercept import InterceptedModel
from offramp.models.vision_cache import VisionCache


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt that was run, and the rules for what follows it.

    ids: token ids [1, T] as Hugging Face's `generate` counts them. cache: keys and values of the
    layers, and of the exits behind them. positions: its position ids [..., 1, T], or None. real:
    which of its columns [T] are no padding. logits: of the first token [1, V], at full depth.
    looks: what the exits made of the first token; empty where they may not say it.
    """

    ids: Tensor
    processors: Any
    criteria: Any
    config: Any
    cache: Any
    positions: Tensor | None
    real: Tensor | None
    logits: Tensor
    looks: States


class PromptReader:
    """The layer handler of prompts; not for two threads at once.

    depths: of the exits in use. vision_cache, prefix_cache: as in `generate`.
    """

    def __init__(
        self,
        backbone: Backbone,
        exits: ExitSet | Exits | None,
        depths: Sequence[int],
        *,
        vision_cache: VisionCache | None = None,
        prefix_cache: PrefixCache | None = None,
    ) -> None:
        self.backbone, self.exits = backbone, exits
        self.view = InterceptedModel(backbone, self)
        if vision_cache is not None:
            self.view.remember_images(backbone, vision_cache)
        self._prefix_cache = prefix_cache
        self._depths = tuple(depths)
        self.thresholds: dict[int, float] = {}  # what a prefix cache asks for: exits that are on
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
        check_inputs(inputs)
        if len(inputs["input_ids"]) != 1 or asked.get("num_return_sequences", 1) != 1:
            raise InputError(
                f"A request of {len(inputs['input_ids'])} rows was submitted.",
                "Submit each prompt as a request of its own.",
            )
        self.thresholds = dict.fromkeys(self._depths, 1.0) if use_exits else {}
        self._looks, found = {}, []

        def run(
            model: Any,
            input_ids: Tensor,
            logits_processor: Any,
            stopping_criteria: Any,
            generation_config: Any,
            **prepared: Any,
        ) -> Tensor:
            check_options(lambda name: getattr(generation_config, name, None))
            rules = (input_ids, logits_processor, stopping_criteria, generation_config)
            found.append(self._read(model, rules, prepared))
            return input_ids

        try:
            with torch.inference_mode():
                self.view.model.generate(**inputs, custom_generate=run, **options)
        finally:
            self.cache, self._looks, self._before = None, {}, None
        return found[0]

    def _read(
        self, model: Any, rules: tuple[Tensor, Any, Any, Any], prepared: dict[str, Any]
    ) -> Prompt:
        self.cache = prepared["cache"] if "cache" in prepared else prepared["past_key_values"]
        if self.thresholds:
            self._add_entries()
        served = None if self._prefix_cache is None else self._prefix_cache.serve(self)  # type: ignore[arg-type]
        reading = Prefill(self.view, model, rules[0], prepared)
        if served is not None:
            served.end()
        real = None
        if not self.backbone.is_encoder_decoder and prepared.get("attention_mask") is not None:
            real = prepared["attention_mask"][0].bool()
        entries, exits, previous = (
            {depth: look[part] for depth, look in self._looks.items()} for part in range(3)
        )
        looks = States(reading.logits, entries, exits, previous)
        return Prompt(*rules, self.cache, reading.positions, real, reading.logits, looks)

    def _add_entries(self) -> None:
        """Give the exits entries of their own, behind those of the layers."""
        assert self.exits is not None
        halves = [self.cache]
        if hasattr(self.cache, "cross_attention_cache"):
            halves = [self.cache.self_attention_cache, self.cache.cross_attention_cache]
        for half in halves:
            half.layers.extend(copy.deepcopy(half.layers[d]) for d in self.exits.depths)
        if len(halves) == 2:
            self.cache.is_updated.update(dict.fromkeys(range(len(halves[0].layers)), False))

    def layer(
        self,
        index: int,
        layer: nn.Module,
        hidden: Tensor,
        args: tuple[Any, ...],
        kw: dict[str, Any],
    ) -> Any:
        """The layer's own output; before it, the exit that stands there."""
        if index in self.thresholds:
            assert self.exits is not None
            if self.backbone.is_encoder_decoder:
                state = self.exits.run(index, hidden, args, kw)
                assert self._before is not None
                self._looks[index] = (hidden[:, -1], state[:, -1], self._before)
            else:
                store_keys(self.cache, self.exits.at(index), hidden, args, kw)
        self._before = hidden[:, -1]
        return layer(hidden, *args, **kw)
