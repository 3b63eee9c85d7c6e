"""The photo model, sliced from the hub's file: without PyTorch against with it, and against
llama.cpp alone; rewrites runtimes-photo-edge.json.

`python -m offramp_lab.records.runtimes.photo_edge --file SmolLM2-135M-Instruct.Q4_1.gguf` needs the
model that `python -m examples.photo_vlm.build` makes and the photographs it names; ten minutes, one
thread. Images go through PyTorch in both, as the model's vision tower has no place in libmtmd.
Embeddings are the file's, quantised, or those of the model in PyTorch, which are rounded to
bfloat16. CPU seconds are of decoding alone, all ways in turns on the same photographs.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from examples.photo_vlm.caption import ADAPTER, load
from examples.photo_vlm.rows import half_of, read_photographs

from offramp.adapter import Adapter
from offramp.engine.decoding.sequence import Token
from offramp.engine.policy import MODES
from offramp.provenance import provenance
from offramp.runtimes.edge.model import EdgeModel
from offramp.runtimes.edge.sampling import Sampler, Sampling
from offramp.runtimes.llama_cpp import EngineOptions, LlamaCppRuntime, slice_gguf
from offramp.runtimes.llama_cpp.prompt import Prompt
from offramp.runtimes.llama_cpp.segment import Segment
from offramp.storage import write_json
from offramp_lab.places import PHOTOGRAPHS, RECORDS, RUNS

RECORD = RECORDS / "runtimes-photo-edge.json"
NEW = 30
ENGINE, THEIRS = EngineOptions(context=256), EngineOptions(context=256, kernels=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--file", type=Path, required=True, help="SmolLM2's GGUF file")
    parser.add_argument("--model", type=Path, default=RUNS / "photo_vlm" / "model")
    parser.add_argument("--data", type=Path, default=PHOTOGRAPHS)
    parser.add_argument("--photographs", type=int, default=50)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    backbone, encoder = load(arguments.model, torch.float32)
    adapter = Adapter.load(ADAPTER, backbone)
    held = [e for e in read_photographs(arguments.data)["captions_val"] if half_of(e) == 1]
    with tempfile.TemporaryDirectory() as folder:
        slice_gguf(arguments.file, ADAPTER, folder)
        result = _compared(adapter, encoder, held[: arguments.photographs], folder, arguments.file)
    write_json(RECORD, {**result, "provenance": provenance(0, [__name__], None)})


def _compared(
    adapter: Adapter, encoder: Any, photographs: list[Any], folder: str, file: Path
) -> dict[str, Any]:
    model = EdgeModel(folder, engine=ENGINE)
    runtime = LlamaCppRuntime(adapter, folder, engine=ENGINE)
    whole = Segment(file, THEIRS, tap_layer=None)
    own, theirs_too = model._embeddings, runtime._embeddings
    same, same_fed = dict.fromkeys(MODES, 0), dict.fromkeys(MODES, 0)
    lossless = 0
    ways: dict[str, Callable[[Prompt], list[int]]] = {
        "llama.cpp alone, one file": lambda prompt: alone(whole, model, prompt),
        **{mode: functools.partial(_edge, model, mode) for mode in MODES},
    }
    seconds, tokens = dict.fromkeys(ways, 0.0), dict.fromkeys(ways, 0)
    for example in photographs:
        inputs = encoder.prompts([example])
        prompt = prompt_of(runtime, inputs)
        answers = {}
        for way, write in ways.items():
            begin = time.process_time()
            answers[way] = write(prompt)
            seconds[way] += time.process_time() - begin
            tokens[way] += len(answers[way])
        for mode in MODES:
            theirs = runtime.generate(inputs, mode=mode, max_new_tokens=NEW, do_sample=False)
            same[mode] += answers[mode] == theirs.new_tokens[0].tolist()
            model._embeddings = theirs_too  # type: ignore[assignment]
            same_fed[mode] += _edge(model, mode, prompt) == theirs.new_tokens[0].tolist()
            model._embeddings = own
        lossless += answers["lossless"] == answers["full"]
    for each in (model, runtime, whole):
        each.close()
    rates = {way: tokens[way] / seconds[way] for way in ways}
    base = rates["llama.cpp alone, one file"]
    return {
        "photographs": len(photographs),
        "same_as_in_pytorch": same,
        "same_fed_with_its_embeddings": same_fed,
        "lossless_as_full": lossless,
        "tokens_per_cpu_second": rates,
        "over_llama_cpp": {way: rate / base for way, rate in rates.items()},
    }


def prompt_of(runtime: LlamaCppRuntime, inputs: Any) -> Prompt:
    """What a processor's inputs are to llama.cpp."""
    entry = runtime.entry()
    with torch.inference_mode():
        prepared = entry.prepare(inputs, {"max_new_tokens": NEW, "do_sample": False})
        return entry.prompts(prepared)[0]


def _edge(model: EdgeModel, mode: str, prompt: Prompt) -> list[int]:
    return [step.token for step in written(model, mode, prompt)]


def written(model: EdgeModel, mode: str, prompt: Prompt, new: int = NEW) -> list[Token]:
    """The greedy answer to a prompt whose states are known."""
    vocabulary = model.vocabulary
    sampler = Sampler(Sampling(), vocabulary.size, most=new, ends=vocabulary.ends)
    return model._rounds.write(model._job(prompt, model._policy_of(mode, None), sampler))


def alone(segment: Segment, model: EdgeModel, prompt: Prompt, new: int = NEW) -> list[int]:
    """Greedy, by llama.cpp's kernels, from the whole file."""
    segment.begin()
    tokens: list[int] = []
    states = prompt.states
    while len(tokens) < new:
        segment.feed(states, 1)
        token = int(np.argmax(segment.logits(1)[0]))
        tokens.append(token)
        if model.vocabulary.ends(token):
            break
        states = model._embeddings.of([token])
    return tokens


if __name__ == "__main__":
    main()
