"""Vision towers by what runs them."""

from collections.abc import Mapping
from functools import partial

from offramp.report.table import Table, Told
from offramp_lab.tables.markdown import Make, MakeTable, Value, by, record

NAMES = {
    "torch": "PyTorch",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "openvino-bf16": "OpenVINO, bfloat16",
}


def engines(part: str, of: str, names: Mapping[str, str], digits: int = 1) -> Table:
    """By what sees, as `of` says: CPU milliseconds of a photograph, their share of PyTorch's, how
    far its tokens are from PyTorch's, and captions that are the same, where there are any."""
    found = record("vision")[part]
    entries = by(found["engines"], "engine")
    own = entries["torch"]["cpu_milliseconds"]
    columns: dict[str, Told] = {
        of: lambda entry: names.get(entry["engine"], entry["engine"].replace("mtmd", "libmtmd")),
        "ms": f"{{cpu_milliseconds:.{digits}f}}",
        "": lambda entry: f"{own / entry['cpu_milliseconds']:.1f}x",
        "distance of tokens": "{distance:.1e}",
    }
    if "same_captions" in entries["torch"]:
        columns["same captions"] = f"{{same_captions}} of {found['pictures']}"
    return Table.of(entries.values(), columns)


def _of(part: str, engine: str) -> Value:
    return by(record("vision")[part]["engines"], "engine")[engine]


FIGURES: dict[str, Make] = {
    "vit-alone": lambda: f"{_of('vit', 'mtmd q8_0')['cpu_milliseconds']:.0f}",
    "vit-ours": lambda: f"{_of('vit', 'mtmd q8_0, our kernels')['cpu_milliseconds']:.0f}",
    "vit-packed": lambda: f"{_of('vit', 'mtmd q8_0, our kernels')['packed_bytes'] / 1e6:.0f}",
}
TABLES: dict[str, MakeTable] = {
    "vision-engines": partial(engines, "towers", "tower in", NAMES),
    "vision-vit": partial(engines, "vit", "tower and projector in", NAMES, digits=0),
}
