"""Exits beside an unmodified checkpoint: vLLM builds them as layers after the model's last one, and
their tensors come after the checkpoint's."""

from __future__ import annotations

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


def with_exits(
    weights: Iterable[tuple[str, Any]], exported: Exported
) -> Iterator[tuple[str, Any]]:
    """The checkpoint's tensors by name, then the exits' as layers L, L + 1, and so on.

    Raises:
        Refused: the checkpoint has no layers that the exits are built like, or several kinds.
    """
    exits = list(exported.tensors())
    shapes = {(place, name): tuple(tensor.shape) for place, name, tensor in exits}
    inner = {name for _, name in shapes}
    seen: dict[str, dict[tuple[int, str], tuple[int, ...]]] = defaultdict(dict)
    for name, tensor in weights:
        for prefix, index, rest in _split(name):
            if rest in inner:
                seen[prefix][index, rest] = tuple(tensor.shape)
        yield name, tensor
    fits = [prefix for prefix, layers in seen.items() if _fit(layers, shapes, exported)]
    if len(fits) != 1:
        raise Refused(
            f"The checkpoint has {len(fits)} decoders of {exported.layers} layers that are built "
            f"like the exits in {exported.folder}.",
            "Serve the model that the exits were trained for, in its own Hugging Face checkpoint.",
        )
    for place, name, tensor in exits:
        yield f"{fits[0]}{exported.layers + place}.{name}", tensor


def _split(name: str) -> Iterator[tuple[str, int, str]]:
    """What stands before, at and after each number in a tensor's name."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdigit():
            before = "".join(f"{one}." for one in parts[:place])
            yield before, int(part), ".".join(parts[place + 1 :])


def _fit(
    layers: dict[tuple[int, str], Sequence[int]],
    shapes: dict[tuple[int, str], Sequence[int]],
    exported: Exported,
) -> bool:
    """Whether there are L layers, and those that the exits copy have the exits' tensors."""
    if {index for index, _ in layers} != set(range(exported.layers)):
        return False
    return all(
        layers.get((exported.copied[place], name)) == shape
        for (place, name), shape in shapes.items()
    )
