"""Fill the tables and figures of the Markdown pages from the committed records.

`python -m offramp_lab.pages.readme` rewrites them, so that no measured figure is typed by hand. A
page says in comments what stands where: see `offramp_lab.tables.markdown`.
"""

from offramp.core.storage import write_atomic
from offramp_lab.places import DOCS, ROOT
from offramp_lab.tables import FIGURES, TABLES
from offramp_lab.tables.markdown import fill

PAGES = ("README.md", *sorted(f"docs/{page.name}" for page in DOCS.glob("*.md")))


def filled(name: str) -> str:
    """The page with the figures that the records have now."""
    return fill((ROOT / name).read_text(encoding="utf-8"), TABLES, FIGURES)


def main() -> None:
    for name in PAGES:
        write_atomic(ROOT / name, filled(name))


if __name__ == "__main__":
    main()
