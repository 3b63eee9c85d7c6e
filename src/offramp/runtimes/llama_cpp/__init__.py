"""Early exits inside llama.cpp: the decoder in GGUF files, the rest of the model in PyTorch.

`export_gguf` writes an adapter and its backbone's decoder as a chain of GGUF files, cut at the
exits; `LlamaCppRuntime` generates with them. Needs the extra `llama-cpp`.
"""

from offramp.runtimes.llama_cpp.gguf_export import FORMATS, ExportFormats, export_gguf
from offramp.runtimes.llama_cpp.runtime import LlamaCppRuntime
from offramp.runtimes.llama_cpp.segment import EngineOptions, kernels

__all__ = ["FORMATS", "EngineOptions", "ExportFormats", "LlamaCppRuntime", "export_gguf", "kernels"]
