"""Vision towers by what runs them."""

from collections.abc import Mapping
from typing import Any

from offramp.report.table import Table
from offramp_lab.tables.markdown import Make, MakeTable, by, record

NAMES = {
    "torch": "PyTorch",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "openvino-bf16": "OpenVINO, bfloat16",
}


STEPS = {"torch": "as it is", "folded": "norms folded", "channels last": "channels last",
         "oneDNN linears": "oneDNN linears"}  # fmt: skip


def engines(part: str = "towers", names: Mapping[str, str] = NAMES, of: str = "tower in") -> Table:
    """CPU milliseconds of a photograph, how far its tokens are from PyTorch's, and captions that
    are the same."""
    found = record("vision")[part]
    entries = by(found["engines"], "engine")
    own = entries["torch"]["cpu_milliseconds"]
    rows = []
    for name, shown in names.items():
        if name in entries:
            entry = entries[name]
            took, far = entry["cpu_milliseconds"], entry["distance"]
            same = f"{entry['same_captions']} of {found['pictures']}"
            rows.append((shown, f"{took:.1f}", f"{own / took:.1f}x", f"{far:.1e}", same))
    return Table((of, "ms", "", "distance of tokens", "same captions"), rows)


def vit() -> Table:
    """The same of a vision transformer with random weights, which writes no captions."""
    entries = by(record("vision")["vit"]["engines"], "engine")
    own = entries["torch"]["cpu_milliseconds"]
    rows = []
    for name, entry in entries.items():
        shown = NAMES.get(name, name.replace("mtmd", "libmtmd"))
        took, far = entry["cpu_milliseconds"], entry["distance"]
        rows.append((shown, f"{took:.0f}", f"{own / took:.1f}x", f"{far:.1e}"))
    return Table(("tower and projector in", "ms", "", "distance of tokens"), rows)


def _of(part: str, engine: str) -> Mapping[str, Any]:
    return by(record("vision")[part]["engines"], "engine")[engine]


def _saved() -> str:
    own, last = (_of("own", name)["cpu_milliseconds"] for name in ("torch", "oneDNN linears"))
    return f"{own - last:.0f}"


FIGURES: dict[str, Make] = {
    "vit-alone": lambda: f"{_of('vit', 'mtmd q8_0')['cpu_milliseconds']:.0f}",
    "vit-ours": lambda: f"{_of('vit', 'mtmd q8_0, our products')['cpu_milliseconds']:.0f}",
    "vit-packed": lambda: f"{_of('vit', 'mtmd q8_0, our products')['packed_bytes'] / 1e6:.0f}",
    "own-saved": _saved,
}
TABLES: dict[str, MakeTable] = {
    "vision-engines": engines,
    "vision-vit": vit,
    "vision-own": lambda: engines("own", STEPS, "PyTorch's tower"),
}
