"""A public docstring begins with a verb or a noun phrase: whoever reads it alone knows what it is
about."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "offramp"
NO_BEGINNING = {
    *("It", "Its", "They", "Their", "This", "That", "These", "Those", "There", "Who", "Whose"),
    *("What", "Which", "Whether", "Where", "When", "How", "Why", "None", "Each", "All", "Only"),
    *("Of", "As", "By", "For", "At", "On", "In", "From", "With", "Behind", "If"),
}
"""Pronouns, conjunctions and prepositions: what is meant stands elsewhere."""


def public(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Name and docstring of classes, functions and methods whose names begin with a letter."""
    for each in ast.iter_child_nodes(node):
        if isinstance(each, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if each.name.startswith("_"):
                continue
            if text := ast.get_docstring(each):
                yield each.name, text
            if isinstance(each, ast.ClassDef):
                yield from public(each)


@pytest.mark.parametrize(
    "room", sorted({f.relative_to(SOURCE).parts[0] for f in SOURCE.rglob("*.py")})
)
def test_a_public_docstring_begins_with_a_verb_or_a_noun(room: str) -> None:
    wrong = [
        f"{file.relative_to(SOURCE)}: {name}: {text.splitlines()[0]}"
        for file in ([SOURCE / room] if room.endswith(".py") else (SOURCE / room).rglob("*.py"))
        for name, text in public(ast.parse(file.read_text(encoding="utf-8")))
        if text.split()[0].strip("`,.:;") in NO_BEGINNING
    ]
    assert wrong == []
