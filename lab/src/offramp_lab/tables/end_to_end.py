"""Captions and answers about photographs: decoding and end to end, each multiple in its factors."""

from collections.abc import Callable, Sequence

from offramp.evaluation.statistics import interval, mean_of
from offramp.report.table import Table
from offramp_lab.experiments.factors import DECODING, LOSSLESS, NAMED, STAGES, factors, read
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
FASTEST = "llama.cpp iq4_nl"
"""llama.cpp's fastest format whose captions are as good as those of q8_0."""
TOWER, TORCH = "onnxruntime", "torch"
FULL, SHORT, STATIC = "full", "full, shortlist", "static"
EARLY, CAREFUL = "early exit", "early exit, careful"
WHOLE = "early exit, prompt run whole"
MODES = {
    FULL: "full depth",
    SHORT: "full depth, the same shortlist",
    STATIC: "every token at the exit",
    EARLY: "early exit, as it ships",
    CAREFUL: "early exit, careful thresholds",
    LOSSLESS: "lossless",
    WHOLE: "early exit, prompt run whole",
    "student": "student of five layers",
}
ENGINES = {"generate": "Hugging Face's `generate`", PLAIN: "PyTorch, float32", F16: "f16"}
THINGS = ("format", "kernels", "head", "layers skipped", "prompt", "batch")
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
    return name + (", PyTorch's tower" if entry["tower"] == TORCH else "")


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


def _as_full(entry: Value) -> str:
    return f"{entry['as_full']} of {len(entry['each']['tokens'].split())}"


def same_captions(engine: str, mode: str) -> Make:
    """How many captions are full depth's."""
    return lambda: _as_full(_entry(engine, mode))


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
    """Of q8_0 every mode, of others those that answer and what they are compared with."""
    if (entry["engine"], entry["tower"]) == (Q8, TORCH):
        return False
    few = (FULL, EARLY, LOSSLESS) if entry["engine"] == PLAIN else (EARLY, LOSSLESS)
    return entry["engine"] not in (PLAIN, PACKED, F16) or entry["mode"] in few


def five_layers() -> Table:
    """What confidence adds to a static model of five layers."""
    found = record("five_layers")
    asked = by(found["questioned"], *NAMED)
    rows = [
        {**entry, "questions": asked[tuple(entry[key] for key in NAMED)]}
        for entry in found["captioned"]
    ]
    return Table.of(
        rows,
        {
            "": _mode,
            "CIDEr": _score("CIDEr"),
            "of full depth": _drop("CIDEr"),
            "ms a caption": "{whole_milliseconds:.0f}",
            "faster, end to end": _ratio("over_full"),
            "faster, decoding": _ratio("decoding_over_full"),
            "questions right": lambda row: _score("right", ".1%")(row["questions"]),
            "right, of full depth": lambda row: _drop("right", "+.1%")(row["questions"]),
            "ms an answer": "{questions[whole_milliseconds]:.0f}",
        },
    )


# -- factors --------------------------------------------------------------------------------------


def chain_of_decoding(engine: str, mode: str = EARLY) -> Chain:
    if mode == LOSSLESS:
        return ("", (engine, FULL, TOWER)), ("layers skipped", (engine, mode, TOWER))
    return (
        ("", (engine, FULL, TOWER)),
        ("head", (engine, SHORT, TOWER)),
        ("layers skipped", (engine, mode, TOWER)),
    )


def chain_of_llama(mode: str = EARLY) -> Chain:
    """From llama.cpp's fastest format to ours in q8_0."""
    begin: list[tuple[str, tuple[str, str, str]]] = [
        ("", (FASTEST, FULL, TOWER)),
        ("format", ("llama.cpp q8_0", FULL, TOWER)),
        ("kernels", (Q8, FULL, TOWER)),
    ]
    if mode == LOSSLESS:
        return [*begin, ("layers skipped", (Q8, mode, TOWER))]
    begin.append(("head", (Q8, SHORT, TOWER)))
    if mode == EARLY:
        begin.append(("layers skipped", (Q8, WHOLE, TOWER)))
        return [*begin, ("prompt", (Q8, mode, TOWER))]
    return [*begin, ("layers skipped", (Q8, mode, TOWER))]


def chain_of_batch() -> Chain:
    slots = f"batch of {record('end_to_end')['slots']}"
    return (
        ("", (PLAIN, FULL, TOWER)),
        ("head", (PLAIN, SHORT, TOWER)),
        ("layers skipped", (PLAIN, WHOLE, TOWER)),
        ("prompt", (PLAIN, EARLY, TOWER)),
        ("batch", (slots, EARLY, TOWER)),
    )


def _rows() -> dict[str, tuple[Chain, Sequence[str]]]:
    """Chains by what their multiple is of, and the stages that count."""
    decoded = {
        f"decoding, {ENGINES.get(engine, engine)}, {MODES[mode]}": (
            chain_of_decoding(engine, mode),
            DECODING,
        )
        for mode, engines in (
            (EARLY, (PLAIN, Q8)),
            (CAREFUL, (PLAIN, Q8)),
            (LOSSLESS, (PLAIN, PACKED, F16, Q8)),
        )
        for engine in engines
    }
    ended = {
        f"end to end in q8_0 over llama.cpp's fastest, {MODES[mode]}": (
            chain_of_llama(mode),
            STAGES,
        )
        for mode in (EARLY, CAREFUL, LOSSLESS)
    }
    return {
        **decoded,
        **ended,
        "eight at once over one at full depth, PyTorch": (chain_of_batch(), STAGES),
    }


def in_factors() -> Table:
    """Every multiple in what it is made of."""
    found = record("end_to_end")
    entries = [*found["captioned"], *found["together"]]
    rows = []
    for what, (chain, stages) in _rows().items():
        told = factors(entries, chain, stages)
        rows.append(
            (
                what,
                bold(times_with_range(told["all"])),
                *(f"{told[thing]['times']:.2f}" if thing in told else "" for thing in THINGS),
            )
        )
    return Table(("multiple", "all", *THINGS), rows)


def of_skipping(mode: str) -> Make:
    """Of the end-to-end multiple in q8_0, the factor that skipped layers bring."""

    def make() -> str:
        found = record("end_to_end")
        chain, stages = _rows()[f"end to end in q8_0 over llama.cpp's fastest, {MODES[mode]}"]
        entries = [*found["captioned"], *found["together"]]
        return f"{factors(entries, chain, stages)['layers skipped']['times']:.2f}"

    return make


def by_stage() -> dict[str, dict[str, float]]:
    """Milliseconds of a caption by stage: llama.cpp alone, and ours in q8_0, exits off and on."""
    ways = {
        "llama.cpp alone": (FASTEST, FULL),
        "exits off": (Q8, FULL),
        "lossless": (Q8, LOSSLESS),
        "early exit, as it ships": (Q8, EARLY),
        "early exit, careful": (Q8, CAREFUL),
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


def told(over: str, engine: str, mode: str, tower: str = TOWER) -> Make:
    """A multiple with its interval."""
    return lambda: times_with_range(_entry(engine, mode, tower)[over])


def cider_of(engine: str, mode: str) -> Make:
    """From full depth's CIDEr to a mode's, with the interval of the difference."""

    def make() -> str:
        found = _entry(engine, mode)["CIDEr"]
        low, high = found["difference"]
        full = found["value"] - found["minus_full"]
        return f"{full:.3f} to {found['value']:.3f} [{low:+.3f}, {high:+.3f}]"

    return make


def beside_static(mode: str) -> Make:
    """How far CIDEr is from that of every token at the exit."""

    def make() -> str:
        found = by(record("five_layers")["captioned"], "mode")
        ours, static = (mean_of(read(found[name]).scores["CIDEr"]) for name in (mode, STATIC))
        return with_range(f"{ours.value - static.value:+.3f}", interval(ours, minus=static), "+.3f")

    return make


def same_answers(mode: str) -> Make:
    """Answers to questions that are full depth's."""
    return lambda: str(by(record("five_layers")["questioned"], "mode")[mode]["as_full"])


TABLES: dict[str, MakeTable] = {
    "photo-factors": in_factors,
    "end-to-end": whole,
    "five-layers": five_layers,
}
FIGURES: dict[str, Make] = {
    "end-to-end-q8_0": told("over_fastest", Q8, EARLY),
    "end-to-end-q8_0-lossless": told("over_fastest", Q8, LOSSLESS),
    "end-to-end-skipped": of_skipping(EARLY),
    "end-to-end-skipped-lossless": of_skipping(LOSSLESS),
    "five-confidence": beside_static(EARLY),
    "five-student": beside_static("student"),
    "five-same-early": same_answers(EARLY),
    "five-same-static": same_answers(STATIC),
    "five-same-student": same_answers("student"),
    "photo-same": same_captions(PLAIN, EARLY),
    "photo-same-careful": same_captions(PLAIN, CAREFUL),
    "photo-same-static": same_captions(PLAIN, STATIC),
    "photo-cider": cider_of(PLAIN, EARLY),
    "photo-cider-careful": cider_of(PLAIN, CAREFUL),
    "photo-cider-static": cider_of(PLAIN, STATIC),
}
