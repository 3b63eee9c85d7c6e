"""The tables and figures of the Markdown pages by name."""

from offramp_lab.tables import (
    comparison,
    drafts,
    end_to_end,
    lean,
    loads,
    models,
    overview,
    photographs,
    quantised,
    runtimes,
    serving,
    speed,
    suitability,
    tiny,
    vision,
)
from offramp_lab.tables.markdown import Make, MakeTable

_MODULES = (
    overview, tiny, comparison, speed, photographs, lean, serving, quantised, runtimes, drafts,
    end_to_end, loads, models, suitability, vision,
)  # fmt: skip
TABLES: dict[str, MakeTable] = {n: make for m in _MODULES for n, make in m.TABLES.items()}
FIGURES: dict[str, Make] = {
    n: make for m in _MODULES for n, make in getattr(m, "FIGURES", {}).items()
}
