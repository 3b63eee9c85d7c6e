"""Each decoder family inside llama.cpp, on tiny random models; rewrites llama-families.json.

`python tests/helpers/record_families.py` takes two minutes and the package llama-cpp-python. Of
each family: how far logits are from the model's and from those of one file that is not cut; of how
many prompts with an image what is written in float32 is what PyTorch writes, and in q8_0 lossless
what full depth is.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tiny_families as families
import torch
from tiny_families.text import FIRST_WORD, PAD

from offramp.adapter.adapter import Adapter
from offramp.core.decoding.policy import FULL, ExitPolicy
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits, ExitSet
from offramp.features.registration import register_score
from offramp_lab.records.record import Record, asked
from offramp_llama_cpp import EngineOptions, ExportFormats, LlamaCppRuntime, export_gguf
from offramp_llama_cpp.architectures import architecture_of
from offramp_llama_cpp.gguf_export import export_whole
from offramp_llama_cpp.segment import Segment

RECORD = Record("llama-families", "tests/helpers/record_families.py")
EXACT = EngineOptions(context=128, cache="f32", flash_attention=False, kernels=False)
USUAL = EngineOptions(context=128)
PROMPTS, NEW = 4, 16
OPTIONS: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
NAMES = {
    "llava": "Llama",
    "internvl": "Qwen2",
    "internvl-qwen3": "Qwen3",
    "internvl-experts": "Qwen3, experts",
    "qwen2-vl": "Qwen2-VL",
    "qwen2.5-vl": "Qwen2.5-VL",
    "qwen3-vl": "Qwen3-VL",
    "qwen3-vl-experts": "Qwen3-VL, experts",
    "gemma3": "Gemma 3",
    "paligemma": "PaliGemma",
    "paligemma2-wide": "PaliGemma 2",
    "granite": "Granite",
    "blip2-opt": "OPT",
}


def main() -> None:
    asked(__doc__)
    rows = [family(name, title) for name, title in NAMES.items()]
    RECORD.write({"prompts": PROMPTS, "tokens": NEW, "families": rows})


def family(name: str, title: str) -> dict[str, Any]:
    """A row of the record."""
    adapter = _adapter(name)
    with tempfile.TemporaryDirectory() as folder:
        export_gguf(adapter, Path(folder) / "f32", "f32")
        with LlamaCppRuntime(adapter, Path(folder) / "f32", engine=EXACT) as runtime:
            row = {
                "family": title,
                "graph": architecture_of(adapter.backbone).name,
                "away": _away(adapter.backbone, runtime),
                "cut": _cut(adapter.backbone, runtime, Path(folder) / "whole.gguf"),
                "full": _same(adapter, runtime, full=True),
                "early_exit": _same(adapter, runtime, full=False),
            }
        export_gguf(adapter, Path(folder) / "q8_0", "q8_0")
        with LlamaCppRuntime(adapter, Path(folder) / "q8_0", engine=USUAL) as runtime:
            row["lossless"] = _lossless(adapter, runtime)
    print(row)
    return row


def _adapter(name: str) -> Adapter:
    backbone = Backbone(families.build(name), name=name)
    depths = families.depths(name)
    exits = Exits(backbone, depths)
    families.perturb(exits)
    exits.requires_grad_(False)
    return Adapter(backbone, ExitSet(exits), ExitPolicy(dict.fromkeys(depths, 0.5)))


def _prompts(name: str) -> list[dict[str, Any]]:
    return [families.kind_of(name).inputs(1, seed) for seed in range(PROMPTS)]


def _probe(backbone: Backbone) -> list[int]:
    draw = np.random.default_rng(0)
    return [int(n) for n in draw.integers(FIRST_WORD, backbone.vocabulary, 24)]


def _away(backbone: Backbone, runtime: LlamaCppRuntime) -> float:
    """The largest difference of logits over 24 tokens of text, read at once."""
    ids = _probe(backbone)
    with torch.inference_mode():
        # A mask of a padded row is one that no model leaves out.
        padded = torch.tensor([[PAD, *ids]])
        mask = torch.ones_like(padded)
        mask[0, 0] = 0
        states = backbone.stack(input_ids=padded, attention_mask=mask).last_hidden_state[0, 1:]
        theirs = backbone.logits(states).numpy()
    return float(np.abs(_chain_logits(runtime, ids) - theirs).max())


def _chain_logits(runtime: LlamaCppRuntime, ids: list[int]) -> Any:
    chain = runtime._chain
    chain.reset()
    chain.run(runtime._embeddings.of(ids))
    return chain.finish(len(ids))


def _cut(backbone: Backbone, runtime: LlamaCppRuntime, file: Path) -> float:
    """The largest difference of logits between the cut files and one file."""
    export_whole(backbone, file, ExportFormats("f32"))
    ids = _probe(backbone)
    whole = Segment(file, EXACT, tap_layer=None)
    whole.feed(runtime._embeddings.of(ids), len(ids))
    logits = whole.logits(len(ids)).copy()
    whole.close()
    return float(np.abs(_chain_logits(runtime, ids) - logits).max())


def _same(adapter: Adapter, runtime: LlamaCppRuntime, *, full: bool) -> int:
    """Of how many prompts the answer is PyTorch's, with its depths."""
    policy = FULL if full else replace(adapter.policy, score="drawn")
    count = 0
    for seed, inputs in enumerate(_prompts(adapter.backbone.name)):
        _draw_scores(seed)
        ours = runtime.generate(inputs, policy=policy, **OPTIONS)
        _draw_scores(seed)
        theirs = adapter.generate(inputs, policy=policy, **OPTIONS)
        stock = adapter.backbone.model.generate(**inputs, **OPTIONS)
        same = torch.equal(ours.sequences, theirs.sequences)
        same &= torch.equal(ours.depths, theirs.depths)
        count += same and (not full or torch.equal(ours.sequences, stock))
    return count


def _draw_scores(seed: int) -> None:
    """Scores that know nothing, so that tokens exit here and there."""
    draw = torch.Generator().manual_seed(seed)
    register_score("drawn", lambda logits: torch.rand(len(logits), generator=draw))


def _lossless(adapter: Adapter, runtime: LlamaCppRuntime) -> int:
    """Of how many prompts the lossless answer is that at full depth."""
    policy = replace(adapter.policy, score="drawn", lossless=True, max_draft=4)
    count = 0
    for seed, inputs in enumerate(_prompts(adapter.backbone.name)):
        _draw_scores(seed)
        ours = runtime.generate(inputs, policy=policy, **OPTIONS)
        full = runtime.generate(inputs, policy=FULL, **OPTIONS)
        assert ours.rounds, "nothing was drafted"
        count += torch.equal(ours.sequences, full.sequences)
    return count


if __name__ == "__main__":
    main()
