"""Laws of vision towers that libmtmd runs: the model's own tokens as far as a format goes, by our
products too; and answers with them."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from gguf_cases import adapter_of, inputs_of, refused, seen_by_mtmd
from hub_files import image_adapter, sliced
from PIL import Image
from projector_files import LOOKS
from smolvlm import save_smolvlm

from offramp.adapter.adapter import Adapter
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.errors import AdapterError, InputError, UnsupportedBackboneError
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits
from offramp.features.vision_cache import VisionCache
from offramp.inputs.image import open_rgb
from offramp.promises.conditions import Conditions
from offramp.serving.batch_engine import BatchEngine
from offramp_llama_cpp import EngineOptions, LlamaCppRuntime, export_gguf
from offramp_llama_cpp import vision_export as writing
from offramp_llama_cpp.edge.model import EdgeModel
from offramp_llama_cpp.gguf_files import PROJECTOR
from offramp_llama_cpp.gguf_writing import VISION_FORMATS
from offramp_llama_cpp.native.products import reason_against
from offramp_llama_cpp.projector import Tower
from offramp_llama_cpp.segment import library
from offramp_llama_cpp.vision_export import export_vision
from offramp_llama_cpp.vision_tower import with_mtmd

pytestmark = pytest.mark.llama_cpp

NEAR = dict(zip(VISION_FORMATS, (0.002, 0.003, 0.03, 0.3), strict=True))
"""How far tokens of these small towers are from the model's own, as a share of their length."""
ENGINE = EngineOptions(context=192, cache="f32", flash_attention=False)
NAMES = ("siglip", "gemma3", "smolvlm", "qwen2-vl", "qwen2.5-vl", "qwen3-vl")
"""The last three take pictures of any size."""


def adapter_with(name: str) -> Adapter:
    return image_adapter() if name == "siglip" else seen_by_mtmd(name)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_the_models_own_as_far_as_the_format_goes(name: str, tmp_path: Path) -> None:
    backbone = adapter_with(name).backbone
    far = {kind: export_vision(backbone, tmp_path / kind, kind, LOOKS) for kind in VISION_FORMATS}
    assert all(0 < far[kind] < NEAR[kind] for kind in VISION_FORMATS), far
    assert far["f32"] < far["q8_0"] < far["q4_0"]


def test_a_clip_tower_is_seen_with_or_refused(tmp_path: Path) -> None:
    """As llama.cpp has it: 0.3.36 of its bindings takes the class token for a patch."""
    try:
        far = export_vision(adapter_of("llava").backbone, tmp_path / "x", "f32", LOOKS)
    except UnsupportedBackboneError as error:
        assert "away, and rounding at most 0.02" in str(error)
    else:
        assert far < NEAR["f32"]


def test_of_half_precision_too(tmp_path: Path) -> None:
    backbone = Backbone(families.build("gemma3", torch.bfloat16))
    assert export_vision(backbone, tmp_path / "f16", "f16", LOOKS) < NEAR["f16"]


def wide() -> Backbone:
    """With weights as wide as our products read them."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

    torch.manual_seed(1)
    tower = SiglipVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
        vision_use_head=False,
    )
    config = LlavaConfig(
        vision_config=tower,
        text_config=families.llama_config(),
        image_token_index=families.IMAGE,
        vision_feature_select_strategy="full",
    )
    return Backbone(LlavaForConditionalGeneration(config).eval(), name="wide")


@pytest.mark.parametrize(("kind", "near"), [("f16", 1e-3), ("q8_0", 0.02), ("q4_0", 0.02)])
def test_our_products_give_what_libmtmd_gives(kind: str, near: float, tmp_path: Path) -> None:
    """To the rounding of activations to 8 bits, which is each one's own."""
    if reason := reason_against(library()._lib):
        pytest.skip(reason)
    backbone, picture = wide(), np.random.default_rng(3).integers(0, 256, (56, 56, 3), np.uint8)
    export_vision(backbone, tmp_path / "tower", kind, LOOKS)
    rows = []
    for kernels in (True, False):
        engine = EngineOptions(kernels=kernels)
        tower = Tower(tmp_path / "tower", engine, width=backbone.width)
        rows.append(tower.rows(picture))
        again = tower.rows(picture)
        assert np.array_equal(again, rows[-1])
        assert (tower.packed_bytes > 0) == kernels
        tower.close()
    assert rows[0].shape == (16, 1, backbone.width)
    far = np.linalg.norm(rows[0] - rows[1]) / np.linalg.norm(rows[1])
    assert 0 < far < near


def test_without_pytorch_images_are_seen_by_our_products(tmp_path: Path) -> None:
    adapter = image_adapter()
    where = sliced(adapter, tmp_path)
    export_vision(adapter.backbone, tmp_path / "tower", "q8_0", LOOKS)
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "dog.png")
    states = []
    for kernels in (True, False):
        engine = replace(ENGINE, kernels=kernels)
        with EdgeModel(where, mmproj=tmp_path / "tower", engine=engine) as model:
            assert model.answer("it is", [tmp_path / "dog.png"], max_new_tokens=4).steps
            seen = open_rgb(tmp_path / "dog.png", "dog.png")
            states.append(model.prompt_of("<__media__>it is", [seen])[0].states)
            packed = model._images.packed_bytes  # type: ignore[union-attr]
            assert (packed > 0) == (kernels and not reason_against(library()._lib))
    assert np.linalg.norm(states[0] - states[1]) < 0.02 * np.linalg.norm(states[1])


# -- in the tower's place --------------------------------------------------------------------------


class Processor:
    """What an export asks of a model's processor."""

    image_mean = image_std = (0.5, 0.5, 0.5)


def seen(name: str, image: int) -> dict[str, Any]:
    """A prompt about a picture of bytes."""
    inputs = dict(inputs_of(name)) if name != "siglip" else siglip_inputs()
    shape, draw = inputs["pixel_values"].shape, np.random.default_rng(image)
    if "image_grid_thw" in inputs:
        [[_, high, wide]] = inputs["image_grid_thw"].tolist()
        shape = (3, 8 * high, 8 * wide)
    pixels = torch.from_numpy(draw.integers(0, 256, shape) / 127.5 - 1).float()
    if "image_grid_thw" in inputs:
        config = adapter_with(name).backbone.model.config
        pixels = writing.KINDS[config.model_type].inputs(config, pixels)["pixel_values"]
    return inputs | {"pixel_values": pixels}


def siglip_inputs() -> dict[str, Any]:
    ids = torch.tensor([[families.IMAGE] * 4 + [20, 30, 40]])
    pixels = torch.zeros(1, 3, 28, 28)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def exported(name: str, folder: Path, vision: str = "f32") -> tuple[Adapter, Path]:
    adapter = adapter_with(name)
    export_gguf(adapter, folder, "f32", vision=vision, processor=Processor())
    return adapter, folder


@pytest.mark.parametrize("name", NAMES)
def test_what_enters_the_decoder_is_near_and_the_models_own_tower_rests(
    name: str, tmp_path: Path
) -> None:
    adapter, folder = exported(name, tmp_path)
    calls: list[int] = []
    own = with_mtmd(adapter, folder)
    hook = adapter.backbone.vision.register_forward_pre_hook(lambda *_: calls.append(1))
    options = {"max_new_tokens": 4, "do_sample": False}
    with LlamaCppRuntime(own, folder, engine=ENGINE) as runtime, torch.inference_mode():
        assert runtime.backbone.vision_engine == "mtmd f32"
        entry, made = runtime.entry(), []
        for image in range(4):  # of a kept text too
            made.append(entry.read(seen(name, image), options)[1][0].states)
            assert runtime.generate(seen(name, image), **options).new_tokens.shape == (1, 4)
        assert not calls
    hook.remove()
    with LlamaCppRuntime(adapter, folder, engine=ENGINE) as runtime, torch.inference_mode():
        entry = runtime.entry()
        for image, rows in enumerate(made):
            want = entry.read(seen(name, image), options)[1][0].states
            assert 0 < np.linalg.norm(rows - want) < NEAR["f32"] * np.linalg.norm(want)


def test_the_engine_reads_images_ahead_by_it(tmp_path: Path) -> None:
    adapter, folder = exported("siglip", tmp_path)
    adapter = with_mtmd(adapter, folder)
    engine = replace(ENGINE, sequences=2)
    options = {"max_new_tokens": 4, "do_sample": False}
    with LlamaCppRuntime(adapter, folder, engine=engine) as runtime:
        alone = [runtime.generate(seen("siglip", image), **options) for image in (0, 1, 1)]
        cache = VisionCache()
        with BatchEngine(runtime, vision_cache=cache) as batch:
            handles = [batch.submit(seen("siglip", image), **options) for image in (0, 1, 1)]
            for handle, want in zip(handles, alone, strict=True):
                assert torch.equal(handle.result(60).output.sequences, want.sequences)
        assert cache.misses == 2


def test_it_is_a_condition_of_the_guarantee(tmp_path: Path) -> None:
    adapter, folder = exported("siglip", tmp_path, "q8_0")
    own = with_mtmd(adapter, folder)
    assert Conditions.of(own.backbone, own.policy)["vision"] == "mtmd q8_0"
    assert Conditions.of(adapter.backbone, adapter.policy)["vision"] == "torch"


def test_pixels_are_the_bytes_that_they_were() -> None:
    looks = writing.Looks((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    assert np.array_equal(looks.pixels(looks.seen(pixels)), pixels)
    assert np.array_equal(looks.pixels(looks.seen(pixels)[None])[0], pixels)


# -- mistakes --------------------------------------------------------------------------------------


def test_towers_that_are_not_written_are_refused(tmp_path: Path) -> None:
    for name in ("blip2-llama", "paligemma", "internvl"):
        adapter = adapter_of(name)
        asked = {"vision": "q8_0", "processor": Processor()}
        refused(
            lambda adapter=adapter, asked=asked: export_gguf(adapter, tmp_path, "f32", **asked),
            UnsupportedBackboneError,
            "none that is written",
        )
    assert not [*tmp_path.iterdir()]
    refused(
        lambda: export_vision(image_adapter().backbone, tmp_path / "x", "q3", LOOKS),
        InputError,
        "q8_0",
    )
    refused(lambda: writing.Looks.of(object()), InputError, "object")


def test_one_that_computes_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = writing.KINDS["llava"]

    def other(config: Any, key: str, tensor: Any) -> Any:
        for name, part in kind.tensors(config, key, tensor):
            yield name, 3 * part if "fc2.weight" in name else part

    monkeypatch.setitem(writing.KINDS, "llava", replace(kind, tensors=other))
    for name in ("f32", "q8_0"):
        refused(
            lambda name=name: export_gguf(
                image_adapter(), tmp_path, "f32", vision=name, processor=Processor()
            ),
            UnsupportedBackboneError,
            "away, and rounding at most",
        )
    assert not [*tmp_path.iterdir()]


def test_a_folder_without_a_whole_tower_is_refused(tmp_path: Path) -> None:
    adapter, folder = exported("siglip", tmp_path / "with")
    (folder / PROJECTOR).write_bytes(b"GGUF")
    refused(lambda: with_mtmd(adapter, folder), AdapterError, "is damaged")
    (folder / PROJECTOR).unlink()
    refused(lambda: with_mtmd(adapter, folder), AdapterError, "missing")
    export_gguf(adapter, tmp_path / "without", "f32")
    assert PROJECTOR not in json.loads((tmp_path / "without" / "digests.json").read_text())
    refused(lambda: with_mtmd(adapter, tmp_path / "without"), AdapterError, "--vision")


def test_a_video_is_refused(tmp_path: Path) -> None:
    adapter, folder = exported("qwen2-vl", tmp_path)
    tower = with_mtmd(adapter, folder).backbone.vision
    patches, grid = torch.randn(16, 3 * 2 * 8 * 8), torch.tensor([[1, 4, 4]])
    refused(lambda: tower(patches, grid_thw=grid), InputError, "video")


@pytest.mark.slow
def test_commands_write_it_and_see_by_it(
    run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_smolvlm(tmp_path / "model")
    backbone = Backbone.from_pretrained(tmp_path / "model")
    exits = Exits(backbone, (2, 4))
    Adapter(backbone, exits, ExitPolicy({2: 0.3, 4: 0.3})).save(tmp_path / "exits")
    draw = np.random.default_rng(0)
    Image.fromarray(draw.integers(0, 256, (50, 40, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    known = ("--adapter", tmp_path / "exits", "--dtype", "float32")
    out = ("--gguf", "f32", "--out", tmp_path / "gguf")
    with caplog.at_level(logging.INFO):
        code, made, _ = run("export", *known, *out, "--vision", "q8_0", "--json")
    assert code == 0 and str(tmp_path / "gguf" / PROJECTOR) in json.loads(made)
    assert "of their length from the model's own" in caplog.text and "Endian" not in caplog.text
    asked = (
        "generate",
        *known,
        "--engine",
        "llama.cpp",
        "--gguf",
        tmp_path / "gguf",
        "--image",
        tmp_path / "a.png",
        "--max-new-tokens",
        4,
        "--json",
    )
    answers = [run(*asked, "--vision", name) for name in ("torch", "mtmd")]
    assert [code for code, _, _ in answers] == [0, 0]
    first = [json.loads(text)["steps"][0]["token"] for _, text, _ in answers]
    assert first[0] == first[1]

    run("export", *known, *out, "--overwrite")
    code, _, said = run(*asked, "--vision", "mtmd")
    assert code == 1 and "holds no vision tower" in said
    code, _, said = run("generate", "--adapter", "tiny-opt", "--vision", "mtmd", "--image", "x")
    assert code == 1 and "--engine llama.cpp" in said
    code, _, said = run("export", "--adapter", "tiny-opt", *out, "--vision", "q8_0", "--overwrite")
    assert code == 1 and "none that is written" in said
