"""The pages say what the records say."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_figure_of_a_page_is_its_records() -> None:
    spec = importlib.util.spec_from_file_location("readme", ROOT / "benchmarks" / "readme.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    for name in tool.PAGES:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert text == tool.rendered(name, text)
