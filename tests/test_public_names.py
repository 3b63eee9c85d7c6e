"""What `import offramp` offers: names for completion and star imports, and no module for one."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import offramp

ROOT = Path(__file__).resolve().parents[1]


def test_completion_and_star_import_offer_the_public_names() -> None:
    assert set(offramp.__all__) <= set(dir(offramp))
    assert 10 <= len(offramp.__all__) <= 30
    scope: dict[str, object] = {}
    exec("from offramp import *", scope)
    assert set(offramp.__all__) <= set(scope)


@pytest.mark.parametrize("name", offramp.__all__)
def test_a_public_name_can_be_called(name: str) -> None:
    found = getattr(offramp, name)
    assert callable(found) and found.__doc__


@pytest.mark.slow
def test_no_module_stands_where_a_function_of_its_name_does() -> None:
    """Importing every module leaves each public name what it was."""
    code = (
        "import offramp, pkgutil, importlib\n"
        "for m in pkgutil.walk_packages(offramp.__path__, 'offramp.'):\n"
        "    if not m.name.endswith(('__main__', 'eval_model')) and 'llama_cpp' not in m.name:\n"
        "        importlib.import_module(m.name)\n"
        "print(*[n for n in offramp.__all__ if not callable(getattr(offramp, n))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
    modules = {m.name for m in pkgutil.iter_modules(offramp.__path__)}
    assert not modules & set(offramp.__all__)
    assert not any(isinstance(getattr(offramp, n), ModuleType) for n in offramp.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = offramp.trian  # type: ignore[attr-defined]


def test_the_reference_documents_them_all() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^::: offramp\.(?:core\.)?(\w+)$", page, re.MULTILINE)) == {
        *offramp.__all__,
        "errors",
    }


def test_what_documented_code_imports_is_stable() -> None:
    page = (ROOT / "docs" / "stable.md").read_text(encoding="utf-8")
    stable = {f"offramp.{name}" for name in offramp.__all__} | {"offramp"}
    for module, names in re.findall(r"^\* `(offramp\.[\w.]+)`: (.*)$", page, re.MULTILINE):
        stable |= {f"{module}.{name}" for name in re.findall(r"`(\w+)`", names)}
    for name in sorted(stable - {"offramp"}):
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name
    for file in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = file.read_text(encoding="utf-8")
        for code in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            for node in ast.walk(ast.parse(code)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("offramp"):
                    found = {f"{node.module}.{alias.name}" for alias in node.names}
                    ours = {n for n in found if not n.startswith(("offramp_", "offramp-"))}
                    assert ours <= stable, (file.name, ours - stable)
