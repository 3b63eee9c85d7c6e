"""Early exits for frozen Hugging Face vision-language models that really skip layers."""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

__version__ = "0+unknown"  # run from a source tree that was not installed
for _name in ("offramp", "offramp-edge"):
    try:
        __version__ = metadata.version(_name)
        break
    except metadata.PackageNotFoundError:
        continue

if TYPE_CHECKING:
    from offramp.adapter.adapter import Adapter, attach
    from offramp.calibration.calibrate import calibrate, calibrated
    from offramp.core.decoding.policy import ExitPolicy, GenerationOutput
    from offramp.core.engine.generate import generate
    from offramp.core.errors import OfframpError
    from offramp.core.models.backbone import Backbone
    from offramp.core.models.exits import Exits
    from offramp.core.models.registry import Family, register_backbone
    from offramp.engines import register_engine
    from offramp.engines.loading import Loaded, load
    from offramp.features.constraint import JsonConstraint
    from offramp.features.input_processor import InputProcessor
    from offramp.features.registration import register_drafter, register_exit, register_score
    from offramp.inputs.example import Example
    from offramp.promises.conditions import register_condition
    from offramp.serving.batch_engine import BatchEngine
    from offramp.serving.engine_config import EngineConfig
    from offramp.training.config import TrainConfig
    from offramp.training.losses import register_loss
    from offramp.training.trainer import train

__all__ = [
    "Adapter",
    "Backbone",
    "BatchEngine",
    "EngineConfig",
    "Example",
    "ExitPolicy",
    "Exits",
    "Family",
    "GenerationOutput",
    "InputProcessor",
    "JsonConstraint",
    "Loaded",
    "OfframpError",
    "TrainConfig",
    "attach",
    "calibrate",
    "calibrated",
    "generate",
    "load",
    "register_backbone",
    "register_condition",
    "register_drafter",
    "register_engine",
    "register_exit",
    "register_loss",
    "register_score",
    "train",
]

_HOMES = {
    "Adapter": "adapter.adapter",
    "Backbone": "core.models.backbone",
    "BatchEngine": "serving.batch_engine",
    "EngineConfig": "serving.engine_config",
    "Example": "inputs.example",
    "ExitPolicy": "core.decoding.policy",
    "Exits": "core.models.exits",
    "Family": "core.models.registry",
    "GenerationOutput": "core.decoding.policy",
    "InputProcessor": "features.input_processor",
    "JsonConstraint": "features.constraint",
    "Loaded": "engines.loading",
    "OfframpError": "core.errors",
    "TrainConfig": "training.config",
    "attach": "adapter.adapter",
    "calibrate": "calibration.calibrate",
    "calibrated": "calibration.calibrate",
    "generate": "core.engine.generate",
    "load": "engines.loading",
    "register_backbone": "core.models.registry",
    "register_condition": "promises.conditions",
    "register_drafter": "features.registration",
    "register_engine": "engines",
    "register_exit": "features.registration",
    "register_loss": "training.losses",
    "register_score": "features.registration",
    "train": "training.trainer",
}


def __getattr__(name: str) -> Any:
    # Late, so that `offramp --help` does not wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'offramp' has no attribute {name!r}")
    value = getattr(import_module(f"offramp.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
