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

from offramp.engine.policy import FULL
from offramp.errors import InputError, StorageError, UnsupportedBackboneError
from offramp.runtimes.llama_cpp import export_gguf, gguf_export
from offramp.runtimes.llama_cpp.architectures import architecture_of
from offramp.runtimes.llama_cpp.gguf_export import ExportFormats


def test_files_say_what_they_are_made_from(exported: Any) -> None:
    import gguf

    adapter = adapter_of("llava")
    first, _, last = (
        gguf.GGUFReader(exported("llava", "q4_1") / f"segment-{i}.gguf") for i in range(3)
    )
    said = {key: field.contents() for key, field in first.fields.items()}
    assert said["offramp.shortlist"] == SHORT.tolist()
    assert json.loads(said["offramp.policy"])["thresholds"] == {"2": 0.5, "4": 0.5}
    assert said["offramp.exits_digest"] == gguf_export.exits_digest(adapter)
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

    monkeypatch.setattr(gguf_export, "digest_file", full_disk)
    with pytest.raises(StorageError):
        export_gguf(adapter_of("llava"), folder, "q8_0")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["gguf"]


@pytest.mark.parametrize("name", sorted(set(families.NAMES) - set(KINDS)))
def test_other_decoders_are_refused(name: str, backbone: Any) -> None:
    if name in ("llava-next", "idefics3", "instructblip-llama"):
        assert architecture_of(backbone(name)).name == "llama"
        return
    with pytest.raises(UnsupportedBackboneError) as error:
        architecture_of(backbone(name))
    assert len(str(error.value).splitlines()) == 2


def test_unknown_formats_and_depths_are_refused(tmp_path: Path) -> None:
    adapter = adapter_of("llava")
    refused(lambda: ExportFormats("q4_2"), InputError, "q4_1")
    refused(lambda: export_gguf(adapter, tmp_path, depths=(3,)), InputError, "[3]")
    off = replace(adapter, policy=FULL)
    refused(lambda: export_gguf(off, tmp_path), InputError, "--depths")
    assert not list(tmp_path.iterdir())
