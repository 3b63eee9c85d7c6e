"""Captions and answers about photographs: decoding and end to end, each multiple in its factors."""

from collections.abc import Callable, Sequence
from functools import partial

from offramp.evaluation.statistics import interval, mean_of
from offramp.report.table import Table
from offramp_lab.experiments.factors import (
    DECODER,
    DECODING,
    LOSSLESS,
    NAMED,
    STAGES,
    factors,
    read,
)
from offramp_lab.tables.markdown import (
    Make,
    MakeTable,
    Value,
    bold,
    by,
    record,
    times_with_range,
    with_range,
)

PLAIN, PACKED, F16, Q8 = "PyTorch", "PyTorch, packed", "f16", "q8_0"
FASTEST = "llama.cpp iq4_nl, head q4_0"
"""llama.cpp alone in the formats in which it is fastest."""
TOWER, TORCH, ROUNDED = "onnxruntime", "torch", "openvino-bf16"
LARGE = f"{TOWER}, 12 megapixels"
FULL, SHORT, STATIC = "full", "full, shortlist", "static"
EARLY = "early exit"
THRESHOLDS = "thresholds 0.1, 0.5"
MODES = {
    FULL: "full depth",
    SHORT: "full depth, the same shortlist",
    STATIC: "every token at the exit",
    EARLY: "early exit, as it ships",
    THRESHOLDS: "early exit by thresholds",
    LOSSLESS: "lossless",
    "trust 0": "by trust of `0`",
    "student": "student of five layers",
}
ENGINES = {"generate": "Hugging Face's `generate`", PLAIN: "PyTorch, float32", F16: "f16"}
THINGS = ("format", "kernels", "head", "layers skipped", "tower", "batch")
Chain = Sequence[tuple[str, tuple[str, str, str]]]


def captioned(name: str = "end_to_end") -> dict[tuple[str, ...], Value]:
    """Entries by engine, mode and tower."""
    return by(record(name)["captioned"], *NAMED)


def _entry(engine: str, mode: str, tower: str = TOWER) -> Value:
    return captioned()[engine, mode, tower]


def _engine(entry: Value) -> str:
    name = str(ENGINES.get(entry["engine"], entry["engine"]))
    if entry["engine"].startswith("llama.cpp"):
        name = f"llama.cpp alone, {entry['engine'].removeprefix('llama.cpp ')}"
    towers = {TORCH: ", PyTorch's tower", ROUNDED: ", tower in bfloat16"}
    return name + towers.get(entry["tower"], "")


def _mode(entry: Value) -> str:
    return MODES[entry["mode"]]


def _score(metric: str, form: str = ".3f") -> Callable[[Value], str]:
    return lambda entry: with_range(
        format(entry[metric]["value"], form), entry[metric]["interval"], form
    )


def _drop(metric: str, form: str = "+.3f") -> Callable[[Value], str]:
    """How far a score is from full depth's of the same engine."""
    return lambda entry: with_range(
        format(entry[metric]["minus_full"], form), entry[metric]["difference"], form
    )


def _ratio(name: str) -> Callable[[Value], str]:
    return lambda entry: times_with_range(entry[name]) if name in entry else ""


def whole() -> Table:
    """From the file to the text, by stage."""
    return Table.of(
        [entry for entry in record("end_to_end")["captioned"] if _shown(entry)],
        {
            "engine": _engine,
            "mode": _mode,
            **_stages(),
            "ms": "{whole_milliseconds:.1f}",
            "of llama.cpp's fastest": _ratio("over_fastest"),
            "of full depth": _ratio("over_full"),
            "CIDEr, of full depth": _drop("CIDEr"),
        },
    )


def megapixels() -> Table:
    """From files of a camera's size, opened whole or shrunk on load."""
    return Table.of(
        [e for e in record("megapixels")["captioned"] if (e["engine"], e["mode"]) != (Q8, FULL)],
        {
            "engine": _engine,
            "mode": _mode,
            "opened": lambda entry: "whole" if entry["tower"] == LARGE else "shrunk",
            "opening": _milliseconds("picture"),
            "ms": "{whole_milliseconds:.1f}",
            "of llama.cpp's fastest, opened whole": _ratio("over_fastest"),
            "opened as here": _ratio("over_fastest_as_opened"),
        },
    )


def _stages() -> dict[str, Callable[[Value], str]]:
    """Milliseconds by column; what comes before the decoder is one."""
    return {
        "before the decoder": _milliseconds("picture", "tower", "entry"),
        "prompt": _milliseconds("prompt"),
        "decoding": _milliseconds("decoding"),
    }


def _milliseconds(*stages: str) -> Callable[[Value], str]:
    return lambda entry: f"{sum(entry['milliseconds'][name] for name in stages):.1f}"


def _shown(entry: Value) -> bool:
    """Of q8_0 every mode that answers, of others the usual ones; behind PyTorch's tower only what
    has no other. Packed weights stand among the factors."""
    if entry["engine"] in (PACKED, "llama.cpp q4_0", "llama.cpp iq4_nl"):
        return False
    if entry["tower"] == TORCH and entry["engine"] != "generate":
        return False
    if entry["mode"] not in MODES or entry["mode"] == SHORT:
        return False
    if (entry["engine"], entry["mode"], entry["tower"]) == (Q8, FULL, ROUNDED):
        return False
    few = (FULL, EARLY, LOSSLESS) if entry["engine"] == PLAIN else (EARLY, LOSSLESS)
    return entry["engine"] not in (PLAIN, F16) or entry["mode"] in few


def five_layers() -> Table:
    """What confidence adds to a static model of five layers."""
    found = record("five_layers")
    asked = by(found["questioned"], *NAMED)
    rows = [
        {**entry, "questions": asked[tuple(entry[key] for key in NAMED)]}
        for entry in found["captioned"]
        if entry["mode"] in MODES and entry["mode"] != SHORT
    ]
    return Table.of(
        rows,
        {
            "": _mode,
            "CIDEr": _score("CIDEr"),
            "of full depth": _drop("CIDEr"),
            "faster, end to end": _ratio("over_full"),
            "faster, decoding": _ratio("decoding_over_full"),
            "questions right": lambda row: _score("right", ".1%")(row["questions"]),
            "ms an answer": "{questions[whole_milliseconds]:.0f}",
        },
    )


# -- factors --------------------------------------------------------------------------------------


def _chain(*steps: tuple[str, str, str]) -> Chain:
    """steps: what sets each way apart from the one before, its engine and mode."""
    towers = {"tower": ROUNDED}
    return [(thing, (engine, mode, towers.get(thing, TOWER))) for thing, engine, mode in steps]


def _skipping(engine: str, mode: str) -> Sequence[tuple[str, str, str]]:
    """The steps from full depth to a mode."""
    steps = [] if mode == LOSSLESS else [("head", engine, SHORT)]
    return [*steps, ("layers skipped", engine, mode)]


OVER_LLAMA = "end to end in q8_0 over llama.cpp's fastest, "


def _rows() -> dict[str, tuple[Chain, Sequence[str]]]:
    """Chains by what their multiple is of, and the stages that count."""
    parts = {
        EARLY: ("prompt and decoding", DECODER, (PLAIN, Q8)),
        LOSSLESS: ("decoding", DECODING, (PLAIN, PACKED, F16, Q8)),
    }
    fastest = (("", FASTEST, FULL), ("format", "llama.cpp q8_0", FULL), ("kernels", Q8, FULL))
    slots = f"batch of {record('end_to_end')['slots']}"
    return {
        **{
            f"{what}, {ENGINES.get(engine, engine)}, {MODES[mode]}": (
                _chain(("", engine, FULL), *_skipping(engine, mode)),
                stages,
            )
            for mode, (what, stages, some) in parts.items()
            for engine in some
        },
        **{
            OVER_LLAMA + MODES[mode]: (_chain(*fastest, *_skipping(Q8, mode)), STAGES)
            for mode in parts
        },
        f"{OVER_LLAMA}{MODES[EARLY]}, tower in bfloat16": (
            _chain(*fastest, *_skipping(Q8, EARLY), ("tower", Q8, EARLY)),
            STAGES,
        ),
        "eight at once over one at full depth, PyTorch": (
            _chain(("", PLAIN, FULL), *_skipping(PLAIN, EARLY), ("batch", slots, EARLY)),
            STAGES,
        ),
    }


def _factors(chain: Chain, stages: Sequence[str]) -> dict[str, dict[str, float]]:
    found = record("end_to_end")
    return factors([*found["captioned"], *found["together"]], chain, stages)


def in_factors() -> Table:
    """Every multiple in what it is made of."""
    return Table.of(
        [{"multiple": what, **_factors(*made)} for what, made in _rows().items()],
        {
            "multiple": "{multiple}",
            "all": lambda told: bold(times_with_range(told["all"])),
            **{thing: partial(_times_of, thing) for thing in THINGS},
        },
    )


def _times_of(thing: str, told: Value) -> str:
    return f"{told[thing]['times']:.2f}" if thing in told else ""


def of_skipping(mode: str) -> str:
    """Of the end-to-end multiple in q8_0, the factor that skipped layers bring."""
    return _times_of("layers skipped", _factors(*_rows()[OVER_LLAMA + MODES[mode]]))


def by_stage() -> dict[str, dict[str, float]]:
    """Milliseconds of a caption by stage: llama.cpp alone, and ours in q8_0, exits off and on."""
    ways = {
        "llama.cpp alone": (FASTEST, FULL),
        "exits off": (Q8, FULL),
        "lossless": (Q8, LOSSLESS),
        "early exit, as it ships": (Q8, EARLY),
    }
    rows = {}
    for title, (engine, mode) in ways.items():
        took = _entry(engine, mode)["milliseconds"]
        rows[title] = {
            "picture and vision tower": took["picture"] + took["tower"] + took["entry"],
            "prompt": took["prompt"],
            "answer": took["decoding"],
        }
    return rows


def beside_static(mode: str) -> str:
    """How far CIDEr is from that of every token at the exit."""
    found = by(record("five_layers")["captioned"], "mode")
    ours, static = (mean_of(read(found[name]).scores["CIDEr"]) for name in (mode, STATIC))
    return with_range(f"{ours.value - static.value:+.3f}", interval(ours, minus=static), "+.3f")


TABLES: dict[str, MakeTable] = {
    "photo-factors": in_factors,
    "end-to-end": whole,
    "megapixels": megapixels,
    "five-layers": five_layers,
}
FIGURES: dict[str, Make] = {
    "end-to-end-skipped": partial(of_skipping, EARLY),
    "end-to-end-skipped-lossless": partial(of_skipping, LOSSLESS),
    "five-student": partial(beside_static, "student"),
}
