"""Laws of missing packages: two lines that name the package and how it is installed."""

from __future__ import annotations

import json
import re
import shlex
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import transformers
from packaging.requirements import Requirement

from offramp.cli.command_line import run
from offramp.cli.commands import inspect
from offramp.core.errors import InputError
from offramp.core.missing import EXTRAS, install_command, missing_package
from offramp.core.models.backbone import Backbone
from offramp.core.models.hub import load_processor

ROOT = Path(__file__).resolve().parents[2]


def behind(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def no_module(name: str) -> ImportError:
    return ModuleNotFoundError(f"No module named {name!r}", name=name)


LAZY = (
    "Could not import module 'SmolVLMProcessor'. Are this object's requirements defined correctly?"
)
RAISED: dict[str, tuple[Exception, str]] = {
    "num2words, behind a lazy module": (
        behind(
            ModuleNotFoundError(LAZY, name="transformers.models.smolvlm"), no_module("num2words")
        ),
        "num2words",
    ),
    "num2words, in words": (
        ImportError(
            "Package `num2words` is required to run SmolVLM processor. Install it with "
            "`pip install num2words`."
        ),
        "num2words",
    ),
    "bitsandbytes": (
        ImportError(
            "Using `bitsandbytes` 4-bit quantization requires bitsandbytes: `pip install -U "
            "bitsandbytes>=0.46.1`"
        ),
        "bitsandbytes",
    ),
    "quanto": (
        ImportError(
            "Loading an optimum-quanto quantized model requires optimum-quanto library "
            "(`pip install optimum-quanto`)"
        ),
        "optimum-quanto",
    ),
    "torchao": (
        ImportError(
            "Loading an torchao quantized model requires torchao library (`pip install torchao`)"
        ),
        "torchao",
    ),
    "accelerate": (
        ValueError(
            "Using a `device_map` requires `accelerate`. You can install it with `pip install "
            "accelerate`"
        ),
        "[train]",
    ),
    "gguf": (no_module("gguf"), "[llama-cpp]"),
    "llama-cpp": (no_module("llama_cpp.llama_cpp"), "[llama-cpp]"),
    "matplotlib": (no_module("matplotlib.pyplot"), "[report]"),
    "starlette, which fastapi brings": (no_module("starlette.types"), "[serve]"),
    "sentencepiece": (
        ImportError("LlamaTokenizer requires the SentencePiece library but it was not found."),
        "SentencePiece",
    ),
}


def _requirement(text: str) -> Requirement:
    """Without where its source is, which the build system fills in."""
    return Requirement(text.partition("{")[0])


def test_every_package_of_an_extra_is_known_with_its_extra() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    text = (ROOT / "llama" / "pyproject.toml").read_text(encoding="utf-8")
    extras["llama-cpp"] += tomllib.loads(text)["project"]["dependencies"]  # that package's own
    # Of quant's packages a model needs a single one.
    for extra in extras.keys() - {"all", "dev", "docs", "quant"}:
        for needed in map(_requirement, extras[extra]):
            if needed.name == "offramp":  # an extra that is part of this one
                assert needed.extras <= extras.keys()
                continue
            assert needed.name in [_requirement(r).name for r in extras[EXTRAS[needed.name]]]


@pytest.mark.parametrize("name", RAISED)
def test_a_package_that_loading_misses_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error, package = RAISED[name]

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    (tmp_path / "config.json").write_text('{"model_type": "llava"}', encoding="utf-8")
    for kind, load in (
        ("AutoModelForImageTextToText", Backbone.from_pretrained),
        ("AutoProcessor", load_processor),
    ):
        monkeypatch.setattr(getattr(transformers, kind), "from_pretrained", fail)
        with pytest.raises(InputError) as caught:
            load(tmp_path)
        first, second = str(caught.value).split("\n")
        assert str(missing_package(error)) in first and "pip install" in second
        assert package in second


@pytest.mark.parametrize("name", [n for n, (e, _) in RAISED.items() if isinstance(e, ImportError)])
def test_a_package_that_a_command_misses_is_named(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error, package = RAISED[name]

    def fail(_: Any) -> None:
        raise error

    monkeypatch.setattr(inspect, "_inspect", fail)
    assert run(["inspect", "tiny-opt"]) == 1
    out, err = capsys.readouterr()
    first, second = err.rstrip("\n").split("\n")
    assert not out and first.startswith("error: ")
    assert "pip install" in second and package in second


@pytest.mark.parametrize(
    "error",
    [
        ValueError("model type `x` is not known. Update it: `pip install --upgrade transformers`"),
        OSError("nowhere is not a local folder"),
    ],
)
def test_what_is_not_about_a_package_is_not_said_to_be(error: Exception) -> None:
    error.__context__ = no_module("flash_attn")  # one that was looked for, and not needed
    assert missing_package(error) is None


class Installed:
    """A distribution that pip was told of in some way."""

    def __init__(self, origin: dict[str, Any] | None) -> None:
        self.origin = origin

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return None if self.origin is None else json.dumps(self.origin)


def test_what_to_type_follows_how_it_was_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout, wheel = tmp_path / "a checkout's", tmp_path / "offramp-0.1.0-py3-none-any.whl"
    checkout.mkdir()
    wheel.touch()
    git = {"url": "https://example.org/o.git", "vcs_info": {"vcs": "git", "commit_id": "0a1"}}
    origins: list[tuple[dict[str, Any] | None, str]] = [
        (None, "pip install 'offramp[eval]'"),
        ({"url": tmp_path.as_uri(), "dir_info": {}}, f"pip install '{tmp_path}[eval]'"),
        (
            {"url": tmp_path.as_uri(), "dir_info": {"editable": True}},
            f"pip install -e '{tmp_path}[eval]'",
        ),
        (
            {"url": wheel.as_uri(), "archive_info": {}},
            f"pip install 'offramp[eval] @ {wheel.as_uri()}'",
        ),
        ({"url": (tmp_path / "gone.whl").as_uri()}, "pip install 'offramp[eval]'"),
        (git, "pip install 'offramp[eval] @ git+https://example.org/o.git@0a1'"),
    ]
    for origin, typed in origins:
        monkeypatch.setattr(metadata, "distribution", lambda _, o=origin: Installed(o))
        assert install_command("eval") == typed
    odd = Installed({"url": checkout.as_uri(), "dir_info": {}})
    monkeypatch.setattr(metadata, "distribution", lambda _: odd)
    assert shlex.split(install_command("eval")) == ["pip", "install", f"{checkout}[eval]"]


def test_from_a_source_tree_it_is_the_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", nowhere)
    assert install_command("eval") == f"pip install '{ROOT}[eval]'"


def test_no_remedy_writes_it_by_hand_and_pages_install_from_the_checkout() -> None:
    """No index has the name yet, so `offramp[extra]` alone would install nothing."""
    by_hand = re.compile(r"pip install [^\n]*offramp\[")
    files = [*(ROOT / "src").rglob("*.py"), *(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
    assert not [file for file in files if by_hand.search(file.read_text(encoding="utf-8"))]


@pytest.mark.slow
def test_tests_that_need_llama_cpp_are_named_where_it_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.chdir(ROOT)
    file = "tests/llama_cpp/test_trial.py"
    assert pytest.main(["-q", "-n", "0", "-p", "no:cacheprovider", "-p", "no:randomly", file]) == 0
    told = capsys.readouterr().out
    assert re.search(rf"= not run: needs llama-cpp-python =+\n +\d+ of {file}\n", told)
    assert "SKIPPED" not in told and re.search(r"^\d+ not run in", told, re.MULTILINE), told
