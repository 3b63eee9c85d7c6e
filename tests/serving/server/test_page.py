"""The page at work in a browser: on a phone and a desktop, light and dark."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Page, browser, open_page

from offramp.common.depth_color import depth_color, ink_on
from offramp.features.input_processor import InputProcessor
from offramp.promises.verdict import EXACT, NONE
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
    assert "0.75%" in page.ask("document.getElementById('promise').textContent")
    page.ask("document.getElementById('example').click()")
    page.until("!document.getElementById('go').disabled")
    page.ask("document.getElementById('go').click()")
    page.until(DONE)
    depths = "[...document.querySelectorAll('#{} .token')].map(t => +t.dataset.depth)"
    assert set(page.ask(depths.format("full"))) == {12}
    early = page.ask(depths.format("early"))
    assert len(early) > 5 and min(early) == 2
    tokens = early + page.ask(depths.format("full"))
    style = "t => [t.style.background, t.style.color]"
    colours = f"[...document.querySelectorAll('.token')].map({style})"
    for depth, (ground, ink) in zip(tokens, page.ask(colours), strict=True):
        expected = depth_color(depth, 12)
        assert rgb(ground) == [int(expected[i : i + 2], 16) for i in (1, 3, 5)]
        assert rgb(ink) == ([0] * 3 if ink_on(expected) == "#000" else [255] * 3)
    number = "getComputedStyle(document.querySelector('#early .token'), '::after').content"
    assert page.ask(number) == f'"{early[0]}"'
    assert "An exit is" in page.ask("document.querySelector('main').innerText")
    assert page.ask("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.ask("document.getElementById('promise').textContent") == EXACT
    assert float(page.ask("parseFloat(document.querySelector('#early .depth').textContent)")) >= 2
    assert page.errors == []
    page.shot(tmp_path / f"page-{size}-{'dark' if dark else 'light'}.png")


def rgb(text: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", text)]


def test_the_keyboard_goes_from_word_to_word(page: Page, address: str) -> None:
    page.show(address + "/", 1280, 900)
    page.until("document.getElementById('prompt').value === 'Caption:'")
    page.ask("example().then(both)")
    page.until(DONE)
    stops = "document.querySelectorAll('#early [tabindex=\"0\"]').length"
    assert page.ask(stops) == 1
    page.ask("document.querySelector('#early .token').focus()")
    legend = "document.getElementById('legend').textContent"
    depths = page.ask("[...document.querySelectorAll('#early .token')].map(t => +t.dataset.depth)")
    for depth in depths:
        shown = f"depth {depth} of 12" if depth < 12 else "full depth, 12 layers"
        assert page.ask(legend).endswith(shown)
        page.press("ArrowRight")
    page.press("Home")
    focused = "[...document.querySelectorAll('#early .token')].indexOf(document.activeElement)"
    assert page.ask(focused) == 0 and page.ask(stops) == 1


def test_reading_the_image_is_counted_for_neither_side(page: Page) -> None:
    """A vision tower that takes a second makes neither side slower: what the first side read would
    have helped the second."""
    service = service_of()
    tower = service.served.backbone.model.get_submodule("vision_model")
    slow = tower.register_forward_pre_hook(lambda *_: time.sleep(1.0))
    try:
        with running(service) as address:
            page.show(address + "/", 1280, 900)
            page.until("document.getElementById('prompt').value === 'Caption:'")
            page.ask("example().then(both)")
            page.until(DONE)
            for side in ("early", "full"):
                first = page.ask(f"document.querySelector('#{side} .first').textContent")
                assert float(first.split()[0]) < 1
            said = page.ask("document.getElementById('state').textContent")
            read = re.search(r"first word took ([0-9.]+) s with reading the image", said)
            assert read is not None and float(read[1]) >= 1
    finally:
        slow.remove()


def test_the_prompt_is_one_that_the_exits_were_calibrated_with(page: Page, address: str) -> None:
    page.show(address + "/", 1280, 900)
    page.until("document.getElementById('prompt').value === 'Caption:'")
    for frames, prompt in (
        ([["Describe it."]], "Describe it."),
        ([["Q: ", "? A:"], ["Tell me."]], "Tell me."),
        ([["Q: ", "? A:"]], "Q: …? A:"),
        ([["", ""]], "Caption:"),
    ):
        assert page.ask(f"usual({{guarantee: {{prompts: {frames}}}}})") == prompt


def test_both_sides_are_written_at_once_and_losslessly_unless_asked_otherwise(
    page: Page, address: str
) -> None:
    page.show(address + "/", 1280, 900)
    page.until("document.getElementById('prompt').value === 'Caption:'")
    begun = (
        "window.modes = []; const of = request; request = (m) => { modes.push(m); return of(m); };"
    )
    page.ask(f"{begun} void example().then(both)")
    page.until(DONE)
    modes = page.ask("modes")
    assert set(modes[:2]) == {"lossless", "full"} and modes[2:4] == ["lossless", "full"]
    early, full = (
        page.ask(f"document.querySelector('#{side} .text').textContent")
        for side in ("early", "full")
    )
    assert early and early == full


def test_the_answers_are_the_models(page: Page, address: str) -> None:
    from serving import data_uri

    example = scene_examples()[0]
    page.show(address + "/", 1280, 900)
    page.until("document.getElementById('prompt').value === 'Caption:'")
    page.ask("document.getElementById('mode').value = 'early_exit'")
    page.ask(f"show({data_uri(example.image)!r})")
    page.ask("document.getElementById('go').click()")
    page.until(DONE)
    adapter, processor = shipped()
    encoder = InputProcessor(adapter.backbone, processor)
    output = adapter.generate(encoder.prompts([example]), do_sample=False, max_new_tokens=48)
    shown = page.ask("document.querySelector('#early .text').textContent")
    assert shown == encoder.texts(output.new_tokens)[0]


def test_what_is_promised_of_an_answer_stays_said_beside_it(page: Page, address: str) -> None:
    """In about five words, and whatever is promised of others says nothing else."""
    page.show(address + "/", 1280, 900)
    page.until("document.getElementById('prompt').value === 'Caption:'")
    page.ask("document.getElementById('mode').value = 'early_exit'")
    for prompt, says in (("Write a poem.", NONE), ("Caption:", "Promised: at most 0.75% differ.")):
        page.ask("document.getElementById('state').textContent = ''")
        page.ask(f"document.getElementById('prompt').value = {prompt!r}; void example().then(both)")
        page.until(DONE)
        page.ask("void about()")
        page.until("document.getElementById('go').disabled === false")
        shown = page.ask("document.querySelector('main').innerText")
        assert says in shown
        assert shown.count("Promised") + shown.count("Guarantee") == (says != NONE)


def test_what_is_wrong_is_said_on_the_page(page: Page) -> None:
    with running(service_of(slots=1, keys=("secret",))) as address:
        page.show(address.replace("//", "//u:secret@") + "/", 390, 844)
        page.until("document.getElementById('model').textContent !== '…'")
        page.ask("document.getElementById('prompt').value = '<image><image>'; example()")
        page.until("!document.getElementById('go').disabled")
        page.ask("document.getElementById('go').click()")
        page.until("/stands for images/.test(document.getElementById('state').textContent)")
