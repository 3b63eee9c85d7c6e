"""A guide is short and has a picture; its measurements are a page of their own."""

from __future__ import annotations

import re

import pytest

from offramp_lab.experiments.drawing import standalone
from offramp_lab.pages.plots import plots
from offramp_lab.places import RECORDS, ROOT

DOCS = ROOT / "docs"
GUIDES = ("serving", "runtimes", "quantisation", "decoding", "models", "guarantees")
"""Guides with a page of measurements."""

MOST_WORDS = 22_000
"""Of all pages together."""

EVIDENCE = re.compile(r"(results|limits|photographs)$")
"""Names of pages that are there for their tables."""


def text(name: str) -> str:
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", GUIDES)
def test_a_guide_has_a_picture_and_leads_to_its_measurements(name: str) -> None:
    assert re.search(r"!\[[^\]]+\]\((plots/)?[\w-]+\.(svg|png)\)", text(name))
    assert f"({name}-results.md" in text(name) and (DOCS / f"{name}-results.md").is_file()


def words(name: str) -> int:
    return len(re.sub(r"<!--.*?-->", "", text(name)).split())


def test_all_pages_together_are_read_in_two_hours() -> None:
    assert sum(words(page.stem) for page in DOCS.glob("*.md")) <= MOST_WORDS


def test_guides_are_eighteen_pages_in_three_paths() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    guides, _, _ = navigation.partition("  - Results:")
    assert re.findall(r"^  - ([\w ]+):$", guides, re.M) == ["Serve", "Train", "On a CPU"]
    pages = re.findall(r"([\w-]+)\.md$", guides, re.M)
    assert len(pages) <= 18 and sum(map(words, pages)) <= 13_000


def test_a_table_follows_a_sentence_that_says_what_it_shows() -> None:
    for page in DOCS.glob("*.md"):
        for before in re.findall(r"(.*)\n+<!-- table: ", page.read_text(encoding="utf-8")):
            assert before and not before.startswith(("#", "|", "<!--")), (page.name, before)


@pytest.mark.parametrize("name", [p.stem for p in DOCS.glob("*.md")])
def test_a_matrix_multiplication_is_called_so(name: str) -> None:
    assert not re.findall(r"\bproducts\b", text(name))


@pytest.mark.parametrize("name", [p.stem for p in DOCS.glob("*.md")])
def test_a_page_that_is_no_evidence_is_at_most_1200_words(name: str) -> None:
    assert EVIDENCE.search(name) or words(name) <= 1200


def test_the_first_two_pages_name_a_path_for_each_kind_of_reader() -> None:
    for page in (text("index"), (ROOT / "README.md").read_text(encoding="utf-8")):
        for reader in ("I serve", "I research", "I run on a CPU"):
            assert f"**{reader}" in page


def test_every_plot_is_drawn_from_its_record() -> None:
    """But for the numbers of matplotlib's version, the words of each committed plot are what the
    records give now."""
    for name, (title, svg) in plots().items():
        words = [
            re.findall(r">([^<>]+)</text>", s)
            for s in (
                (DOCS / "plots" / f"{name}.svg").read_text(encoding="utf-8"),
                standalone(svg, title),
            )
        ]
        assert words[0] == words[1], name


def test_every_record_says_how_to_make_it_again() -> None:
    page = text("reproducing")
    assert not [p.name for p in RECORDS.glob("*.json") if f"`{p.name}`" not in page]


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert not [p.name for p in DOCS.glob("*.md") if f" {p.name}" not in navigation]


def test_an_anchor_leads_to_a_heading() -> None:
    pages = {p.name: p.read_text(encoding="utf-8") for p in DOCS.glob("*.md")}
    for name, page in pages.items():
        for other, anchor in re.findall(r"\]\(([\w-]*(?:\.md)?)#([\w-]+)\)", page):
            target = pages[other or name]
            heads = re.findall(r"^#+ (.*)$", target, re.M)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in heads}
            assert anchor in slugs, (name, other, anchor)
