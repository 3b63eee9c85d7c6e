"""A rehearsal: the stack runs over tokens to come, and its layers only note what they are handed.

The stand-in cache says that the text so far has been read. What the stack prepares (rotary tables,
masks, positions, biases) is then there for all of these tokens, and a step takes slices of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from offramp.engine.kv_cache import cache_name, self_attention
from offramp.engine.lean.arguments import (
    Arguments,
    CannotRehearseError,
    causal,
    named,
    same,
)
from offramp.engine.lean.cache import Columns, LeanCache, LeanLayer, beside_encoder
from offramp.models.backbone import Backbone, LayerCall
from offramp.models.discovery.twin import twin
from offramp.models.intercept import stand_ins

TOKENS = 128
"""Tokens that are rehearsed at once."""
CHECKED = 3
"""Tokens of the call of several that a rehearsal is held to."""


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
    """A twin of the stack whose layers only note their calls.

    stack: one that is called in its place, with the same layers.
    """

    def __init__(self, backbone: Backbone, stack: Any = None) -> None:
        self.backbone, self._stack = backbone, backbone.stack if stack is None else stack
        self.layers = range(backbone.depth)
        self.embed: Any = backbone.stack.get_input_embeddings()
        norms = [n for n, m in backbone.stack.named_children() if "norm" in n]
        norms = [n for n in norms if backbone.stack.get_submodule(n) is not backbone.norm]
        if len(norms) > 1 or not isinstance(self.embed, nn.Embedding):
            raise CannotRehearseError("how embeddings enter the layers")
        self._norm_name = norms[0] if norms else None
        self.norm = backbone.stack.get_submodule(norms[0]) if norms else None

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
            raise CannotRehearseError("what the stack does behind its layers")
        return _Run(calls, None if noted is None else noted.entered)


class Rehearsal:
    """What the stack hands to its layers for columns `origin` up to `end`."""

    def __init__(
        self,
        stage: Stage,
        kw: Mapping[str, Any],
        cache: Any,
        origin: int,
        tokens: int,
        positions: bool,
    ) -> None:
        """kw: the stack's arguments for these tokens. cache: a `LeanCache`, or one with a part for
        an encoder's keys, whose windows the layers have.

        positions: whether positions are added to the embeddings.

        Raises:
            CannotRehearseError: the layers get something whose slices are not known.
        """
        backbone = stage.backbone
        own, columns = self_attention(cache), Columns(origin, origin)
        wide = LeanCache([LeanLayer(columns, None) for _ in own.layers], columns)
        run = stage.run({**kw, cache_name(kw): beside_encoder(wide, cache)})
        calls = run.calls
        self.origin, self.end = origin, origin + tokens
        self.rows = len(calls[0].hidden)
        before = calls[0].hidden if run.before_norm is None else run.before_norm
        self._positions = before if positions else None
        self._stage = stage
        masks = None
        if origin == 0 and getattr(backbone.text_config, "_attn_implementation", "") == "sdpa":
            masks = partial(_causal, tokens, calls[0].hidden.device)
        if backbone.family.layers == "block":
            calls = _with_bias(calls)
        self._kinds: list[Arguments] = []
        self.kind_of: list[int] = []
        known: dict[Any, int] = {}
        for call, layer in zip(calls, own.layers, strict=False):
            key = (layer.window, *(id(v) for v in (*call.args, *call.kw.values())), *call.kw)
            if key not in known:
                known[key] = len(self._kinds)
                self._kinds.append(Arguments(call, origin, layer.window, masks))
            self.kind_of.append(known[key])

    def covers(self, first: int, end: int, rows: int) -> bool:
        return self.origin <= first and end <= self.end and rows == self.rows

    def enter(self, ids: Tensor, first: int) -> Tensor:
        """The states [B, T, D] of token ids [B, T] that enter the first layer."""
        states: Tensor = self._stage.embed(ids)
        if self._positions is not None:
            states = states + self._positions.narrow(1, first - self.origin, ids.shape[1])
        return states if self._stage.norm is None else self._stage.norm(states)

    def arguments(self, first: int, end: int, cache: Any) -> list[Any]:
        """Those of each kind of layer, by position and by name; see `kind_of`."""
        return [kind.at(first, end, cache) for kind in self._kinds]


def _causal(tokens: int, device: torch.device) -> Tensor:
    return causal(0, tokens, None, device)[None, None]


def _with_bias(calls: list[LayerCall]) -> list[LayerCall]:
    """T5's first block computes the bias that the others are handed; here it is handed it too.

    That of cross-attention is zero, and a single one fits all queries.
    """
    _, bias, _, _, across = calls[1].args[:5]
    if across is None:
        across = bias.new_zeros(1, 1, 1, 1)
    shared = list(calls[1].args)
    shared[1], shared[4] = bias, across
    return [LayerCall(c.index, c.layer, c.hidden, tuple(shared), c.kw) for c in calls]


def ahead(kw: Mapping[str, Any], end: int, first: int, tokens: int) -> dict[str, Any]:
    """The stack's arguments for `tokens` columns from `first` on, from those of a call whose last
    token stands at column `end` - 1."""
    more = {n: v for n, v in kw.items() if n not in ("input_ids", "inputs_embeds")}
    positions, mask = kw.get("position_ids"), kw.get("attention_mask")
    if positions is not None:
        steps = torch.arange(first, first + tokens, device=positions.device)
        more["position_ids"] = positions[..., -1:] + (steps - (end - 1))
    if mask is not None:
        if mask.dim() != 2:
            raise CannotRehearseError("a mask that the stack did not make")
        new = mask.new_ones(len(mask), max(0, first + tokens - end))
        more["attention_mask"] = torch.cat([mask, new], 1)[:, : first + tokens]
    return more


def check(stage: Stage, rehearsal: Rehearsal, kw: Mapping[str, Any], cache: Any, end: int) -> bool:
    """Hold slices of a rehearsal to what the stack itself hands to its layers, for one token and
    for several; return whether positions are added to embeddings.

    rehearsal: of columns before `end`, and of some behind. kw: arguments of a call that ends there.

    Raises:
        CannotRehearseError: they differ.
    """
    columns, plain = self_attention(cache).columns, stage.norm is None
    for tokens in (1, CHECKED):
        columns.first, columns.end = end, end + tokens
        ids = torch.arange(rehearsal.rows * tokens, device=stage.backbone.device)
        ids = ids.view(rehearsal.rows, tokens) % stage.embed.num_embeddings
        given = {**ahead(kw, end, end, tokens), cache_name(kw): cache, "input_ids": ids}
        calls = stage.run(given).calls
        if stage.backbone.family.layers == "block":
            calls = _with_bias(calls)
        ours = rehearsal.arguments(end, end + tokens, cache)
        for call, kind in zip(calls, rehearsal.kind_of, strict=True):
            mine = named(LayerCall(call.index, call.layer, call.hidden, *ours[kind]))[1]
            wrong = same(mine, named(call)[1])
            if wrong is not None:
                raise CannotRehearseError(f"argument {wrong}, whose slices differ")
        entered = calls[0].hidden
        plain = plain and torch.equal(entered, stage.embed(ids))
        if not plain and not torch.equal(entered, rehearsal.enter(ids, end)):
            raise CannotRehearseError("how embeddings enter the layers")
    return not plain
