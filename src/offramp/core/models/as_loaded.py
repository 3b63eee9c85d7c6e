"""Whether a model and its exits are as they were loaded: what a guarantee stands on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from offramp.core.models.backbone import Backbone
from offramp.core.models.change import answers_of, same_answers
from offramp.core.models.weights import OwnLinear

DIGITS = 16
"""Hex digits kept of a digest."""
_LOADED: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()
_LOOKED: WeakKeyDictionary[Backbone, tuple[int, bool]] = WeakKeyDictionary()
_EXITS: WeakKeyDictionary[nn.Module, tuple[dict[str, Any], str | None]] = WeakKeyDictionary()


def note_loaded(backbone: Backbone) -> None:
    """Store the state of a model, once, for `as_loaded` to compare with later."""
    if backbone.model not in _LOADED:
        _LOADED[backbone.model] = answers_of(backbone.model)


def as_loaded(backbone: Backbone) -> bool:
    """Return True if a model's weights, code, hooks and PEFT are as they were at `note_loaded`."""
    model = backbone.model
    if model not in _LOADED:
        return True
    version, found = _LOOKED.get(backbone, (-1, True))
    if version != backbone.version():
        found = same_answers(_LOADED[model], answers_of(model))
        _LOOKED[backbone] = backbone.version(), found
    return found


@contextmanager
def still_loaded(backbone: Backbone) -> Iterator[None]:
    """Let what is done to a model count as no change, such as freeing weights that the files of an
    engine hold."""
    before = as_loaded(backbone)
    yield
    if before and backbone.model in _LOADED:
        _LOADED[backbone.model] = answers_of(backbone.model)
        _LOOKED.pop(backbone, None)


def exits_digest(modules: nn.Module) -> str | None:
    """Return the digest of the tensors of exits; made again after the tensors were written to."""
    now = answers_of(modules)
    before, digest = _EXITS.get(modules, (None, None))
    if before is None or not same_answers(before, now):
        digest = None if _is_laid_out(modules) else tensors_digest(modules)[:DIGITS]
        _EXITS[modules] = now, digest
    return digest


def tensors_digest(modules: nn.Module) -> str:
    """SHA-256 over the tensors of trained modules."""
    digest = hashlib.sha256()
    for name, tensor in sorted(modules.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


def _is_laid_out(modules: nn.Module) -> bool:
    return any(isinstance(part, OwnLinear) for part in modules.modules())
