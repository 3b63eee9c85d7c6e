"""Early exits for frozen Hugging Face vision-language models that really skip layers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from offramp.adapter import Adapter as Adapter
    from offramp.backbone import Backbone as Backbone
    from offramp.config import TrainConfig as TrainConfig
    from offramp.decode import generate as generate
    from offramp.examples import Example as Example
    from offramp.exits import Exits as Exits
    from offramp.families import Family as Family
    from offramp.families import register_backbone as register_backbone
    from offramp.policy import Generation as Generation
    from offramp.policy import Policy as Policy

_HOMES = {
    "Adapter": "adapter",
    "Backbone": "backbone",
    "Family": "families",
    "register_backbone": "families",
    "TrainConfig": "config",
    "Generation": "policy",
    "Policy": "policy",
    "generate": "decode",
    "Example": "examples",
    "Exits": "exits",
}


def __getattr__(name: str) -> Any:
    # Late, so that `offramp --help` does not wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'offramp' has no attribute {name!r}")
    value = getattr(import_module(f"offramp.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
