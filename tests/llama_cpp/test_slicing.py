"""Laws of the slicer: tensors as they are stored, what an export would hold, and bit by bit the
whole file's numbers."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_cases import GREEDY, SHORT, adapter_of, depths_of, inputs_of, refused, same
from transformers import LlamaConfig, LlamaForCausalLM

from offramp.adapter.adapter import Adapter
from offramp.core.decoding.policy import FULL, ExitPolicy
from offramp.core.errors import AdapterError, InputError, UnsupportedBackboneError
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits, ExitSet
from offramp_llama_cpp import ExportFormats, export_gguf, slice_gguf
from offramp_llama_cpp.exit_files import digest_of, read_exits
from offramp_llama_cpp.gguf_export import export_whole

gguf = pytest.importorskip("gguf")


def saved(adapter: Adapter, folder: Path) -> Path:
    """A shortlist is kept with what was measured of it."""
    exits = replace(adapter.exits, measured={"shortlist": {"size": len(SHORT)}})
    replace(adapter, exits=exits).save(folder)
    return folder


@pytest.fixture
def whole(tmp_path: Path) -> Any:
    """`whole(name, formats)`: a file of the whole decoder, and the folder of the adapter."""

    def write(name: str, formats: str = "q8_0") -> tuple[Path, Path]:
        adapter = adapter_of(name)
        folder = saved(adapter, tmp_path / "adapter")
        export_whole(adapter.backbone, tmp_path / "whole.gguf", ExportFormats(formats))
        return tmp_path / "whole.gguf", folder

    return write


def contents(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of the architecture, and tensors as they are stored."""
    reader = gguf.GGUFReader(file)
    said = {key: field.contents() for key, field in reader.fields.items()}
    name = said["general.architecture"]
    settings = {key: value for key, value in said.items() if key.startswith(f"{name}.")}
    return settings, {t.name: (t.tensor_type.name, t.data.copy()) for t in reader.tensors}


@pytest.mark.parametrize(
    "name", ["llava", "internvl", "qwen3-vl", "qwen3-vl-experts", "gemma3", "paligemma", "granite"]
)
def test_a_slice_is_what_an_export_would_be(name: str, whole: Any, tmp_path: Path) -> None:
    file, folder = whole(name)
    sliced = slice_gguf(file, folder, tmp_path / "sliced")
    exported = export_gguf(adapter_of(name), tmp_path / "exported", "q8_0")
    assert len(sliced) == len(exported) == len(depths_of(name)) + 1
    for one, other in zip(sliced, exported, strict=True):
        (said, tensors), (expected, theirs) = contents(one), contents(other)
        assert tensors.keys() == theirs.keys()
        for key, (kind, data) in tensors.items():
            assert kind == theirs[key][0] and np.array_equal(data, theirs[key][1]), key
        assert {k: v for k, v in said.items() if k in expected} == expected


def test_exits_are_read_without_torch_as_with_it(tmp_path: Path) -> None:
    for name in ("llava", "qwen3-vl-experts"):
        adapter = adapter_of(name)
        saved(adapter, tmp_path / name)
        found = read_exits(tmp_path / name)
        assert found.digest == digest_of(adapter)
        assert found.shortlist is not None and found.shortlist.tolist() == SHORT.tolist()
        for depth in adapter.exits.depths:
            for key, tensor in adapter.exits.at(depth).state_dict().items():
                assert np.array_equal(found.states[depth][key], tensor.float().numpy())


def test_half_precision_has_the_same_digest(tmp_path: Path) -> None:
    adapter = adapter_of("llava")
    exits = Exits(adapter.backbone, depths_of("llava"))
    exits.load_state_dict(adapter.exits.modules.state_dict())
    half = replace(adapter, exits=ExitSet(exits.to(torch.bfloat16), SHORT))
    saved(half, tmp_path / "half")
    assert read_exits(tmp_path / "half").digest == digest_of(half)


@pytest.mark.llama_cpp
@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("formats", ["q4_k", "q6_k"])
def test_k_quants_are_cut_bit_by_bit(formats: str, kernels: bool, tmp_path: Path) -> None:
    from offramp_llama_cpp.chain import CallSizes, SegmentChain
    from offramp_llama_cpp.segment import EngineOptions, Segment

    config = LlamaConfig(
        vocab_size=96,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    backbone = Backbone(LlamaForCausalLM(config), name="wide")
    adapter = Adapter(
        backbone, ExitSet(Exits(backbone, (2,)), SHORT), ExitPolicy({2: 0.5}, shortlist=True)
    )
    saved(adapter, tmp_path / "adapter")
    formats_of_all = ExportFormats(formats, formats, formats)
    export_whole(backbone, tmp_path / "whole.gguf", formats_of_all)
    files = slice_gguf(tmp_path / "whole.gguf", tmp_path / "adapter", tmp_path / "sliced")
    kind = contents(files[1])[1]["blk.0.ffn_up.weight"][0]
    assert kind == formats.upper()
    options = EngineOptions(context=64, kernels=kernels)
    states = np.random.default_rng(0).normal(size=(20, 256)).astype(np.float32)
    parts = [Segment(files[0], options, tap_layer=1), Segment(files[1], options, tap_layer=None)]
    one = Segment(tmp_path / "whole.gguf", options, tap_layer=None)
    chain = SegmentChain(parts, CallSizes(1, 1))
    chain.run(states[:12])
    found = [chain.finish(12).copy()]
    one.feed(states[:12], 12)
    expected = [one.logits(12).copy()]
    for row in states[12:]:
        chain.run(row[None])
        found.append(chain.finish(1).copy())
        one.feed(row[None], 1)
        expected.append(one.logits(1).copy())
    assert np.array_equal(np.concatenate(found), np.concatenate(expected))
    assert not kernels or parts[1].products is None or parts[1].products.bytes > 0
    for segment in (*parts, one):
        segment.close()


@pytest.mark.llama_cpp
def test_the_runtime_runs_a_slice(whole: Any, tmp_path: Path) -> None:
    from offramp_llama_cpp import LlamaCppRuntime
    from offramp_llama_cpp.segment import EngineOptions

    file, folder = whole("llava")
    slice_gguf(file, folder, tmp_path / "sliced")
    export_gguf(adapter_of("llava"), tmp_path / "exported", "q8_0")
    engine, found = EngineOptions(context=128), []
    for name in ("sliced", "exported"):
        with LlamaCppRuntime(adapter_of("llava"), tmp_path / name, engine=engine) as each:
            for policy in (FULL, adapter_of("llava").policy):
                found.append(each.generate(inputs_of("llava"), policy=policy, **GREEDY))
    assert same(found[0], found[2]) and same(found[1], found[3])
    other = adapter_of("smolvlm")
    refused(lambda: LlamaCppRuntime(other, tmp_path / "sliced"), AdapterError, "other than this")


def test_a_slice_says_of_what_it_is(whole: Any, tmp_path: Path) -> None:
    from offramp.core.storage import digest_file

    file, folder = whole("llava")
    first, *_ = slice_gguf(file, folder, tmp_path / "sliced")
    said = {k: f.contents() for k, f in gguf.GGUFReader(first).fields.items()}
    source = json.loads(said["offramp.source"])
    assert source["file"] == "whole.gguf" and source["sha256"] == digest_file(file)
    assert json.loads(said["offramp.policy"])["thresholds"] == {"2": 0.5, "4": 0.5}
    assert said["offramp.depths"] == [2, 4]


def test_what_cannot_be_cut_is_refused(whole: Any, tmp_path: Path) -> None:
    file, folder = whole("llava")
    out = tmp_path / "sliced"
    refused(lambda: slice_gguf(file, folder, out, depths=(3,)), InputError, "[3]")
    refused(lambda: slice_gguf(file, folder, out, exits="q4_2"), InputError, "q4_1")
    refused(lambda: slice_gguf(tmp_path / "none.gguf", folder, out), AdapterError, "is no file")
    refused(lambda: slice_gguf(file, tmp_path, out), AdapterError, "holds no adapter")
    saved(adapter_of("smolvlm"), tmp_path / "smol")
    data = json.loads((tmp_path / "smol" / "adapter.json").read_text())
    del data["digest"]
    data["backbone"]["fingerprint"]["layers"] = 7
    (tmp_path / "smol" / "adapter.json").write_text(json.dumps(data))
    refused(lambda: slice_gguf(file, tmp_path / "smol", out), AdapterError, "layers is 7")
    short = file.read_bytes()[:2000]
    (tmp_path / "short.gguf").write_bytes(short)
    refused(lambda: slice_gguf(tmp_path / "short.gguf", folder, out), AdapterError, "no whole GGUF")
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    for key in ("block_count", "embedding_length"):
        writer.add_uint32(f"mamba.{key}", 4)
    for name in ("token_embd.weight", "output_norm.weight"):
        writer.add_tensor(name, np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(
        lambda: slice_gguf(tmp_path / "other.gguf", folder, out), UnsupportedBackboneError, "mamba"
    )
    assert not out.exists()


class Damaged:
    """A file's bytes, of which some are written over."""

    def __init__(self, file: Path) -> None:
        self.data = bytearray(file.read_bytes())

    def key(self, name: str, value: bytes, kind: int = 4) -> None:
        """The number of a key, which has four bytes."""
        at = self.data.index(name.encode()) + len(name)
        self.data[at : at + 8] = struct.pack("<I", kind) + value

    def tensor(self, name: str, *, shape: tuple[int, ...] = (), offset: int | None = None) -> None:
        at = self.data.index(name.encode()) + len(name)
        (axes,) = struct.unpack_from("<I", self.data, at)
        for axis, size in enumerate(shape):
            struct.pack_into("<Q", self.data, at + 4 + 8 * axis, size)
        if offset is not None:
            struct.pack_into("<Q", self.data, at + 8 + 8 * axes, offset)

    def offset(self, name: str) -> int:
        at = self.data.index(name.encode()) + len(name)
        (axes,) = struct.unpack_from("<I", self.data, at)
        return int(struct.unpack_from("<Q", self.data, at + 8 + 8 * axes)[0])


def number(value: int) -> bytes:
    return struct.pack("<I", value)


def moved(file: Damaged) -> None:
    file.tensor("blk.1.ffn_up.weight", offset=file.offset("blk.1.ffn_up.weight") + 32)


def swapped(file: Damaged) -> None:
    one, other = "blk.1.ffn_up.weight", "blk.1.ffn_gate.weight"
    first = file.offset(one)
    file.tensor(one, offset=file.offset(other))
    file.tensor(other, offset=first)


def turned(file: Damaged) -> None:
    name = b"blk.1.ffn_up.weight"
    at = file.data.index(name) + len(name)
    wide, high = struct.unpack_from("<QQ", file.data, at + 4)
    assert wide != high
    file.tensor(name.decode(), shape=(high, wide))


def renamed(file: Damaged) -> None:
    at = file.data.index(b"blk.1.ffn_up.weight")
    file.data[at + 4 : at + 5] = b"0"


DAMAGES: dict[str, Callable[[Damaged], None]] = {
    "a tensor that begins later": moved,
    "two tensors in each other's place": swapped,
    "rows for columns": turned,
    "a tensor twice": renamed,
    "more tensors than bytes": lambda file: struct.pack_into("<Q", file.data, 8, 1 << 60),
    "more keys than bytes": lambda file: struct.pack_into("<Q", file.data, 16, 1 << 60),
    "a shape beyond 64 bits": lambda f: f.tensor("blk.1.ffn_up.weight", shape=(1 << 63, 2)),
    "an empty shape": lambda file: file.tensor("blk.1.ffn_up.weight", shape=(0, 0)),
    "no heads": lambda file: file.key("llama.attention.head_count", number(0)),
    "three heads of keys": lambda file: file.key("llama.attention.head_count_kv", number(3)),
    "heads in words": lambda file: file.key("llama.attention.head_count", number(1), kind=6),
    "fewer layers": lambda file: file.key("llama.block_count", number(5)),
    "more layers": lambda file: file.key("llama.block_count", number(1 << 30)),
    "another width": lambda file: file.key("llama.embedding_length", number(48)),
    "other rows of the feed-forward part": lambda f: f.key("llama.feed_forward_length", number(8)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_slice_is_made_of_a_damaged_file(damage: str, whole: Any, tmp_path: Path) -> None:
    file, folder = whole("llava")
    damaged = Damaged(file)
    DAMAGES[damage](damaged)
    assert damaged.data != file.read_bytes()
    file.write_bytes(damaged.data)
    refused(lambda: slice_gguf(file, folder, tmp_path / "out"), AdapterError, "no whole GGUF file")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "part, change",
    [
        ("policy", {"thresholds": {"x": 0.5}}),
        ("policy", {"thresholds": 7}),
        ("policy", {"from_tomorrow": 1}),
        ("backbone", {"fingerprint": {"layers": [6]}}),
        ("backbone", {"fingerprint": 5}),
    ],
)
def test_an_adapter_that_is_not_known_is_refused(
    part: str, change: Any, whole: Any, tmp_path: Path
) -> None:
    file, folder = whole("llava")
    data = json.loads((folder / "adapter.json").read_text())
    del data["digest"]
    data[part].update(change)
    (folder / "adapter.json").write_text(json.dumps(data))
    with pytest.raises(AdapterError):
        slice_gguf(file, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_exits_of_other_sizes_than_the_file_s_layers_are_refused(
    whole: Any, tmp_path: Path
) -> None:
    file, _ = whole("llava")
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    backbone = Backbone(LlamaForCausalLM(config), name="other")
    made = Adapter(backbone, ExitSet(Exits(backbone, (2,))), ExitPolicy({2: 0.5}))
    made.save(tmp_path / "other")
    out = tmp_path / "out"
    refused(lambda: slice_gguf(file, tmp_path / "other", out), AdapterError, "of the shape")


def test_slicing_does_not_wait_for_torch(whole: Any, tmp_path: Path) -> None:
    import subprocess

    file, folder = whole("llava")
    code = (
        "import sys; from offramp.cli import main; "
        f"code = main(['export', {str(folder)!r}, {str(file)!r}, '--out', "
        f"{str(tmp_path / 'out')!r}]); print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-2:] == ["0", "False"], done.stderr
    assert (tmp_path / "out" / "segment-2.gguf").is_file()
