"""The one table of the README: a row for each model, with what was guaranteed."""

from offramp.report.html import times
from offramp.report.table import Table, told
from offramp_lab.tables.drafts import way
from offramp_lab.tables.markdown import (
    KINDS,
    Make,
    MakeTable,
    Value,
    bold,
    by,
    record,
    tiny,
    with_range,
)

COLUMNS = (
    "model",
    "decoding, over the same model and kernels with exits off",
    "all in all",
    "end to end (CPU ms an answer)",
    "timed on",
    "guaranteed",
    "quality, full / early exit",
)
"""Exits' part of a speedup stands beside all of it: the rest is kernels, compiling or batching."""
NOTHING_ELSE = "the same"
PROMISE = "ROUGE-L drop 3%"


def overview() -> Table:
    """At most seven rows."""
    made = (_photo, _in_llama_cpp, _sliced, _drafting, _at_once)
    return Table(COLUMNS, [*map(_tiny, KINDS), *(make() for make in made)])


def _tiny(kind: str) -> tuple[str, ...]:
    rows = record("calibrated")[kind]
    row = next(r for r in rows if (r["risk"], r["risk_target"]) == ("disagreement", 0.01))
    right = " / ".join(
        f"{row[name]['questions']:.1%}" for name in ("quality_full", "quality_early")
    )
    return (
        f"{tiny(kind)}, 12 layers",
        bold(times(row["speedup_decode"])),
        NOTHING_ELSE,
        _end_to_end(row),
        "scenes",
        told("by image, at most {risk_target:.0%} of answers change (here {risk_test:.2%})", row),
        f"questions right: {right}",
    )


def _drafting() -> tuple[str, ...]:
    ours = way("pytorch float32, packed")
    plain = way("pytorch float32", "full")
    return (
        "the photo model that ships, lossless, packed float32",
        bold(times(ours["times"])),
        f"{times(ours['speed'] / plain['speed'])} of plain weights",
        "not measured",
        told(f"{{photographs}} photographs, {_ENDS}", ours),
        "nothing to trust: the full model's tokens",
        f"{ours['identical']} of {ours['photographs']} answers the same",
    )


def _promise(exits: str = "photo-exits") -> Value:
    """The photo model at the thresholds that ship, or with other exits at theirs."""
    photo = record(exits)
    return by(photo["regimes"][photo["first"]]["points"], "chosen_by")[PROMISE]


def _speed(row: Value) -> str:
    return with_range(f"{row['speedup_decode']:.2f}", row["speedup_decode_interval"], ".2f")


_CIDER = "{cider_full:.3f} to {cider:.3f}"


def _photo() -> tuple[str, ...]:
    photo, row = record("photo-exits"), _promise()
    low, high = row["speedup_decode_interval"]
    return (
        "the photo model that ships, 30 layers, bfloat16",
        bold(times(row["speedup_decode"])),
        NOTHING_ELSE,
        _end_to_end(row),
        f"{photo['sizes']['timed']} photographs, [{low:.2f}, {high:.2f}]",
        f"captions and answers lose at most {row['risk_target']:g} of ROUGE-L against people's, "
        f"{row['confidence']:.0%} on {row['n_calibration']} photographs; captions are "
        f"{row['inconsistency_test']:.0%} apart from the full model's, as 1 - ROUGE-L",
        f"CIDEr: {row['cider_full']:.3f} / {row['cider']:.3f} on {row['n_test']} photographs",
    )


def _in_llama_cpp() -> tuple[str, ...]:
    """Exits inside llama.cpp, behind a tower of ONNX Runtime, against llama.cpp alone."""
    found = record("end_to_end")
    entries = by(found["captioned"], "engine", "mode", "tower")
    row = entries[found["format"], "early exit", "onnxruntime"]
    decoding, whole = row["decoding_over_full"], row["over_alone"]
    score, full = (
        entries[found["format"], mode, "onnxruntime"]["ROUGE_L"]["value"]
        for mode in ("early exit", "full")
    )
    low, high = row["ROUGE_L"]["difference"]
    full_ms = entries[found["format"], "full", "torch"]["whole_milliseconds"]
    return (
        f"the same inside llama.cpp, {found['format']}, vision tower by ONNX Runtime",
        bold(times(decoding["times"])),
        f"{times(whole['times'])} of llama.cpp alone, end to end",
        f"{times(row['over_full']['times'])} ({full_ms:.0f} / {row['whole_milliseconds']:.0f})",
        f"{found['photographs']} photographs, decoding {told(_ENDS, decoding)}, end to end "
        f"{told(_ENDS, whole)}",
        "the same thresholds, calibrated in PyTorch",
        f"ROUGE-L: {full:.3f} / {score:.3f}, difference [{low:+.3f}, {high:+.3f}]",
    )


def _sliced() -> tuple[str, ...]:
    """The photo model without PyTorch, of a file as a hub would have it."""
    found = record("runtimes-photo-edge")
    entries = by(found["entries"], "format", "mode")
    early, lossless = (entries["q4_1", mode] for mode in ("early_exit", "lossless"))
    of = found["photographs"]
    return (
        "the photo model that ships, of a file in q4_1, sliced, without PyTorch",
        bold(times(early["exits"]["times"])),
        told(f"{_WITH_ENDS} of llama.cpp alone, prompts with it", early["all"]),
        "not measured",
        told(f"{of} photographs, {_ENDS}", early["exits"]),
        f"none; lossless ({times(lossless['exits']['times'])}, all in all "
        f"{times(lossless['all']['times'])}) is full depth's in {lossless['as_full']} of {of}",
        f"{early['as_with_its_embeddings']} of {of} captions as PyTorch's early exits write them",
    )


def _at_once() -> tuple[str, ...]:
    """Captions in the batch engine, against single requests at full depth."""
    found = record("end_to_end")
    slots = by(found["together"], "mode", "tower")["early exit", "onnxruntime"]
    alone = by(found["captioned"], "engine", "mode", "tower")
    full = alone["PyTorch", "full", "torch"]["whole_milliseconds"]
    score = alone["PyTorch", "early exit", "onnxruntime"]["ROUGE_L"]
    low, high = score["difference"]
    return (
        f"the photo model that ships, {found['slots']} captions at once (batch engine, float32)",
        "not measured apart",
        f"{times(full / slots['milliseconds'])} of single requests, end to end",
        f"{told(_WITH_ENDS, slots['over_full'])} ({slots['milliseconds']:.0f} early)",
        f"{found['photographs']} photographs",
        "the same thresholds, calibrated in float32",
        f"ROUGE-L of single requests: difference [{low:+.3f}, {high:+.3f}]",
    )


def _end_to_end(row: Value) -> str:
    full, ours = (1000 * row[name] for name in ("seconds_an_answer_full", "seconds_an_answer"))
    return f"{times(row['speedup_end_to_end'])} ({full:.0f} / {ours:.0f})"


_WITH_ENDS = "{times:.2f}x [{low:.2f}, {high:.2f}]"
_ENDS = "[{low:.2f}, {high:.2f}]"


TABLES: dict[str, MakeTable] = {"overview": overview}
FIGURES: dict[str, Make] = {
    "photo-promise": lambda: _speed(_promise()),
    "photo-promise-cider": lambda: told(_CIDER, _promise()),
    "photo-lossless": lambda: _speed(record("photo-exits")["lossless"]),
}
