"""Laws of vision engines: the model's own answers in float32, or the model's own tower."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import families
import pytest
import torch

from offramp import Backbone
from offramp.core.engine.generate import generate
from offramp.core.errors import InputError
from offramp.engines.loading import open_backbone
from offramp.features import vision_engine
from offramp.features.towers import with_vision
from offramp.features.vision_cache import VisionCache
from offramp.features.vision_engine import IN_BF16, IN_INT8, TOLERANCE

OPTIONS: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
NAMES = ("onnxruntime", "openvino")


@pytest.fixture(params=NAMES)
def engine(request: Any) -> str:
    for package in (request.param, "onnxscript"):
        pytest.importorskip(package)
    return str(request.param)


@pytest.fixture
def ort() -> str:
    """One engine, where what is looked at is the same for all."""
    for package in ("onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    return "onnxruntime"


@pytest.fixture(scope="module", autouse=True)
def kept(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Exports of these tests alone, which share them."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder / "offramp" / "vision"


def exported(name: str, engine: str, dtype: torch.dtype = torch.float32) -> tuple[Backbone, Any]:
    """A tiny model whose tower runs in an engine, and a list of its own tower's calls since."""
    backbone = Backbone(families.build(name, dtype))
    calls: list[int] = []
    backbone.vision.register_forward_pre_hook(lambda *_: calls.append(1))
    seeing = with_vision(backbone, engine, inputs_of(name, dtype=dtype))
    assert backbone.vision_engine == "torch"
    calls.clear()
    return seeing, calls


def inputs_of(
    name: str, rows: int = 1, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    made = families.KINDS[name].inputs(rows, seed)
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in made.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["blip2-opt", "smolvlm"])  # their towers are built differently
def test_each_family_calls_it_in_its_own_way(name: str, ort: str) -> None:
    test_answers_are_the_models_own_and_its_tower_rests(ort, name)


def test_answers_are_the_models_own_and_its_tower_rests(engine: str, name: str = "llava") -> None:
    backbone, calls = exported(name, engine)
    own = Backbone(families.build(name))
    assert (own.vision_engine, backbone.vision_engine) == ("torch", engine)
    for rows in (1, 3):
        inputs = inputs_of(name, rows, seed=5)
        made = generate(backbone, inputs, **OPTIONS)
        assert made.sequences.tolist() == generate(own, inputs, **OPTIONS).sequences.tolist()
    assert not calls


def test_a_tower_in_bfloat16_is_near_but_another_one() -> None:
    for package in ("openvino", "onnxscript"):
        pytest.importorskip(package)
    backbone, calls = exported("llava", IN_BF16)
    assert backbone.vision_engine == IN_BF16
    made = generate(backbone, inputs_of("llava"), **OPTIONS)
    assert made.new_tokens.shape[1] == 4 and not calls


def test_products_in_int8_are_near_but_those_of_another_tower(ort: str) -> None:
    backbone, calls = exported("llava", IN_INT8)
    assert backbone.vision_engine == IN_INT8
    pixels = inputs_of("llava")["pixel_values"]
    towers: list[Any] = [backbone.tower, exported("llava", ort)[0].tower]
    made, want = (each._call.run(each, [pixels]).last_hidden_state for each in towers)
    assert TOLERANCE < ((made - want).norm() / want.norm()).item() < 0.1
    assert not calls and not logging.getLogger().disabled


@pytest.mark.slow
def test_a_tower_that_is_farther_off_than_rounding_is_not_used(
    ort: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(vision_engine, "TOLERANCE_ROUNDED", 1e-9)
    backbone, _ = exported("llava", IN_INT8)
    assert backbone.vision_engine == "torch" and "away from the tower's own" in caplog.text


def test_a_picture_is_seen_as_it_is_alone(engine: str) -> None:
    backbone, _ = exported("llava", engine)
    pixels = inputs_of("llava", 3)["pixel_values"]
    together = backbone.vision(pixels, output_hidden_states=True).hidden_states
    for row in range(3):
        alone = backbone.vision(pixels[row : row + 1], output_hidden_states=True).hidden_states
        for one, all_of_them in zip(alone, together, strict=True):
            assert torch.equal(one[0], all_of_them[row])


@pytest.mark.slow
def test_in_half_precision_it_runs_in_float32(engine: str) -> None:
    backbone, _ = exported("llava", engine, torch.bfloat16)
    exact = families.build("llava", torch.bfloat16).float()
    pixels = inputs_of("llava", dtype=torch.bfloat16)["pixel_values"]
    made = backbone.vision(pixels, output_hidden_states=True).last_hidden_state
    want = exact.model.vision_tower(pixels.float(), output_hidden_states=True).last_hidden_state
    assert made.dtype == torch.bfloat16
    assert ((made - want).norm() / want.norm()).item() < 5e-3  # of one rounding to bfloat16


def test_the_vision_cache_stands_before_it(ort: str) -> None:
    backbone, cache = exported("llava", ort)[0], VisionCache()
    inputs = inputs_of("llava")
    first = generate(backbone, inputs, vision_cache=cache, **OPTIONS)
    again = generate(backbone, inputs, vision_cache=cache, **OPTIONS)
    assert (cache.misses, cache.hits) == (1, 1)
    assert torch.equal(first.sequences, again.sequences)


@pytest.mark.slow
def test_an_export_is_kept_and_a_damaged_one_made_again(
    kept: Path, ort: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exports: list[Path] = []
    real = vision_engine._export

    def counted(*given: Any) -> None:
        exports.append(given[-1])
        real(*given)

    monkeypatch.setattr(vision_engine, "_export", counted)
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept / "of one"))
    for _ in range(2):
        assert exported("llava", ort)[0].vision_engine == ort
    assert len(exports) == 1
    [file] = (kept / "of one").rglob(vision_engine.FILE)
    file.write_bytes(file.read_bytes()[:5000])
    assert exported("llava", ort)[0].vision_engine == ort
    assert len(exports) == 2


@pytest.mark.slow
def test_one_that_cannot_be_kept_is_made_each_time(
    ort: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert exported("llava", ort)[0].vision_engine == ort


@pytest.mark.slow
def test_what_is_not_the_towers_own_stays_in_pytorch(
    engine: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    load = vision_engine.ENGINES[engine]

    def wrong(file: Path) -> Any:
        run = load(file)
        return lambda arrays: [1.001 * made for made in run(arrays)]

    monkeypatch.setitem(vision_engine.ENGINES, engine, wrong)
    with caplog.at_level(logging.WARNING):
        backbone, calls = exported("llava", engine)
    assert backbone.vision_engine == "torch"
    assert f"runs in PyTorch, not in {engine}: what it makes of two pictures is 1.0e-03" in (
        caplog.text
    )
    generate(backbone, inputs_of("llava"), **OPTIONS)
    assert calls
    assert TOLERANCE < 1e-3


def test_patches_of_any_size_stay_in_pytorch(ort: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        backbone, _ = exported("qwen2.5-vl", ort)
    assert backbone.vision_engine == "torch"
    assert "patches of no one size" in caplog.text


def test_a_tower_that_is_written_into_answers_itself(
    ort: str, caplog: pytest.LogCaptureFixture
) -> None:
    backbone, calls = exported("llava", ort)
    changed = families.build("llava")
    for model in (backbone.model, changed):
        with torch.no_grad():
            next(model.model.vision_tower.parameters()).mul_(1.5)
    inputs = inputs_of("llava")
    with caplog.at_level(logging.WARNING):
        made = generate(backbone, inputs, **OPTIONS)
    assert torch.equal(made.sequences, generate(Backbone(changed), inputs, **OPTIONS).sequences)
    assert calls and caplog.text.count("no longer those exported") == 1


def test_another_way_of_calling_is_answered_by_the_tower(
    ort: str, caplog: pytest.LogCaptureFixture
) -> None:
    backbone, calls = exported("llava", ort)
    with caplog.at_level(logging.WARNING):
        made = backbone.vision(inputs_of("llava")["pixel_values"], output_hidden_states=False)
    assert made.hidden_states is None
    assert calls and "in another way" in caplog.text


def test_a_picture_by_its_name_is_the_call_that_was_exported(ort: str) -> None:
    backbone, calls = exported("blip2-opt", ort)
    pixels, tower = inputs_of("blip2-opt")["pixel_values"], backbone.tower
    assert tower is not None
    options = {"interpolate_pos_encoding": False, "return_dict": True}
    by_place, by_name = tower(pixels, **options), tower(pixel_values=pixels, **options)
    assert torch.equal(by_place.last_hidden_state, by_name.last_hidden_state)
    assert not calls


# -- mistakes --------------------------------------------------------------------------------------


def test_mistakes_are_two_lines(opt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no vision engine 'onnx'") as error:
        with_vision(opt, "onnx")
    assert "onnxruntime" in error.value.remedy
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(InputError, match="package onnxruntime is missing") as error:
        open_backbone("nowhere", vision="onnxruntime")  # before the model is looked for
    assert "[vision]" in error.value.remedy


def test_a_language_model_has_no_tower(engine: str) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_config(families.llama_config())
    with pytest.raises(InputError, match="sees no images"):
        with_vision(Backbone(model), engine)


def test_without_a_picture_to_try_it_stays_in_pytorch(
    ort: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        backbone = with_vision(Backbone(families.build("llava")), ort)
    assert backbone.vision_engine == "torch"
    assert "nothing of a picture" in caplog.text


# -- where it is used ------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_shipped_model_is_loaded_with_it(ort: str) -> None:
    from offramp import Example
    from offramp.adapter.shipped import example_picture
    from offramp.features.input_processor import InputProcessor

    answers: list[Any] = []
    for name in ("torch", ort):
        backbone, processor = open_backbone("tiny-opt", vision=name)
        assert backbone.vision_engine == name
        example = Example(example_picture(backbone.name), "Caption:", (), key="scene")
        inputs = InputProcessor(backbone, processor).prompts([example])
        answers.append(generate(backbone, inputs, max_new_tokens=12, do_sample=False).sequences)
    assert torch.equal(*answers)


@pytest.mark.slow
def test_the_photo_models_tower_is_exported(ort: str, tmp_path: Path) -> None:
    import photo
    from offramp_photo.build import assembled

    model, _ = assembled(
        photo.language(), photo.tokenizer(), _network(), photo.trained(tmp_path / "data")
    )
    own, pixels = Backbone(model), torch.randn(1, 3, 224, 224)
    ids = torch.tensor([[photo.IMAGE] * photo.TOWER.tokens + [1, 2]])
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    backbone = with_vision(own, ort, example)
    assert backbone.vision_engine == ort
    made, want = (generate(model, example, **OPTIONS).sequences for model in (backbone, own))
    assert torch.equal(made, want)


def _network() -> Any:
    from offramp_photo.tower import EfficientNetLite0

    return EfficientNetLite0().eval().requires_grad_(False)


@pytest.mark.slow
@pytest.mark.llama_cpp
def test_llama_cpps_prompts_are_of_it(ort: str) -> None:
    """What enters llama.cpp is what the engine saw, as far as PyTorch's tower goes to rounding."""
    from offramp_llama_cpp.entry import PromptEntry
    from offramp_llama_cpp.graphs import Architecture
    from offramp_llama_cpp.segment import EngineOptions

    backbone, calls = exported("llava", ort)
    architecture = Architecture("llama", {})
    rows: list[Any] = []
    for model in (backbone, Backbone(families.build("llava"))):
        entry = PromptEntry(model, architecture, EngineOptions(context=64))
        with torch.inference_mode():
            prepared = entry.prepare(inputs_of("llava"), dict(OPTIONS))
            [prompt] = entry.prompts(prepared)
        rows.append(torch.from_numpy(prompt.states))
    assert not calls
    assert 0 < ((rows[0] - rows[1]).norm() / rows[1].norm()).item() < TOLERANCE


def test_commands_take_it_and_answer_the_same(ort: str, run: Any) -> None:
    from offramp.adapter.shipped import example_picture

    ask = ("generate", "--adapter", "tiny-opt", "--image", example_picture("offramp/tiny-opt"))
    answers = [run(*ask, "--vision", name, "--json") for name in ("torch", ort)]
    assert [code for code, _, _ in answers] == [0, 0]
    theirs, ours = (json.loads(said) for _, said, _ in answers)
    scores = [[token.pop("score") for token in one["steps"]] for one in (theirs, ours)]
    assert theirs == ours and scores[0] == pytest.approx(scores[1], abs=1e-4)
    code, _, said = run(*ask, "--vision", "onnx")
    assert code == 2 and "onnxruntime" in said
