"""What a stack hands to its layers, for calls in which every token stands at a column of its own.

A stack prepares rotary tables, positions and masks anew for each call. Here it runs once over all
positions that a row may have, its layers only noting what they are handed; a call gathers the rows
of its tokens out of those tables, and makes its masks by the rules that the stack's were made by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from offramp.engine.kv_cache import CACHE_NAMES
from offramp.engine.lean.arguments import CannotRehearseError, named, same
from offramp.engine.lean.rehearsal import Stage
from offramp.engine.slots.layout import SlotCall
from offramp.engine.slots.masks import MaskRule, rule_of
from offramp.models.backbone import LayerCall

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Of a layer, by position and by name."""
Given = Mapping[str, Any]
"""What the stack is called with."""

BIASES = ("position_bias", "encoder_decoder_position_bias")
"""T5's, which are no stack's but its first block's; the runner's in slots."""


def _positions(given: Given, call: SlotCall) -> Tensor:
    """Where each token of a call stands in the tables [N]."""
    own = given.get("position_ids")
    return call.columns if own is None else own.reshape(-1, len(call.columns))[-1]


def _gathered(tables: tuple[Tensor, ...], given: Given, call: SlotCall) -> tuple[Tensor, ...]:
    """Of tables [..., 1, P, D] the rows of a call's tokens [..., B, T, D]."""
    at = _positions(given, call)
    found = [table.select(-3, 0).index_select(-2, at) for table in tables]
    return tuple(rows.view(*rows.shape[:-2], *call.shape, rows.shape[-1]) for rows in found)


class _Kind:
    """How the arguments of one or more layers are made."""

    def __init__(self, call: LayerCall) -> None:
        """call: one over all positions. Raise `CannotRehearseError`: an argument is not known."""
        self.by_position, values = named(call)
        self._fixed: dict[str, Any] = {}
        self._made: list[tuple[str, Callable[[Given, SlotCall], Any]]] = []
        for name, value in values.items():
            rule = rule_of(value)
            if name in (*CACHE_NAMES, *BIASES):
                self._fixed[name] = None
            elif value is None or isinstance(value, (bool, str)):
                self._fixed[name] = value
            elif rule is not None:
                self._made.append((name, _masked(rule)))
            elif name == "encoder_hidden_states":
                self._made.append((name, _given(name)))
            elif name == "position_ids":
                self._made.append((name, _ids(value)))
            elif name == "position_embeddings" and isinstance(value, tuple):
                self._made.append((name, _rows(value)))
            else:
                raise CannotRehearseError(f"argument {name}, a {type(value).__name__}")

    def at(self, given: Given, call: SlotCall, instead: Mapping[str, Any]) -> Arguments:
        """For one call. instead: values of arguments that the runner says itself."""
        values = dict(self._fixed)
        for name, make in self._made:
            values[name] = make(given, call)
        values.update((name, value) for name, value in instead.items() if name in values)
        return tuple([values.pop(name) for name in self.by_position]), values


def _masked(rule: MaskRule) -> Callable[[Given, SlotCall], Any]:
    if rule.allowed is None:
        return lambda given, call: rule.mask(call.queries, 0, given["encoder_attention_mask"])
    return lambda given, call: rule.mask(call.queries, call.width)


def _given(name: str) -> Callable[[Given, SlotCall], Any]:
    return lambda given, call: given[name]


def _ids(handed: Tensor) -> Callable[[Given, SlotCall], Any]:
    """Position ids as given, or the first of several axes where the layers get no more."""

    def made(given: Given, _: SlotCall) -> Any:
        own = given.get("position_ids")
        if own is None:
            raise CannotRehearseError("position ids that the stack counts itself")
        return own if own.dim() == handed.dim() else own[0]

    return made


def _rows(tables: tuple[Tensor, ...]) -> Callable[[Given, SlotCall], Any]:
    return lambda given, call: _gathered(tables, given, call)


class LeanCalls:
    """Makes the arguments of the layers of a stack."""

    def __init__(self, stage: Stage, given: Given) -> None:
        """given: what the stack is called with for all positions in a row, the states zero.

        Raises:
            CannotRehearseError: something about the stack is not known here.
        """
        run = stage.run(given)
        self._stage = stage
        entered = run.calls[0].hidden if run.before_norm is None else run.before_norm
        self._added = entered if bool(entered.any()) else None
        self._kinds: list[_Kind] = []
        self.kind_of: list[int] = []
        known: dict[Any, int] = {}
        for call in run.calls:
            values = named(call)[1]
            key = tuple((name, id(v)) for name, v in values.items() if name not in BIASES)
            if key not in known:
                known[key] = len(self._kinds)
                self._kinds.append(_Kind(call))
            self.kind_of.append(known[key])

    def enter(self, given: Given, call: SlotCall) -> Tensor:
        """The states [B, T, D] that enter the first layer."""
        states: Tensor = self._stage.embed(given["input_ids"])
        if self._added is not None:
            states = states + _gathered((self._added,), given, call)[0]
        return states if self._stage.norm is None else self._stage.norm(states)

    def arguments(
        self, given: Given, call: SlotCall, instead: Mapping[str, Any]
    ) -> list[Arguments]:
        """Those of each kind of layer; see `kind_of`. instead: of a runner's own."""
        return [kind.at(given, call, instead) for kind in self._kinds]

    def check(self, given: Given, call: SlotCall) -> None:
        """Hold what is made for a call to what the stack itself hands to its layers.

        Raises:
            CannotRehearseError: they differ.
        """
        calls, ours = self._stage.run(given).calls, self.arguments(given, call, {})
        for theirs, kind in zip(calls, self.kind_of, strict=True):
            mine = named(LayerCall(theirs.index, theirs.layer, theirs.hidden, *ours[kind]))[1]
            its = {name: v for name, v in named(theirs)[1].items() if name not in BIASES}
            wrong = same({name: v for name, v in mine.items() if name not in BIASES}, its)
            if wrong is not None:
                raise CannotRehearseError(f"argument {wrong}, which is made otherwise")
        if "input_ids" in given and not torch.equal(calls[0].hidden, self.enter(given, call)):
            raise CannotRehearseError("how embeddings enter the layers")
