"""Exits beside an unmodified checkpoint: vLLM builds them as layers after the model's last one, of
plain weights, and their tensors come after the checkpoint's."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from offramp_vllm.adapter import Exported
from offramp_vllm.refuse import Refused


@dataclass(frozen=True)
class MoreLayers:
    """Takes a Hugging Face configuration to one with layers for the exits.

    It is handed to vLLM as `hf_overrides` and from there to other processes, so it is a plain
    object of a module. A configuration of another number of layers, such as a draft's, stays.

    layers: L of the backbone. copied: the layer that each exit is built like.
    """

    layers: int
    copied: tuple[int, ...]

    def __call__(self, config: Any) -> Any:
        text = config.get_text_config()
        if getattr(text, "num_hidden_layers", None) != self.layers:
            return config
        for name, value in list(vars(text).items()):
            if "layer" in name and isinstance(value, list) and len(value) == self.layers:
                setattr(text, name, [*value, *(value[index] for index in self.copied)])
        text.num_hidden_layers = self.layers + len(self.copied)
        return config


@contextmanager
def plain_exits(config: Any, exported: Exported) -> Iterator[None]:
    """Have vLLM build exits of plain weights beside quantised layers. config: vLLM's whole."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
        UnquantizedFusedMoEMethod,
    )
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

    scheme = config.quant_config
    if scheme is None:
        yield
        return
    theirs = scheme.get_quant_method

    @functools.wraps(theirs)
    def ours(layer: Any, prefix: str, *args: Any, **kw: Any) -> Any:
        numbers = [int(part) for part in prefix.split(".") if part.isdigit()]
        tower = any(word in prefix for word in _TOWERS)
        if numbers and not tower and exported.layers <= numbers[0] < exported.all_layers:
            if isinstance(layer, LinearBase):
                return UnquantizedLinearMethod()
            if isinstance(layer, RoutedExperts):
                return UnquantizedFusedMoEMethod(layer.moe_config)
        return theirs(layer, prefix, *args, **kw)

    scheme.get_quant_method = ours
    try:
        yield
    finally:
        del scheme.get_quant_method


_TOWERS = "vision", "visual", "audio"
"""In the names of layers that are none of the decoder's."""


@contextmanager
def exits_loaded(exported: Exported) -> Iterator[None]:
    """Have vLLM's loader find the exits' tensors after those of the checkpoint."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    theirs = DefaultModelLoader.get_all_weights

    def ours(self: Any, model_config: Any, model: Any) -> Iterator[tuple[str, Any]]:
        weights = theirs(self, model_config, model)
        is_draft = model_config.hf_text_config.num_hidden_layers != exported.all_layers
        return weights if is_draft else with_exits(weights, exported)

    DefaultModelLoader.get_all_weights = ours  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        DefaultModelLoader.get_all_weights = theirs  # type: ignore[method-assign]


def with_exits(weights: Iterable[tuple[str, Any]], exported: Exported) -> Iterator[tuple[str, Any]]:
    """The checkpoint's tensors by name, then the exits' as layers L, L + 1, and so on.

    Raises:
        Refused: the checkpoint has no layers that the exits are built like, or several kinds, or
            its weights are not those of the exits' backbone.
    """
    spellings = [list(spell(exported.tensors())) for spell in SPELLINGS]
    inner = {name for exits in spellings for _, name, _ in exits}
    seen: dict[str, _Shapes] = defaultdict(dict)
    samples: dict[str, dict[str, Sequence[int]]] = defaultdict(dict)
    for name, tensor in weights:
        for prefix, index, rest in _split(name):
            held = _plain_name(rest)
            if held in inner:
                seen[prefix][index, held] = tuple(tensor.shape) if held == rest else None
            wanted = exported.sample.get(f"{index}.{rest}")
            is_plain = tensor.is_floating_point() and tensor.itemsize > 1
            if wanted is not None and is_plain and "experts." not in rest:  # spelled in many ways
                samples[prefix][f"{index}.{rest}"] = bits_of(tensor, len(wanted))
        yield name, tensor
    fits = [
        (prefix, exits)
        for prefix, layers in seen.items()
        for exits in spellings
        if _fit(layers, exits, exported)
    ]
    decoders = {prefix for prefix, _ in fits}
    if len(decoders) != 1:
        raise Refused(
            f"The checkpoint has {len(decoders)} decoders of {exported.layers} layers that are "
            f"built like the exits in {exported.folder}.",
            "Serve the model that the exits were trained for, in its own Hugging Face checkpoint.",
        )
    prefix, exits = fits[0]
    _check_sample(samples[prefix], exported)
    for place, name, tensor in exits:
        yield f"{prefix}{exported.layers + place}.{name}", tensor


_Shapes = dict[tuple[int, str], Sequence[int] | None]
"""Of each layer's tensors; None: packed by a quantisation."""
_Exits = Iterable[tuple[int, str, Any]]
_PACKED = ".weight_packed", ".qweight"


def _plain_name(name: str) -> str:
    """The name that a tensor has where it is not packed."""
    for end in _PACKED:
        if name.endswith(end):
            return name.removesuffix(end) + ".weight"
    return name


def _as_they_are(exits: _Exits) -> _Exits:
    return exits


def _apart(exits: _Exits) -> _Exits:
    """Experts one by one, as checkpoints have them and transformers' modules do not."""
    for place, name, tensor in exits:
        stem, _, last = name.rpartition("experts.")
        if last not in ("gate_up_proj", "down_proj"):
            yield place, name, tensor
            continue
        for number, expert in enumerate(tensor):
            parts = [(last, expert)]
            if last == "gate_up_proj":
                gate, up = expert.chunk(2)
                parts = [("gate_proj", gate), ("up_proj", up)]
            for part, weight in parts:
                yield place, f"{stem}experts.{number}.{part}.weight", weight.contiguous()


def _mixtral(exits: _Exits) -> _Exits:
    """The same in the words of Mixtral's checkpoints."""
    words = {
        "mlp.": "block_sparse_moe.",
        ".gate_proj.": ".w1.",
        ".up_proj.": ".w3.",
        ".down_proj.": ".w2.",
    }
    for place, name, tensor in _apart(exits):
        said = name
        for ours, theirs in words.items():
            said = said.replace(ours, theirs)
        yield place, said, tensor


def _transposed(exits: _Exits) -> _Exits:
    """Experts together, with their last two axes swapped, as checkpoints of Qwen3-VL-MoE are."""
    for place, name, tensor in exits:
        together = name.endswith(("experts.gate_up_proj", "experts.down_proj"))
        yield place, name, tensor.transpose(1, 2).contiguous() if together else tensor


SPELLINGS = (_as_they_are, _apart, _mixtral, _transposed)
ALIKE = 0.9
"""Share of the sampled values that agree, at least: precisions round differently."""


def bits_of(tensor: Any, values: int) -> list[int]:
    """Some evenly spaced values of a tensor as the bits of their bfloat16, as offramp's fingerprint
    of a backbone has them."""
    import torch

    flat = tensor.flatten()
    few = flat[:: max(1, flat.numel() // _VALUES)][:values]
    return few.to(torch.bfloat16).view(torch.int16).tolist()  # type: ignore[no-any-return]


_VALUES = 8
"""Of a tensor, in the fingerprint."""


def _check_sample(found: dict[str, Sequence[int]], exported: Exported) -> None:
    """Raise `Refused` where a checkpoint's weights are not those that the exits were trained on.
    Tensors that a quantised checkpoint has under other names are not compared."""
    pairs = [
        pair
        for name, bits in found.items()
        for pair in zip(exported.sample[name], bits, strict=False)
    ]
    equal = sum(a == b for a, b in pairs) / max(1, len(pairs))
    if equal < ALIKE:
        raise Refused(
            f"The exits in {exported.folder} are of another backbone: {equal:.0%} of a sample of "
            "the checkpoint's weights agree.",
            "Serve the model that they were trained for, or train exits for this one.",
        )


def _split(name: str) -> Iterator[tuple[str, int, str]]:
    """What stands before, at and after each number in a tensor's name."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdigit():
            before = "".join(f"{one}." for one in parts[:place])
            yield before, int(part), ".".join(parts[place + 1 :])


def _fit(layers: _Shapes, exits: Sequence[tuple[int, str, Any]], exported: Exported) -> bool:
    """Whether there are L layers, and those that the exits copy have the exits' tensors."""
    if {index for index, _ in layers} != set(range(exported.layers)):
        return False
    return all(
        layers.get((exported.copied[place], name), ()) in (None, tuple(tensor.shape))
        for place, name, tensor in exits
    )
