"""Fill the tables and figures of the Markdown pages from the committed records.

`python -m offramp_lab.pages.readme` rewrites them, so that no measured figure is typed by hand. A
page says in comments what stands where: see `offramp_lab.tables.markdown`.
"""

from offramp.storage import write_atomic
from offramp_lab.places import ROOT
from offramp_lab.tables import FIGURES, TABLES
from offramp_lab.tables.markdown import fill

PAGES = (
    "README.md",
    "docs/guarantees.md",
    "docs/guarantees-results.md",
    "docs/results.md",
    "docs/decoding-results.md",
    "docs/defaults.md",
    "docs/defaults-results.md",
    "docs/adversary-results.md",
    "docs/photographs.md",
    "docs/end-to-end.md",
    "docs/end-to-end-results.md",
    "docs/batch-engine.md",
    "docs/llama-cpp-kernels.md",
    "docs/llama-cpp-models.md",
    "docs/models-results.md",
    "docs/peers.md",
    "docs/quantisation-libraries.md",
    "docs/quantisation-limits.md",
    "docs/quantisation-results.md",
    "docs/runtimes-limits.md",
    "docs/runtimes-results.md",
    "docs/serving-results.md",
    "docs/speculators.md",
    "docs/suitability.md",
    "docs/text-models.md",
    "docs/torch-engines.md",
    "docs/vision-towers.md",
    "docs/vision-towers-results.md",
    "docs/watch.md",
    "docs/without-pytorch-results.md",
    "lab/src/offramp_lab/recipes/tiny_vlm/README.md",
)


def filled(name: str) -> str:
    """The page with the figures that the records have now."""
    return fill((ROOT / name).read_text(encoding="utf-8"), TABLES, FIGURES)


def main() -> None:
    for name in PAGES:
        write_atomic(ROOT / name, filled(name))


if __name__ == "__main__":
    main()
