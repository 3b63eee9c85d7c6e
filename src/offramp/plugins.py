"""Packages that add scores, policies of keys and values, losses, exits or backbones of their own.

One names, as an entry point of the group `offramp.plugins`, a module that registers them when it is
imported, or a function that does when it is called:

    [project.entry-points."offramp.plugins"]
    mine = "my_package.offramp_plugin"
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from offramp.errors import InputError, did_you_mean

GROUP = "offramp.plugins"
LAB = ("agreement", "patience", "saturation", "propagate")
"""Baselines that the plug-in of offramp-lab brings."""
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


def check_registered(what: str, name: str, known: Callable[[], Collection[str]]) -> None:
    """Raise `InputError` where a registry does not know a name, and no plug-in, once they are
    loaded, brings it.

    what: as the error calls it, such as "Score". known: the registry's names.
    """
    if name not in known():
        load_plugins()
    if name not in known():
        raise InputError(f"{what} {name!r} is not known.", not_registered(str(name), known()))


def not_registered(name: str, known: Collection[str]) -> str:
    """Return what to do about a name that no registry knows."""
    if name in LAB:
        return (
            "It is a baseline of offramp-lab: install that (pip install -e lab, in a checkout of "
            f"offramp), or take one of these: {', '.join(known)}."
        )
    return did_you_mean(name, known)
