"""Early exits for frozen Hugging Face vision-language models that really skip layers."""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

try:
    __version__ = metadata.version("offramp")
except metadata.PackageNotFoundError:  # run from a source tree that was not installed
    __version__ = "0+unknown"

if TYPE_CHECKING:
    from offramp.adapter import Adapter as Adapter
    from offramp.data.example import Example as Example
    from offramp.engine.confidence import register_score as register_score
    from offramp.engine.generate import generate as generate
    from offramp.engine.policy import ExitPolicy as ExitPolicy
    from offramp.engine.policy import GenerationOutput as GenerationOutput
    from offramp.models.backbone import Backbone as Backbone
    from offramp.models.exits import Exits as Exits
    from offramp.models.exits import register_exit as register_exit
    from offramp.models.registry import Family as Family
    from offramp.models.registry import register_backbone as register_backbone
    from offramp.serving.batch_engine import BatchEngine as BatchEngine
    from offramp.serving.core import EngineConfig as EngineConfig
    from offramp.training.config import TrainConfig as TrainConfig
    from offramp.training.losses import register_loss as register_loss

_HOMES = {
    "Adapter": "adapter",
    "Backbone": "models.backbone",
    "BatchEngine": "serving.batch_engine",
    "EngineConfig": "serving.core",
    "Example": "data.example",
    "Exits": "models.exits",
    "Family": "models.registry",
    "ExitPolicy": "engine.policy",
    "GenerationOutput": "engine.policy",
    "TrainConfig": "training.config",
    "generate": "engine.generate",
    "register_backbone": "models.registry",
    "register_exit": "models.exits",
    "register_loss": "training.losses",
    "register_score": "engine.confidence",
}


def __getattr__(name: str) -> Any:
    # Late, so that `offramp --help` does not wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'offramp' has no attribute {name!r}")
    value = getattr(import_module(f"offramp.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
