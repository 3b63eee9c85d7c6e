"""The tables and figures of the Markdown pages by name: those of every module here."""

from importlib import import_module
from pkgutil import iter_modules

from offramp_lab.tables.markdown import Make, MakeTable

_MODULES = [import_module(f"{__name__}.{found.name}") for found in iter_modules(__path__)]
TABLES: dict[str, MakeTable] = {
    n: make for m in _MODULES for n, make in getattr(m, "TABLES", {}).items()
}
FIGURES: dict[str, Make] = {
    n: make for m in _MODULES for n, make in getattr(m, "FIGURES", {}).items()
}
