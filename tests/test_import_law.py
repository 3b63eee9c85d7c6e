"""The rooms of the package stand in one order, the lab's behind them, and each imports only what
stands before it.

Read from the syntax trees, so that imports inside functions count; then asked of a fresh process.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from offramp.cli.command_line import COMMANDS

SOURCE = Path(__file__).parents[1] / "src" / "offramp"
GROUND = {
    "offramp",
    "errors",
    "options",
    "missing",
    "storage",
    "provenance",
    "progress",
    "betting",
    "plugins",
    "certificate",
    "depth_color",
    "prompt_kinds",
}
MODELS = {*GROUND, "data", "models"}
ADAPTER = {
    *MODELS,
    "engine",
    "conditions",
    "guarantee",
    "likeness",
    "save_and_load",
    "model_card",
    "adapter",
}
ANSWERS = {*ADAPTER, "answers"}
MAY_IMPORT = {
    "errors": set(),
    "options": set(),
    "missing": {"errors"},
    "betting": set(),
    "depth_color": set(),
    "storage": {"errors"},
    "certificate": {"errors", "storage"},
    "progress": set(),
    "plugins": {"errors"},
    "provenance": {"offramp", "errors", "storage"},
    "data": GROUND,
    "models": {*GROUND, "data"},
    "photo": {*GROUND, "data", "models"},
    "engine": MODELS,
    "prompt_kinds": set(),
    "likeness": {"betting"},
    "conditions": {*MODELS, "engine"},
    "guarantee": {*MODELS, "engine", "conditions", "likeness"},
    "save_and_load": {*MODELS, "engine"},
    "model_card": {*MODELS, "engine", "conditions", "guarantee", "likeness", "save_and_load"},
    "adapter": ADAPTER,
    "answers": ADAPTER,
    "training": ANSWERS,
    "evaluation": ANSWERS,
    "engines": {*ANSWERS, "runtimes"},
    "loading": {*ANSWERS, "engines", "runtimes"},
    "serving": {*ANSWERS, "loading"},
    "verification": {*ANSWERS, "serving"},
    "runtimes": {*ANSWERS, "serving"},
    "calibration": {*ANSWERS, "evaluation"},
    "report": {*ANSWERS, "evaluation"},
    "demo": {*ANSWERS, "training", "evaluation", "calibration", "report"},
    "__main__": {"cli"},
    "cli": {
        *ANSWERS,
        "training",
        "evaluation",
        "calibration",
        "serving",
        "verification",
        "runtimes",
        "engines",
        "loading",
        "report",
        "demo",
    },
}
"""By room, what else it may import. `offramp` itself only hands names on, when asked for them."""


def imports(file: Path) -> Iterator[str]:
    """Every module that a file imports, as dotted names; of `from a import b`, also a.b."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{file}: a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(module: str) -> str:
    """The room of a dotted name inside `offramp`; what `offramp` itself holds is its own."""
    part = module.removeprefix("offramp.").partition(".")[0]
    return part if part in MAY_IMPORT else "offramp"


ROOMS = sorted({p.relative_to(SOURCE).parts[0].removesuffix(".py") for p in SOURCE.rglob("*.py")})


@pytest.mark.parametrize("name", [r for r in ROOMS if r != "__init__"])
def test_a_room_imports_only_what_stands_before_it(name: str) -> None:
    files = [*SOURCE.glob(f"{name}.py"), *SOURCE.glob(f"{name}/**/*.py")]
    found = {(room(m), f.name) for f in files for m in imports(f) if m.split(".")[0] == "offramp"}
    wrong = {(r, file) for r, file in found if r not in {*MAY_IMPORT[name], name}}
    assert files and wrong == set()


CORE = {"engine", "models", "data", "save_and_load", "storage", *GROUND}
ATTACHED = (
    "betting", "certificate", "conditions", "depth_color", "guarantee", "likeness", "model_card",
    "progress", "prompt_kinds", "provenance", "data.annotation_file", "data.datasets",
    "data.decontamination", "data.format_readers", "data.formats", "data.item",
    "data.near_copies", "data.rows", "data.scenes", "engine.constraint",
    "engine.executors.modules", "engine.prefix_cache", "engine.registration",
    "engine.self_check", "engine.teacher_forcing", "models.cache_salt", "models.description",
    "models.eagle3", "models.input_processor", "models.kept_texts", "models.mixture",
    "models.quantized", "models.shipped", "models.shortlist", "models.shrink_on_load",
    "models.vision_cache", "models.vision_engine",
    "options", "save_and_load.custom_generate", "save_and_load.records",
    "save_and_load.speculators", "storage.folders", "storage.jsonl_log",
)  # fmt: skip
"""What stands in the rooms of the core and attaches to it, by file or package."""


def attaches(name: str) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in ATTACHED)


def test_the_core_imports_nothing_of_what_attaches_to_it() -> None:
    files = {n.removeprefix("offramp."): f for n, f in files_of(SOURCE).items() if "." in n}
    core = {n: f for n, f in files.items() if n.partition(".")[0] in CORE and not attaches(n)}
    names = {f"offramp.{name}" for name in files}
    found = {
        (name, outer)
        for name, file in core.items()
        for edge in edges(file, names)
        if attaches(outer := edge.removeprefix("offramp."))
    }
    assert found == set()


def files_of(source: Path) -> dict[str, Path]:
    """Files by dotted name; a package is its `__init__`."""
    inside = {f: ".".join(f.relative_to(source.parent).with_suffix("").parts) for f in
              source.rglob("*.py")}  # fmt: skip
    return {name.removesuffix(".__init__"): file for file, name in inside.items()}


def edges(file: Path, known: Iterable[str]) -> set[str]:
    """Which of the known files a file imports; of `from a import b` b, where that is a file."""
    names, found = set(known), set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            parts = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {p if p in names else node.module for p in parts.values()}
    return found & names


def in_circles(graph: dict[str, set[str]]) -> set[str]:
    """Names that reach themselves, or stand between two that do."""
    left = {name: to - {name} for name, to in graph.items()}
    while True:
        reached = {t for to in left.values() for t in to}
        kept = {n: to & left.keys() for n, to in left.items() if n in reached and to & left.keys()}
        if kept == left:
            return set(left)
        left = kept


def test_circles_are_seen() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"a"}}
    assert in_circles(graph) == {"b", "c"}
    assert in_circles({"a": {"b"}, "b": set()}) == set()


def test_no_files_import_each_other_in_a_circle() -> None:
    """Imports inside functions and for types count."""
    files = files_of(SOURCE)
    assert in_circles({name: edges(file, files) for name, file in files.items()}) == set()


def test_nothing_of_the_product_imports_the_lab() -> None:
    assert "offramp_lab" not in {m.split(".")[0] for f in SOURCE.rglob("*.py") for m in imports(f)}


LAB = Path(__file__).parents[1] / "lab" / "src" / "offramp_lab"
BEFORE = {
    "places": set(),
    "methods": set(),
    "harnesses": set(),
    "inputs": {"places"},
    "experiments": {"methods", "inputs"},
    "records": {"places", "methods", "inputs", "experiments"},
    "tables": {"places", "experiments"},
    "pages": {"places", "inputs", "experiments", "records", "tables"},
}
"""The same of the lab's rooms."""


@pytest.mark.parametrize("name", BEFORE)
def test_a_room_of_the_lab_imports_only_what_stands_before_it(name: str) -> None:
    files = [*LAB.glob(f"{name}.py"), *LAB.glob(f"{name}/**/*.py")]
    modules = {m for f in files for m in imports(f) if m.startswith("offramp_lab.")}
    assert files and {m.split(".")[1] for m in modules} <= {*BEFORE[name], name}


def test_only_the_report_draws() -> None:
    drawing = {
        file.relative_to(SOURCE).parts[0]
        for file in SOURCE.rglob("*.py")
        if any(module.split(".")[0] == "matplotlib" for module in imports(file))
    }
    assert drawing == {"report"}


def loaded_by(*modules: str, then: str = "") -> set[str]:
    """What a fresh process holds in memory after importing `modules`."""
    code = f"import sys, {', '.join(modules)}; {then or None}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_serving_loads_neither_training_nor_what_draws_nor_data_sets() -> None:
    loaded = loaded_by("offramp.serving", "offramp.core.engine.generate", "offramp.adapter.adapter")
    assert "offramp.core.engine.generate" in loaded
    unwanted = {"offramp.training", "offramp.evaluation", "offramp.calibration", "offramp.report"}
    assert loaded & {*unwanted, "offramp.cli", "matplotlib", "datasets"} == set()


def test_data_and_help_do_not_wait_for_torch() -> None:
    files = [file.relative_to(SOURCE.parent) for file in (SOURCE / "data").rglob("[!_]*.py")]
    data = [".".join(file.with_suffix("").parts) for file in files]
    modules = ["offramp.core.storage", "offramp.common.provenance", "offramp.cli.command_line", *data]
    loaded = loaded_by(*modules, then="offramp.cli.command_line.build_parser()")
    assert {"offramp.data.datasets", "offramp.cli"} <= loaded
    assert loaded & {"torch", "transformers", "matplotlib"} == set()


HELP = """
main = __import__("importlib").import_module(sys.argv[1]).main
for name in sys.argv[2:]:
    try:
        main([name, "--help"])
    except SystemExit:
        pass
    if "torch" in sys.modules:
        sys.exit(name)
"""


def test_no_command_loads_torch_for_its_help() -> None:
    """Plug-ins that are installed, which name scores there, among them."""
    names, main = COMMANDS, "offramp.cli"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys{HELP}", main, *names],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("usage: ") == len(names)


def test_neither_the_server_nor_a_sliced_model_needs_torch() -> None:
    loaded = loaded_by("offramp.serving.server.app", "offramp.serving.server.run")
    assert loaded & {"torch", "transformers", "huggingface_hub"} == set()
    model = loaded_by("offramp_llama_cpp.edge.model")
    assert model & {"torch", "transformers", "fastapi", "pydantic"} == set()
    assert "torch" not in loaded_by("offramp_llama_cpp.edge.served")


OUTER = (
    "adapter", "calibrat", "compiled", "constraint", "gguf", "guarantee", "image", "json",
    "llama", "packed", "prefix", "prun", "quanti", "server", "shortlist", "stream", "torch",
    "transformers", "vision", "watch",
)  # fmt: skip
"""Words of what is attached to the decoder from outside."""


def test_the_innermost_ring_imports_and_names_nothing_of_the_others() -> None:
    inner = [*SOURCE.glob("engine/decoding/*.py")]
    own = ("offramp.core.decoding", "offramp.core.engine.policy", "offramp.core.errors", "numpy")
    for file in inner:
        outside = {m for m in imports(file) if m.split(".")[0] not in sys.stdlib_module_names}
        assert [m for m in outside if not m.startswith(own)] == [], file.name
        code = ast.unparse(_without_docstrings(ast.parse(file.read_text(encoding="utf-8"))))
        assert [w for w in OUTER if w in code.lower()] == [], file.name


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [n for n in body if not _is_text(n)] or [ast.Pass()]
    return tree


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def test_the_page_of_the_core_tells_each_of_its_files() -> None:
    page = (SOURCE.parents[1] / "docs" / "core.md").read_text(encoding="utf-8")
    files = {f.name for f in SOURCE.glob("engine/decoding/*.py")} - {"__init__.py"}
    inner = page.partition("## The ring without PyTorch")[2].partition("## Around it")[0]
    assert {w for w in inner.split("`") if w.endswith(".py")} == files


def test_the_decoder_needs_no_torch() -> None:
    modules = ["offramp.core.decoding.decoder", "offramp.core.engine.policy"]
    loaded = loaded_by(*modules, "offramp_llama_cpp.executor")
    assert loaded & {"torch", "transformers"} == set()
