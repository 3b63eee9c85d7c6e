"""The page at work in a browser: on a phone and a desktop, light and dark."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Page, browser, open_page

from offramp.models.input_processor import InputProcessor
from serving import running, scene_examples, service_of, shipped

pytestmark = pytest.mark.skipif(browser() is None, reason="no Chromium on this machine")
SIZES = {"phone": (390, 844), "desktop": (1280, 900)}
DONE = "/speed of the full model/.test(document.getElementById('state').textContent)"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running(service_of()) as found:
        yield found


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with open_page() as found:
        yield found


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_both_answers_appear_coloured_by_depth(
    size: str, dark: bool, page: Page, address: str, tmp_path: Path
) -> None:
    page.errors.clear()
    page.show(address + "/", *SIZES[size], dark=dark)
    page.until("document.getElementById('prompt').value === 'Caption:'")
    assert page.ask("document.getElementById('go').disabled") is True
    page.ask("document.getElementById('example').click()")
    page.until("!document.getElementById('go').disabled")
    page.ask("document.getElementById('go').click()")
    page.until(DONE)
    depths = "[...document.querySelectorAll('#{} .token')].map(t => +t.dataset.depth)"
    assert set(page.ask(depths.format("full"))) == {12}
    early = page.ask(depths.format("early"))
    assert len(early) > 5 and min(early) == 2
    tokens = early + page.ask(depths.format("full"))
    colours = "new Set([...document.querySelectorAll('.token')].map(t => t.style.background)).size"
    assert page.ask(colours) == len(set(tokens))
    assert page.ask("document.documentElement.scrollWidth <= window.innerWidth")
    assert "0.75%" in page.ask("document.getElementById('promise').textContent")
    assert float(page.ask("parseFloat(document.querySelector('#early .depth').textContent)")) >= 2
    assert page.errors == []
    page.shot(tmp_path / f"page-{size}-{'dark' if dark else 'light'}.png")


def test_the_answers_are_the_models(page: Page, address: str) -> None:
    from serving import data_uri

    example = scene_examples()[0]
    page.show(address + "/", 1280, 900)
    page.until("document.getElementById('prompt').value === 'Caption:'")
    page.ask(f"show({data_uri(example.image)!r})")
    page.ask("document.getElementById('go').click()")
    page.until(DONE)
    adapter, processor = shipped()
    encoder = InputProcessor(adapter.backbone, processor)
    output = adapter.generate(encoder.prompts([example]), do_sample=False, max_new_tokens=48)
    shown = page.ask("document.querySelector('#early .text').textContent")
    assert shown == encoder.texts(output.new_tokens)[0]


def test_what_is_wrong_is_said_on_the_page(page: Page) -> None:
    with running(service_of(slots=1, keys=("secret",))) as address:
        page.show(address.replace("//", "//u:secret@") + "/", 390, 844)
        page.until("document.getElementById('model').textContent !== '…'")
        page.ask("document.getElementById('prompt').value = '<image><image>'; example()")
        page.until("!document.getElementById('go').disabled")
        page.ask("document.getElementById('go').click()")
        page.until("/stands for images/.test(document.getElementById('state').textContent)")
