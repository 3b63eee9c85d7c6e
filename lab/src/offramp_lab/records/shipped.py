"""Calibrate the exits that ship with the package again, in place, as `offramp demo` does its own.

The exits stay as they were trained. Target, risk and images are the demo's.
"""

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from offramp import demo
from offramp.adapter import Adapter
from offramp.calibration.calibrate import calibrate, calibrated
from offramp.calibration.draft_thresholds import draft_speeds, with_drafts
from offramp.calibration.profiler import measure_costs
from offramp.data.scenes.tasks import captions, questions
from offramp.engine.policy import ExitPolicy
from offramp.models.input_processor import InputProcessor
from offramp.models.shipped import load_tiny, tiny_exits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=demo.DemoSizes().calibration)
    parser.add_argument("--out", type=Path, default=tiny_exits("opt"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    backbone, processor = load_tiny("opt")
    adapter, encoder = (
        Adapter.load(tiny_exits("opt"), backbone),
        InputProcessor(backbone, processor),
    )
    n = arguments.images
    examples = [*captions("calibration", n).examples, *questions("calibration", n).examples]
    costs = measure_costs(backbone, encoder.prompts(examples[:1]), adapter.exits)
    found = calibrate(
        adapter, encoder, examples, ExitPolicy(), target=demo.TARGET, costs=costs,
        progress=lambda path: tqdm(path, "calibrate", disable=None), **demo.OPTIONS,
    )  # fmt: skip
    adapter = calibrated(adapter, found, examples)
    drafted = [encoder.prompts([example]) for example in examples[: demo.DemoSizes().drafts]]
    adapter = with_drafts(adapter, draft_speeds(adapter, drafted, **demo.OPTIONS))
    adapter.save(arguments.out)
    print(found.reason or f"{found.policy.thresholds}: {found.measured} on {found.n} images")


if __name__ == "__main__":
    main()
