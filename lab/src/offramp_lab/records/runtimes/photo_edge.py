"""The photo model from files as a hub would have them: without PyTorch against with it, and against
llama.cpp alone; rewrites runtimes-photo-edge.json.

`python -m offramp_lab.records.runtimes.photo_edge` captions photographs of the reporting half, in
q8_0 and q4_1, on one thread. Images go through PyTorch in all, as the model's vision tower has no
place in libmtmd. Embeddings are the file's, quantised, or those of the model in PyTorch. CPU
seconds are of whole answers behind the tower, prompts with them, all ways in turns; ten minutes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from offramp.adapter import Adapter
from offramp.models.backbone import Backbone
from offramp.photo.packages import LANGUAGE, weights_file
from offramp.runtimes.edge.model import EdgeModel
from offramp.runtimes.llama_cpp import ExportFormats, LlamaCppRuntime, slice_gguf
from offramp.runtimes.llama_cpp.gguf_export import export_whole
from offramp.runtimes.llama_cpp.gguf_writing import new_file
from offramp.runtimes.llama_cpp.packages import import_gguf
from offramp.runtimes.llama_cpp.prompt import Prompt
from offramp.runtimes.llama_cpp.segment import Segment
from offramp.storage import cache_folder
from offramp_lab.records.record import Record, asked
from offramp_lab.records.runtimes.ways import (
    ENGINE,
    NEW,
    THEIRS,
    beside_alone,
    edge_ways,
)
from offramp_lab.records.subjects import photo, photo_exits

RECORD = Record("runtimes-photo-edge", "runtimes.photo_edge")
FORMATS = "q8_0", "q4_1"


def main() -> None:
    arguments = asked(__doc__, photo=True, photographs=50)
    exits = photo_exits(arguments.adapter)
    subject = photo(arguments, arguments.photographs)
    adapter, inputs = subject.adapter, subject.prompts()
    entries: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for formats in FORMATS:
            file = hub_file(adapter.backbone, Path(folder) / f"{formats}.gguf", formats)
            slice_gguf(file, exits, Path(folder) / formats)
            told = _compared(adapter, inputs, Path(folder) / formats, file)
            entries += [{"format": formats, **entry} for entry in told]
            print(*told, sep="\n")
    RECORD.write({"photographs": len(inputs), "entries": entries})


def _compared(
    adapter: Adapter, inputs: Sequence[Any], folder: Path, file: Path
) -> list[dict[str, Any]]:
    """Of each way, besides: which answers are those in PyTorch, by mode, and fed with its
    embeddings."""
    model = EdgeModel(folder, engine=ENGINE)
    runtime = LlamaCppRuntime(adapter, folder, engine=ENGINE)
    whole = Segment(file, THEIRS, tap_layer=None)
    prompts = [prompt_of(runtime, one) for one in inputs]
    ways = edge_ways(whole, model)
    answers, entries = beside_alone(ways, prompts, folder.name)
    own, its = model._embeddings, runtime._embeddings
    for entry in entries[1:]:
        mode, same, fed = entry["mode"], 0, 0
        for n, prompt in enumerate(prompts):
            there = runtime.generate(inputs[n], mode=mode, max_new_tokens=NEW, do_sample=False)
            tokens = there.new_tokens[0].tolist()
            same += answers[mode][n] == tokens
            model._embeddings = its  # type: ignore[assignment]
            fed += ways[mode](prompt) == tokens
            model._embeddings = own
        entry |= {"as_in_pytorch": same, "as_with_its_embeddings": fed}
    for each in (model, runtime, whole):
        each.close()
    return entries


def hub_file(backbone: Backbone, out: Path, formats: str) -> Path:
    """The decoder with the tokenizer and the settings of SmolLM2's own file, whose shape it has."""
    gguf = import_gguf()
    plain = out.with_suffix(".plain")
    export_whole(backbone, plain, ExportFormats(formats))
    like = gguf.GGUFReader(weights_file(LANGUAGE, cache_folder("photo")))
    with new_file(out, str(like.fields["general.architecture"].contents())) as writer:
        for key, field in like.fields.items():
            if not key.startswith("GGUF.") and key != "general.architecture":
                inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(key, field.contents(), field.types[0], inner)
        for tensor in gguf.GGUFReader(plain).tensors:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    plain.unlink()
    return out


def prompt_of(runtime: LlamaCppRuntime, inputs: Any) -> Prompt:
    """What a processor's inputs are to llama.cpp."""
    entry = runtime.entry()
    with torch.inference_mode():
        prepared = entry.prepare(inputs, {"max_new_tokens": NEW, "do_sample": False})
        return entry.prompts(prepared)[0]


if __name__ == "__main__":
    main()
