"""Simulate a watched guarantee; rewrites lab/records/watched.json.

How often a promise that just holds is ever called broken, over many draws, and after how many
watched images a promise that does not hold is. About two minutes of one core.
"""

from typing import Any

import numpy as np

from offramp.betting import first_alarms
from offramp_lab.records.record import Record, asked

RECORD = Record("watched")
TARGETS = (0.0075, 0.01, 0.02, 0.05)
LEVEL = 0.01
RATIOS = (1.5, 2.0, 3.0, 10.0)


def main() -> None:
    arguments = asked(__doc__, streams=1000, images=20_000, out=RECORD.path)
    entries = [entry(target, arguments.streams, arguments.images) for target in TARGETS]
    for row in entries:
        print(row)
    RECORD.write({"level": LEVEL, "entries": entries}, arguments.out)


def entry(target: float, streams: int, images: int) -> dict[str, Any]:
    """Of one promise: false alarms over `images` images, and delays by how much it is exceeded."""
    false = alarms(target, target, streams, images) > 0
    delays = {}
    for ratio in RATIOS:
        alarmed = alarms(target, ratio * target, 200, images)
        noticed = alarmed[alarmed > 0]
        delays[f"{ratio:g}"] = {
            "noticed": float((alarmed > 0).mean()),
            "median_images": float(np.median(noticed)) if len(noticed) else None,
            "p95_images": float(np.percentile(noticed, 95)) if len(noticed) else None,
        }
    return {
        "target": target, "streams": streams, "images": images,
        "false_alarms": float(false.mean()), "delays": delays,
    }  # fmt: skip


def alarms(promised: float, risk: float, streams: int, images: int) -> Any:
    """First alarms of streams whose losses are 1 with probability `risk`, else 0."""
    random = np.random.default_rng(round(1e6 * risk) + images)
    return np.concatenate(
        [
            first_alarms((random.random((images, 50)) < risk).astype(float), promised, LEVEL)
            for _ in range(max(1, streams // 50))
        ]
    )


if __name__ == "__main__":
    main()
