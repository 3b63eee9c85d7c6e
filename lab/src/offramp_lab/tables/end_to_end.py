"""Whole captions, from the file to the text: where the time goes, and what each step brings."""

from collections.abc import Callable, Collection

from offramp.report.table import Table
from offramp_lab.tables.markdown import (
    Make,
    MakeTable,
    Value,
    by,
    record,
    times_with_range,
    with_range,
)

STOCK, ALONE = "generate", "llama.cpp alone"
EARLY, CAREFUL = "early exit", "early exit, careful"
WHOLE_PROMPT, LOSSLESS = "early exit, prompt run whole", "lossless"
TORCH, ENGINE, ROUNDED = "torch", "onnxruntime", "openvino-bf16"
NAMES = {STOCK: "Hugging Face's `generate`", ALONE: "llama.cpp alone", "PyTorch": "PyTorch"}


def _way(entry: Value) -> str:
    name = NAMES.get(entry["engine"], f"offramp, {entry['engine']}")
    mode = "" if entry["engine"] in (STOCK, ALONE) else f", {_mode(entry)}"
    return name + mode + _tower(entry)


def _mode(entry: Value) -> str:
    return "exits off" if entry["mode"] == "full" else str(entry["mode"])


def _tower(entry: Value) -> str:
    return f", {entry['tower']} tower" if entry["tower"] != TORCH else ""


def captions() -> Table:
    """Milliseconds of a caption by parts, and multiples of full depth."""
    return _table((STOCK, "PyTorch"), {"over exits off": "over_full"})


def captions_in_llama() -> Table:
    """The same inside llama.cpp, beside llama.cpp alone."""
    columns = {
        "over llama.cpp alone": "over_alone",
        "over it with the same tower": "over_alone_same_tower",
        "over exits off": "over_full",
    }
    return _table((ALONE, record("end_to_end")["format"]), columns)


def _table(engines: Collection[str], ratios: dict[str, str]) -> Table:
    found = record("end_to_end")
    return Table.of(
        (entry for entry in found["captioned"] if entry["engine"] in engines and _shown(entry)),
        {
            "": _way,
            "to the first token": lambda entry: f"{_until_first(entry):.0f}",
            "decoding": "{milliseconds[decoded]:.0f}",
            "whole, ms": "{whole_milliseconds:.0f}",
            **{title: _ratio(name) for title, name in ratios.items()},
            "same as exits off": f"{{as_full}} of {found['photographs']}",
            "ROUGE-L, difference": lambda entry: with_range(
                f"{entry['ROUGE_L']['value']:.3f}", entry["ROUGE_L"]["difference"], "+.3f"
            ),
        },
    )


def _shown(entry: Value) -> bool:
    """Whether a table has the entry: each mode once, and with faster towers what gains most."""
    always = ("full", EARLY)
    return entry["mode"] in (
        always if entry["tower"] != TORCH else (*always, WHOLE_PROMPT, LOSSLESS)
    )


def _until_first(entry: Value) -> float:
    """Milliseconds from the file to the first token."""
    return float(entry["milliseconds"]["opened"] + entry["milliseconds"]["first_token"])


def _ratio(name: str) -> Callable[[Value], str]:
    return lambda entry: times_with_range(entry[name])


def questions() -> Table:
    """Questions answered right."""
    found = record("end_to_end")
    return Table.of(
        (entry for entry in found["questioned"] if entry["mode"] in ("full", EARLY)),
        {
            "": _way,
            "right": lambda entry: with_range(f"{entry['right']:.1%}", entry["difference"], "+.1%"),
            "same as exits off": f"{{as_full}} of {found['questions']}",
            "over exits off, end to end": _ratio("over_full"),
        },
    )


def together() -> Table:
    """Several photographs at once."""
    found = record("end_to_end")
    return Table.of(
        filter(_shown, found["together"]),
        {
            "": lambda entry: _mode(entry) + _tower(entry),
            "ms a caption": "{milliseconds:.0f}",
            "over exits off": _ratio("over_full"),
            "over early exit, prompt run whole": _ratio("over_before"),
            "same captions as that": f"{{as_before}} of {found['photographs']}",
        },
    )


def _captioned(*way: str) -> Value:
    """way: engine, mode and tower."""
    return by(record("end_to_end")["captioned"], "engine", "mode", "tower")[way]


def _whole(engine: str, mode: str, over: str, tower: str = ENGINE) -> Make:
    return lambda: times_with_range(_captioned(engine, mode, tower)[over])


TABLES: dict[str, MakeTable] = {
    "end-to-end": captions,
    "end-to-end-llama": captions_in_llama,
    "end-to-end-questions": questions,
    "end-to-end-together": together,
}
FIGURES: dict[str, Make] = {
    "end-to-end-torch-ms": lambda: (
        f"{_captioned('PyTorch', EARLY, TORCH)['whole_milliseconds']:.0f}"
    ),
    "end-to-end-torch": _whole("PyTorch", EARLY, "over_full"),
    "end-to-end-careful": _whole("PyTorch", CAREFUL, "over_full"),
    "end-to-end-careful-q8_0": _whole("q8_0", CAREFUL, "over_alone"),
    "end-to-end-careful-bf16": _whole("q8_0", CAREFUL, "over_alone", ROUNDED),
    "end-to-end-careful-decoding": _whole("PyTorch", CAREFUL, "decoding_over_full", TORCH),
    "end-to-end-q8_0": _whole("q8_0", EARLY, "over_alone"),
    "end-to-end-q8_0-tower": _whole("q8_0", EARLY, "over_alone_same_tower"),
    "end-to-end-bf16": _whole("q8_0", EARLY, "over_alone", ROUNDED),
    "end-to-end-bf16-tower": _whole("q8_0", EARLY, "over_alone_same_tower", ROUNDED),
}
