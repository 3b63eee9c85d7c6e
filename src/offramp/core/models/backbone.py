"""The frozen vision-language model, held to what was found of it, and how it is decoded."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from offramp.core.errors import InputError, UnsupportedBackboneError
from offramp.core.models.change import Unchanged
from offramp.core.models.discovery.probe import accepts
from offramp.core.models.discovery.self_check import self_check
from offramp.core.models.hub import grey_example, load_model, load_processor
from offramp.core.models.opened import Instead, OpenedModel
from offramp.core.models.readings import Readings
from offramp.core.models.registry import Family, is_tested
from offramp.core.models.stand_in import TORCH, StandIn
from offramp.core.models.weights import rounds_states


class ExactBatches(Protocol):
    """Attention to each token as if it were alone. attention: its name in Hugging Face's table."""

    attention: str

    def check(self, backbone: Any, exits: Any, ours: bool) -> None:
        """Raise `UnsupportedBackboneError` where a token would depend on the tokens beside it.

        ours: whether the model's attention is one that can be replaced.
        """
        ...


@dataclass(frozen=True)
class DecodeOptions:
    """Options of how layers are called in decoding; answers do not depend on them.

    lean: whether the stack's own code around the layers is left out, where that is exact. instead:
    makes replacements of layers, exits and head; None: the modules themselves are called.
    exact_batches: makes a token's numbers equal to the last bit whatever tokens are computed beside
    it (`offramp.features.exact_batches`); prompts are then read one at a time. again: share of
    answers that the model reads again, beside the first of each shape
    (`offramp.core.engine.read_again`); None: the default for models without tests here.
    """

    lean: bool = True
    instead: Instead | None = None
    exact_batches: ExactBatches | None = None
    again: float | None = 0.01


class Backbone(OpenedModel):
    """A frozen VLM with its decoder laid open. Not an `nn.Module`: it is held, never trained.

    Depth d means d decoder layers run, 1..`depth`; the state at depth d is the input of layer d
    (0-based), and the state at full depth is what the final norm reads.
    """

    decoding: DecodeOptions = DecodeOptions()
    """Of all that decodes on it; for others see `with_decoding`."""
    identity: Mapping[str, Any] | None = None
    """Its fingerprint, once all processes have gathered split weights for it together."""

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
                the model reads itself (`offramp.core.models.discovery.self_check`).
        """
        super().__init__(model, example)
        config = self.model.config
        self.name: str = str(
            name or getattr(config, "_name_or_path", "") or type(self.model).__name__
        )
        self.revision: str | None = revision
        self.example: Mapping[str, Any] | None = example
        kinds = [type(layer) for layer in self.layers]
        common = max(kinds, key=kinds.count)
        self.rare_layers: frozenset[int] = frozenset(
            i for i, kind in enumerate(kinds) if kind is not common
        )
        """Layers of another kind than most: Mllama's cross-attention, with the image's keys."""
        self.stock: bool = self._is_stock()
        """Whether all of its code but the vision tower's is of libraries that tests ran it with: a
        class of somebody's own may bear the name of a family and compute otherwise."""
        self.tested: bool = not self.family.discovered and is_tested(config) and self.stock
        """Whether its family has tests here; what is found or registered by others is checked."""
        self.rounds: str | None = rounds_states(self.layers)
        """What makes a token of a call another than alone (`offramp.core.models.weights`)."""
        self.lossless: bool = self.rounds is None
        """Whether drafts can be verified and taken back, as far as decoding has shown."""
        self.engine: str | None = self._proven()
        """The executor that was found to be exact (`offramp.core.executors`); None: not yet."""
        self._learnt = False
        self.in_parts: bool = self.tested and self.rounds is None
        """Whether prompts may be run in parts, as tests or decoding showed; `reads_in_parts`."""
        self.readings: Readings = Readings()
        """What the model found when it read answers again."""
        self._unchanged: Unchanged | None = None
        self._version = 0
        self.reads_ids: bool = accepts(self.stack, "per_layer_inputs")
        """Whether layers read the tokens again, beside the states (Gemma 3n, Gemma 4)."""
        self._layout = found = self_check(self, example)
        self.softcap: float | None = found.softcap
        self.words: int | None = found.words
        self.returns: Sequence[int] = found.returns
        self.read_as: Mapping[int, int] = found.read_as

    @classmethod
    def of(cls, model: Backbone | nn.Module) -> Backbone:
        """Return `model` if it is a backbone, or the backbone of a Hugging Face model.

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
        example: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Backbone:
        """Load a hub name or a folder.

        device: where the model is moved; None: it stays where it was loaded, as `device_map` says.
        example: as of `Backbone`; None: where it is needed, one is made of a grey picture by the
            processor that was saved beside the model.
        kwargs: of transformers. Code that comes with a model runs only with trust_remote_code=True.

        Raises:
            InputError: there is no such model or device, or a package that it needs is missing.
        """
        model = load_model(name, revision=revision, dtype=dtype, device=device, **kwargs)
        return cls._of_loaded(model, str(name), revision, example)

    @classmethod
    def _of_loaded(
        cls, model: Any, name: str, revision: str | None, example: Mapping[str, Any] | None
    ) -> Backbone:
        """The backbone; where it does not run without an example, of one that is made."""
        try:
            return cls(model, name=name, revision=revision, example=example)
        except UnsupportedBackboneError:
            if example is not None:
                raise
        with suppress(InputError):  # there is no processor
            example = grey_example(load_processor(name, revision=revision), model)
        return cls(model, name=name, revision=revision, example=example)

    def with_decoding(self, **options: Any) -> Backbone:
        """Return the same model with other options (`DecodeOptions`). This backbone stays as it is,
        and each of the two learns about its own decoding."""
        made = copy.copy(self)
        made.readings = Readings()
        made.decoding = replace(self.decoding, **options)
        if made.decoding.instead or made.decoding.exact_batches:
            self.check_whole("This way of decoding")
        return made

    def with_tower(self, tower: StandIn | None) -> Backbone:
        """Return the same model with `tower` in its vision tower's place; None: the model's own."""
        made = copy.copy(self)
        made.readings, made.tower = Readings(), tower
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
        files = {name for kind in kinds for name in (kind.__module__, kind.forward.__module__)}
        return all(name.partition(".")[0] in _STOCK for name in files)

    @property
    def reads_in_parts(self) -> bool:
        """Return True if a prompt may run in parts, as chunks and kept beginnings do."""
        return self.in_parts and self.family.causal_prompt and not self.is_encoder_decoder

    def version(self) -> int:
        """Return the number of changes of the model that were seen so far. Plans and findings
        belong to one version."""
        if self._unchanged is None or not self._unchanged():
            model = self.model
            self._unchanged = Unchanged(lambda: (model,))
            self._version += 1
            self.readings = self.readings.following()
            self.seat()
            self.stock = self._is_stock()
            if not self.stock:  # code that tests here never ran
                self.tested = self.in_parts = False
        return self._version

    def learn(
        self,
        *,
        causal_prompt: bool,
        lossless: bool,
        in_parts: bool = True,
        engine: str | None = None,
    ) -> None:
        """Store what decoding showed: whether the first token may exit out of the prompt, whether a
        prompt may run in parts, whether drafts can be taken back, and which executor is exact. What
        was registered or found as impossible before stays so."""
        again, self._learnt = self._learnt, True
        able = self.family.causal_prompt if again or not self.family.discovered else True
        self.family: Family = replace(self.family, causal_prompt=causal_prompt and able)
        self.lossless = lossless and (self.lossless or not (again or self.rounds))
        self.in_parts = in_parts and (self.in_parts or not again)
        self.engine = engine or self.engine

    def check_lossless(self) -> None:
        """Raise `UnsupportedBackboneError` where decoding showed that drafts stay in the cache, or
        the tokens of one call are not what each is alone."""
        if self.rounds is not None:
            raise UnsupportedBackboneError(
                f"Lossless decoding verifies several tokens in one call, and {self.rounds} rounds "
                "what enters it, so that they are not what each is alone.",
                "Use a policy with lossless=False, or load the model in another format.",
            )
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
    def width(self) -> int:
        """Width D of the decoder's states."""
        return self._layout.width

    @property
    def vocabulary(self) -> int:
        """The number of tokens V that logits are over."""
        return self._layout.vocabulary

    @property
    def vision_engine(self) -> str:
        """Return the name of the vision tower's engine, "torch" if it has none; for llama.cpp,
        "mtmd" with a number format."""
        return TORCH if self.tower is None else self.tower.name

    @property
    def text_only(self) -> bool:
        """Return True if this is a language model, without images."""
        config = self.model.config
        return not self.is_encoder_decoder and config.get_text_config() is config


_STOCK = frozenset(
    {"torch", "transformers", "offramp", "offramp_photo", "peft"}
    | {"bitsandbytes", "compressed_tensors", "optimum", "torchao"}
)
"""Packages whose modules are held to their families by tests."""
