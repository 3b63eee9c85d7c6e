"""What a process takes with PyTorch and without; rewrites runtimes-edge.json.

`python -m offramp_lab.records.runtimes.edge --sliced FOLDER` takes a minute. Each way is a process
of its own, in turns; CPU seconds and peak memory of importing, of loading the sliced folder, and of
an answer of some tokens.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from statistics import median
from typing import Any

from offramp_lab.experiments.experiment import Experiment, Rounds, each
from offramp_lab.records.record import Record, asked

RECORD = Record("runtimes-edge", "runtimes.edge")
TOKENS = 64
_HEAD = """
import json, resource, sys, time
def used():
    return [time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000]
marks = [used()]
"""
WAYS = {
    "without PyTorch": _HEAD
    + """
from offramp.runtimes.edge.model import EdgeModel
marks.append(used())
model = EdgeModel(sys.argv[1])
marks.append(used())
answer = model.answer("A photo of", mode=sys.argv[2], max_new_tokens=int(sys.argv[3]))
marks.append(used())
print(json.dumps([marks, "torch" in sys.modules]))
""",
    "PyTorch and transformers, imported alone": _HEAD
    + """
import torch, transformers
from transformers import AutoModelForImageTextToText
marks.append(used())
print(json.dumps([marks, "torch" in sys.modules]))
""",
}


def main() -> None:
    arguments = asked(
        __doc__, rounds=5,
        more=lambda parser: parser.add_argument(
            "--sliced", required=True, help="what `offramp slice` wrote"
        ),
    )  # fmt: skip
    plain, *others = WAYS
    ways = [(plain, "full"), (plain, "early_exit"), *((way, "") for way in others)]
    processes = {way: partial(_process, way, arguments.sliced) for way in ways}
    entries = Experiment(processes, rounds=arguments.rounds).entries(("way", "mode"), _figures)
    RECORD.write({"tokens": TOKENS, "entries": entries})


def _process(way: tuple[str, str], sliced: str, _: None) -> list[Any]:
    """What it had used after each step."""
    name, mode = way
    command = [sys.executable, "-c", WAYS[name], sliced, mode, str(TOKENS)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    marks, torch = json.loads(done.stdout)
    assert torch == (name != "without PyTorch")
    return list(marks)


def _figures(rounds: Rounds) -> dict[str, float]:
    """Medians of each step."""
    found = each(rounds)
    steps = ("import", "load", "answer")[: len(found[0]) - 1]
    cpu = {
        f"{step}_seconds": median(m[i + 1][0] - m[i][0] for m in found)
        for i, step in enumerate(steps)
    }
    peak = {f"{step}_megabytes": median(m[i + 1][1] for m in found) for i, step in enumerate(steps)}
    return {**cpu, **peak}


if __name__ == "__main__":
    main()
