"""Figures of the photo model that ships: what it promises, and how long its parts were trained."""

from offramp.calibration.risk_functions import CIDER_CAP
from offramp_lab.tables.markdown import Make, minutes, record


def promise() -> float:
    """What captions may lose of CIDEr at the thresholds that ship."""
    return float(CIDER_CAP * record("photo-adapter")["calibration"]["target"])


FIGURES: dict[str, Make] = {
    "photo-promised-cider": lambda: f"{promise():g}",
    "photo-exit-minutes": lambda: minutes(record("photo-adapter")["metrics"]["seconds"]),
    "student-minutes": lambda: minutes(record("five_layers")["student"]["seconds"]),
}
