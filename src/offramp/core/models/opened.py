"""A vision-language model laid open: where its language decoder is, and how its states are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from offramp.core.errors import InputError, UnsupportedBackboneError
from offramp.core.models.change import Unchanged
from offramp.core.models.hub import unwrap_peft
from offramp.core.models.registry import Family, is_ours, registered_family
from offramp.core.models.rope import LengthDependentRope
from offramp.core.models.sharding import (
    check_hooks,
    device_of,
    full,
    is_split,
    keep_layers_alone_split,
    loaded,
)
from offramp.core.models.stand_in import StandIn
from offramp.core.models.weights import check_scheme, float_dtype, float_parameters, unpack


@dataclass(slots=True)
class LayerCall:
    """One call of a decoder layer by its stack.

    index: of the layer, from 0. hidden: the state that enters the layer [B, T, D]. args, kw: the
    stack's other arguments, by the family's own names. instead: replacements of modules.
    """

    index: int
    layer: nn.Module
    hidden: Tensor
    args: tuple[Any, ...]
    kw: dict[str, Any]
    instead: Mapping[Any, Any] | None = None

    def run(self, module: Callable[..., Any]) -> Any:
        """Call `module` with the layer's arguments, and return its output."""
        called = module if self.instead is None else self.instead[module]
        return called(self.hidden, *self.args, **self.kw)

    def state(self, module: Callable[..., Any]) -> Tensor:
        """Call `module` with the layer's arguments, and return its hidden state [B, T, D]."""
        return first(self.run(module))


def first(output: Any) -> Tensor:
    """Return the hidden state of a layer's output, which in some families is a tuple."""
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


class _Rows(nn.Module):
    """Logits of some tokens, of a head that computes all of them."""

    def __init__(self, head: nn.Module, ids: Tensor) -> None:
        super().__init__()
        self.__dict__["_head"] = head
        self._ids = ids

    def forward(self, states: Tensor) -> Tensor:
        logits: Tensor = self.__dict__["_head"](states)
        return logits.index_select(-1, self._ids.to(logits.device))


HeadCode = Callable[[Tensor], Tensor]
"""Does what the LM head does: logits [N, V] of states [N, D]."""


class Instead(Protocol):
    """Makes replacements of a backbone's layers, exits and LM head for decoding. name: of such
    code, for conditions."""

    name: str

    def modules(self, backbone: Any, caller: str) -> Any:
        """Return the replacements by module, as `BareModules` has them; None: bare twins.

        caller: the Python module whose code calls them.
        """
        ...

    def head(self, backbone: Any) -> HeadCode | None:
        """Return the replacement of the LM head; None: its bare twin, or the head itself."""
        ...

    def left_out(self, backbone: Any, reason: str) -> None:
        """Note that the modules themselves are called, and the reason."""
        ...


class OpenedModel:
    """A model with the places of its parts, before any self-check of these.

    softcap: bound of the soft cap on logits. words: ids of the head that are the model's tokens;
    None: all.
    """

    tower: StandIn | None = None
    """What stands in the vision tower's place; see `Backbone.with_tower`."""
    read_as: Mapping[int, int] = {}
    """Ids that the model reads as others where an answer holds them, as those of images."""

    def __init__(self, model: nn.Module, example: Mapping[str, Any] | None = None) -> None:
        """Find the decoder, by the registry or by watching it run; see `Backbone`."""
        model = unwrap_peft(model)
        self.model: Any = model
        check_scheme(model)
        model.eval()
        model.requires_grad_(False)  # HF resets it on load
        check_hooks(model)
        unpack(model)
        known = registered_family(model.config)
        if known is not None and is_ours(model.config) and not _has_paths(model, known):
            known = None  # another text model in a wrapper that is known
        self.family: Family = known or _discovered(model, example)
        self.head: Any = None
        self.returns: Sequence[int] = ()
        """By layer, how many values it returns; 0: the state alone. Known once it ran."""
        self.seat()
        if self.family.vision is not None:
            self._find(self.family.vision)
        self.is_encoder_decoder: bool = any(
            getattr(config, "is_encoder_decoder", False)
            for config in (model.config, self.text_config)
        )
        self.rope: LengthDependentRope = LengthDependentRope.of(self.text_config)
        self._check_drivable()
        parts = (model, *self.layers, *([] if self.norm is None else [self.norm]), self.head)
        self.sharded: bool = len({device_of(part) for part in parts}) > 1
        """Whether parts of the decoder run on several devices."""
        self.split: bool = is_split(model)
        """Whether processes hold parts of its weights: tensor parallel, or FSDP2."""
        keep_layers_alone_split(model, [*self.layers])
        scale = self.family.hidden_scale
        self._scale = scale(self.text_config) if callable(scale) else scale or 1.0
        self.softcap = self.family.softcap
        if self.softcap is None and not self.family.discovered:
            self.softcap = _softcap(self.text_config, model.config)
        self.words: int | None = None
        self._suppressed = torch.tensor(self.family.suppressed, dtype=torch.long)

    def seat(self) -> None:
        """Look up by path the modules that read and write states.

        Raises:
            UnsupportedBackboneError: a module is no longer there, or the decoder has other layers.
        """
        family = self.family
        self.stack: Any = self._find(family.stack)
        layers = self._find(f"{family.stack}.{family.layers}")
        self.layer_names: tuple[str, ...] | None = (
            tuple(layers) if isinstance(layers, nn.ModuleDict) else None
        )
        """What a stack calls its layers that holds them by name; None: by number."""
        self.layers: Any = layers if self.layer_names is None else nn.ModuleList(layers.values())
        if self.returns and len(self.returns) != len(layers):
            raise UnsupportedBackboneError(
                f"{type(self.model).__name__} has {len(layers)} decoder layers where it had "
                f"{len(self.returns)}.",
                "Open it anew: Backbone(model), and exits that were trained for it.",
            )
        self.norm: Any | None = self._find(f"{family.stack}.{family.norm}") if family.norm else None
        config = self.model.config.get_text_config(decoder=True)
        self.text_config: Any = getattr(self.stack, "config", config)
        head = self._find(family.head)
        if head is not self.head or not self._laid_out_of():
            self.head = self.reader = head
            self._laid_out_of: Callable[[], bool] = _always

    def read_by(self, reader: nn.Module) -> None:
        """Read states by `reader`, the LM head in another layout, while the head is unchanged."""
        self.reader, self._laid_out_of = reader, Unchanged(partial(_one, self.head))

    # -- what it is -------------------------------------------------------------------------

    @property
    def depth(self) -> int:
        """Number of decoder layers L."""
        return len(self.layers)

    @property
    def vision(self) -> Any:
        """The vision tower, or its replacement. Raise `InputError` where the family does not say
        where it is."""
        if self.family.vision is None:
            raise InputError(
                f"Where the vision tower of {type(self.model).__name__} is, is not known.",
                "Name it: register_backbone(..., Family(..., vision='path.to.the.tower')).",
            )
        return self.tower or self._find(self.family.vision)

    @property
    def positions(self) -> int | None:
        """The most tokens that the model's learned positions, or its "dynamic" rotary frequencies,
        allow: past these the frequencies change with every token, and kept keys fit no more. None:
        no limit."""
        if not isinstance(getattr(self.stack, "embed_positions", None), nn.Embedding):
            return self.rope.grows
        return int(self.text_config.max_position_embeddings)

    def room(self, prompt: int) -> int | None:
        """Return the most tokens of a prompt of `prompt` tokens and its answer; None: no limit.

        With "longrope", longer texts have other rotary frequencies from the first token on, so that
        kept keys of shorter ones do not fit.
        """
        switch = self.rope.switches
        return switch if switch is not None and prompt <= switch else self.positions

    def has_own_frequencies(self, prompt: int) -> bool:
        """Return True if prompts of `prompt` tokens have other rotary frequencies than short
        ones."""
        return self.rope.switches is not None and prompt > self.rope.switches

    @property
    def device(self) -> torch.device:
        """Return the device that inputs go to, and that normed states and logits come from."""
        return device_of(self.model)

    @property
    def dtype(self) -> torch.dtype:
        return float_dtype(self.layers)

    def check_whole(self, what: str) -> None:
        """Raise `UnsupportedBackboneError` where `what` needs weights that other processes hold."""
        if self.split:
            raise UnsupportedBackboneError(
                f"{what} needs whole weights, and those of {type(self.model).__name__} are split "
                "between processes.",
                "Leave it out, or load the model whole, in one process.",
            )

    # -- reading states ---------------------------------------------------------------------

    def logits(
        self, normed: Tensor, head: nn.Module | None = None, *, code: HeadCode | None = None
    ) -> Tensor:
        """Return logits [..., V] of final-normed states [..., D], as the model computes them.

        head: of `head_rows`, to read only those tokens. code: called in place of the whole head.
        """
        rows = normed.reshape(-1, normed.shape[-1])
        read = head or code or self.reader
        logits = self.here(read(rows * self._scale if self._scale != 1.0 else rows))
        if self.words is not None and head is None:
            logits = logits[:, : self.words]
        if self.family.logit_scale != 1.0:
            logits = logits * self.family.logit_scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        added = self._logit_bias() if head is None else getattr(head, "added", None)
        if added is not None:
            logits = logits + added
        if len(self._suppressed) and head is None:
            logits = logits.index_fill(
                1, self._suppressed.to(logits.device), torch.finfo(logits.dtype).min
            )
        return logits.reshape(*normed.shape[:-1], -1)

    def head_rows(self, ids: Tensor) -> nn.Module:
        """A copy of the LM head's rows for the token ids [S], frozen: logits of these alone."""
        if any(True for _ in self.head.children()):  # LoRA, or what else stands around it
            return _Rows(self.head, ids)
        bias = getattr(self.head, "bias", None)
        with loaded(self.head):
            weight = float_parameters(self.head)[0]()
            rows = nn.Linear(weight.shape[1], len(ids), bias=bias is not None, device="meta")
            rows.weight = nn.Parameter(weight[ids].to(self.device), requires_grad=False)
            if bias is not None:
                own = full(bias.detach())[ids].to(self.device)
                rows.bias = nn.Parameter(own, requires_grad=False)
        made: nn.Module = rows if self.reader is self.head else type(self.reader)(rows)
        added = self._logit_bias()
        made.__dict__["added"] = None if added is None else added[ids.to(added.device)]
        return made

    def _logit_bias(self) -> Tensor | None:
        """What the model adds to its logits [V], if anything."""
        path = self.family.logit_bias
        if path is None:
            return None
        added: Tensor = self.here(self._find(path).flatten())
        return added if self.words is None else added[: self.words]

    def final_norm(self, hidden: Tensor) -> Tensor:
        """Apply the final norm, where the family has one."""
        return self.here(self.norm(hidden) if self.norm is not None else hidden)

    def as_read(self, ids: Tensor) -> Tensor:
        """Return the ids of an answer as the model's own forward pass reads them."""
        for written, read in self.read_as.items():
            ids = ids.masked_fill(ids == written, read)
        return ids

    def here(self, tensor: Tensor) -> Tensor:
        """Return the tensor on `device`, from the device of its layer."""
        return tensor.to(self.device) if self.sharded else tensor

    # -- driving ----------------------------------------------------------------------------

    def skipped_layer_output(self, call: LayerCall) -> Any:
        """Return the output of a layer that leaves the state as it is."""
        return self.handed_through(call, self.returns[call.index])

    def handed_through(self, call: LayerCall, values: int) -> Any:
        """Return that output for a layer with this many values; 0: the state alone.

        T5's layers hand the attention biases on, from block 0, which computes the relative one: a
        skipped block must do the same.
        """
        if self.family.layers != "block":
            return (call.hidden, *[None] * (values - 1)) if values else call.hidden
        _, bias, _, _, cross_bias = call.args[:5]
        attention = self.layers[call.index].layer[0].SelfAttention
        if bias is None and attention.has_relative_attention_bias:
            cache = call.kw.get("cache", call.kw.get("past_key_values"))
            past = cache.get_seq_length() if cache is not None else 0
            new = call.hidden.shape[1]
            bias = attention.compute_bias(new, past + new, call.hidden.device, past)
        return call.hidden, bias, cross_bias

    def _find(self, path: str) -> Any:
        node = self.model
        for name in path.split("."):
            if not hasattr(node, name):
                raise UnsupportedBackboneError(
                    f"{type(self.model).__name__} has no {path!r} ({type(node).__name__} has no "
                    f"{name!r}).",
                    "Correct the paths with offramp.register_backbone; docs/models.md shows how "
                    "to find them.",
                )
            node = getattr(node, name)
        return node

    def _check_drivable(self) -> None:
        if self.family.logit_bias is not None:
            self._find(self.family.logit_bias)
        if not isinstance(self.layers, nn.ModuleList) or len(self.layers) < 2:
            raise UnsupportedBackboneError(
                f"{self.family.stack}.{self.family.layers} is not a list of at least two layers.",
                "Point the family at the decoder stack; see docs/models.md.",
            )
        inside = f"{self.family.stack}.{self.family.layers}."
        if self.family.head.startswith(inside):
            raise UnsupportedBackboneError(
                f"The LM head {self.family.head!r} lies inside the layers.",
                "Correct head in register_backbone; see docs/models.md.",
            )
        if getattr(self.stack, "project_out", None) is not None:
            raise UnsupportedBackboneError(
                "This OPT projects its states to another width before the LM head.",
                "Use an OPT with word_embed_proj_dim == hidden_size (all but opt-350m).",
            )


def _discovered(model: nn.Module, example: Mapping[str, Any] | None) -> Family:
    from offramp.core.models.discovery.paths import discover

    return discover(model, example)


def _always() -> bool:
    return True


def _one(module: nn.Module) -> tuple[nn.Module]:
    return (module,)


def _has_paths(model: nn.Module, family: Family) -> bool:
    inside = [family.layers, *([] if family.norm is None else [family.norm])]
    try:
        for path in (family.head, *(f"{family.stack}.{name}" for name in inside)):
            model.get_submodule(path)
    except AttributeError:
        return False
    return True


def _softcap(*configs: Any) -> float | None:
    """The bound of a soft cap on logits, where one of the configurations has it."""
    for config in configs:
        cap = getattr(config, "final_logit_softcapping", None)
        if cap is not None:
            return float(cap)
    return None
