"""CPU seconds of vLLM with exits and without, on prompts that `record_vllm.py` wrote;
ways take turns, so that a busy machine is busy for all of them.

    python speed.py FOLDER AT_ONCE OUT [WAY ...]

OUT gets a line for each way and group of so many answers at once: seconds, tokens, and how often
drafts were verified and how many of them were kept. A run that was cut off goes on there. WAY: of
`WAYS`; all, if none is named. Prompts are embeddings, so no vision tower runs, and EAGLE-3 knows
an image by the model's states alone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}

NEW, WARM = 30, 2
EXITS = {"model": "offramp_vllm.drafts.ExitDrafts", "num_speculative_tokens": 7}
EAGLE = {"method": "eagle3", "num_speculative_tokens": 3}
NGRAMS = {
    "method": "ngram",
    "num_speculative_tokens": 4,
    "prompt_lookup_min": 2,
    "prompt_lookup_max": 4,
}
EAGER = "full depth", "EAGLE-3", "n-grams"
"""The other ways run as vLLM does by itself, compiled."""
WAYS: dict[str, tuple[str | None, dict[str, Any] | None, str]] = {
    "full depth": (None, None, "full"),
    "full depth, compiled": (None, None, "full"),
    "lossless": ("exits", EXITS, "lossless"),
    "early exit": ("exits", EXITS, "early_exit"),
    "early exit, trust 0.4": ("trust 0.4", EXITS, "early_exit"),
    "early exit, thresholds 0.1, 0.5": ("thresholds 0.1, 0.5", None, "early_exit"),
    "early exit, thresholds 0.4, 0.7": ("thresholds 0.4, 0.7", None, "early_exit"),
    "EAGLE-3": (None, EAGLE, "full"),
    # Last: after it no other engine starts in this process.
    "n-grams": (None, NGRAMS, "full"),
}
"""Folder of exits, drafts, and mode of a request."""


def main(folder: Path, at_once: int, out: Path, *asked: str) -> None:
    from safetensors.torch import load_file

    from vllm import SamplingParams

    embeds = load_file(folder / "prompts.safetensors")
    prompts = [{"prompt_embeds": embeds[name]} for name in sorted(embeds)]
    starts = range(0, len(prompts), at_once)
    ids = json.loads((folder / "ids.json").read_text())
    read = [  # by EAGLE-3, which embeds tokens itself
        {**one, "prompt_token_ids": row, "prompt_is_token_ids": [False] * len(row)}
        for one, row in zip(prompts, ids, strict=True)
    ]
    lines = out.read_text().splitlines() if out.is_file() else []
    done = {(row["way"], row["group"]) for row in map(json.loads, lines)}
    ways = asked or tuple(WAYS)
    missing = [way for way in ways if {(way, place) for place in range(len(starts))} - done]
    engines: dict[str, Any] = {}
    for name in missing:
        exits, drafts, _ = WAYS[name]
        if drafts is EAGLE:
            drafts = {**EAGLE, "model": str(folder.parent / "side_by_side" / "drafter")}
        eager = name in EAGER
        key = str((*WAYS[name][:2], eager))
        engines[name] = engines[key] = engines.get(key) or make(folder, exits, drafts, eager=eager)
    rounds = {name: counted(engine) for name, engine in engines.items()}
    for place, start in enumerate([*starts[:1]] * WARM + [*starts], -WARM):
        for name in missing:
            if (name, place) in done:
                continue
            params = SamplingParams(
                temperature=0.0,
                max_tokens=NEW,
                detokenize=False,
                extra_args={"offramp_mode": WAYS[name][2]},
            )
            rounds[name][:] = 0, 0
            group = (read if WAYS[name][1] is EAGLE else prompts)[start : start + at_once]
            begin = time.process_time()
            made = engines[name].generate(group, params, use_tqdm=False)
            seconds = time.process_time() - begin
            if place >= 0:
                tokens = [list(one.outputs[0].token_ids) for one in made]
                row = {
                    "way": name,
                    "group": place,
                    "seconds": round(seconds, 4),
                    "tokens": tokens,
                    "rounds": rounds[name],
                }
                with out.open("a") as file:
                    file.write(json.dumps(row) + "\n")


def counted(engine: Any) -> list[int]:
    """How often the engine has verified drafts of an answer from here on, and how many of them
    were kept."""
    scheduler = engine.llm_engine.engine_core.engine_core.scheduler
    if not isinstance(getattr(scheduler, "offramp_rounds", None), list):
        theirs, found = scheduler.make_spec_decoding_stats, [0, 0]

        def ours(stats: Any, num_draft_tokens: int, num_accepted_tokens: int, **more: Any) -> Any:
            found[0] += num_draft_tokens > 0
            found[1] += num_accepted_tokens
            return theirs(stats, num_draft_tokens, num_accepted_tokens, **more)

        scheduler.make_spec_decoding_stats, scheduler.offramp_rounds = ours, found
    rounds: list[int] = scheduler.offramp_rounds
    return rounds


def make(
    folder: Path,
    exits: str | None = None,
    drafts: dict[str, Any] | None = None,
    model: str = "decoder",
    dtype: str = "float32",
    eager: bool = True,
) -> Any:
    from vllm import LLM

    more: dict[str, Any] = {}
    if exits is not None:
        more = {"additional_config": {"offramp": {"exits": str(folder / exits)}}}
    return LLM(
        model=str(folder / model),
        dtype=dtype,
        skip_tokenizer_init=model != "decoder",
        max_model_len=256,
        seed=0,
        enable_prompt_embeds=model == "decoder",
        enforce_eager=eager,
        enable_prefix_caching=False,
        disable_log_stats=True,
        kv_cache_memory_bytes=2**28,
        speculative_config=drafts,
        **more,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])
