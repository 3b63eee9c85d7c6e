"""The tables and figures of the Markdown pages by name."""

from offramp_lab.tables import (
    comparison,
    lean,
    loads,
    overview,
    photographs,
    quantised,
    quantised_models,
    runtimes,
    serving,
    speed,
    tiny,
)
from offramp_lab.tables.markdown import Make

_MODULES = (
    overview,
    tiny,
    comparison,
    speed,
    photographs,
    lean,
    serving,
    quantised,
    quantised_models,
    runtimes,
    loads,
)
TABLES: dict[str, Make] = {n: make for module in _MODULES for n, make in module.TABLES.items()}
FIGURES: dict[str, Make] = {
    name: make
    for module in (
        tiny,
        comparison,
        speed,
        photographs,
        lean,
        runtimes,
        quantised,
        quantised_models,
        loads,
    )
    for name, make in module.FIGURES.items()
}
