"""The models of photographs: small VLMs, each put together from two packages' weights and its own.

"photo" writes captions, and "photo-chat" answers questions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

FOLDERS = {"photo": "", "photo-chat": "chat"}
"""By a model's name, the folder of what was learnt, inside this package."""


def load(name: str = "photo", **how: Any) -> tuple[Any, Any]:
    """The backbone, built where it is not, and its processor.

    name: of `FOLDERS`. how: dtype and device, as of `Backbone.from_pretrained`.

    Raises:
        InputError, StorageError, DataError: as of `offramp_photo.build.built_folder`.
    """
    import offramp_photo.tower  # noqa: F401  registers the tower
    from offramp.core.models.backbone import Backbone
    from offramp.core.models.hub import load_processor
    from offramp.features.input_processor import COMPLETES
    from offramp_photo.build import built_folder

    folder = built_folder(_data(name))
    backbone, processor = Backbone.from_pretrained(folder, **how), load_processor(folder)
    processor.chat_template = COMPLETES
    return backbone, processor


def exits_folder(name: str = "photo") -> Path:
    """Folder of a model's exits. Raise `InputError` where its package is not installed."""
    return _data(name) / "exits"


def example_picture() -> Path:
    """A photograph to try them on. Raise `InputError` where their package is not installed."""
    return _data("photo") / "photographer.jpg"


def _data(name: str) -> Path:
    """Folder of what a model learnt."""
    from offramp_photo.packages import data_folder  # of offramp's, which vLLM does without

    return data_folder() / FOLDERS[name]


def register_in_vllm() -> None:
    """Tell vLLM which class built folders name in their config.json: a plug-in of vLLM's."""
    from offramp_photo.tower import ARCHITECTURE
    from vllm import ModelRegistry

    ModelRegistry.register_model(ARCHITECTURE, "offramp_photo.vllm:PhotoForConditionalGeneration")
