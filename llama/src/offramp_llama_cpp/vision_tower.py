"""An mmproj file in the place of a model's vision tower and projector, for what stays in PyTorch.

The model's own processor goes on resizing images: the file's tower is given what that made, as
bytes again, and libmtmd has nothing left to resize.
"""

from __future__ import annotations

import inspect
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offramp.adapter.adapter import Adapter
from offramp.core.errors import AdapterError
from offramp.core.models.backbone import Backbone
from offramp.core.models.stand_in import StandIn
from offramp_llama_cpp.gguf_files import whole_projector
from offramp_llama_cpp.projector import Tower
from offramp_llama_cpp.segment import EngineOptions
from offramp_llama_cpp.vision_export import Kind, Looks, check_tower, features_of, kind_of

MTMD = "mtmd"


class MtmdTower(StandIn):
    """Tower and projector in libmtmd: tokens stand where the tower's states did, and the model's
    projector hands them on."""

    def __init__(self, tower: Tower, own: nn.Module, kind: Kind, config: Any, looks: Looks) -> None:
        empty = {} if kind.projector is None else {kind.projector: nn.Identity()}
        super().__init__(f"{MTMD} {tower.said['offramp.format']}", own, empty)
        self._tower, self._kind, self._config, self._looks = tower, kind, config, looks
        self._names = [*inspect.signature(type(own).forward).parameters][1:]
        weakref.finalize(self, tower.close)

    @property
    def packed_bytes(self) -> int:
        """Return the bytes of the weights that our own kernels multiply."""
        return self._tower.packed_bytes

    def forward(self, *args: Any, **kw: Any) -> Any:
        """Raise `InputError` where a video came."""
        call = {**dict(zip(self._names, args, strict=False)), **kw}
        call.setdefault("pixel_values", call.get("hidden_states"))  # as Qwen's towers call them
        seen = self._kind.pictures(self._config, call)
        rows = [self._tower.rows(self._looks.pixels(picture)) for picture in seen]
        made = [torch.from_numpy(each).to(call["pixel_values"]) for each in rows]
        return self._kind.standing(self._config, made)


def with_mtmd(adapter: Adapter, folder: str | Path, *, threads: int = 1) -> Adapter:
    """The same exits on a backbone that sees by the mmproj file which was exported beside them.

    Raises:
        AdapterError: there is no such file, or it is damaged.
        UnsupportedBackboneError: as of `mtmd_tower`.
    """
    backbone, options = adapter.backbone, EngineOptions(threads=threads)
    tower = mtmd_tower(backbone, whole_projector(Path(folder)), options)
    return replace(adapter, backbone=backbone.with_tower(tower))


def mtmd_tower(backbone: Backbone, file: Path, options: EngineOptions) -> MtmdTower:
    """Return what stands in the place of a backbone's tower and projector.

    Raises:
        AdapterError: the file is missing, or `export_vision` did not write it.
        UnsupportedBackboneError: the file does not see what the model sees.
    """
    kind = kind_of(backbone)
    tower = Tower(file, options, width=backbone.width, features=features_of(backbone))
    try:
        parts = ("clip.vision.image_mean", "clip.vision.image_std")
        if missing := [key for key in (*parts, "offramp.format") if key not in tower.said]:
            raise AdapterError(
                f"{file} does not say its {missing[0]}.", "Export it again, with --vision q8_0."
            )
        mean, std = (tuple(tower.said[key]) for key in parts)
        looks = Looks(mean, std)
        check_tower(backbone, tower, looks)
    except BaseException:
        tower.close()
        raise
    own = backbone.model.get_submodule(str(backbone.family.vision))
    return MtmdTower(tower, own, kind, backbone.model.config, looks)
