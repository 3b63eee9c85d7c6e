"""Measure exits beside what else transformers offers; rewrites peers.json in lab/records.

The shipped models with the exits that `make records` leaves in runs/demo; one thread, a quiet
machine, a few minutes.
"""

import sys

from offramp.data.scenes.tasks import captions_and_questions
from offramp.models.shipped import TINY
from offramp_lab.experiments.benchmark.peers import table, time_peers
from offramp_lab.experiments.experiment import bar
from offramp_lab.places import RUNS
from offramp_lab.records.record import Record, Some, asked
from offramp_lab.records.subjects import tiny_with

RECORD = Record("peers")
ROUNDS, PICTURES = 5, 20


def main() -> None:
    arguments = asked(__doc__, backbone=Some(TINY))
    for kind in arguments.backbone:
        adapter, encoder = tiny_with(kind, RUNS / "demo" / kind)
        inputs = [
            encoder.prompts([example]) for example in captions_and_questions("test", PICTURES)
        ]
        peers = time_peers(adapter, inputs, rounds=ROUNDS, progress=bar(f"peers {kind}"))
        print(table(peers), file=sys.stderr)
        RECORD.add({kind: peers})


if __name__ == "__main__":
    main()
