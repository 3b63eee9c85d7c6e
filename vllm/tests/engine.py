"""An engine in this process, and what it writes."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
    "VLLM_CPU_CI_ENV": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def engine(model: Path, exits: Path | None = None, **options: Any) -> Any:
    """A vLLM engine of a tiny model; with exits where their folder is given."""
    from vllm import LLM

    added = {} if exits is None else {"additional_config": {"offramp": {"exits": str(exits)}}}
    defaults: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 512,
        "skip_tokenizer_init": True,
        "seed": 0,
        "block_size": 32,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "enforce_eager": True,
    }
    return LLM(model=str(model), **{**defaults, **added, **options})


def answers(
    llm: Any,
    prompts: Sequence[Sequence[int]],
    new: int = 20,
    at_once: int | None = None,
    **params: Any,
) -> list[tuple[list[int], list[int]]]:
    """Tokens and depths of each prompt's answer. at_once: how many are asked together."""
    from vllm import SamplingParams

    wanted = SamplingParams(
        **{"temperature": 0.0, "max_tokens": new, "detokenize": False, **params}
    )
    found = []
    step = at_once or len(prompts)
    for start in range(0, len(prompts), step):
        asked = [{"prompt_token_ids": list(p)} for p in prompts[start : start + step]]
        for made in llm.generate(asked, wanted, use_tqdm=False):
            found.append((list(made.outputs[0].token_ids), depths(made)))
    return found


def depths(made: Any, place: int = 0) -> list[int]:
    """Depths of an answer's tokens. place: of its choices."""
    assert made.kv_transfer_params is None
    return getattr(made.outputs[place], "offramp_depths", [])


def stored(folder: Path, mode: str = "early_exit") -> list[dict[str, list[int]]]:
    """What offramp answered: prompt, tokens and depths."""
    return json.loads((folder / "answers.json").read_text())[mode]


def close(llm: Any) -> None:
    """Give an engine's memory back, so that another can be made in this process."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
