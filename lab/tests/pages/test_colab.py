"""A notebook's page leads to Colab, where the repository has an address on GitHub."""

from types import SimpleNamespace

import pytest

from offramp_lab.pages.colab import on_page_content


def page(name: str, address: str | None) -> str:
    at = SimpleNamespace(file=SimpleNamespace(src_uri=name))
    return on_page_content("<p>body</p>", at, SimpleNamespace(repo_url=address), None)


def test_a_notebook_opens_in_colab_and_says_what_to_install() -> None:
    shown = page("notebooks/a.ipynb", "https://github.com/us/offramp/")
    assert "colab.research.google.com/github/us/offramp/blob/main/docs/notebooks/a.ipynb" in shown
    assert "git+https://github.com/us/offramp'" in shown and shown.endswith("<p>body</p>")


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("serving.md", "https://github.com/us/offramp"),
        ("notebooks/a.ipynb", None),
        ("notebooks/a.ipynb", "https://example.org/us/offramp"),
    ],
)
def test_other_pages_and_addresses_get_no_badge(name: str, address: str | None) -> None:
    assert page(name, address) == "<p>body</p>"
