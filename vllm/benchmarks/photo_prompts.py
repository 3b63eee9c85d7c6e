"""Photographs as the photo model's decoder reads them, and what offramp answers: for `speed.py`,
which runs where vLLM is installed. Run where offramp is, with its extra photo.

    python photo_prompts.py CAPTIONS.jsonl OUT [NUMBER]

OUT gets `decoder` (the decoder alone, a plain Llama checkpoint with its tokenizer), `export` (the
exits for vLLM), `prompts.safetensors` (embeddings of each prompt [T, D], the image's among them)
and `answers.json`: tokens, depths and CPU seconds of each answer, early with the shortlist and
without, and at full depth.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

from offramp.adapter import Adapter
from offramp.models.photo.packages import data_folder
from offramp.models.shipped import load_named
from offramp.runtimes.vllm import PROMPTS, _language_model, export_vllm

NEW = 30


def main(rows: Path, out: Path, number: int) -> None:
    torch.set_num_threads(1)
    backbone, processor = load_named("photo", dtype="float32")
    exits = data_folder() / "exits"
    adapter = Adapter.load(exits, backbone)
    texts = [processor.tokenizer(t)["input_ids"] for t in PROMPTS]
    print("checked answers:", export_vllm(adapter, out / "export", texts), flush=True)
    decoder = _language_model(backbone)
    decoder.config.tie_word_embeddings = True
    decoder.save_pretrained(out / "decoder")
    processor.tokenizer.save_pretrained(out / "decoder")
    policies = {
        "early": adapter.policy,
        "whole": replace(adapter.policy, shortlist=False),
        "full": replace(adapter.policy, thresholds={}),
    }
    embeds, answers = {}, []
    for place, image in enumerate(_images(rows, number)):
        text = f"{processor.image_token}Caption:"
        inputs = processor(images=image, text=text, return_tensors="pt")
        with _entering(backbone) as seen:
            made = {name: _answer(adapter, inputs, policy) for name, policy in policies.items()}
        embeds[f"{place:03}"] = seen[0][0].contiguous()
        answers.append(made)
    save_file(embeds, out / "prompts.safetensors")
    (out / "answers.json").write_text(json.dumps(answers))
    for name in policies:
        seconds = [one[name]["seconds"] for one in answers]
        tokens = sum(len(one[name]["tokens"]) for one in answers)
        print(name, f"{1000 * sum(seconds) / len(seconds):.1f} CPU ms an answer, tokens {tokens}")


def _images(rows: Path, number: int) -> Iterator[Image.Image]:
    said = [json.loads(line) for line in rows.read_text().splitlines()]
    held_out = [row for row in said if row["split"] == "val"][:number]
    for row in held_out:
        yield Image.open(rows.parent / row["image"]).convert("RGB")


def _answer(adapter: Adapter, inputs: Any, policy: Any) -> dict[str, Any]:
    start = time.process_time()
    made = adapter.generate(dict(inputs), policy=policy, do_sample=False, max_new_tokens=NEW)
    return {
        "tokens": made.new_tokens[0].tolist(),
        "depths": made.depths[0].tolist(),
        "seconds": time.process_time() - start,
    }


@contextmanager
def _entering(backbone: Any) -> Iterator[list[torch.Tensor]]:
    """The states [1, T, D] that enter the first layer over a prompt."""
    seen: list[torch.Tensor] = []

    def hook(module: Any, args: Any, kw: Any) -> None:
        state = args[0] if args else kw["hidden_states"]
        if not seen:
            seen.append(state.detach().clone())

    handle = backbone.layers[0].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 100)
