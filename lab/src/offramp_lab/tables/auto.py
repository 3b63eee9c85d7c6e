"""What `engine="auto"` chooses."""

from offramp.report.table import Table
from offramp_lab.tables.markdown import MakeTable, Value, record

ENGINES = {
    "torch": "PyTorch",
    "packed": "prepacked",
    "llama.cpp": "llama.cpp, f16",
    "compiled": "compiled",
}


def _cell(row: Value, engine: str) -> str:
    """Milliseconds of an answer by an engine, with the tower as it would be, or why it is out."""
    for way in reversed(row["ways"]):
        if way["engine"] == engine:
            said = way["why"].replace("\n", " ").partition(". ")[0].rstrip(".")
            return said or f"{1e3 * way['answer']:.0f}"
    return ""


def auto() -> Table:
    """By model, milliseconds an answer by each way, and the one that is taken."""
    rows = [
        (row["model"], *(_cell(row, engine) for engine in ENGINES), row["chosen"])
        for row in record("auto")["models"]
    ]
    return Table(("", *ENGINES.values(), "chosen"), rows)


TABLES: dict[str, MakeTable] = {"auto": auto}
