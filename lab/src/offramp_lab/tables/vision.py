"""Vision towers by what runs them."""

from collections.abc import Mapping

from offramp.report.table import Table
from offramp_lab.tables.markdown import Make, MakeTable, Value, by, record

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
    rows = [
        (
            *_seen(entries, name, shown, 1),
            f"{entries[name]['same_captions']} of {found['pictures']}",
        )
        for name, shown in names.items()
        if name in entries
    ]
    return Table((of, *SEEN, "same captions"), rows)


SEEN = ("ms", "", "distance of tokens")


def _seen(entries: Mapping[str, Value], name: str, shown: str, digits: int = 0) -> tuple[str, ...]:
    """Of a way to see, by its title: milliseconds, of PyTorch's, and how far its tokens are."""
    entry, own = entries[name], entries["torch"]["cpu_milliseconds"]
    took, far = entry["cpu_milliseconds"], entry["distance"]
    return shown, f"{took:.{digits}f}", f"{own / took:.1f}x", f"{far:.1e}"


def vit() -> Table:
    """The same of a vision transformer with random weights, which writes no captions."""
    entries = by(record("vision")["vit"]["engines"], "engine")
    shown = {name: NAMES.get(name, name.replace("mtmd", "libmtmd")) for name in entries}
    rows = [_seen(entries, name, title) for name, title in shown.items()]
    return Table(("tower and projector in", *SEEN), rows)


def _of(part: str, engine: str) -> Value:
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
