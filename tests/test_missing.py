"""Laws of missing packages: two lines that name the package and how it is installed."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import transformers
from packaging.requirements import Requirement

from offramp.cli.command_line import run
from offramp.cli.commands import inspect
from offramp.errors import InputError
from offramp.missing import EXTRAS, missing_package
from offramp.models.backbone import Backbone
from offramp.models.hub.loading import load_processor


def behind(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def no_module(name: str) -> ImportError:
    return ModuleNotFoundError(f"No module named {name!r}", name=name)


LAZY = (
    "Could not import module 'SmolVLMProcessor'. Are this object's requirements defined correctly?"
)
RAISED: dict[str, tuple[Exception, str]] = {
    "num2words, behind a lazy module": (behind(ModuleNotFoundError(
        LAZY, name="transformers.models.smolvlm"), no_module("num2words")), "num2words"),
    "num2words, in words": (ImportError(
        "Package `num2words` is required to run SmolVLM processor. Install it with `pip install "
        "num2words`."), "num2words"),
    "bitsandbytes": (ImportError(
        "Using `bitsandbytes` 4-bit quantization requires bitsandbytes: `pip install -U "
        "bitsandbytes>=0.46.1`"), "bitsandbytes"),
    "quanto": (ImportError(
        "Loading an optimum-quanto quantized model requires optimum-quanto library (`pip install "
        "optimum-quanto`)"), "optimum-quanto"),
    "torchao": (ImportError(
        "Loading an torchao quantized model requires torchao library (`pip install torchao`)"),
        "torchao"),
    "accelerate": (ValueError(
        "Using a `device_map` requires `accelerate`. You can install it with `pip install "
        "accelerate`"), "offramp[train]"),
    "gguf": (no_module("gguf"), "offramp[llama-cpp]"),
    "llama-cpp": (no_module("llama_cpp.llama_cpp"), "offramp[llama-cpp]"),
    "matplotlib": (no_module("matplotlib.pyplot"), "offramp[report]"),
    "starlette, which fastapi brings": (no_module("starlette.types"), "offramp[serve]"),
    "sentencepiece": (ImportError(
        "LlamaTokenizer requires the SentencePiece library but it was not found."),
        "SentencePiece"),
}  # fmt: skip


def _requirement(text: str) -> Requirement:
    """Without where its source is, which the build system fills in."""
    return Requirement(text.partition("{")[0])


def test_every_package_of_an_extra_is_known_with_its_extra() -> None:
    text = (Path(__file__).resolve().parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    # Of quant's packages a model needs a single one.
    for extra in extras.keys() - {"all", "dev", "docs", "quant"}:
        for needed in map(_requirement, extras[extra]):
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
