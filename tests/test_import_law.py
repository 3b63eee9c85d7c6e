"""Each room of the package, a folder, imports only what stands before it, and the core nothing of
what stands around it.

Read from the tree and the syntax trees, so that imports inside functions count, and modules that a
string names; then asked of a fresh process.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from offramp.cli.command_line import COMMANDS

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "offramp"


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
    """The room of a dotted name: a folder of `offramp`, or of its core."""
    parts = module.split(".")[1:3]
    return ".".join(parts) if parts[:1] == ["core"] else parts[0] if parts else ""


MODULE = re.compile(r"offramp(\.\w+)+")


def named(file: Path) -> set[str]:
    """Modules that a whole string names, which may be imported by it."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    texts = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
    return {text for text in texts if isinstance(text, str) and MODULE.fullmatch(text)}


def test_the_core_imports_and_names_nothing_of_what_stands_around_it() -> None:
    files = files_of(SOURCE)
    core = {name: file for name, file in files.items() if name.startswith("offramp.core.")}
    found = {
        (name, other)
        for name, file in core.items()
        for other in {*edges(file, files), *(named(file) & {*files})}
        if not other.startswith("offramp.core")
    }
    assert core and found == KNOWN_STRINGS


KNOWN_STRINGS: set[tuple[str, str]] = set()
"""Modules that the core still names by a string."""


def test_rooms_stand_in_an_order() -> None:
    """`offramp` itself only hands names on, when asked for them."""
    files = files_of(SOURCE)
    graph: dict[str, set[str]] = {}
    for name, file in files.items():
        if room(name):
            graph.setdefault(room(name), set()).update(map(room, edges(file, files)))
    for others in graph.values():
        others.discard("")
    assert len(graph) > 15 and in_circles(graph) == set()


FORBIDDEN = {
    "serving": {"training", "evaluation", "calibration", "report", "cli"},
    "data": {"adapter", "features", "engines"},
    "training": {"evaluation", "calibration"},
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_serves_does_not_import_what_trains_or_measures(name: str) -> None:
    files = files_of(SOURCE)
    own = {n: f for n, f in files.items() if room(n) == name}
    found = {room(other) for file in own.values() for other in edges(file, files)}
    assert own and found & FORBIDDEN[name] == set()


def files_of(source: Path) -> dict[str, Path]:
    """Files by dotted name; a package is its `__init__`."""
    inside = {
        f: ".".join(f.relative_to(source.parent).with_suffix("").parts)
        for f in source.rglob("*.py")
    }
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


@pytest.mark.parametrize("source", ["src/offramp", "llama/src/offramp_llama_cpp"])
def test_no_files_import_each_other_in_a_circle(source: str) -> None:
    """Imports inside functions and for types count."""
    files = files_of(ROOT / source)
    assert in_circles({name: edges(file, files) for name, file in files.items()}) == set()


def test_nothing_of_the_product_imports_the_lab() -> None:
    assert "offramp_lab" not in {m.split(".")[0] for f in SOURCE.rglob("*.py") for m in imports(f)}


LAB = ROOT / "lab" / "src" / "offramp_lab"
BEFORE = {
    "places": set(),
    "methods": set(),
    "harnesses": set(),
    "experiments": {"methods"},
    "graphs": set(),
    "records": {"places", "methods", "experiments"},
    "tables": {"places", "experiments"},
    "pages": {"places", "experiments", "records", "tables"},
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


@pytest.mark.slow
def test_serving_loads_neither_training_nor_what_draws_nor_data_sets() -> None:
    loaded = loaded_by("offramp.serving", "offramp.core.engine.generate", "offramp.adapter.adapter")
    assert "offramp.core.engine.generate" in loaded
    unwanted = {"offramp.training", "offramp.evaluation", "offramp.calibration", "offramp.report"}
    assert loaded & {*unwanted, "offramp.cli", "matplotlib", "datasets"} == set()


ANSWERS = """
import pathlib, sys, torch
from offramp import Adapter
adapter = Adapter.from_pretrained("tiny-opt")
config = adapter.backbone.model.config
ids = torch.tensor([[config.image_token_id] * config.num_query_tokens + [5]])
size = config.vision_config.image_size
pixels = torch.zeros(1, 3, size, size)
made = adapter.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=3)
assert made.sequences.shape[1] > ids.shape[1]
ours = [m for n, m in sys.modules.items() if n.partition(".")[0] == "offramp"]
files = [pathlib.Path(m.__file__) for m in ours if m.__file__]
print(len(ours), sum(len(f.read_text(encoding="utf-8").splitlines()) for f in files))
print(*(m.__name__ for m in ours))
"""


@pytest.mark.slow
def test_who_opens_an_adapter_and_answers_loads_the_core_and_adapters() -> None:
    """From an adapter with a guarantee: it is read, and nobody asks for it."""
    done = subprocess.run(
        [sys.executable, "-c", ANSWERS], capture_output=True, text=True, check=True
    )
    counts, names = done.stdout.splitlines()[-2:]
    modules, lines = map(int, counts.split())
    print(f"{modules} modules and {lines} lines of offramp")
    rooms = {name.split(".")[1] for name in names.split() if "." in name}
    assert rooms == {"core", "adapter"}
    assert modules <= 75 and lines <= 12_500


def test_data_and_help_do_not_wait_for_torch() -> None:
    files = [file.relative_to(SOURCE.parent) for file in (SOURCE / "data").rglob("[!_]*.py")]
    data = [".".join(file.with_suffix("").parts) for file in files]
    others = ["offramp.core.storage", "offramp.common.provenance", "offramp.cli.command_line"]
    modules = [*others, *data]
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
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("usage: ") == len(names)


@pytest.mark.slow
def test_neither_the_server_nor_a_sliced_model_needs_torch() -> None:
    loaded = loaded_by("offramp.serving.server.app", "offramp.serving.server.run")
    assert loaded & {"torch", "transformers", "huggingface_hub"} == set()
    model = loaded_by("offramp_llama_cpp.edge.model")
    assert model & {"torch", "transformers", "fastapi", "pydantic"} == set()
    assert "torch" not in loaded_by("offramp_llama_cpp.edge.served")


OUTER = (
    "adapter",
    "calibrat",
    "compiled",
    "constraint",
    "gguf",
    "guarantee",
    "image",
    "json",
    "llama",
    "packed",
    "prefix",
    "prun",
    "quanti",
    "server",
    "shortlist",
    "stream",
    "torch",
    "transformers",
    "vision",
    "watch",
)
"""Words of what is attached to the decoder from outside."""


def test_the_innermost_ring_imports_and_names_nothing_of_the_others() -> None:
    kept = ("policy.py", "confidence.py", "scores.py")  # what is stored, and read by PyTorch too
    inner = [f for f in SOURCE.glob("core/decoding/*.py") if f.name not in kept]
    own = ("offramp.core.decoding", "offramp.core.errors", "offramp.core.plugins", "numpy")
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


def test_the_core_tells_each_of_its_loops_files() -> None:
    page = (SOURCE / "core" / "README.md").read_text(encoding="utf-8")
    files = {f.name for f in SOURCE.glob("core/decoding/*.py")} - {"__init__.py"}
    inner = page.partition("## The loop's files")[2]
    assert {w for w in inner.split("`") if w.endswith(".py")} == files


def test_the_decoder_needs_no_torch() -> None:
    modules = ["offramp.core.decoding.decoder", "offramp.core.decoding.policy"]
    loaded = loaded_by(*modules, "offramp_llama_cpp.executor")
    assert loaded & {"torch", "transformers"} == set()
