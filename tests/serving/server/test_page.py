"""The page at work in a browser: on a phone and a desktop, light and dark."""

from __future__ import annotations

import base64
import io
import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from browser import Page, browser, open_page, violations
from PIL import Image

from offramp.common.depth_color import depth_color, ink_on
from offramp.core.decoding.policy import ExitPolicy
from offramp.features.input_processor import InputProcessor
from offramp.inputs.example import Example
from offramp.promises.verdict import EXACT, NONE
from offramp.serving.engine_config import EngineConfig
from offramp.serving.server.app import page_policy
from offramp.serving.server.config import ServerConfig
from offramp.serving.server.pytorch import service_of as service_of_model
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


@pytest.mark.slow
@pytest.mark.parametrize(("size", "dark"), [("phone", True), ("desktop", False)])
def test_both_answers_appear_coloured_by_depth(
    size: str, dark: bool, page: Page, address: str
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
    colours = f"[...document.querySelectorAll('.answers .token')].map({style})"
    for depth, (ground, ink) in zip(tokens, page.ask(colours), strict=True):
        expected = depth_color(depth, 12)
        assert rgb(ground) == [int(expected[i : i + 2], 16) for i in (1, 3, 5)]
        assert rgb(ink) == ([0] * 3 if ink_on(expected) == "#000" else [255] * 3)
    number = "getComputedStyle(document.querySelector('#early .token'), '::after').content"
    assert page.ask(number) == f'"{early[0]}"'
    assert "An exit is" in page.ask("document.querySelector('main').innerText")
    assert page.ask(f"document.documentElement.scrollWidth <= {SIZES[size][0]}")
    assert page.ask("document.querySelector('#early .verdict').textContent") == EXACT
    assert page.ask("document.getElementById('promise').hidden")
    assert float(page.ask("parseFloat(document.querySelector('#early .depth').textContent)")) >= 2
    assert page.errors == []


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_axe_finds_nothing(size: str, dark: bool, page: Page, address: str) -> None:
    page.show(address + "/", *SIZES[size], dark=dark)
    page.until("document.getElementById('prompt').value === 'Caption:'")
    assert violations(page) == []
    page.ask("void example().then(both)")
    page.until(DONE)
    page.ask("whole()")
    assert violations(page) == []


def rgb(text: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", text)]


@pytest.mark.slow
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
        drafted = f"drafted at depth {depth}, checked by all 12 layers"
        shown = drafted if depth < 12 else "full depth, 12 layers"
        assert page.ask(legend).endswith(shown)
        page.press("ArrowRight")
    page.press("Home")
    focused = "[...document.querySelectorAll('#early .token')].indexOf(document.activeElement)"
    assert page.ask(focused) == 0 and page.ask(stops) == 1


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
        shown = page.ask("document.querySelector('#early').innerText")
        assert says in shown
        whole = page.ask("document.querySelector('main').innerText")
        assert whole.count("Promised") + whole.count("Guarantee") == (says != NONE)


def test_what_is_wrong_is_said_on_the_page(page: Page) -> None:
    with running(service_of(slots=1, keys=("secret",))) as address:
        page.show(address.replace("//", "//u:secret@") + "/", 390, 844)
        page.until("document.getElementById('model').textContent !== '…'")
        page.ask("document.getElementById('prompt').value = '<image><image>'; example()")
        page.until("!document.getElementById('go').disabled")
        page.ask("document.getElementById('go').click()")
        page.until("/stands for images/.test(document.getElementById('state').textContent)")


def answered(page: Page, address: str, mode: str) -> None:
    """Show the page, and ask about the example."""
    page.show(address + "/", 1280, 900)
    page.until("document.getElementById('prompt').value === 'Caption:'")
    page.ask(f"document.getElementById('mode').value = {mode!r}; void example().then(both)")
    page.until(DONE)
    page.until("!busy")


@pytest.mark.slow
def test_a_replay_shows_each_word_when_the_server_wrote_it(page: Page, address: str) -> None:
    answered(page, address, "early_exit")
    times = {side: page.ask(f"heard.{side}.timed.seconds") for side in ("early", "full")}
    assert all(sorted(own) == own and own[0] > 0 for own in times.values())
    page.ask("var waiting = null; requestAnimationFrame = (frame) => { waiting = frame; }; 0")
    page.ask("var now = 0; performance.now = () => now; replay()")
    for at in (0.0, times["early"][3], times["full"][3], times["full"][-1]):
        page.ask(f"now = {1000 * at + 0.001}; waiting(); 0")
        for side, own in times.items():
            unsaid = page.ask(f"document.querySelectorAll('#{side} .unsaid').length")
            ends = page.ask(f"heard.{side}.pieces.map((one) => one.to)")
            assert unsaid == sum(own[min(end, len(own)) - 1] > at + 1e-6 for end in ends)


def slide(page: Page, level: float, event: str) -> None:
    """Move the slider to a level (input), or let it go there too (change)."""
    page.ask(f"document.getElementById('level').value = levels.indexOf({level})")
    page.ask(f"document.getElementById('level').dispatchEvent(new Event({event!r}))")


def example_of(page: Page) -> Example:
    """The image that the page asks about."""
    data = base64.b64decode(page.ask("image").partition(",")[2])
    return Example(Image.open(io.BytesIO(data)).convert("RGB"), "Caption:", (), "page")


HOW = "document.getElementById('how').textContent"
TUNED = "document.querySelector('#tune .text').textContent"


@pytest.mark.slow
def test_the_slider_foretells_depths_and_then_shows_the_servers_answer(
    page: Page, address: str
) -> None:
    answered(page, address, "lossless")
    assert page.ask("document.getElementById('chosen').textContent") == "0.8"
    assert "calibrated: 0.8" in page.ask("document.getElementById('mark').textContent")
    assert "0.48% measured" in page.ask("document.getElementById('risk').textContent")
    scores, full = page.ask("passes[0].scores"), page.ask("heard.full.text")
    adapter, processor = shipped()
    encoder = InputProcessor(adapter.backbone, processor)
    inputs = encoder.prompts([example_of(page)])
    for level in (1, 0.995, 0):
        page.ask("written.clear()")
        slide(page, level, "input")
        foretold = page.ask(f"foretold({level})")
        assert foretold == [2 if s is not None and s >= level else 12 for s in scores]
        assert "Foretold" in page.ask(HOW)
        slide(page, level, "change")
        page.until(f"/As the server wrote it/.test({HOW})")
        policy = ExitPolicy({2: float(level)})
        own = adapter.generate(inputs, policy=policy, do_sample=False, max_new_tokens=48)
        text = encoder.texts(own.new_tokens)[0]
        assert page.ask(TUNED) == text
        assert page.ask("[...written.values()][0].depths") == own.depths[0].tolist()
        assert ("the full model's words" in page.ask(HOW)) == (text == full)


@pytest.mark.slow
def test_a_slider_of_trust_shows_what_each_level_takes(page: Page) -> None:
    adapter, processor = shipped()
    policy = ExitPolicy(drafts={2: 0.0}, max_draft=8, trust=0.9)
    encoder = InputProcessor(adapter.backbone, processor)
    sizes, config = EngineConfig(2, 256), ServerConfig(name="tiny-opt")
    service = service_of_model(replace(adapter, policy=policy), processor, config, sizes)
    seen = set()
    with running(service) as address:
        answered(page, address, "early_exit")
        assert page.ask("document.querySelector('#tuned label').textContent") == "Trust"
        inputs = encoder.prompts([example_of(page)])
        for level in (1, 0.9, 0):
            slide(page, level, "input")
            by = replace(policy, trust=float(level))
            own = adapter.generate(inputs, policy=by, do_sample=False, max_new_tokens=48)
            assert page.ask(TUNED) == encoder.texts(own.new_tokens)[0]
            depths = page.ask(
                "[...document.querySelectorAll('#tune .token')].map(t => +t.dataset.depth)"
            )
            assert depths == own.depths[0].tolist()[: len(depths)]
            seen.add(tuple(depths))
    assert len(seen) > 1


def test_an_empty_answer_says_so_and_took_no_negative_time(page: Page, address: str) -> None:
    page.show(address + "/", 1280, 900)
    page.until("document.getElementById('prompt').value === 'Caption:'")
    verdict = {"says": "x", "why": "", "promised": False, "exact": True}
    usage = {"mode": "full", "mean_depth": 12, "verdict": verdict}
    own = {"seconds": [0.25], "scores": [0.5], "offers": []}
    ending = {"choices": [{"delta": {}, "finish_reason": "stop", "offramp": own}]}
    counted = {"choices": [], "usage": {"completion_tokens": 1, "offramp": usage}}
    stream = "".join(f"data: {json.dumps(one)}\n\n" for one in (ending, counted))
    page.ask(f"request = async () => new Response({json.dumps(stream)}); void example().then(both)")
    page.until(DONE)
    for side in ("early", "full"):
        assert "No words" in page.ask(f"document.querySelector('#{side} .text').textContent")
        assert page.ask(f"document.querySelector('#{side} .first').textContent") == "0.25 s"


def test_a_further_question_goes_on_from_the_answer(page: Page, address: str) -> None:
    page.show(address + "/", 1280, 900)
    page.until("document.getElementById('prompt').value === 'Caption:'")
    page.ask("show('data:,a'); further('A dog.'); document.getElementById('prompt').value = 'Why?'")
    first, answer, second = page.ask("conversation()")
    assert [part["type"] for part in first["content"]] == ["image_url", "text"]
    assert answer == {"role": "assistant", "content": "A dog."}
    assert second == {"role": "user", "content": [{"type": "text", "text": "Why?"}]}
    assert "Caption: A dog." in page.ask("document.getElementById('turns').textContent")
    page.ask("show('data:,b')")
    assert len(page.ask("conversation()")) == 1  # of another image


def test_an_address_is_for_the_server_to_fetch(page: Page, address: str) -> None:
    page.show(address + "/", 1280, 900)
    page.until("document.getElementById('prompt').value === 'Caption:'")
    url = "https://example.org/dog.jpg"
    page.ask(f"document.getElementById('url').value = {url!r}")
    page.ask("document.getElementById('url').dispatchEvent(new Event('change'))")
    page.until("/server will fetch/.test(document.getElementById('hint').textContent)")
    assert page.ask("conversation()[0].content[0].image_url.url") == url
    page.ask("document.getElementById('go').click()")
    page.until("/does not fetch/.test(document.getElementById('state').textContent)")
    assert " example.org *.of.example;" in page_policy("", ("example.org", ".of.example"))
