"""Laws of the export: the files hold the model's own weights, whole or not at all."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
from gguf_cases import DEPTHS, KINDS, SHORT, adapter_of, refused

from offramp.core.decoding.policy import FULL
from offramp.core.errors import InputError, StorageError, UnsupportedBackboneError
from offramp_llama_cpp import cuts, export_gguf
from offramp_llama_cpp.architectures import architecture_of, layer_tensors
from offramp_llama_cpp.exit_files import digest_of
from offramp_llama_cpp.gguf_export import ExportFormats
from offramp_llama_cpp.gguf_writing import FORMATS


def test_files_say_what_they_are_made_from(exported: Any) -> None:
    import gguf

    adapter = adapter_of("llava")
    first, _, last = (
        gguf.GGUFReader(exported("llava", "q4_1") / f"segment-{i}.gguf") for i in range(3)
    )
    said = {key: field.contents() for key, field in first.fields.items()}
    assert said["offramp.shortlist"] == SHORT.tolist()
    assert json.loads(said["offramp.policy"])["thresholds"] == {"2": 0.5, "4": 0.5}
    assert said["offramp.exits_digest"] == digest_of(adapter)
    kinds = {t.name: t.tensor_type.name for t in first.tensors}
    assert kinds["blk.0.ffn_up.weight"] == "Q4_1" and kinds["blk.2.ffn_up.weight"] == "Q8_0"
    heads = [next(t for t in f.tensors if t.name == "token_embd.weight") for f in (first, last)]
    assert [head.shape.tolist() for head in heads] == [[32, len(SHORT)], [32, families.VOCABULARY]]


@pytest.mark.parametrize("name", KINDS)
def test_weights_are_the_models_own(name: str, exported: Any) -> None:
    import gguf

    reader = gguf.GGUFReader(exported(name) / "segment-2.gguf")
    tensors = {t.name: t.data for t in reader.tensors}
    layer = adapter_of(name).backbone.layers[DEPTHS[-1]]
    down = layer.mlp.down_proj.weight.numpy()
    assert np.array_equal(tensors["blk.0.ffn_down.weight"], down)
    query = layer.self_attn.q_proj.weight.numpy()
    assert np.array_equal(np.sort(tensors["blk.0.attn_q.weight"], 0), np.sort(query, 0))


def test_an_export_that_fails_leaves_what_was_there(
    exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "gguf"
    shutil.copytree(exported("llava"), folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full_disk(*_: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cuts, "digest_file", full_disk)
    with pytest.raises(StorageError):
        export_gguf(adapter_of("llava"), folder, "q8_0")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["gguf"]


GRAPHS = {
    "llava-next": "llama",
    "idefics3": "llama",
    "instructblip-llama": "llama",
    "qwen2-vl": "paddleocr",
    "qwen2.5-vl": "paddleocr",
    "qwen3-vl": "qwen3vl",
    "gemma3": "gemma3",
    "paligemma": "gemma",
    "paligemma2": "gemma2",
    "blip2-opt": "gpt2",
    "instructblip-opt": "gpt2",
}


@pytest.mark.parametrize("name", sorted(set(families.NAMES) - set(KINDS)))
def test_other_decoders_are_refused(name: str, backbone: Any) -> None:
    if name in GRAPHS:
        assert architecture_of(backbone(name)).name == GRAPHS[name]
        return
    with pytest.raises(UnsupportedBackboneError) as error:
        architecture_of(backbone(name))
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize(
    "name, changes, word",
    [
        ("qwen2-vl", {"hidden_act": "gelu"}, "activation 'gelu'"),
        ("gemma3", {"use_bidirectional_attention": True}, "always looks ahead"),
        ("blip2-opt", {"do_layer_norm_before": False}, "norms after"),
        ("internvl-experts", {"norm_topk_prob": False}, "add up to one"),
        ("qwen2.5-vl", {"layer_types": ["sliding_attention"] * 6}, "sliding windows"),
        ("gemma3", {"layer_types": ["chunked_attention"] * 8}, "chunked_attention"),
    ],
)
def test_settings_that_a_graph_does_not_have_are_refused(
    name: str, changes: dict[str, Any], word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = adapter_of(name).backbone
    for key, value in changes.items():
        monkeypatch.setattr(backbone.text_config, key, value)
    refused(lambda: architecture_of(backbone), UnsupportedBackboneError, word)


@pytest.mark.parametrize("large", [False, True])
def test_the_scale_of_scores_is_in_the_weights(large: bool, monkeypatch: Any) -> None:
    """llama.cpp computes a scale by itself, another one in files of some numbers of layers."""
    backbone = adapter_of("paligemma2-wide").backbone
    plain = replace(architecture_of(backbone), query="")
    heads = backbone.text_config.num_attention_heads
    base = backbone.width / heads if large else backbone.text_config.head_dim
    layers = 46 if large else 3
    [was, now] = [
        dict(layer_tensors(backbone.layers[0], each, backbone, layers))["attn_q.weight"]
        for each in (plain, architecture_of(backbone))
    ]
    wanted = was * backbone.layers[0].self_attn.scaling * base**0.5
    assert np.allclose(now, wanted) and not np.allclose(now, was)


def test_unknown_formats_and_depths_are_refused(tmp_path: Path) -> None:
    adapter = adapter_of("llava")
    refused(lambda: ExportFormats("q4_2"), InputError, "q4_1")
    refused(lambda: export_gguf(adapter, tmp_path, depths=(3,)), InputError, "[3]")
    off = replace(adapter, policy=FULL)
    refused(lambda: export_gguf(off, tmp_path), InputError, "--depths")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layers", FORMATS)
def test_exits_and_head_have_eight_bits_at_least(layers: str) -> None:
    formats = ExportFormats(layers)
    wanted = layers if layers in ("f32", "f16", "bf16") else "q8_0"
    assert (formats.layers, formats.exits, formats.head) == (layers, wanted, wanted)
