"""Compare what the plug-in takes from vLLM in two versions: python names.py TESTED NEWEST

TESTED, NEWEST: folders of an unpacked wheel each. Every name that is imported must be in both; what
is wrapped or overridden is shown where its text differs. Exits with 1 if a name is missing.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

SOURCES = Path(__file__).parent / "src" / "offramp_vllm"
OURS = {  # by class of the plug-in's: of vLLM's where its methods are
    "ExitRunner": "vllm.v1.worker.gpu_model_runner.GPUModelRunner",
    "ExitWorker": "vllm.v1.worker.gpu_worker.Worker",
    "ExitScheduler": "vllm.v1.core.sched.scheduler.Scheduler",
}


def taken() -> Iterator[tuple[str, str]]:
    """Modules of vLLM's, and names that are imported from them."""
    for file in sorted(SOURCES.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                yield from ((str(node.module), name.name) for name in node.names)


def methods() -> Iterator[tuple[str, str]]:
    """Classes of vLLM's, and methods that the plug-in wraps or overrides."""
    where = {name: f"{module}.{name}" for module, name in taken()}
    for file in ("__init__.py", "v1.py"):
        for node in ast.walk(ast.parse((SOURCES / file).read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "_wrap":
                owner, name = node.args[:2]
                if isinstance(owner, ast.Name) and isinstance(name, ast.Constant):
                    yield where[owner.id], str(name.value)
            elif isinstance(node, ast.ClassDef) and node.name in OURS:
                for one in node.body:
                    if isinstance(one, ast.FunctionDef):
                        yield OURS[node.name], one.name


def found(version: Path, module: str) -> ast.Module | None:
    stem = version / Path(*module.split("."))
    for file in (stem.with_suffix(".py"), stem / "__init__.py"):
        if file.is_file():
            return ast.parse(file.read_text())
    return None


def has(version: Path, module: str, name: str) -> bool:
    """Whether a module has a name, or a package a module of that name."""
    tree = found(version, module)
    if tree is None or found(version, f"{module}.{name}") is not None:
        return tree is not None
    stars = [
        node.module
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"
    ]
    return any(has(version, f"{module}.{one}", name) for one in stars) or any(
        name
        in (
            getattr(node, "name", None),
            getattr(node, "id", None),
            getattr(node, "asname", None),
            getattr(node, "value", None),
        )
        for node in ast.walk(tree)
    )


def text(version: Path, owner: str, name: str) -> str | None:
    """The code of a method, without comments; None: the class has none of its own."""
    module, _, kind = owner.rpartition(".")
    for node in ast.walk(found(version, module) or ast.Module([], [])):
        if isinstance(node, ast.ClassDef) and node.name == kind:
            for one in node.body:
                if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef) and one.name == name:
                    return ast.unparse(one)
    return None


def main(tested: Path, newest: Path) -> int:
    names = sorted(set(taken()))
    missing = [f"{module}.{name}" for module, name in names if not has(newest, module, name)]
    assert all(has(tested, *one) for one in names), "the tested version lacks a name"
    pairs = [(one, text(tested, *one), text(newest, *one)) for one in sorted(set(methods()))]
    theirs = [one for one in pairs if one[1] is not None]
    changed = [".".join(one) for one, old, new in theirs if old != new]
    print(f"{len(names)} names, {len(missing)} missing: {', '.join(missing) or 'none'}")
    print(f"{len(theirs)} methods, {len(changed)} otherwise: {', '.join(changed) or 'none'}")
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:3])))
