"""What a stack hands to its layers, for calls in which every token stands at a column of its own.

A stack prepares rotary tables, positions and masks anew for each call. Here it runs once over all
positions that a row may have, its layers only noting what they are handed; a call gathers the rows
of its tokens out of those tables, or takes a slice where they stand side by side, and makes its
masks by the rules that the stack's were made by. A first call of each kind is held to what the
stack itself hands to its layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from offramp.core.executors.kv_cache import CACHE_NAMES
from offramp.core.executors.slots.attention import MaskRule
from offramp.core.executors.slots.cache import Call
from offramp.core.models.backbone import Backbone
from offramp.core.models.discovery.twin import twin
from offramp.core.models.intercept import stand_ins
from offramp.core.models.opened import LayerCall

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Of a layer, by position and by name."""

BIASES = ("position_bias", "encoder_decoder_position_bias")
"""T5's, which are no stack's but its first block's; the executor's in slots."""


# -- rehearsals: the stack runs, and its layers only note what they are handed --------------------


class CannotRehearseError(Exception):
    """The arguments of layers cannot be made here for this model or request: the stack must run."""


class _Recorder:
    """A layer handler that notes the calls, and hands the states through."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.calls: list[LayerCall] = []

    def layer(self, call: LayerCall) -> Any:
        self.calls.append(call)
        return self.backbone.skipped_layer_output(call)


class _Noted(nn.Module):
    """Stands where a norm stood, and keeps what enters it."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.__dict__["norm"] = norm
        self.entered: Tensor | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        self.entered = hidden
        return self.__dict__["norm"](hidden)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Run:
    """What one run of the stack came to: the calls of its layers, and the sum of embeddings and
    positions that entered its norm of embeddings, where it has one."""

    calls: list[LayerCall]
    before_norm: Tensor | None


class Stage:
    """A twin of the stack whose layers only record their calls.

    stack: a module that is called in its place, with the same layers.
    """

    def __init__(self, backbone: Backbone, stack: Any = None) -> None:
        self.backbone: Backbone = backbone
        self._stack = backbone.stack if stack is None else stack
        self.layers: range = range(backbone.depth)
        self.embed: Any = backbone.stack.get_input_embeddings()
        norms = [n for n, m in backbone.stack.named_children() if "norm" in n]
        norms = [n for n in norms if backbone.stack.get_submodule(n) is not backbone.norm]
        if len(norms) > 1 or not isinstance(self.embed, nn.Embedding):
            raise CannotRehearseError("how embeddings enter the layers")
        self._norm_name = norms[0] if norms else None
        self.norm: Any | None = backbone.stack.get_submodule(norms[0]) if norms else None

    def run(self, kw: Mapping[str, Any]) -> _Run:
        """Raise `CannotRehearseError` where the stack does more than call its layers and a norm, or
        does not run without them."""
        recorder = _Recorder(self.backbone)
        stack: Any = twin(self._stack)
        stack._modules[self.backbone.family.layers] = stand_ins(self.backbone, recorder)
        noted = None
        if self._norm_name is not None and self.norm is not None:
            noted = stack._modules[self._norm_name] = _Noted(self.norm)
        try:
            out = stack(**kw).last_hidden_state
        except Exception as error:  # code that looks at more of the cache than is there
            raise CannotRehearseError(f"{type(error).__name__} in the stack: {error}") from error
        calls = recorder.calls
        if [call.index for call in calls] != [*self.layers]:
            raise CannotRehearseError("which layers the stack calls")
        entered = calls[0].hidden
        if not all(c.hidden is entered or torch.equal(c.hidden, entered) for c in calls):
            raise CannotRehearseError("what the stack does between its layers")
        if not torch.equal(out, self.backbone.final_norm(entered)):
            raise CannotRehearseError("what the stack does after its layers")
        return _Run(calls, None if noted is None else noted.entered)


def named(call: LayerCall) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return the names of a call's positional arguments, and all its arguments by name."""
    names = [*inspect.signature(type(call.layer).forward).parameters][2 : 2 + len(call.args)]
    return tuple(names), {**dict(zip(names, call.args, strict=True)), **call.kw}


def same(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """Return the name of a layer's argument that differs between two calls; None where none does.

    A mask of zeros, which attention adds, counts as no mask.
    """
    for name in {*ours, *theirs} - {*CACHE_NAMES}:
        mine, other = ours.get(name), theirs.get(name)
        if not _equal(mine, other) and not (name == "attention_mask" and _nothing(mine, other)):
            return name
    return None


def _nothing(mine: Any, mask: Any) -> bool:
    added = isinstance(mask, Tensor) and mask.dtype != torch.bool
    return mine is None and added and not bool(mask.any())


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return type(one) is type(other) and bool(one == other)


# -- calls ----------------------------------------------------------------------------------------


@dataclass(eq=False)
class Given:
    """The inputs and positions of one call.

    inputs: token ids [n] or [B, T], or states [B, T, D] at the entry of a deeper layer. offsets:
    position of column 0 [..., slots], where the stack takes positions. offset: that of the single
    slot of a call whose positions count up by one; first: the same on the first of several axes.
    encode: makes `encoder`, the states and mask of the encoder, when it is read.
    """

    call: Call
    inputs: Tensor
    offsets: Tensor | None
    offset: int | None
    encode: Callable[[], tuple[Tensor, Tensor]] | None
    first: int = 0

    @property
    def ids(self) -> Tensor | None:
        """Token ids [B, T]; None: states enter a deeper layer."""
        ids = self.inputs[:, None] if self.inputs.dim() == 1 else self.inputs
        return ids if ids.dim() == 2 else None

    @cached_property
    def positions(self) -> Tensor | None:
        """Position ids [..., B, T]."""
        if self.offsets is None:
            return None
        call = self.call
        positions = self.offsets[..., call.slots] + call.columns
        return positions.view(*positions.shape[:-1], *call.shape)

    @cached_property
    def encoder(self) -> tuple[Tensor, Tensor]:
        assert self.encode is not None
        return self.encode()

    @property
    def row(self) -> int:
        """Return the row of the tables at which a call of one slot begins."""
        call = self.call
        assert call.beside is not None
        return call.beside[1] + (self.offset or 0)

    @cached_property
    def rows(self) -> Tensor:
        """Return the rows of the tables for the tokens of a call [N]."""
        own = self.positions
        columns = self.call.columns
        return columns if own is None else own.reshape(-1, len(columns))[-1]


def _of_tables(tables: tuple[Tensor, ...], given: Given) -> tuple[Tensor, ...]:
    """Of tables [..., 1, P, D] the rows of a call's tokens [..., B, T, D]."""
    call = given.call
    if call.beside is not None:
        return tuple([table.narrow(-2, given.row, call.shape[1]) for table in tables])
    at = given.rows
    found = [table.select(-3, 0).index_select(-2, at) for table in tables]
    return tuple(rows.view(*rows.shape[:-2], *call.shape, rows.shape[-1]) for rows in found)


class _Kind:
    """How the arguments of one or more layers are made."""

    def __init__(self, call: LayerCall) -> None:
        """call: one over all positions. Raise `CannotRehearseError`: an argument is not known."""
        self.by_position, values = named(call)
        self._fixed: dict[str, Any] = {}
        self._made: list[tuple[str, Callable[[Given], Any]]] = []
        for name, value in values.items():
            rule = getattr(value, "rule", None)  # what `slot_mask` made it by
            if name in (*CACHE_NAMES, *BIASES):
                self._fixed[name] = None
            elif value is None or isinstance(value, (bool, str)):
                self._fixed[name] = value
            elif rule is not None:
                self._made.append((name, _masked(rule)))
            elif name == "encoder_hidden_states":
                self._made.append((name, lambda given: given.encoder[0]))
            elif name == "position_ids":
                self._made.append((name, _ids(value)))
            elif name == "position_embeddings" and isinstance(value, tuple):
                self._made.append((name, partial(_of_tables, value)))
            else:
                raise CannotRehearseError(f"argument {name}, a {type(value).__name__}")

    def at(self, given: Given, instead: Mapping[str, Any]) -> Arguments:
        """For one call. instead: values of arguments that the executor says itself."""
        values = dict(self._fixed)
        for name, make in self._made:
            values[name] = make(given)
        for name in instead:
            if name in values:
                values[name] = instead[name]
        return tuple([values.pop(name) for name in self.by_position]), values


def _masked(rule: MaskRule) -> Callable[[Given], Any]:
    if rule.allowed is None:
        return lambda given: rule.mask(given.call.queries, 0, given.encoder[1])
    causal = rule.causal

    def made(given: Given) -> Any:
        call = given.call
        if causal and call.beside is not None and call.shape[1] == 1:
            return None  # one query, and no key after it
        return rule.mask(call.queries, call.width)

    return made


def _ids(handed: Tensor) -> Callable[[Given], Any]:
    """Position ids as given, or the first of several axes where the layers get no more."""

    def made(given: Given) -> Any:
        if given.call.beside is not None and given.offsets is not None and handed.dim() == 2:
            start = given.call.beside[1] + given.first
            if start >= 0 and start + given.call.shape[1] <= handed.shape[1]:
                return handed.narrow(1, start, given.call.shape[1])
        own = given.positions
        if own is None:
            raise CannotRehearseError("position ids that the stack counts itself")
        return own if own.dim() == handed.dim() else own[0]

    return made


class Tables:
    """Makes the arguments of a stack's layers.

    positions: rows of the tables. counted: whether the stack takes position ids.
    """

    def __init__(self, stage: Stage, stack_arguments: Mapping[str, Any], positions: int) -> None:
        """stack_arguments: what the stack is called with for all positions in a row, the states
        zero.

        Raises:
            CannotRehearseError: something about the stack is not known here.
        """
        run = stage.run(stack_arguments)
        self.positions, self.counted = positions, "position_ids" in stack_arguments
        self._embed, self._norm = stage.embed, stage.norm  # the stage is one executor's
        entered = run.calls[0].hidden if run.before_norm is None else run.before_norm
        self._added = entered if bool(entered.any()) else None
        self._kinds: list[_Kind] = []
        self.kind_of: list[int] = []
        self.checked: set[Any] = set()
        known: dict[Any, int] = {}
        for call in run.calls:
            values = named(call)[1]
            key = tuple((name, id(v)) for name, v in values.items() if name not in BIASES)
            if key not in known:
                known[key] = len(self._kinds)
                self._kinds.append(_Kind(call))
            self.kind_of.append(known[key])

    def enter(self, given: Given) -> Tensor:
        """Return the states [B, T, D] that enter the first layer."""
        states: Tensor = self._embed(given.ids)
        if self._added is not None:
            states = states + _of_tables((self._added,), given)[0]
        return states if self._norm is None else self._norm(states)

    def arguments(self, given: Given, instead: Mapping[str, Any]) -> list[Arguments]:
        """Return the arguments of each kind of layer (`kind_of`). instead: replaced modules."""
        return [kind.at(given, instead) for kind in self._kinds]

    def check(self, given: Given, stage: Stage, stack_arguments: Mapping[str, Any]) -> None:
        """Compare the arguments that these tables make for a call with those that the stack itself
        passes to its layers.

        stage: of the executor whose call it is; the tables serve all executors of a backbone.

        Raises:
            CannotRehearseError: they differ.
        """
        calls, ours = stage.run(stack_arguments).calls, self.arguments(given, {})
        for theirs, kind in zip(calls, self.kind_of, strict=True):
            mine = named(LayerCall(theirs.index, theirs.layer, theirs.hidden, *ours[kind]))[1]
            its = {name: v for name, v in named(theirs)[1].items() if name not in BIASES}
            wrong = same({name: v for name, v in mine.items() if name not in BIASES}, its)
            if wrong is not None:
                raise CannotRehearseError(f"argument {wrong}, which is made otherwise")
        if "input_ids" in stack_arguments and not torch.equal(calls[0].hidden, self.enter(given)):
            raise CannotRehearseError("how embeddings enter the layers")
