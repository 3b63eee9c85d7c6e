"""Write docs/report-opt.html and docs/report-t5.html.

Each is of one run: the figures of the committed record, and answers of the adapter that the demo
left in runs/demo, which must be that run's or one that decides alike.
"""

from collections.abc import Mapping
from typing import Any

from offramp.adapter.adapter import Adapter
from offramp.adapter.shipped import TINY, load_tiny
from offramp.cli.demo import SHOWN, answers, demo_page, shown_rows
from offramp.core.decoding.policy import FULL
from offramp.core.errors import DataError
from offramp.core.storage import read_json, write_atomic
from offramp.data.scenes.tasks import captions, questions
from offramp.evaluation.run_log import Done
from offramp.features.input_processor import InputProcessor
from offramp_lab.places import DOCS, RECORDS, RUNS
from offramp_lab.records.record import Some, asked

DEMO = RUNS / "demo"


def page(kind: str) -> str:
    """The report of one tiny model's demo.

    Raises:
        DataError: the adapter in runs/demo is of another run than the record.
    """
    record = read_json(RECORDS / "demo.json")[kind]
    backbone, processor = load_tiny(kind)
    adapter = Adapter.load(DEMO / kind, backbone)
    if decided(dict(adapter.calibration or {})) != decided(record["calibration"]):
        raise DataError(
            f"{DEMO / kind} and lab/records/demo.json are of two runs.", "Run make records."
        )
    encoder = InputProcessor(backbone, processor)
    tasks = [captions("test", SHOWN), questions("test", SHOWN)]
    shown: Done = {}
    for mode, policy in (("full", FULL), ("early_exit", adapter.policy)):
        shown |= shown_rows(mode, tasks, answers(adapter, encoder, tasks, policy))
    return demo_page(record, shown)


def decided(calibration: Mapping[str, Any]) -> list[Any]:
    """What a calibration measured and chose; seconds differ from run to run."""
    path = [(step["thresholds"], step["risk"]) for step in calibration["path"]]
    return [calibration["policy"]["thresholds"], calibration["measured"], path]


def main() -> None:
    arguments = asked(__doc__, backbone=Some(TINY), out=DOCS)
    for kind in arguments.backbone:
        write_atomic(arguments.out / f"report-{kind}.html", page(kind))


if __name__ == "__main__":
    main()
