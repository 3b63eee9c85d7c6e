"""Where things are in the checkout that the lab works on."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
RECORDS = ROOT / "lab" / "records"
RUNS = ROOT / "runs"
DOCS = ROOT / "docs"
PHOTOGRAPHS = ROOT.parent / "shared" / "data"
"""For research only, and no part of the repository."""
