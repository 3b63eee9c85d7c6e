"""Runs vision towers ahead of the prompts that need them, beside a decoder that writes for others.

A model is run up to its tower, whose output a `VisionCache` keeps; when the prompt is read, its
image is known. How a family gets from a processor's output to its tower is the family's own code.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import Any

import torch

from offramp.core.executors.prefill import Prefill, prepare
from offramp.core.models.backbone import Backbone
from offramp.core.models.discovery.twin import graft
from offramp.core.models.intercept import InterceptedModel
from offramp.core.models.opened import LayerCall
from offramp.features.vision_cache import RememberedTower, VisionCache

log = logging.getLogger(__name__)


class _Reached(Exception):
    """The tower's output is kept, or the decoder would begin."""


class _LastTower(RememberedTower):
    """A tower that ends the forward pass once it has run."""

    def __call__(self, *args: Any, **kw: Any) -> Any:
        super().__call__(*args, **kw)
        raise _Reached


class ImageReader:
    """Computes the features of prompts' images into a cache. Threads take turns."""

    def __init__(self, backbone: Backbone, cache: VisionCache) -> None:
        """Raise `InputError` where it is not known where the backbone's vision tower is."""
        self._intercepted = InterceptedModel(backbone, self)
        tower = _LastTower(backbone.vision, cache)
        graft(self._intercepted.model, str(backbone.family.vision), tower)
        self._turn = threading.Lock()

    def layer(self, call: LayerCall) -> Any:
        """Stop at the decoder's first layer, where the vision tower has already run."""
        raise _Reached

    @staticmethod
    def wanted(inputs: Mapping[str, Any]) -> bool:
        """Return True if a prompt brings an image."""
        return any(name.startswith("pixel_values") for name in inputs)

    def read(self, inputs: Mapping[str, Any]) -> None:
        """Compute the features of one prompt's images. inputs: a processor's; errors in them are
        left to the prompt's own reader."""
        if not self.wanted(inputs):
            return
        with self._turn, torch.inference_mode():
            try:
                prepared = prepare(self._intercepted.model, inputs, do_sample=False, num_beams=1)
                Prefill(self._intercepted, prepared)
            except _Reached:
                return
            except Exception as error:
                log.debug("An image was not read ahead: %s", error)
