"""Whether a token depends on the tokens beside it, and what it costs that it does not; rewrites
exact_batches.json.

`python -m offramp_lab.records.exact_batches` writes answers of 30 tokens about photographs of the
reporting half with the photo model, in every mode: alone, and all modes at once in the batch
engine; with packed weights, and with exact batches. What is counted: tokens, depths and scores that
are not the same. CPU seconds of one thread for whole answers, vision features being kept. Ten
minutes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from offramp.adapter import Adapter
from offramp.engine.decoding.scheduler import Schedule
from offramp.engine.policy import MODES
from offramp.models.vision_cache import VisionCache
from offramp.progress import progress
from offramp.serving.batch_engine import BatchEngine
from offramp.serving.engine_config import EngineConfig
from offramp_lab.records.record import Record, asked
from offramp_lab.records.subjects import photo

RECORD = Record("exact_batches")
NEW = 30
OPTIONS: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
WAYS = ("packed", "exact")


def main() -> None:
    arguments = asked(__doc__, photo=True, photographs=56, slots=8)
    entries = []
    for dtype in ("bfloat16", "float32"):
        for way in WAYS:
            subject = photo(arguments, arguments.photographs, dtype)
            adapter = subject.adapter
            if way == "exact":
                adapter = adapter.with_exact_batches()
            else:
                adapter.prepack()
            told = _measured(adapter, subject.prompts(), arguments.slots)
            entries.append({"precision": dtype, "way": way, **told})
            print(entries[-1])
    RECORD.write(
        {"photographs": arguments.photographs, "slots": arguments.slots, "entries": entries}
    )


def _measured(adapter: Adapter, prompts: Sequence[Any], slots: int) -> dict[str, Any]:
    cache = VisionCache()
    alone = {
        (n, mode): adapter.generate(prompt, mode=mode, vision_cache=cache, **OPTIONS)
        for n, prompt in enumerate(progress(prompts, "alone"))
        for mode in MODES
    }
    config = EngineConfig(slots, 256, schedule=Schedule.of(slots))
    begin = time.process_time()
    with BatchEngine(adapter, config=config, vision_cache=cache, queue=len(alone)) as engine:
        handles = {(n, mode): engine.submit(prompts[n], mode=mode, **OPTIONS) for n, mode in alone}
        made = {key: handle.result().output for key, handle in handles.items()}
    seconds = time.process_time() - begin
    tokens = sum(len(one.new_tokens[0]) for one in made.values())
    return {
        "tokens": tokens,
        "tokens_per_cpu_second": tokens / seconds,
        **{
            f"{name}_differ": sum(
                int((ours != theirs).sum())
                for key in made
                for ours, theirs in [(_of(made[key], name), _of(alone[key], name))]
            )
            for name in ("tokens", "depths", "scores")
        },
    }


def _of(output: Any, name: str) -> torch.Tensor:
    found: torch.Tensor = getattr(output, "new_tokens" if name == "tokens" else name)[0]
    return found.nan_to_num(-1) if found.is_floating_point() else found


if __name__ == "__main__":
    main()
