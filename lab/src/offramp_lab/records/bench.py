"""Measure predicted against real speed, and peers; rewrites bench.json, peers.json, dialogues.json
in lab/records.

One thread, a quiet machine with 12 GB of memory, about an hour. `python -m
offramp_lab.records.bench --parts NAME...` measures only these parts; what each found stays in
runs/bench for the others: opt-2.7b, flan-t5-xl, smollm2-135m, batch, families, peers, dialogues.

opt-2.7b, flan-t5-xl, smollm2-135m: exits forced at a quarter and half of the depth, random weights.
batch: eight rows of OPT-2.7B, exiting each on its own, and all together.
families: full depth against HF `generate`, for a tiny random model of every family.
peers: the shipped models, with what else HF offers.
dialogues: the shipped models, with image features and prompts kept between turns.
"""

import sys
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from offramp.adapter import Adapter
from offramp.calibration.profiler import measure_costs
from offramp.data.example import Example
from offramp.data.scenes import language, world
from offramp.data.scenes.tasks import captions_and_questions
from offramp.engine.policy import FULL
from offramp.engine.prefix_cache import PrefixCache
from offramp.evaluation.timing import GenerateFn, exit_generate_fn, speedup, time_interleaved
from offramp.models.backbone import Backbone
from offramp.models.input_processor import InputProcessor
from offramp.models.shipped import TINY
from offramp.models.vision_cache import VisionCache
from offramp.provenance import provenance
from offramp.storage import read_json, write_json
from offramp_lab.experiments.benchmark.bench import bench, shortlisted, table, untrained
from offramp_lab.experiments.benchmark.cases import RATES, Case
from offramp_lab.experiments.benchmark.peers import table as peers_table
from offramp_lab.experiments.benchmark.peers import time_peers
from offramp_lab.experiments.experiment import bar
from offramp_lab.inputs import tiny_families
from offramp_lab.inputs.shapes import shape
from offramp_lab.places import RECORDS, RUNS
from offramp_lab.records.record import Some, asked
from offramp_lab.records.subjects import tiny_with

OUT = RUNS / "bench"
ACCEPTANCE = 0.8
SHORTLIST = 2048  # tokens that exits read where the whole vocabulary costs more than a layer
ROUNDS, TOKENS, PICTURES = 5, 40, 20
BATCH = 8
DIALOGUES, TURNS = 10, 5


def main() -> None:
    arguments = asked(__doc__, parts=Some(PARTS))
    for name in arguments.parts:
        write_json(OUT / f"{name}.json", PARTS[name]())
    if missing := [name for name in PARTS if not (OUT / f"{name}.json").is_file()]:
        print(f"no records yet: {', '.join(missing)} not measured", file=sys.stderr)
        return
    *lists, peers, dialogues = (read_json(OUT / f"{name}.json") for name in PARTS)
    write_json(RECORDS / "dialogues.json", dialogues)
    write_json(RECORDS / "bench.json", [entry for part in lists for entry in part])
    write_json(RECORDS / "peers.json", peers)


def _forced(name: str, shortlist: int | None = None) -> list[dict[str, Any]]:
    backbone = shape(name).build(torch.bfloat16)
    quarter, half = backbone.depth // 4, backbone.depth // 2
    cases = [Case(quarter, 0.0), Case(quarter, ACCEPTANCE, "lossless")]
    cases += [
        Case(depth, rate, policy)
        for depth in (quarter, half)
        for policy in ("recompute", "propagate")
        for rate in RATES
    ]
    return _run(backbone, shape(name).inputs(backbone), cases, shortlist)


def _batch() -> list[dict[str, Any]]:
    backbone = shape("opt-2.7b").build(torch.bfloat16)
    inputs = shape("opt-2.7b").inputs(backbone, BATCH)
    quarter = backbone.depth // 4
    rates = (0.0, *RATES)
    own = _run(backbone, inputs, [Case(quarter, r) for r in rates], SHORTLIST, independent=True)
    together = _run(backbone, inputs, [Case(quarter, RATES[-1])], SHORTLIST)
    return [
        *({**row, "rows": "independent"} for row in own),
        *({**row, "rows": "together"} for row in together),
    ]


def _families() -> list[dict[str, Any]]:
    entries = []
    for name, kind in tiny_families.KINDS.items():
        backbone = Backbone(tiny_families.build(name), name=name)
        entries += _run(backbone, kind.inputs(1), [])
    return entries


def _run(
    backbone: Backbone,
    inputs: Any,
    cases: list[Case],
    shortlist: int | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    depths = sorted({case.depth for case in cases}) or [backbone.depth // 4]
    exits = shortlisted(backbone, untrained(backbone, depths), shortlist)
    costs = measure_costs(backbone, inputs, exits, repeats=ROUNDS, shortlist=shortlist is not None)
    entries = bench(
        backbone, inputs, cases, costs, exits, tokens=TOKENS, rounds=ROUNDS,
        progress=bar(backbone.name), **options,
    )  # fmt: skip
    print(table(costs, entries), file=sys.stderr)
    return entries


def _of_both(measure: Callable[[str], Any]) -> dict[str, Any]:
    """Of both shipped models, with where it comes from."""
    found = {kind: measure(kind) for kind in TINY}
    return {**found, "provenance": provenance(None, sys.argv, None)}


def _peers(kind: str) -> dict[str, Any]:
    adapter, encoder = _trained(kind)
    examples = captions_and_questions("test", PICTURES)
    inputs = [encoder.prompts([example]) for example in examples]
    peers = time_peers(adapter, inputs, rounds=ROUNDS, progress=bar(f"peers {kind}"))
    print(peers_table(peers), file=sys.stderr)
    return peers


def _dialogues(kind: str) -> dict[str, Any]:
    """Turns of dialogues, answered with and without what can be kept from one call to the next."""
    adapter, encoder = _trained(kind)
    examples = []
    for index in range(DIALOGUES):
        scene = world.scene("test", index)
        talk, picture = language.dialogue(scene, TURNS), world.render(scene)
        for turn, (question, answer) in enumerate(talk):
            prompt = language.dialogue_prompt(talk[:turn], question)
            examples.append(Example(picture, prompt, (answer,), f"{index}/{turn}"))
    inputs = [encoder.prompts([example]) for example in examples]
    options: dict[str, Any] = {"max_new_tokens": 48, "do_sample": False}
    first_image = VisionCache()
    adapter.generate(inputs[0], vision_cache=first_image, **options)

    def method(exits: bool, caching: bool) -> GenerateFn:
        # Room for one image, so that none is still there in the next round.
        caches: dict[str, Any] = {
            "vision_cache": VisionCache(first_image.nbytes),
            "prefix_cache": PrefixCache(),
        }
        policy = adapter.policy if exits else FULL
        return exit_generate_fn(
            adapter.backbone, adapter.exits, policy, **options, **(caches if caching else {})
        )

    methods = {
        "full": method(False, False),
        "full, kept": method(False, True),
        "early_exit": method(True, False),
        "early_exit, kept": method(True, True),
    }
    timings = time_interleaved(methods, inputs, rounds=ROUNDS)
    return {
        name: {
            "speedup_end_to_end": speedup(timings["full"].seconds, timing.seconds),
            "prefill_share": 1 - median(timing.decode) / median(timing.seconds),
            "same_answers": timing.answers == timings[name.removesuffix(", kept")].answers,
        }
        for name, timing in timings.items()
    }


def _trained(kind: str) -> tuple[Adapter, InputProcessor]:
    """The shipped model with the exits that `offramp demo` left in runs/demo."""
    return tiny_with(kind, RUNS / "demo" / kind)


PARTS: dict[str, Callable[[], Any]] = {
    "opt-2.7b": lambda: _forced("opt-2.7b"),
    "flan-t5-xl": lambda: _forced("flan-t5-xl"),
    "smollm2-135m": lambda: _forced("smollm2-135m", SHORTLIST),
    "batch": _batch,
    "families": _families,
    "peers": lambda: _of_both(_peers),
    "dialogues": lambda: _of_both(_dialogues),
}


if __name__ == "__main__":
    main()
