"""Laws of the report: one file that fetches nothing, runs nothing, and shows what was measured."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from offramp import cli
from offramp.common.depth_color import depth_color
from offramp.core.errors import DataError, InputError
from offramp.data.formats import read_items
from offramp.data.item import Item
from offramp.inputs.example import Example
from offramp.report.gallery import token
from offramp.report.report import KINDS, Source, read_sources, report

HOSTILE = '<img src=x onerror="alert(1)"></script><b>&amp;" $x^ \u2028 \u05d0'
VOID = {"meta", "img", "br", "link", "input", "hr"}
PROVENANCE = {
    "command": "offramp eval",
    "seed": 0,
    "data_digest": "ab" * 32,
    "date": "2026-01-02T03:04:05",
    "versions": {"offramp": "0.1.0"},
    "platform": "Linux",
    "processor": "Test CPU",
    "accelerator": None,
    "threads": 1,
}


class Page(HTMLParser):
    """Tags with their attributes, in a tree that must close as it opened."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def sections(self) -> list[str | None]:
        return [attributes["id"] for attributes in self.all("section")]


def estimate(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.01, "high": value + 0.01}


def evaluation() -> dict[str, Any]:
    def mode(depth: float) -> dict[str, Any]:
        return {
            "layers": 12,
            "metrics": {"exact_match": estimate(0.9)},
            "unavailable": {"SPICE": "no"},
            "tokens": 4,
            "mean_depth": depth,
            "depth_shares": {"2": 0.75, "12": 0.25},
            "latency": {n: {"p50": 0.1, "p95": 0.2} for n in ("seconds", "decode_seconds")},
        }

    return {
        "task": "gqa",
        "n": 2,
        "settings": {"backbone": "offramp/tiny-opt", "layers": 12},
        "modes": {"full": mode(12.0), "early_exit": mode(4.5)},
        "compared": {
            "agreement": estimate(0.5),
            "difference": {"exact_match": estimate(0.0)},
            "speedup": {"decode": estimate(2.345), "end_to_end": None},
        },
        "provenance": PROVENANCE,
    }


EXAMPLES = [Example(Image.new("RGB", (640, 480), "red"), HOSTILE, (HOSTILE,), "a")]
SMALL = [Example(Image.new("RGB", (72, 72), "red"), "", (), "b")]


def rows() -> list[dict[str, Any]]:
    digests = {example.key: Item(example).digest() for example in [*EXAMPLES, *SMALL]}

    def row(key: str, mode: str, answer: str, ids: list[int], depths: list[int]) -> dict[str, Any]:
        return {
            "key": key,
            "mode": mode,
            "answer": answer,
            "ids": ids,
            "depths": depths,
            "prompt_digest": digests[key],
        }

    return [
        {"settings": {"layers": 12}},
        row("a", "full", HOSTILE, [5, 2], [12, 12]),
        row("a", "early_exit", HOSTILE + "!", [6, 2], [2, 12]),
        row("b", "full", "same", [7, 2], [12, 12]),
        row("b", "early_exit", "same", [7, 2], [2, 2]),
    ]


def adapter(promised: bool = True) -> dict[str, Any]:
    path = [
        {"thresholds": {"2": t}, "risk": r, "bound": b, "seconds": 0.001}
        for t, r, b in ((0.99, 0.0, 0.004), (0.9, 0.002, 0.008), (0.8, 0.02, 0.03))
    ]
    promise = {
        "policy": {"thresholds": {"2": 0.9}},
        "risk": "disagreement",
        "target": 0.01,
        "confidence": 0.95,
        "method": "learn_then_test",
        "measured": 0.002,
        "bound": 0.008,
        "n": 777,
        "reason": "",
        "path": path,
    }
    return {
        "backbone": {"name": "offramp/tiny-opt"},
        "depths": [2],
        "policy": promise["policy"],
        "calibration": promise if promised else None,
        "provenance": PROVENANCE,
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each kind of result, as the commands write them."""
    folder = tmp_path_factory.mktemp("runs")
    written = {"exits/adapter.json": adapter(), "run/result.json": evaluation()}
    for name, value in written.items():
        (folder / name).parent.mkdir()
        (folder / name).write_text(json.dumps(value))
    (folder / "run" / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows()))
    return folder


@pytest.fixture(scope="module")
def sources(runs: Path) -> list[Source]:
    return read_sources([runs / name for name in ("exits", "run")])


class Words:
    """A tokenizer whose token 6 is hostile."""

    all_special_ids = (2,)

    def decode(self, ids: list[int]) -> str:
        return HOSTILE if ids[0] == 6 else f"w{ids[0]}"


def written(sources: list[Source], examples: Any = (), tokenizer: Any = Words) -> str:
    return report(sources, examples, tokenizer_of=lambda _: tokenizer and tokenizer())


@pytest.fixture(scope="module")
def whole(sources: list[Source]) -> str:
    """The page of everything."""
    return written(sources, EXAMPLES)


# -- safe and self-contained ---------------------------------------------------------------------


def test_nothing_is_fetched_and_nothing_runs(whole: str) -> None:
    page = Page(whole)
    assert not {"script", "link", "iframe", "object", "base", "form"} & {t for t, _ in page.tags}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "srcset", "poster", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:image/")), (tag, value)
    assert not re.findall(r"url\((?!#)", whole)
    assert "@import" not in whole


def test_hostile_answers_are_text(whole: str) -> None:
    page = Page(whole)
    assert page.text.count("alert(1)") == 4  # token, full answer, prompt, reference
    assert all(attributes.get("src") != "x" for attributes in page.all("img"))
    assert "b" not in {tag for tag, _ in page.tags}


def test_tags_close_as_they_opened_and_ids_are_unique(whole: str) -> None:
    page = Page(whole)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = {a["xlink:href"] for a in page.all("use")}
    assert used <= {f"#{i}" for i in ids}
    assert {a["href"] for a in page.all("a")} == {f"#{s}" for s in page.sections}


def test_pictures_are_scaled_down(whole: str, runs: Path) -> None:
    (image,) = Page(whole).all("img")
    assert (image["width"], image["height"]) == ("240", "180")
    assert str(image["src"]).startswith("data:image/jpeg;base64,")
    (exact,) = Page(written(read_sources([runs / "run"]), SMALL)).all("img")
    assert str(exact["src"]).startswith("data:image/png;base64,")


def test_the_same_results_give_the_same_page(sources: list[Source], whole: str) -> None:
    assert written(sources, EXAMPLES) == whole


# -- complete and honest -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, shown",
    [
        ("exits", ["key", "calibration", "origin"]),
        ("run", ["answers", "key", "exits", "figures", "origin"]),
    ],
)
def test_a_section_appears_when_its_result_was_given(
    runs: Path, given: str, shown: list[str]
) -> None:
    page = Page(written(read_sources([runs / given])))
    assert page.sections == shown
    assert "Not shown, for want of its data" in page.text


def test_all_sections_in_order(whole: str) -> None:
    page = Page(whole)
    assert page.sections == ["answers", "key", "exits", "calibration", "figures", "origin"]
    assert "Not shown" not in page.text


def test_figures_come_with_their_intervals(runs: Path) -> None:
    text = Page(written(read_sources([runs / "run"]))).text
    assert "2.35x" in text or "2.34x" in text
    assert "49.0% to 51.0%" in text
    assert "90.00% (89.00% to 91.00%)" in text
    assert "SPICE is missing: no" in text
    assert "Test CPU" in text


@pytest.mark.parametrize("names", [["run"], ["exits", "run"]])
def test_the_page_opens_with_one_sentence_and_the_answers(runs: Path, names: list[str]) -> None:
    html = written(read_sources([runs / name for name in names]))
    (opening,) = re.findall("<h1>(.*)</h1>", html)
    assert opening == (
        "75% of the words left after 2 of 12 layers; words came 2.3 times as fast as from the "
        "full model, and 50.0% of the answers were the same."
    )
    assert Page(html).sections[0] == "answers"


def test_a_page_of_exits_alone_opens_with_their_guarantee(runs: Path) -> None:
    (opening,) = re.findall("<h1>(.*)</h1>", written(read_sources([runs / "exits"])))
    assert opening == (
        "With 95% confidence, at most 1.00% of the answers differ from the full model's."
    )


def test_a_token_names_its_depth(runs: Path) -> None:
    page = Page(written(read_sources([runs / "run"])))
    titles = [a["title"] for a in page.all("span") if a.get("class") == "t"]
    assert {"depth 2 of 12", "full depth"} == set(titles)
    assert "Changed by early exit: 1 of 2 answers" in page.text


def test_without_a_tokenizer_answers_are_whole(runs: Path) -> None:
    page = Page(written(read_sources([runs / "run"]), tokenizer=None))
    assert "The tokenizer is not on this machine" in page.text
    assert HOSTILE + "!" in page.text


def test_the_promise_is_shown_with_its_bound(runs: Path) -> None:
    text = Page(written(read_sources([runs / "exits"]))).text
    assert "With 95% confidence the risk (disagreement) is at most 1.00%" in text
    assert "measured 0.20% on n = 777, bound 0.80%" in text


def test_an_adapter_without_a_promise_says_so() -> None:
    text = Page(written([Source("adapter", "m", adapter(promised=False))])).text
    assert "nothing is guaranteed" in text


def test_a_promise_by_trust_is_told_beside_what_it_was_compared_with() -> None:
    value = adapter()
    value["calibration"]["policy"] = {"thresholds": {}, "trust": 0.9}
    value["calibration"]["ways"] = [
        {
            "name": "lossless",
            "setting": "at most 4 drafts",
            "times": 1.5,
            "risk": None,
            "answers": 0,
            "promised": False,
        },
        {
            "name": "trust",
            "setting": "0.9",
            "times": 2.25,
            "risk": 0.002,
            "answers": 777,
            "promised": True,
        },
        {
            "name": "thresholds",
            "setting": "0.8 at depth 2",
            "times": 1.9,
            "risk": 0.004,
            "answers": 100,
            "promised": False,
        },
    ]
    text = Page(written([Source("adapter", "m", value)])).text
    assert "With 95% confidence the risk (disagreement) is at most 1.00%" in text
    assert "Levels of trust were tried" in text and "The path of levels of trust" in text
    for cells in ("1.50xnone", "2.25x0.20%promised", "1.90x0.40%estimated"):
        assert cells in text


def test_a_calibration_that_failed_says_so() -> None:
    value = adapter()
    value["calibration"] |= {
        "measured": None,
        "bound": None,
        "policy": {"thresholds": {}},
        "reason": "Too few.",
    }
    text = Page(written([Source("adapter", "m", value)])).text
    assert "Nothing could be guaranteed. Too few." in text


# -- colours -------------------------------------------------------------------------------------


def luminance(color: str) -> float:
    """Relative luminance of "#rrggbb" (WCAG 2)."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def test_words_can_be_read_on_every_depths_colour() -> None:
    for depth in range(1, 41):
        word = token("word", depth, 40)
        ground, ink = luminance(word["color"]), {"#000": 0.0, "#fff": 1.0}[word["ink"]]
        light, dark = max(ground, ink), min(ground, ink)
        assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_deeper_is_darker() -> None:
    shades = [luminance(depth_color(depth, 12)) for depth in range(1, 13)]
    assert shades == sorted(shades, reverse=True)
    assert len(set(shades)) == 12


# -- reading -------------------------------------------------------------------------------------


def test_a_file_may_hold_several_results_by_name(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    file.write_text(json.dumps({"opt": adapter(), "t5": evaluation(), "provenance": PROVENANCE}))
    found = read_sources([file])
    assert [(s.kind, s.name) for s in found] == [
        ("adapter", "tiny-opt, adapter"),
        ("eval", "tiny-opt, gqa"),
    ]


def test_what_cannot_be_shown_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[]")
    for path in (tmp_path, tmp_path / "list.json"):
        with pytest.raises(InputError, match="nothing that a report can show"):
            read_sources([path])


@pytest.mark.parametrize("kind", ["eval", "demo"])
def test_a_result_of_another_form_is_named(kind: str) -> None:
    value: dict[str, Any] = {key: [3] for key in KINDS[kind]} | {"settings": {}}
    with pytest.raises(DataError, match=f"The {kind} result of some"):
        report([Source(kind, "some", value)])


@pytest.mark.slow
@pytest.mark.parametrize(
    "other",
    [
        Item(replace(EXAMPLES[0], prompt="something else")),
        Item(replace(EXAMPLES[0], image=Image.new("RGB", (640, 480), "blue"))),
        Item(EXAMPLES[0], candidates=("yes", "no")),
    ],
)
def test_an_example_that_was_not_asked_is_not_shown(
    sources: list[Source], other: Item, caplog: pytest.LogCaptureFixture
) -> None:
    """Keys such as photos.jsonl#1 are of many data sets."""
    assert written(sources, [other]) == written(sources)
    assert "1 of 1 examples ask something else than the run did" in caplog.text
    caplog.clear()
    assert written(sources, [Item(EXAMPLES[0])]) == written(sources, EXAMPLES) != written(sources)
    assert "something else" not in caplog.text


def test_the_command_shows_images_without_answers_under_the_runs_prompt(
    runs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Image.new("RGB", (90, 90), "red").save(runs / "red.png")
    (runs / "data.jsonl").write_text(json.dumps({"image": "red.png"}))
    [item] = read_items([runs / "data.jsonl"], prompt="Say:", require_answers=False)
    row = {
        "key": item.key,
        "mode": "early_exit",
        "answer": "x",
        "ids": [5],
        "depths": [2],
        "prompt_digest": item.digest(),
    }
    folder = runs / "asked"
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps(evaluation()))
    lines = [json.dumps(line) for line in ({"settings": {"layers": 12}}, row)]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    out = folder / "report.html"
    how = ["report", str(folder), "--data", str(runs / "data.jsonl"), "--out", str(out)]
    assert cli.main([*how, "--prompt", "Say:"]) == 0
    assert "data:image" in out.read_text() and "Say:" in out.read_text()
    assert "something else" not in caplog.text
    assert cli.main([*how, "--overwrite"]) == 0
    assert "data:image" not in out.read_text()
    assert "1 of 1 examples ask something else" in caplog.text


def test_the_command_writes_the_page(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = runs / "deep" / "report.html"
    assert cli.main(["report", str(runs / "run"), "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"report": str(out), "bytes": len(out.read_bytes())}
    assert Page(out.read_text()).all("h1")


def test_the_commands_mistake_is_two_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", str(tmp_path), "--out", str(tmp_path / "r.html")]) == 1
    assert len(capsys.readouterr().err.strip().split("\n")) == 2
