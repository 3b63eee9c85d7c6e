"""CPU seconds of vLLM with exits and without, on what `photo_prompts.py` wrote; ways take turns, so
that a busy machine is busy for all of them.

    python speed.py FOLDER [NUMBER] [TURNS]

Prints a row for each number of answers at once: CPU ms an answer, and in how many answers the
tokens are offramp's own. The vision tower is left out: prompts are its embeddings.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
}  # fmt: skip

AT_ONCE = (1, 8, 24)
NEW = 30


def main(folder: Path, number: int, turns: int, dtype: str) -> None:
    from safetensors.torch import load_file

    from vllm import SamplingParams

    answers = json.loads((folder / "answers.json").read_text())[:number]
    embeds = load_file(folder / "prompts.safetensors")
    prompts = [{"prompt_embeds": embeds[name]} for name in sorted(embeds)]
    engines = {
        "vLLM, full depth": (make(folder, None, dtype), None, "full"),
        "exits, shortlist": (make(folder, "export", dtype), {}, "early"),
    }
    if (folder / "export-whole").exists():
        engines["exits, whole head"] = (make(folder, "export-whole", dtype), {}, "whole")
    spent: dict[Any, float] = defaultdict(float)
    same: dict[Any, int] = {}
    for at_once in AT_ONCE:
        for turn in range(turns):
            for way, (llm, extra, name) in engines.items():
                params = SamplingParams(
                    temperature=0.0, max_tokens=NEW, detokenize=False, extra_args=extra
                )
                got = []
                for start in range(0, number, at_once):
                    before = time.process_time()
                    got += llm.generate(
                        prompts[start : min(number, start + at_once)], params, use_tqdm=False
                    )
                    spent[way, at_once] += (time.process_time() - before) / turns
                if turn == 0:
                    same[way, at_once] = sum(
                        list(one.outputs[0].token_ids) == stored[name]["tokens"]
                        for one, stored in zip(got, answers, strict=True)
                    )
        base = spent["vLLM, full depth", at_once]
        for way in engines:
            took = spent[way, at_once]
            print(
                f"{dtype}, {at_once} at once, {way}: {1000 * took / number:.1f} CPU ms an answer, "
                f"{base / took:.2f}x, {same[way, at_once]} of {number} offramp's own", flush=True,
            )  # fmt: skip


def make(folder: Path, exits: str | None, dtype: str) -> Any:
    from vllm import LLM

    more: dict[str, Any] = {}
    if exits is not None:
        more = {"additional_config": {"offramp": {"exits": str(folder / exits)}}}
    return LLM(
        model=str(folder / "decoder"), dtype=dtype, max_model_len=256, enable_prompt_embeds=True,
        enforce_eager=True, enable_prefix_caching=False, disable_log_stats=True, seed=0, **more,
    )  # fmt: skip


if __name__ == "__main__":
    main(
        Path(sys.argv[1]),
        int(sys.argv[2]) if len(sys.argv) > 2 else 24,
        int(sys.argv[3]) if len(sys.argv) > 3 else 1,
        sys.argv[4] if len(sys.argv) > 4 else "float32",
    )
