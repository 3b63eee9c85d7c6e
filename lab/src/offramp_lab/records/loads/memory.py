"""Whether a batch engine holds more and more: thousands of requests, and what is left of them.

tiny-opt answers images in all modes, greedy and sampled, of 1 to 12 tokens; one request in ten is
cancelled at some point. Looked at every so many requests: memory of the process, live tensors, all
objects of Python's garbage collector, and bytes of the slots. Rewrites "memory" in
lab/records/loads.json; some five minutes.
"""

import gc
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from tqdm import tqdm

from offramp.adapter import Adapter
from offramp.engine.executors.slots.executor import SlotExecutor
from offramp.engine.policy import MODES
from offramp.serving.core import EngineCore
from offramp.serving.engine_config import EngineConfig
from offramp.serving.request import Request
from offramp_lab.records.loads import keep
from offramp_lab.records.record import asked
from offramp_lab.records.soak import resident
from offramp_lab.records.subjects import tiny

ENDINGS = ("answered", "cancelled", "failed")


def main() -> None:
    arguments = asked(__doc__, requests=5000, slots=8, every=250)
    subject = tiny("opt", 32)
    inputs = subject.prompts()
    core = engine_of(subject.adapter, arguments.slots)
    parts = range(0, arguments.requests, arguments.every)
    seen: Counter[str] = Counter()
    looks = []
    for start in tqdm(parts, "requests / every"):
        draw = random.Random(start)
        seen += answered(core, inputs, min(arguments.every, arguments.requests - start), draw)
        looks.append(held(core))
    print(looks[0], looks[len(looks) // 3], looks[-1], seen, sep="\n")
    ends = {ending: seen[ending] for ending in ENDINGS}
    figures = {"slots": arguments.slots, "every": arguments.every, **ends, "looks": looks}
    keep("memory", figures)


def engine_of(adapter: Adapter, slots: int) -> EngineCore:
    """Without threads, so that what is seen is the same each time."""
    return EngineCore(
        adapter.backbone, adapter.exits, adapter.policy, EngineConfig(slots=slots, limit=128)
    )


def answered(
    core: EngineCore, inputs: list[Any], count: int, draw: random.Random, longest: int = 12
) -> Counter[str]:
    """Have `count` requests answered, some of them cancelled on the way; how they ended. The last
    one is alone and always alike, so that what the engine keeps of its latest call is too."""
    handles = []
    for request in _requests(inputs, count - 1, draw, longest):
        handles.append(core.add(request))
        if draw.random() < 0.1:
            draw.choice(handles[-core.config.slots :]).cancel()
        while core.waiting > 2:
            core.round()
    core.run()
    options = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
    handles.append(core.add(Request(inputs[0], "full", options=options)))
    core.run()
    ends = Counter[str]()
    for handle in handles:
        failed = not handle.cancelled() and handle.exception() is not None
        ends[ENDINGS[1 if handle.cancelled() else 2 * failed]] += 1
    return ends


def _requests(
    inputs: list[Any], count: int, draw: random.Random, longest: int
) -> Iterator[Request]:
    for number in range(count):
        length = draw.randint(1, longest)
        options = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": number % 3 == 0}
        yield Request(draw.choice(inputs), draw.choice(MODES), seed=number, options=options)


def held(core: EngineCore) -> dict[str, float]:
    """What the process holds, and this engine of it. MiB; tensors, objects: how many; slots: bytes
    of their keys and values."""
    slots = core.decoder.executor
    assert isinstance(slots, SlotExecutor)
    gc.collect()
    objects = gc.get_objects()
    tensors = sum(issubclass(type(thing), torch.Tensor) for thing in objects)
    return {
        "memory_mib": resident(),
        "tensors": tensors,
        "objects": len(objects),
        "slots": slots.cache.nbytes,
    }


if __name__ == "__main__":
    main()
