"""The photo model's tower by what runs it."""

from offramp.report.table import Table
from offramp_lab.tables.markdown import Make, MakeTable, by, record

NAMES = {"torch": "PyTorch", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


def engines() -> Table:
    """CPU milliseconds of a photograph, how far its tokens are from PyTorch's, and captions that
    are the same."""
    found = record("vision")["towers"]
    entries = by(found["engines"], "engine")
    own = entries["torch"]["cpu_milliseconds"]
    rows = []
    for name, shown in NAMES.items():
        if name in entries:
            entry = entries[name]
            took, far = entry["cpu_milliseconds"], entry["distance"]
            same = f"{entry['same_captions']} of {found['pictures']}"
            rows.append((shown, f"{took:.1f}", f"{own / took:.1f}x", f"{far:.1e}", same))
    return Table(("tower in", "ms", "", "distance of tokens", "same captions"), rows)


def _took(part: str, way: str, places: int) -> str:
    found = record("vision")[part]["cpu_milliseconds"]
    return f"{found[way]:.{places}f}"


FIGURES: dict[str, Make] = {
    "decode-whole": lambda: _took("decoding", "whole", 0),
    "decode-shrunk": lambda: _took("decoding", "shrunk", 0),
    "prompt-whole": lambda: _took("prompts", "whole", 1),
    "prompt-kept": lambda: _took("prompts", "kept", 1),
}
TABLES: dict[str, MakeTable] = {"vision-engines": engines}
