"""The page of `offramp inspect`: verdict, plot and words of models that were made from
configurations, on a phone and a desktop, light and dark."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fakes
import families
import pytest
from browser import Page, browser, open_page, violations
from smolvlm import save_smolvlm

from offramp.cli.command_line import run
from offramp.core.models.backbone import Backbone
from offramp.data.scenes import world

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser() is None, reason="no Chromium on this machine"),
]
SIZES = {"phone": (390, 844), "desktop": (1280, 900)}
MODELS = ("blip2-opt", "blip2-t5", "blip2-llama", "smolvlm")


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with open_page() as found:
        yield found


def told(name: str, folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """The page that the command writes."""
    model, photos = folder / name, folder / "photos"
    photos.mkdir()
    for number in range(16):
        world.render(world.scene("test", number)).save(photos / f"{number}.png")
    if name == "smolvlm":
        save_smolvlm(model)
    else:
        model.mkdir()
        whole = Backbone(families.build(name, wide=4.0))
        both = (whole, fakes.Blip2FakeProcessor(name))
        patch.setattr("offramp.cli.commands.inspect.load_model", lambda *_, **__: both)
    out = folder / "forecast.html"
    asked = ["inspect", str(model), "--data", str(photos)]
    assert run([*asked, "--max-new-tokens", "6", "--out", str(out)]) == 0
    return out


@pytest.mark.usefixtures("briefly")
@pytest.mark.parametrize("name", MODELS)
def test_the_page_can_be_read_everywhere(
    name: str, page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = told(name, tmp_path, monkeypatch)
    for number, size in enumerate(SIZES.values(), MODELS.index(name)):
        page.errors.clear()
        page.show(made.as_uri(), *size, dark=number % 2 == 1)
        said = page.ask("document.body.innerText")
        assert "Exits would pay" in said or "would not pay" in said
        assert page.ask("document.querySelectorAll('svg').length") >= 1
        assert page.ask("document.querySelectorAll('img').length") >= 1
        assert page.ask(f"document.documentElement.scrollWidth <= {size[0]}")
        assert violations(page) == [] and page.errors == []
