"""Several answers at once without PyTorch against one after the other; rewrites
runtimes-edge-together.json.

`python -m offramp_lab.records.runtimes.edge_together --file
SmolLM2-135M-Instruct.Q4_1.gguf` captions photographs of the reporting half in groups, with the photo model's exits on
the hub's file and on what llama.cpp makes of it in q8_0: each group at once, a thread a caption,
and one by one, in every mode, on one thread of llama.cpp. CPU seconds of the process for whole
answers behind the vision tower, prompts with them; PyTorch runs that tower alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from examples.photo_vlm.rows import half_of, read_photographs

from offramp.engine.policy import MODES
from offramp.models.shipped import shipped_exits
from offramp.runtimes.edge.model import EdgeModel
from offramp.runtimes.llama_cpp import EngineOptions, LlamaCppRuntime, slice_gguf
from offramp.runtimes.llama_cpp.packages import import_llama_cpp
from offramp.runtimes.llama_cpp.prompt import Prompt
from offramp_lab.records.photo import load_photo
from offramp_lab.records.record import Record, asked
from offramp_lab.records.runtimes.photo_edge import prompt_of, written
from offramp_lab.records.runtimes.together import Answers, Rows, timed

RECORD = Record("runtimes-edge-together", "runtimes.edge_together")
CONTEXT = 256


def main() -> None:
    arguments = asked(
        __doc__, photo=True, dtype="float32", photographs=52, slots=4,
        more=lambda parser: (
            parser.add_argument("--file", type=Path, required=True, help="SmolLM2's GGUF file"),
        ),
    )  # fmt: skip
    exits = arguments.adapter or shipped_exits("photo")
    dtype = getattr(torch, arguments.dtype)
    adapter, encoder = load_photo(arguments.photo, arguments.adapter, dtype)
    held = [e for e in read_photographs(arguments.data)["captions_val"] if half_of(e) == 1]
    held, size = held[: arguments.photographs], arguments.slots
    entries: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        slice_gguf(arguments.file, exits, folder / "q4_1")
        slice_gguf(in_q8_0(arguments.file, folder / "q8_0.gguf"), exits, folder / "q8_0")
        with LlamaCppRuntime(adapter, folder / "q4_1", engine=EngineOptions(CONTEXT)) as runtime:
            prompts = [prompt_of(runtime, encoder.prompts([example])) for example in held]
        groups = [prompts[start : start + size] for start in range(0, len(held), size)]
        for formats in ("q8_0", "q4_1"):
            engine = EngineOptions(CONTEXT, sequences=size)
            with EdgeModel(folder / formats, engine=engine) as model:
                for mode in MODES:
                    told = timed(groups, _ways(model, mode, size), mode)
                    entries.append({"format": formats, "mode": mode, **told})
                    print(entries[-1])
    RECORD.write({"sequences": size, "photographs": len(held), "entries": entries})


def in_q8_0(file: Path, out: Path) -> Path:
    """The same weights, quantised anew."""
    lib = import_llama_cpp().llama_cpp
    parameters = lib.llama_model_quantize_default_params()
    parameters.ftype, parameters.allow_requantize, parameters.nthread = (
        lib.LLAMA_FTYPE_MOSTLY_Q8_0, True, 1,
    )  # fmt: skip
    assert lib.llama_model_quantize(str(file).encode(), str(out).encode(), parameters) == 0
    return out


def _ways(model: EdgeModel, mode: str, size: int) -> dict[str, Answers]:
    def answer(prompt: Prompt) -> list[tuple[int, int]]:
        return [(step.token, step.depth) for step in written(model, mode, prompt)]

    def at_once(group: Sequence[Any]) -> Rows:
        with ThreadPoolExecutor(size) as threads:
            return [*threads.map(answer, group)]

    return {"at_once": at_once, "one_by_one": lambda group: [*map(answer, group)]}


if __name__ == "__main__":
    main()
