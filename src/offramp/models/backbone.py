"""The frozen vision-language model: where its language decoder is, and how its states are read."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offramp.errors import InputError, UnsupportedBackboneError
from offramp.models.discovery.paths import discover
from offramp.models.discovery.probe import accepts
from offramp.models.discovery.self_check import self_check
from offramp.models.fingerprint import fingerprint
from offramp.models.hub import grey_example, load_model, unwrap_peft
from offramp.models.quantized.linears import check_quantize, quantize_layers
from offramp.models.quantized.prepacked import prepacked
from offramp.models.quantized.weights import (
    check_scheme,
    float_dtype,
    float_parameters,
    scheme,
    unpack,
)
from offramp.models.registry import Family, is_tested, registered_family
from offramp.models.rope import LengthDependentRope
from offramp.models.sharding import check_hooks, device_of, loaded


@dataclass(slots=True)
class LayerCall:
    """One call of a decoder layer by its stack.

    index: of the layer, from 0. hidden: the state that enters it [B, T, D]. args, kw: what the
    stack passes beside it, in the family's own names. instead: what is called in a module's place.
    """

    index: int
    layer: nn.Module
    hidden: Tensor
    args: tuple[Any, ...]
    kw: dict[str, Any]
    instead: Mapping[Any, Any] | None = None

    def run(self, module: Callable[..., Any]) -> Any:
        """What `module`, called as the stack called the layer, returns."""
        called = module if self.instead is None else self.instead[module]
        return called(self.hidden, *self.args, **self.kw)


HeadCode = Callable[[Tensor], Tensor]
"""Does what the LM head does: logits [N, V] of states [N, D]."""


@dataclass(frozen=True)
class DecodeOptions:
    """How the layers are called where tokens are decoded; answers are the same.

    lean: whether the stack's own code around them is left out, where that is exact. compiled:
    whether layers, exits and head are code that is compiled for single answers on a CPU.
    """

    lean: bool = True
    compiled: bool = False


class Backbone:
    """A frozen VLM with its decoder laid open. Not an `nn.Module`: it is held, never trained.

    Depth d means d decoder layers run, 1..`depth`; the state at depth d is the input of layer d
    (0-based), and the state at full depth is what the final norm reads.
    """

    decoding = DecodeOptions()
    """Of all that decodes on it; for others see `with_decoding`."""

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str = "",
        revision: str | None = None,
        example: Mapping[str, Any] | None = None,
    ) -> None:
        """Find the decoder, by the registry or by watching it run, and check it against the model.

        example: what the model's processor returned for a prompt with an image; needed only where
            the model does not run without one.

        Raises:
            UnsupportedBackboneError: the decoder cannot be found or driven, or it is not read as
                the model reads itself (`offramp.models.discovery.self_check`).
        """
        model = unwrap_peft(model)
        self.model: Any = model
        self.name = name or getattr(model.config, "_name_or_path", "") or type(model).__name__
        self.revision = revision
        check_scheme(model)
        model.eval()
        model.requires_grad_(False)  # HF resets it on load
        check_hooks(model)
        unpack(model)
        known = registered_family(model.config)
        if known is not None and is_tested(model.config) and not _has_paths(model, known):
            known = None  # another text model in a wrapper that is known
        self.family: Family = known or discover(model, example)
        self.stack = self._find(self.family.stack)
        layers = self._find(f"{self.family.stack}.{self.family.layers}")
        self.layer_names = tuple(layers) if isinstance(layers, nn.ModuleDict) else None
        """What a stack calls its layers that holds them by name; None: by number."""
        self.layers: Any = layers if self.layer_names is None else nn.ModuleList(layers.values())
        self.norm = (
            self._find(f"{self.family.stack}.{self.family.norm}") if self.family.norm else None
        )
        self.head = self.reader = self._find(self.family.head)  # its weight may be laid out anew
        if self.family.vision is not None:
            self._find(self.family.vision)
        self.text_config: Any = self.stack.config
        self.rope = LengthDependentRope.of(self.text_config)
        self._check_drivable()
        parts = (model, *self.layers, *([] if self.norm is None else [self.norm]), self.head)
        self.sharded = len({device_of(part) for part in parts}) > 1
        """Whether parts of the decoder run on several devices."""
        scale = self.family.hidden_scale
        self._scale = scale(self.text_config) if callable(scale) else scale or 1.0
        self.softcap = self.family.softcap
        """Bound of the soft cap on logits; the check at load turns off one that is not used."""
        if self.softcap is None and not self.family.discovered:
            self.softcap = _softcap(self.text_config, model.config)
        self.words: int | None = None
        """Tokens that the model keeps of those that its head reads; None: all of them."""
        self._suppressed = torch.tensor(self.family.suppressed, dtype=torch.long)
        kinds = [type(layer) for layer in self.layers]
        common = max(kinds, key=kinds.count)
        self.rare_layers = frozenset(i for i, kind in enumerate(kinds) if kind is not common)
        """Layers of another kind than most: Mllama's cross-attention, with the image's keys."""
        self.stock = self._is_stock()
        """Whether all of its code but the vision tower's is of libraries that tests ran it with: a
        class of somebody's own may bear the name of a family and compute otherwise."""
        self.tested = not self.family.discovered and is_tested(model.config) and self.stock
        """Whether its family has tests here; what is found or registered by others is checked."""
        self.example = example
        self.lossless = True
        """Whether drafts can be taken back, as far as decoding has shown."""
        self.engine: str | None = self._proven()
        """The executor that was found to be exact (`offramp.engine.executors`); None: not yet."""
        self._proven_at = frozenset(range(self.depth) if self.tested else ())
        self.reads_ids = accepts(self.stack, "per_layer_inputs")
        """Whether layers read the tokens again, beside the states (Gemma 3n, Gemma 4)."""
        self._layout = self_check(self, example)

    @classmethod
    def of(cls, model: Backbone | nn.Module) -> Backbone:
        """`model` itself, or the backbone of a Hugging Face model.

        Raises:
            InputError: it is neither.
        """
        if isinstance(model, Backbone):
            return model
        if not isinstance(model, nn.Module):
            raise InputError(
                f"A {type(model).__name__} is no vision-language model.",
                "Give an offramp.Backbone or a Hugging Face model; a name is loaded with "
                "Backbone.from_pretrained(name).",
            )
        return cls(model)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        dtype: torch.dtype | str = "auto",
        device: str | None = None,
        quantize: str | None = None,
        compile: bool = False,
        example: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Backbone:
        """Load a hub name or a folder.

        quantize: "int8" or "int4": the decoder layers' weights are rounded to that, and read by a
            processor's kernels, with states in bfloat16 (docs/quantisation.md).
        compile: whether single answers are decoded by compiled code (docs/runtimes.md).
        device: where the model is moved; None: it stays where it was loaded, as `device_map` says.
        example: as of `Backbone`; None: where it is needed, one is made of a grey picture by the
            processor that was saved beside the model.
        kwargs: of transformers. Code that comes with a model runs only with trust_remote_code=True.

        Raises:
            InputError: there is no such model or device, or a package that it needs is missing; or
                it cannot be quantised so.
        """
        if quantize is not None:
            check_quantize(quantize, dtype, kwargs)
            dtype = torch.bfloat16
        model = load_model(name, revision=revision, dtype=dtype, device=device, **kwargs)
        backbone = cls._of_loaded(model, str(name), revision, example)
        if quantize is not None:
            if (held_in := scheme(model)) is not None:
                raise InputError(
                    f"{name} is quantised already, in {held_in}, and was to be in {quantize}.",
                    "Leave the quantisation out, or name the model that it was made of.",
                )
            quantize_layers(backbone.layers, quantize)
            backbone = cls._of_loaded(model, str(name), revision, example)
        return backbone.with_decoding(compiled=compile)

    @classmethod
    def _of_loaded(
        cls, model: Any, name: str, revision: str | None, example: Mapping[str, Any] | None
    ) -> Backbone:
        """The backbone; where it does not run without an example, of one that is made."""
        try:
            return cls(model, name=name, revision=revision, example=example)
        except UnsupportedBackboneError:
            made = None if example is not None else grey_example(name, revision, model)
            if made is None:
                raise
        return cls(model, name=name, revision=revision, example=made)

    def with_decoding(self, **options: bool) -> Backbone:
        """The same model, decoded by other options (`DecodeOptions`) than this backbone, which
        stays as it is: what is found out by decoding each finds out for itself."""
        made = copy.copy(self)
        made.decoding = replace(self.decoding, **options)
        return made

    def _proven(self) -> str | None:
        """The executor that tests have shown to be exact for this class; None: for no such class,
        or on several devices."""
        if self.sharded:
            return "stack" if self.tested else None
        attention = getattr(self.text_config, "_attn_implementation", None)
        return "slots" if self.tested and attention in ("sdpa", "eager") else None

    def _is_stock(self) -> bool:
        vision = self.family.vision
        seen = set() if vision is None else set(self._find(vision).modules())
        kinds = {type(part) for part in self.model.modules() if part not in seen}
        return all(kind.__module__.partition(".")[0] in _STOCK for kind in kinds)

    def is_proven(self, depths: Iterable[int]) -> bool:
        """Whether decoding with exits at these depths was found to be exact."""
        return self.engine is not None and self._proven_at.issuperset(depths)

    def learn(
        self,
        *,
        causal_prompt: bool,
        lossless: bool,
        engine: str | None = None,
        depths: Iterable[int] = (),
    ) -> None:
        """Take over what decoding showed: whether the first token may exit out of the prompt,
        whether drafts can be taken back, and which executor is exact, with exits at which depths.
        What is registered, or was found at other depths, as impossible stays so."""
        again = bool(self._proven_at)
        able = self.family.causal_prompt if again or not self.family.discovered else True
        self.family = replace(self.family, causal_prompt=causal_prompt and able)
        self.lossless = lossless and (self.lossless or not again)
        self.engine = engine or self.engine
        if engine is not None:
            self._proven_at |= frozenset(depths)

    def check_lossless(self) -> None:
        """Raise `UnsupportedBackboneError` where decoding showed that drafts stay in the cache."""
        if not self.lossless:
            raise UnsupportedBackboneError(
                f"Lossless decoding takes drafts back, and {type(self.model).__name__} was found "
                "unable to.",
                "Use a policy with lossless=False: early exit or the full model.",
            )

    def __repr__(self) -> str:
        return (
            f"Backbone({self.name}: {type(self.model).__name__}, {self.depth} layers, width "
            f"{self.width}, {str(self.dtype).removeprefix('torch.')} on {self.device})"
        )

    # -- what it is -------------------------------------------------------------------------

    @property
    def depth(self) -> int:
        """Number of decoder layers L."""
        return len(self.layers)

    @property
    def width(self) -> int:
        """Width D of the decoder's states."""
        return self._layout.width

    @property
    def vocabulary(self) -> int:
        """Tokens V that logits are over."""
        return self._layout.vocabulary

    @property
    def vision(self) -> Any:
        """The vision tower. Raise `InputError` where the family does not say where it is."""
        if self.family.vision is None:
            raise InputError(
                f"Where the vision tower of {type(self.model).__name__} is, is not known.",
                "Name it: register_backbone(..., Family(..., vision='path.to.the.tower')).",
            )
        return self._find(self.family.vision)

    @property
    def positions(self) -> int | None:
        """Tokens that its learned positions are for, or that "dynamic" rotary frequencies stay the
        same for: further on they change with every token, and kept keys are of none of them. None:
        rotary and relative positions have no end."""
        if not isinstance(getattr(self.stack, "embed_positions", None), nn.Embedding):
            return self.rope.grows
        return int(self.text_config.max_position_embeddings)

    def room(self, prompt: int) -> int | None:
        """Tokens that a prompt of so many and its answer may have; None: no end.

        A longer one has other rotary frequencies from its first token on ("longrope"): what is kept
        of a shorter prompt is of no use there.
        """
        switch = self.rope.switches
        return switch if switch is not None and prompt <= switch else self.positions

    @property
    def is_encoder_decoder(self) -> bool:
        configs = (self.model.config, self.text_config)
        return any(getattr(config, "is_encoder_decoder", False) for config in configs)

    @property
    def text_only(self) -> bool:
        """Whether it is a language model, which sees no images."""
        config = self.model.config
        return not self.is_encoder_decoder and config.get_text_config() is config

    @property
    def device(self) -> torch.device:
        """Where inputs go, and where normed states and logits come."""
        return device_of(self.model)

    @property
    def dtype(self) -> torch.dtype:
        return float_dtype(self.layers)

    def fingerprint(self) -> dict[str, Any]:
        """What identifies this backbone; see `offramp.models.fingerprint`."""
        return fingerprint(self)

    # -- reading states ---------------------------------------------------------------------

    def logits(
        self, normed: Tensor, head: nn.Module | None = None, *, code: HeadCode | None = None
    ) -> Tensor:
        """Logits [..., V] of final-normed states [..., D], as the model itself computes them.

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
        bias = getattr(self.head, "bias", None)
        with loaded(self.head):
            weight = float_parameters(self.head)[0]()
            rows = nn.Linear(weight.shape[1], len(ids), bias=bias is not None, device="meta")
            rows.weight = nn.Parameter(weight[ids].to(self.device), requires_grad=False)
            if bias is not None:
                rows.bias = nn.Parameter(bias.detach()[ids].to(self.device), requires_grad=False)
        made: nn.Module = rows if self.reader is self.head else prepacked(rows)
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
        """The final norm, where the family has one."""
        return self.here(self.norm(hidden) if self.norm is not None else hidden)

    def here(self, tensor: Tensor) -> Tensor:
        """The tensor on `device`, from wherever its layer runs."""
        return tensor.to(self.device) if self.sharded else tensor

    # -- driving ----------------------------------------------------------------------------

    def skipped_layer_output(self, call: LayerCall) -> Any:
        """What the layer would return if it left the state as it is."""
        return self.handed_through(call, self._layout.returns[call.index])

    def handed_through(self, call: LayerCall, values: int) -> Any:
        """The same, of a layer that returns this many values; 0: the state alone.

        T5's layers hand the attention biases on, from block 0, which computes the relative one:
        a skipped block must do the same.
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


_STOCK = frozenset(
    {"torch", "transformers", "offramp", "peft"}
    | {"bitsandbytes", "compressed_tensors", "optimum", "torchao"}
)
"""Packages whose modules are held to their families by tests."""


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
