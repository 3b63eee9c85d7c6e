"""Laws of the trial: what would end the process is an error, and is tried once."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from gguf_cases import adapter_of, refused
from hub_files import image_adapter, sliced
from projector_files import write_projector

from offramp.core.errors import UnsupportedBackboneError
from offramp_llama_cpp import EngineOptions, LlamaCppRuntime, architectures, export_gguf
from offramp_llama_cpp.edge.model import EdgeModel
from offramp_llama_cpp.projector import Tower

pytestmark = pytest.mark.llama_cpp

ENGINE = EngineOptions(context=64)


def test_a_file_that_ends_llama_cpps_process_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def windows(*_: Any) -> Any:  # a graph of Gemma 2 without one is an assertion that fails
        yield "attention.sliding_window_pattern", [False, False]

    monkeypatch.setattr(architectures, "window_settings", windows)
    adapter = adapter_of("paligemma2-wide")
    export_gguf(adapter, tmp_path / "gguf", "f32", depths=(5,))
    refused(
        lambda: LlamaCppRuntime(adapter, tmp_path / "gguf", engine=ENGINE),
        UnsupportedBackboneError,
        "ends its process",
    )


@pytest.mark.slow
@pytest.mark.parametrize("where", ["edge", "tower"])
@pytest.mark.parametrize("damage", ["v.patch_embd.weight", "mm.2.bias", "layer_norm_epsilon"])
def test_a_projector_that_would_end_the_process_is_refused(
    damage: str, where: str, tmp_path: Path, own_cache: Path
) -> None:
    adapter = image_adapter()
    file = write_projector(adapter.backbone, tmp_path / "mmproj.gguf")
    data = bytearray(file.read_bytes())
    at = data.index(damage.encode()) + len(damage)
    if "norm" in damage:
        data[at + 4 : at + 8] = struct.pack("<f", -1.0)
    else:
        data[at - 1] ^= 1
    file.write_bytes(data)
    folder = sliced(adapter, tmp_path) if where == "edge" else None

    def load() -> Any:
        if folder is not None:
            return EdgeModel(folder, mmproj=file, engine=ENGINE)
        return Tower(file, ENGINE, width=adapter.backbone.width)

    refused(load, UnsupportedBackboneError, "ends its process")


def test_the_child_imports_nothing_of_the_working_folder(
    exported: Any, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose files may be anybody's; one called numpy.py made the trial fail in silence."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "numpy.py").write_text("open('it-ran', 'w')\nraise ImportError")
    LlamaCppRuntime(adapter_of("llava"), exported("llava", "q8_0"), engine=ENGINE).close()
    assert not (tmp_path / "it-ran").exists()
    assert [*(own_cache / "trials").iterdir()]


@pytest.mark.slow
def test_files_are_tried_out_once(
    exported: Any, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, run = [], subprocess.run

    def counted(command: Any, **options: Any) -> Any:
        if any("llama_cpp.trial" in str(part) for part in command):
            calls.append(command)
        return run(command, **options)

    monkeypatch.setattr(subprocess, "run", counted)
    for _ in range(2):
        LlamaCppRuntime(adapter_of("llava"), exported("llava", "q8_0"), engine=ENGINE).close()
    assert len(calls) == 1
    LlamaCppRuntime(adapter_of("llava"), exported("llava", "f16"), engine=ENGINE).close()
    assert len(calls) == 2


def test_the_child_does_not_wait_for_torch() -> None:
    import sys

    code = "import sys, offramp_llama_cpp.trial_process; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers"} & set(done.stdout.split())
