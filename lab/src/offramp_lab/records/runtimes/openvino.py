"""OpenVINO GenAI over the same decoder, from GGUF files with the same weights.

Its pipeline takes tokens and no states, so a prompt is text of the photograph's length, and the
answer, of a fixed length, is compared with none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteriaList

from offramp.evaluation.timing import GenerateFn
from offramp.runtimes.llama_cpp.gguf_writing import new_file
from offramp_lab.records.runtimes.methods import Bench, Name, tell_first

READS = ("f16", "q8_0", "q4_1")
"""Formats, of those that are timed."""
WRITTEN = 12
"""Tokens of an answer, as many as a caption has."""
_ID, _NORMAL, _CONTROL = 1000, 1, 3


def methods(bench: Bench) -> dict[Name, GenerateFn]:
    """By format; none where openvino-genai is not installed."""
    if find_spec("openvino_genai") is None:
        return {}
    return {("OpenVINO GenAI", layers, "full"): Pipeline(bench, layers) for layers in READS}


class Pipeline:
    """One format, one thread."""

    def __init__(self, bench: Bench, layers: str) -> None:
        import openvino
        import openvino_genai

        self._ov, self._genai = openvino, openvino_genai
        file = bench.out / f"openvino-{layers}.gguf"
        if not file.is_file():
            _with_tokenizer(bench.whole(layers), file, bench.encoder.tokenizer)
        self._pipeline = openvino_genai.LLMPipeline(str(file), "CPU", INFERENCE_NUM_THREADS=1)
        self._config = openvino_genai.GenerationConfig()
        self._config.max_new_tokens = WRITTEN
        self._config.do_sample, self._config.ignore_eos = False, True

    def __call__(self, inputs: Mapping[str, Any], stop: StoppingCriteriaList) -> torch.Tensor:
        ids = torch.arange(_ID, _ID + inputs["input_ids"].shape[1])[None].numpy()
        given = self._genai.TokenizedInputs(self._ov.Tensor(ids), self._ov.Tensor(ids.clip(max=1)))
        tokens: list[int] = []
        running = self._genai.StreamingStatus.RUNNING

        class Streamer(self._genai.StreamerBase):  # type: ignore[name-defined,misc]
            def write(self, token: Any) -> Any:
                tokens.append(token)
                if len(tokens) == 1:
                    tell_first(stop)
                return running

            def end(self) -> None:
                pass

        self._pipeline.generate(given, self._config, Streamer())
        return torch.tensor(tokens)


def _with_tokenizer(source: Path, target: Path, tokenizer: Any) -> None:
    """A copy of a GGUF file with the tokenizer that the pipeline insists on."""
    import gguf

    reader = gguf.GGUFReader(source)
    fields = {name: f for name, f in reader.fields.items() if name.startswith("llama.")}
    rules = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    size = int(fields["llama.vocab_size"].contents())
    words = {number: word for word, number in tokenizer.get_vocab().items() if number < size}
    control = {*tokenizer.all_special_ids, *(set(range(size)) - set(words))}
    with new_file(target, "llama") as writer:
        for name, field in fields.items():
            writer.add_key_value(name, field.contents(), field.types[0])
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list([words.get(i, f"<unused {i}>") for i in range(size)])
        writer.add_token_types([_CONTROL if i in control else _NORMAL for i in range(size)])
        writer.add_token_merges([p if isinstance(p, str) else " ".join(p) for p in rules["merges"]])
        writer.add_bos_token_id(tokenizer.bos_token_id or 0)
        writer.add_eos_token_id(tokenizer.eos_token_id)
        writer.add_uint32("general.file_type", int(gguf.LlamaFileType.MOSTLY_Q8_0))
        for tensor in reader.tensors:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
