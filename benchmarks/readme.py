"""Fill the tables and figures of the Markdown pages from the committed records.

`python -m benchmarks.readme` rewrites them, so that no measured figure is typed by hand. A page
says in comments what stands where: see `benchmarks.tables.markdown`.
"""

from benchmarks.tables import FIGURES, TABLES
from benchmarks.tables.markdown import ROOT, fill
from offramp.storage import write_atomic

PAGES = (
    "README.md",
    "docs/guarantees.md",
    "docs/results.md",
    "docs/decoding.md",
    "docs/defaults.md",
    "docs/photographs.md",
    "docs/quantisation.md",
    "docs/runtimes.md",
    "docs/serving.md",
    "recipes/tiny_vlm/README.md",
)


def filled(name: str) -> str:
    """The page with the figures that the records have now."""
    return fill((ROOT / name).read_text(encoding="utf-8"), TABLES, FIGURES)


def main() -> None:
    for name in PAGES:
        write_atomic(ROOT / name, filled(name))


if __name__ == "__main__":
    main()
