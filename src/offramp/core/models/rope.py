"""Rotary positions whose frequencies depend on how long the text is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from offramp.core.models.discovery.twin import graft, twin


@dataclass(frozen=True)
class LengthDependentRope:
    """The length, in tokens, at which a model's rotary frequencies change; None: no such length.

    grows: the frequencies change with every token after this one ("dynamic"). switches: longer
    texts have other frequencies, from the first token on ("longrope").
    """

    grows: int | None = None
    switches: int | None = None

    @classmethod
    def of(cls, config: Any) -> LengthDependentRope:
        """Read a text model's configuration; the smallest length where kinds of layers differ."""
        found: dict[str, int] = {}
        for rope in _settings(config):
            kind = str(rope.get("rope_type") or rope.get("type") or "")
            field, name = "grows", "max_position_embeddings"
            if kind == "longrope":
                field, name = "switches", "original_max_position_embeddings"
            elif "dynamic" not in kind:
                continue
            at = rope.get(name) or getattr(config, name, None)
            if at is None:
                at = config.max_position_embeddings
            found[field] = min(int(at), found.get(field, int(at)))
        return cls(**found)


def _settings(config: Any) -> list[Mapping[str, Any]]:
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    own = [settings for settings in rope.values() if isinstance(settings, Mapping)]
    return own or [rope]


def with_own_frequencies(root: nn.Module, stack: str) -> None:
    """Give the stack in a twin its own frequencies. Modules rewrite frequencies during a call, and
    other threads would read the changed ones."""
    for name, module in [*root.get_submodule(stack).named_children()]:
        if hasattr(module, "rope_type") and hasattr(module, "inv_freq"):
            graft(root, f"{stack}.{name}" if stack else name, _with_own_buffers(module))


def _with_own_buffers(module: nn.Module) -> nn.Module:
    made = twin(module)
    buffers = {name: None if it is None else it.clone() for name, it in module._buffers.items()}
    made.__dict__["_buffers"] = buffers
    return made
