"""A measured number in a page is read from a record: a decimal or a multiple stands in a mark."""

from __future__ import annotations

import re

import pytest

from offramp_lab.pages.readme import PAGES
from offramp_lab.places import ROOT

_READ = re.compile(r"<!-- (table|figure): .*?<!-- /\1 -->", re.S)
_CODE = re.compile(r"^ *```.*?^ *```$|`[^`\n]+`", re.M | re.S)
"""What one types or reads on a screen: commands with what they print, settings, versions."""
_PART = re.compile(r"\n(?=\s*(?:[*|]|\d+\. |#)|\n)")
"""A paragraph, an item of a list or a row of a table is a part."""
_END = re.compile(r"(?<=[.:;])(?<!al\.)\s+(?=[^a-z\s])")
_CITED = re.compile(r"\]\(https?:|[A-Z][a-z]+(?: et al\.)?,? (?:19|20)\d\d\b")
"""A link to what others published, or their names and the year."""
_NUMBER = re.compile(
    r"(?<![\w.-])[-+]?\d*\.\d+(?:%|x\b)?(?!\.?\w|-[A-Za-z])"
    r"|(?<![\w.-])\d+x\b|(?<![\w.-])\d+ times as\b"
)
"""But for parts of names, as Qwen2.5 and 0.3B."""


def typed(page: str) -> list[str]:
    """Decimals and multiples that somebody typed, with what stands before them; a sentence, a row
    or an item that cites its source may have some."""
    left = _CODE.sub("`code`", _READ.sub("figure", page))
    return [
        sentence[max(0, found.start() - 30) : found.end()]
        for part in _PART.split(left)
        for sentence in ([part] if part.startswith("|") else _END.split(part))
        if not _CITED.search(sentence)
        for found in _NUMBER.finditer(sentence)
    ]


@pytest.mark.parametrize("name", PAGES)
def test_no_measured_number_is_typed(name: str) -> None:
    assert not typed((ROOT / name).read_text(encoding="utf-8"))


TYPED = (
    "is 1.7x as fast.",
    "of .036.",
    "23.4% agree.",
    "4x.",
    "| a | 1.7 |",
    "0.5 ms",
    "0.5-1.0",
    "3 times as fast",
    "(0.01 to 2)",
    "is 1.5.",
    "x):\n2.5 is",
)
FREE = (
    "is <!-- figure: a/b:.1f -->1.7<!-- /figure -->x",
    "needs 12 layers",
    "`0.01`",
    "1 of 2",
    "Qwen2.5-VL, OPT-2.7B and 0.3B",
    "is 2.0x (Li et al. 2024)",
    "[2.0x](https://a.b)",
    "v1.7x",
    "```console\n1.7x\n```",
    "llama-cpp-python 0.3.36",
)


def test_what_counts_as_typed() -> None:
    assert [text for text in TYPED if not typed(f"It {text}\n")] == []
    assert [text for text in FREE if typed(f"It\n{text}\n")] == []
