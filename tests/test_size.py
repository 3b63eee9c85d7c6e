"""Small enough to read: few files a package, short files and functions; a file for each law."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "offramp"
FILES, LINES, FUNCTION_LINES = 11, 400, 60
NOT_YET: set[str] = set()
"""What is still too long; to be empty."""


def too_long(file: Path) -> set[str]:
    """The file's name if it is too long, and those of its functions that are."""
    name, text = file.relative_to(SOURCE).as_posix(), file.read_text(encoding="utf-8")
    functions = {
        f"{name}:{node.name}"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno >= FUNCTION_LINES
    }
    return functions | ({name} if len(text.splitlines()) > LINES else set())


def test_no_file_and_no_function_is_too_long() -> None:
    found = set().union(*map(too_long, SOURCE.rglob("*.py")))
    assert found - NOT_YET == set()


def test_a_package_holds_few_files() -> None:
    packages = [SOURCE, *(path for path in SOURCE.rglob("*") if path.is_dir())]
    modules = {p: [f for f in p.glob("*.py") if f.name != "__init__.py"] for p in packages}
    assert {p.name: len(files) for p, files in modules.items() if len(files) > FILES} == {}


def test_every_law_has_a_file() -> None:
    stated = re.findall(r"(?m)^(\d+)\. ", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    files = {file.name.split("_")[1] for file in (ROOT / "tests" / "laws").glob("test_*.py")}
    assert {f"{int(number):02}" for number in stated} == files
