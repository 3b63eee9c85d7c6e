"""What installed packages add, by name: each seam is a group of entry points.

A package names, in the group of a seam, what it adds and the module that registers it when it is
imported:

    [project.entry-points."offramp.scores"]
    top_gap = "my_package.scores"

A name is looked for without running anybody's code, so that the help of a command can tell it. The
module is imported when the name is asked for. One that fails harms only who asks for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

from offramp.core.errors import InputError, did_you_mean
from offramp.core.missing import how_to_install

log = logging.getLogger(__name__)

Seam = Literal[
    "scores",
    "drafters",
    "exits",
    "losses",
    "engines",
    "exporters",
    "commands",
    "programs",
    "models",
]
"""The groups, without "offramp." before them."""
PACKAGES = {
    "llama.cpp": "offramp-llama-cpp",
    "gguf": "offramp-llama-cpp",
    "mtmd": "offramp-llama-cpp",
    "vllm": "offramp-vllm",
    "draft-model": "offramp-vllm",
    "speculators": "offramp-vllm",
    "photo": "offramp-photo",
    **dict.fromkeys(
        ("agreement", "patience", "saturation", "off_ramp", "propagate"), "offramp-lab"
    ),
}
"""Packages of this project by what they add, so that a missing one is named with its remedy."""


@cache
def _points(seam: Seam) -> dict[str, EntryPoint]:
    """The entry points of a seam by name, looked for once; of two of a name, the first."""
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=f"offramp.{seam}"):
        found.setdefault(point.name, point)
    return found


def offered(seam: Seam) -> tuple[str, ...]:
    """Return the names that installed packages add to a seam."""
    return tuple(_points(seam))


def plugin(seam: Seam, name: str) -> Any:
    """Return the object of the entry point `name`, after an import of its module.

    Raises:
        InputError: no installed package has it, or the one that has it fails.
    """
    point = _points(seam).get(name)
    if point is None:
        raise InputError(f"No installed package brings {name!r}.", remedy(name, ()))
    try:
        return point.load()
    except (Exception, SystemExit) as error:  # whatever a foreign module raises
        raise InputError(
            f"The plug-in {name!r} ({point.value}) failed: {type(error).__name__}: {error}.",
            "Repair it, or uninstall the package that brings it.",
        ) from error


def check_registered(
    what: str, seam: Seam, name: str, known: Callable[[], Collection[str]]
) -> None:
    """Import the plug-in that registers a name, if the registry does not know the name.

    what: the word for the name in the error, such as "Score". known: returns the registry's names.

    Raises:
        InputError: neither the registry nor an installed package knows the name, or the package
            that brings it fails or registers something else.
    """
    if name in known():
        return
    if name in _points(seam):
        plugin(seam, name)
        if name in known():
            return
        raise InputError(
            f"The plug-in {name!r} ({_points(seam)[name].value}) registers no such name.",
            "Repair it, or uninstall the package that brings it.",
        )
    names = tuple(dict.fromkeys((*known(), *offered(seam))))
    raise InputError(f"{what} {name!r} is not known.", remedy(str(name), names))


def remedy(name: str, known: Collection[str]) -> str:
    """Return a remedy for a name that is not among the known ones."""
    if name in PACKAGES:
        others = f" Or take one of these: {', '.join(known)}." if known else ""
        return f"It comes with {PACKAGES[name]}. {how_to_install(PACKAGES[name])}.{others}"
    return did_you_mean(name, known)


def brought(seam: Seam) -> dict[str, Any]:
    """Return what the entry points of a seam load, by name; the log says why one fails."""
    found = {}
    for name in offered(seam):
        try:
            found[name] = plugin(seam, name)
        except InputError as error:
            log.warning("%s", error.problem)
    return found
