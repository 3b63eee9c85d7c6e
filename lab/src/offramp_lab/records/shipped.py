"""Calibrate the exits that ship with the package again, in place, as `offramp demo` does its own.

The exits stay as they were trained. Target, risk and images are the demo's.
"""

from offramp.adapter.shipped import tiny_exits
from offramp.calibration.calibrate import calibrate, calibrated
from offramp.calibration.draft_thresholds import draft_speeds, with_drafts
from offramp.calibration.profiler import measure_costs
from offramp.cli import demo
from offramp.core.decoding.policy import ExitPolicy
from offramp.data.scenes.tasks import captions_and_questions
from offramp_lab.experiments.experiment import bar
from offramp_lab.records.record import asked
from offramp_lab.records.subjects import tiny_with


def main() -> None:
    arguments = asked(__doc__, images=demo.DemoSizes().calibration, out=tiny_exits("opt"))
    adapter, encoder = tiny_with("opt")
    examples = captions_and_questions("calibration", arguments.images)
    costs = measure_costs(adapter.backbone, encoder.prompts(examples[:1]), adapter.exits)
    found = calibrate(
        adapter,
        encoder,
        examples,
        ExitPolicy(),
        target=demo.TARGET,
        costs=costs,
        progress=bar("calibrate"),
        **demo.OPTIONS,
    )
    adapter = calibrated(adapter, found, examples)
    drafted = [encoder.prompts([example]) for example in examples[: demo.DemoSizes().drafts]]
    adapter = with_drafts(adapter, draft_speeds(adapter, drafted, **demo.OPTIONS))
    adapter.save(arguments.out)
    print(found.reason or f"{found.policy.thresholds}: {found.measured} on {found.n} images")


if __name__ == "__main__":
    main()
