"""What every test shares: one thread, no network, fixed seeds, models built once."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What a watch keeps over a restart: of these tests alone.
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="offramp-tests-")

from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import families
import pytest
import pytest_randomly
import quick
import torch

from offramp.core.models.backbone import Backbone, DecodeOptions

torch.set_num_threads(1)
# No other package's, such as spaCy's: they import PyTorch, which some tests hide.
pytest_randomly.entrypoint_reseeds = []
# Many laws count what layers run: of models that tests know, answers are read again where a law
# asks for it, and in processes of their own.
Backbone.decoding = DecodeOptions(again=None)

pytest_plugins = ["command_line"]

NEEDS_LLAMA = "needs llama-cpp-python"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick", action="store_true", help="a few cases of each law, of three families"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--quick"):
        items[:] = quick.chosen(items)
    if find_spec("llama_cpp") is None:
        for item in items:
            if item.get_closest_marker("llama_cpp"):
                item.add_marker(pytest.mark.skip(reason=NEEDS_LLAMA))


def pytest_collection_finish() -> None:
    """Keep the garbage collector from looking through what was imported, which takes .3 s."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[Any]:
    """Names that are no UTF-8 may be printed: what workers of xdist send each other is."""
    report = yield
    report.sections = [
        (name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections
    ]
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Tests that nothing could run here are named, by file, and not lost in a list of skips."""
    skipped = terminalreporter.stats.get("skipped", [])
    left = [report for report in skipped if NEEDS_LLAMA in str(report.longrepr)]
    if left:
        terminalreporter.stats["skipped"] = [it for it in skipped if it not in left]
        terminalreporter.stats["not run"] = left
        terminalreporter.section(f"not run: {NEEDS_LLAMA}")
        for file, count in sorted(Counter(it.nodeid.partition("::")[0] for it in left).items()):
            terminalreporter.write_line(f"{count:4} of {file}")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in every test, whatever ran before it; of the CPU alone, which is a
    hundred times cheaper than asking for every device."""
    torch.default_generator.manual_seed(0)


@cache
def _backbone(name: str, dtype: torch.dtype, wide: float | None) -> Any:
    from offramp.core.models.backbone import Backbone

    return Backbone(families.build(name, dtype, wide=wide))


@cache
def _exits(name: str, dtype: torch.dtype, wide: float | None, depths: tuple[int, ...]) -> Any:
    from offramp.core.models.exits import Exits

    exits = Exits(_backbone(name, dtype, wide), depths)
    families.perturb(exits)
    return exits


@pytest.fixture(scope="session")
def backbone() -> Callable[..., Any]:
    """`backbone(name)`: the tiny backbone of a family. Shared: never change it."""
    return lambda name, dtype=torch.float32, wide=None: _backbone(name, dtype, wide)


@pytest.fixture(scope="session")
def opt(backbone: Callable[..., Any]) -> Any:
    """The tiny BLIP-2 with OPT, where one family is enough."""
    return backbone("blip2-opt")


@pytest.fixture
def saved_adapter(opt: Any, tmp_path: Path) -> Path:
    """The folder of a saved adapter of `opt`."""
    from adapters import POLICY, trained

    trained(opt, policy=POLICY).save(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture(scope="session")
def exits() -> Callable[..., Any]:
    """`exits(name)`: exits on the backbone of the same arguments. Shared: never change them."""
    return lambda name, dtype=torch.float32, wide=None, depths=None: _exits(
        name, dtype, wide, depths or families.depths(name)
    )


@pytest.fixture(scope="session")
def batch() -> Callable[..., dict[str, Any]]:
    """`batch(name, rows)`: inputs for a family's model."""

    def inputs(name: str, rows: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        given = families.KINDS[name].inputs(rows)
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}

    return inputs


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of one test, that begins with what C was compiled to on this machine."""
    from offramp.common.folders import cache_folder

    compiled = [*cache_folder("native").glob("*.so*")]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cache_folder("native").mkdir(mode=0o700, parents=True)
    for file in compiled:
        shutil.copy2(file, cache_folder("native"))
    return tmp_path / "cache" / "offramp"


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """`scored(score)`: the confidence of every exit is this score, whatever the logits."""
    from offramp.core.decoding.scores import SCORES

    return lambda score: monkeypatch.setitem(SCORES, "max_probability", score)


@pytest.fixture
def ngram() -> Iterator[str]:
    """The name of the drafter, and of the engine, of the example package."""
    import runpy

    from offramp.core.decoding.drafting import DRAFTERS
    from offramp.engines import ENGINES

    runpy.run_path(str(Path(__file__).parent / "examples" / "ngram_plugin" / "offramp_ngram.py"))
    yield "ngram"
    del DRAFTERS["ngram"], ENGINES["ngram"]


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a registered score of hidden states: how little the layer before an exit did."""
    from offramp.core.decoding.confidence import FEATURE_SCORES

    def score(check: Any) -> Any:
        entry, previous = check.entry.float(), check.previous.float()
        return (0.5 + 0.5 * torch.cosine_similarity(entry, previous, dim=-1)).clamp(0, 1)

    monkeypatch.setitem(FEATURE_SCORES, "idle", score)
    return "idle"
