"""Several answers at once without PyTorch against one after the other; rewrites
runtimes-edge-together.json.

`python -m offramp_lab.records.runtimes.edge_together` captions photographs of the reporting half in
groups, with the photo model's decoder sliced from files as a hub would have them: each group at
once, a thread a caption, and one by one, in every mode, on one thread of llama.cpp. CPU seconds of
the process for whole answers behind the vision tower, prompts with them; PyTorch runs that tower
alone. Six CPU minutes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from offramp.runtimes.edge.model import EdgeModel
from offramp.runtimes.llama_cpp import EngineOptions, LlamaCppRuntime, slice_gguf
from offramp.runtimes.llama_cpp.prompt import Prompt
from offramp_lab.records.record import Record, asked
from offramp_lab.records.runtimes.photo_edge import hub_file, prompt_of
from offramp_lab.records.runtimes.together import Answers, Rows, in_modes
from offramp_lab.records.runtimes.ways import written
from offramp_lab.records.subjects import photo, photo_exits

RECORD = Record("runtimes-edge-together", "runtimes.edge_together")
CONTEXT, FORMATS = 256, ("q8_0", "q4_1")


def main() -> None:
    arguments = asked(__doc__, photo=True, photographs=52, slots=4)
    exits = photo_exits(arguments.adapter)
    subject, size = photo(arguments, arguments.photographs), arguments.slots
    adapter = subject.adapter
    entries: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for formats in FORMATS:
            file = hub_file(adapter.backbone, folder / f"{formats}.gguf", formats)
            slice_gguf(file, exits, folder / formats)
        with LlamaCppRuntime(adapter, folder / "q8_0", engine=EngineOptions(CONTEXT)) as runtime:
            prompts = [prompt_of(runtime, inputs) for inputs in subject.prompts()]
        groups = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        for formats in FORMATS:
            engine = EngineOptions(CONTEXT, sequences=size)
            with EdgeModel(folder / formats, engine=engine) as model:
                entries += in_modes(formats, groups, partial(_ways, model, size))
    RECORD.write({"sequences": size, "photographs": len(prompts), "entries": entries})


def _ways(model: EdgeModel, size: int, mode: str) -> dict[str, Answers]:
    def answer(prompt: Prompt) -> list[tuple[int, int]]:
        return [(step.token, step.depth) for step in written(model, mode, prompt)]

    def at_once(group: Sequence[Any]) -> Rows:
        with ThreadPoolExecutor(size) as threads:
            return [*threads.map(answer, group)]

    return {"at_once": at_once, "one_by_one": lambda group: [*map(answer, group)]}


if __name__ == "__main__":
    main()
