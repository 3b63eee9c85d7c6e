"""The photo model: a small VLM on real photographs, put together from two packages' weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load(**how: Any) -> tuple[Any, Any]:
    """The backbone, built where it is not, and its processor.

    how: dtype and device, as of `Backbone.from_pretrained`.

    Raises:
        InputError, StorageError, DataError: as of `offramp_photo.build.built_folder`.
    """
    import offramp_photo.tower  # noqa: F401  registers the tower
    from offramp.core.models.backbone import Backbone
    from offramp.core.models.hub import load_processor
    from offramp.features.input_processor import COMPLETES
    from offramp_photo.build import built_folder

    folder = built_folder()
    backbone, processor = Backbone.from_pretrained(folder, **how), load_processor(folder)
    processor.chat_template = COMPLETES
    return backbone, processor


def exits_folder() -> Path:
    """Folder of its exits. Raise `InputError` where its package is not installed."""
    return _data() / "exits"


def example_picture() -> Path:
    """A photograph to try it on. Raise `InputError` where its package is not installed."""
    return _data() / "photographer.jpg"


def _data() -> Path:
    from offramp_photo.packages import data_folder  # of offramp's, which vLLM does without

    return data_folder()


def register_in_vllm() -> None:
    """Tell vLLM which class built folders name in their config.json: a plug-in of vLLM's."""
    from offramp_photo.tower import ARCHITECTURE
    from vllm import ModelRegistry

    ModelRegistry.register_model(ARCHITECTURE, "offramp_photo.vllm:PhotoForConditionalGeneration")
