"""Captions asked for at the same moment, in PyTorch's batches and in llama.cpp's; in batches.json.

`taskset -c 0 python -m offramp_lab.records.batches` needs photographs and the packages onnxruntime
and llama-cpp-python (15 minutes). CPU seconds of the process, from the file to the text, one
thread, the tower in ONNX Runtime, everything in the photo model as it ships. So many photographs
come at once as `GROUP` says, and an engine answers as many of them at a time as it has slots; every
group is captioned in all ways, in an order of its own. What was captioned is kept in runs/batches.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, product
from typing import Any

import numpy as np
from examples.photo_vlm.evaluate import LONGEST
from offramp_llama_cpp import LlamaCppRuntime, export_gguf

from offramp.adapter.adapter import Adapter
from offramp.core.decoding.policy import MODES
from offramp.serving.core import EngineCore
from offramp.serving.engine_config import EngineConfig
from offramp.serving.request import Request
from offramp_lab.experiments.experiment import Rates, same, times
from offramp_lab.records.photographs.opened import ENGINE, PLAIN, Q8, TOWER
from offramp_lab.records.record import Group, Record, Turns
from offramp_lab.records.subjects import halves, load_photo

RECORD = Record("batches")
GROUP = 32
"""Photographs at the same moment."""
AT_ONCE = {PLAIN: (1, 8, 32), Q8: (1, 4, 8)}
"""Slots, by engine."""
OPTIONS: dict[str, Any] = {"max_new_tokens": LONGEST["captions"], "do_sample": False}
Name = tuple[str, str, str]
"""Engine, slots and mode."""


def cores(adapter: Adapter) -> dict[tuple[str, int], EngineCore]:
    """What answers, by engine and slots."""
    folder = RECORD.work / Q8
    if not folder.is_dir():
        export_gguf(adapter, folder, Q8)
    found = {}
    for engine, slots in ((engine, n) for engine, all_ in AT_ONCE.items() for n in all_):
        how: dict[str, Any] = {}
        if engine == Q8:
            runtime = LlamaCppRuntime(adapter, folder, engine=replace(ENGINE, sequences=slots))
            how = {"host": runtime.host(adapter.policy)}
        config = EngineConfig(slots=slots, limit=ENGINE.context)
        found[engine, slots] = EngineCore(
            adapter.backbone, adapter.exits, adapter.policy, config, **how
        )
    return found


def answered(group: Group, core: EngineCore, encoder: Any, mode: str) -> list[Any]:
    """Ids of the captions of a group, and the CPU seconds that all took."""
    begin = time.process_time()
    handles = [
        core.add(Request(encoder.prompts([one]), mode, options=OPTIONS)) for one in group.examples
    ]
    core.run()
    ids = [handle.result().output.new_tokens[0].tolist() for handle in handles]
    return [ids, time.process_time() - begin]


def entries_of(told: Mapping[Name, Sequence[Any]]) -> list[dict[str, Any]]:
    """An entry for each way. over_full, over_torch: how many times as fast it is as full depth with
    as many slots, and as PyTorch's largest batch in the same mode."""

    def rates(name: Name) -> Rates:
        return np.array([[len(ids), seconds] for ids, seconds in told[name]], float).T

    def captions(name: Name) -> list[Any]:
        return [*chain(*(ids for ids, _ in told[name]))]

    entries = []
    for engine, slots, mode in told:
        own, full = rates((engine, slots, mode)), (engine, slots, "full")
        torch = rates((PLAIN, str(max(AT_ONCE[PLAIN])), mode))
        entries.append(
            {
                "engine": engine,
                "at_once": int(slots),
                "mode": mode,
                "milliseconds": round(1e3 * float(own[1].sum() / own[0].sum()), 2),
                "over_full": times(own, rates(full)),
                "over_torch": times(own, torch),
                "as_full": same(captions((engine, slots, mode)), captions(full)),
            }
        )
    return entries


def figures(arguments: Namespace) -> dict[str, Any]:
    adapter, encoder = load_photo(arguments.adapter, vision=TOWER)
    ways = {
        (engine, str(slots), mode): partial(answered, core=core, encoder=encoder, mode=mode)
        for ((engine, slots), core), mode in product(cores(adapter).items(), MODES)
    }
    examples = halves(arguments.data)[1][: arguments.photographs]
    groups, kept = Group.all(examples, GROUP), Turns(RECORD.work / "turns.jsonl")
    entries = entries_of(kept.answers(ways, groups, "groups"))
    return {"photographs": len(examples), "group": GROUP, "entries": entries}


if __name__ == "__main__":
    RECORD.run(__doc__, figures, photo=True, photographs=288)
