"""Vision towers by what runs them."""

from offramp.report.table import Table
from offramp_lab.tables.markdown import MakeTable, by, record

NAMES = {
    "torch": "PyTorch",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "openvino-bf16": "OpenVINO, bfloat16",
}


def towers() -> Table:
    """By what runs the photo model's tower: CPU milliseconds of a photograph, PyTorch's over them,
    how far its tokens are from PyTorch's, and captions that are the same."""
    found = record("vision")["towers"]
    entries = by(found["engines"], "engine")
    own = entries["torch"]["cpu_milliseconds"]
    return Table.of(
        entries.values(),
        {
            "tower in": lambda entry: NAMES[entry["engine"]],
            "ms": "{cpu_milliseconds:.1f}",
            "": lambda entry: f"{own / entry['cpu_milliseconds']:.1f}x",
            "distance of tokens": "{distance:.1e}",
            "same captions": f"{{same_captions}} of {found['pictures']}",
        },
    )


TABLES: dict[str, MakeTable] = {"vision-engines": towers}
