"""CPU seconds of vLLM with exits and without, on prompts that `offramp_lab.records.vllm` wrote;
ways take turns, so that a busy machine is busy for all of them.

    python speed.py FOLDER AT_ONCE OUT

OUT gets, of every way, the seconds of each group of so many answers at once, and their tokens.
Prompts are embeddings, so no vision tower runs.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
}  # fmt: skip

NEW, WARM = 30, 2
EXITS = {"model": "offramp_vllm.drafts.ExitDrafts", "num_speculative_tokens": 7}
NGRAMS = {
    "method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 2, "prompt_lookup_max": 4,
}  # fmt: skip


def main(folder: Path, at_once: int, out: Path) -> None:
    from safetensors.torch import load_file

    from vllm import SamplingParams

    embeds = load_file(folder / "prompts.safetensors")
    prompts = [{"prompt_embeds": embeds[name]} for name in sorted(embeds)]
    exits = make(folder, "exits", EXITS)
    ways = {
        "full depth": (make(folder), "full"),
        "lossless": (exits, "lossless"),
        "early exit": (exits, "early_exit"),
        "early exit, whole head": (make(folder, "whole"), "early_exit"),
        "early exit, looser": (make(folder, "looser"), "early_exit"),
        # Last: after it no other engine starts in this process.
        "n-grams": (make(folder, drafts=NGRAMS), "full"),
    }
    found: dict[str, Any] = {name: {"seconds": [], "tokens": []} for name in ways}
    groups = [prompts[s : s + at_once] for s in range(0, len(prompts), at_once)]
    for place, group in enumerate([*groups[:1] * WARM, *groups]):
        for name, (llm, mode) in ways.items():
            params = SamplingParams(
                temperature=0.0, max_tokens=NEW, detokenize=False,
                extra_args={"offramp_mode": mode},
            )  # fmt: skip
            begin = time.process_time()
            made = llm.generate(group, params, use_tqdm=False)
            seconds = time.process_time() - begin
            if place >= WARM:
                found[name]["seconds"].append(round(seconds, 4))
                found[name]["tokens"] += [list(one.outputs[0].token_ids) for one in made]
    out.write_text(json.dumps(found))


def make(
    folder: Path,
    exits: str | None = None,
    drafts: dict[str, Any] | None = None,
    model: str = "decoder",
    dtype: str = "float32",
) -> Any:
    from vllm import LLM

    more: dict[str, Any] = {}
    if exits is not None:
        more = {"additional_config": {"offramp": {"exits": str(folder / exits)}}}
    return LLM(
        model=str(folder / model), dtype=dtype, skip_tokenizer_init=model != "decoder", 
        max_model_len=256, seed=0,
        enable_prompt_embeds=model == "decoder", enforce_eager=True, enable_prefix_caching=False,
        disable_log_stats=True, kv_cache_memory_bytes=2**28, speculative_config=drafts, **more,
    )  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
