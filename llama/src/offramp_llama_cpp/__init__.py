"""Early exits inside llama.cpp: the decoder in GGUF files, the rest of the model in PyTorch.

`export_gguf` writes an adapter and its backbone's decoder as a chain of GGUF files, cut at the
exits; `LlamaCppRuntime` generates with them. Needs the extra `llama-cpp`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offramp_llama_cpp.dequantised import Dequantised
    from offramp_llama_cpp.gguf_export import ExportFormats, export_gguf
    from offramp_llama_cpp.gguf_writing import FORMATS
    from offramp_llama_cpp.runtime import LlamaCppRuntime
    from offramp_llama_cpp.segment import EngineOptions, kernels
    from offramp_llama_cpp.slicing import slice_gguf
    from offramp_llama_cpp.vision_tower import with_mtmd

__all__ = [
    "FORMATS",
    "Dequantised",
    "EngineOptions",
    "ExportFormats",
    "LlamaCppRuntime",
    "export_gguf",
    "kernels",
    "slice_gguf",
    "with_mtmd",
]

_HOMES = {
    "FORMATS": "gguf_writing",
    "Dequantised": "dequantised",
    "EngineOptions": "segment",
    "ExportFormats": "gguf_export",
    "LlamaCppRuntime": "runtime",
    "export_gguf": "gguf_export",
    "kernels": "segment",
    "slice_gguf": "slicing",
    "with_mtmd": "vision_tower",
}


def __getattr__(name: str) -> Any:
    # Late, so that what runs without PyTorch does not load it.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
