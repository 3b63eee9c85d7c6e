"""All seams, in one place: what another package can register with offramp, and under which names.

A package registers when its module is imported, and names the module as an entry point of the group
"offramp.<seam>" under each name that it registers; see docs/extending.md.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "DecoderEngine": "engines",
    "ExitCheck": "core.engine.heads",
    "ExitHeads": "core.engine.heads",
    "Exporter": "cli.exporting",
    "Family": "core.models.registry",
    "Runtime": "adapter.runtime",
    "TextDrafts": "features.text_drafts",
    "WithoutPytorch": "cli.command_line",
    "register_backbone": "core.models.registry",
    "register_condition": "promises.conditions",
    "register_drafter": "features.registration",
    "register_engine": "engines",
    "register_exit": "features.registration",
    "register_heads": "features.registration",
    "register_loss": "training.losses",
    "register_score": "features.registration",
}
__all__ = [*_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    # Late, so that a plug-in's module loads no more than it registers with.
    if name not in _HOMES:
        raise AttributeError(f"module 'offramp.extend' has no attribute {name!r}")
    value = getattr(import_module(f"offramp.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
