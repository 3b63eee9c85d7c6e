"""The pages say what the records say, in Markdown that every renderer shows."""

import re

import pytest

from offramp.report.table import Table
from offramp_lab.pages import photographer
from offramp_lab.pages.readme import PAGES, filled
from offramp_lab.places import ROOT
from offramp_lab.tables.markdown import fill, record


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PAGES)
def test_every_figure_of_a_page_is_its_records(name: str) -> None:
    assert page(name) == filled(name)
    assert page(name).count("<!-- table: ") == page(name).count("<!-- /table -->")
    assert page(name).count("<!-- figure: ") == page(name).count("<!-- /figure -->")


@pytest.mark.parametrize("name", PAGES)
def test_no_line_starts_with_a_figure(name: str) -> None:
    """There a comment would begin a block of HTML, whose Markdown is not rendered."""
    assert not re.findall(r"^\s*<!-- figure", page(name), re.MULTILINE)


@pytest.mark.parametrize("name", PAGES)
def test_no_figure_stands_in_code(name: str) -> None:
    """There the comment is shown."""
    assert not [code for code in re.findall(r"`([^`\n]*)`", page(name)) if "<!--" in code]


def test_the_readmes_example_is_short() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", page("README.md"), re.DOTALL)
    assert len(example.strip().splitlines()) <= 12


def test_the_readme_is_short() -> None:
    text = re.sub(r"<!--.*?-->", "", page("README.md"))
    assert len(text.split()) <= 650 and len(text.splitlines()) <= 120


def test_the_readmes_captions_and_picture_are_their_record() -> None:
    found = record("photographer")
    image = re.compile('href="[^"]*"')  # another zlib packs the same pixels otherwise
    drawn = photographer.draw(found)
    assert image.sub("", page("docs/plots/photographer.svg")) == image.sub("", drawn)
    assert all(f"\n{mode['text']}\n" in page("README.md") for mode in found["modes"].values())
    shown = re.findall(r"^> (.*)\n(.*)$", page("README.md"), re.MULTILINE)
    assert shown  # in order from the first, since each is read behind those before
    assert shown == [(turn["asked"], turn["text"]) for turn in found["turns"]][: len(shown)]


@pytest.mark.parametrize("name", PAGES)
def test_links_between_pages_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", page(name))
    missing = [link for link in links if not ((ROOT / name).parent / link).exists()]
    assert not missing


def test_a_table_is_filled_and_what_is_around_it_stays() -> None:
    text = (
        "a\n\n<!-- table: t -->\n\nold\n\n<!-- /table -->\n\n"
        "b <!-- figure: f -->0<!-- /figure -->.\n"
    )
    after = fill(text, {"t": lambda: Table(("name", "n"), [("x", "1")])}, {"f": lambda: "7"})
    assert after == (
        "a\n\n<!-- table: t -->\n\n| name | n |\n| --- | --- |\n| x | 1 |\n\n<!-- /table -->\n\n"
        "b <!-- figure: f -->7<!-- /figure -->.\n"
    )


def test_a_figure_may_name_a_place_in_a_record() -> None:
    found = fill("is <!-- figure: calibrated/opt/0/n_test:, -->?<!-- /figure -->", {}, {})
    assert found == "is <!-- figure: calibrated/opt/0/n_test:, -->3,000<!-- /figure -->"
    place = "suitability/opt/foretold/depths/depth=2/depth"
    at = f"at <!-- figure: {place} -->2<!-- /figure -->"
    assert fill(at, {}, {}) == at
    several = "trust/entries/engine=llama.cpp_q8_0&way=lossless/whole:~.2f"
    for place, said in (
        (several, "1.71 [1.67, 1.76]"),
        ("five_layers/student/seconds:minutes", "62"),
    ):
        at = f"at <!-- figure: {place} -->{said}<!-- /figure -->"
        assert fill(at, {}, {}) == at


def test_a_table_or_figure_that_nobody_knows_is_an_error() -> None:
    for text in (
        "<!-- table: no -->\n<!-- /table -->",
        "<!-- figure: calibrated/no -->1<!-- /figure -->",
    ):
        with pytest.raises(KeyError):
            fill(text, {}, {})


def test_a_mark_that_is_not_read_as_one_is_an_error() -> None:
    """Else what stands there would never be filled again."""
    for mark in ("<!-- figure: with a space -->1<!-- /figure -->", "<!-- table: name -->"):
        with pytest.raises(ValueError, match="not read"):
            fill(mark, {"name": lambda: Table((), ())}, {})
