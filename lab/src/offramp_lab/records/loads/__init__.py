"""What the batch engine is worth under loads like those of use.

Each module is a command, `python -m offramp_lab.records.loads.memory` and so on, and rewrites its
own part of lab/records/loads.json.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from offramp.data.example import Example
from offramp.storage import write_json
from offramp_lab.records.record import Record


def keep(part: str, figures: Mapping[str, Any], examples: Sequence[Example] = ()) -> None:
    """Put figures into a part of the record, which is called as its command, beside the others
    there, with where they come from."""
    record = Record("loads", f"loads.{part}")
    parts = record.read()
    known = parts.get(part, {}).get("figures", {})
    origin = {**record.origin(examples), "load": os.getloadavg()[0]}
    parts[part] = {"figures": {**known, **figures}, "provenance": origin}
    write_json(record.path, parts)
