"""Packages that add scores, losses, exits or backbones of their own.

One names, as an entry point of the group `offramp.plugins`, a module that registers them when it is
imported, or a function that does when it is called:

    [project.entry-points."offramp.plugins"]
    mine = "my_package.offramp_plugin"
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points

from offramp.errors import InputError

GROUP = "offramp.plugins"
_loaded: set[str] = set()


@cache
def _points() -> tuple[EntryPoint, ...]:
    """Looked for once: it reads a file of every package that is installed."""
    return tuple(entry_points(group=GROUP))


def load_plugins() -> None:
    """Load all plug-ins that are installed, each once, so that options know what they add.

    Raises:
        InputError: one cannot be loaded.
    """
    for point in _points():
        if point.value in _loaded:
            continue
        try:
            plugin = point.load()
            if callable(plugin):
                plugin()
        except Exception as error:  # whatever a foreign module raises
            raise InputError(
                f"The plug-in {point.name!r} ({point.value}) failed: {type(error).__name__}: "
                f"{error}.",
                "Repair it, or uninstall the package that brings it.",
            ) from error
        _loaded.add(point.value)
