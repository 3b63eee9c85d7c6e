"""The one table of the README: a row for each model, with what was guaranteed."""

from offramp.report.html import times
from offramp.report.table import Table
from offramp_lab.tables.drafts import way
from offramp_lab.tables.markdown import Make, MakeTable, bold, by, record, tiny
from offramp_lab.tables.runtimes import OURS, WAY, entry_at, timed_entries

COLUMNS = (
    "model",
    "decoding, of full depth by the same products",
    "all in all",
    "end to end",
    "timed on",
    "guaranteed",
    "quality, full / early exit",
)
"""Exits' part of a speedup stands beside all of it: the rest is kernels, compiling or batching."""
NOTHING_ELSE = "the same"


def overview() -> Table:
    """At most seven rows."""
    return Table(
        COLUMNS,
        [
            *(_tiny(kind) for kind in ("opt", "t5")),
            _photo(),
            _llama_cpp("q8_0"),
            _sliced(),
            _drafting(),
            _at_once("float32"),
        ],
    )


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
        times(row["speedup_end_to_end"]),
        "scenes",
        f"by image, at most {row['risk_target']:.0%} of answers change "
        f"(here {row['risk_test']:.2%})",
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
        f"{ours['photographs']} photographs, [{ours['low']:.2f}, {ours['high']:.2f}]",
        "nothing to trust: the full model's tokens",
        f"{ours['identical']} of {ours['photographs']} answers the same",
    )


def _photo() -> tuple[str, ...]:
    photo = record("photo")
    points = photo["regimes"][photo["first"]]["points"]
    row = next(p for p in points if p["chosen_by"] == "risk 1%")
    return (
        "photo model, 30 layers, bfloat16",
        bold(times(row["speedup_decode"])),
        NOTHING_ELSE,
        times(row["speedup_end_to_end"]),
        f"{photo['sizes']['race']} photographs",
        f"captions change by at most 1%, as 1 - ROUGE-L (here {row['inconsistency_test']:.2%})",
        f"CIDEr: {row['cider_full']:.3f} / {row['cider']:.3f} on {row['n_test']} photographs",
    )


def _loose(threshold: float) -> str:
    """How far the photo model's captions are from the full model's at a threshold."""
    photo = record("photo")
    points = photo["regimes"][photo["first"]]["points"]
    row = next(p for p in points if list(p["thresholds"].values()) == [threshold])
    return f"{row['inconsistency_test']:.0%}"


def _llama_cpp(layers: str) -> tuple[str, ...]:
    """Exits inside llama.cpp, against llama.cpp alone in the same format."""
    measured = record("runtimes")
    promise = measured["calibrated"]["formats"][layers]["guaranteed"]
    early, alone = (
        entry_at(layers, promise["thresholds"]),
        timed_entries()["llama.cpp", layers, "full"],
    )
    whole = alone["end_to_end_cpu_seconds"] / early["end_to_end_cpu_seconds"]
    full = by(measured["answers"]["cider"], *WAY)[OURS, layers, "full"]["CIDEr"]
    low, high = promise["difference_interval"]
    return (
        f"the same weights inside llama.cpp, {layers}, nearly the first 8 layers alone",
        bold(times(early["over_full"])),
        f"{times(early['over_llama_cpp'])} of llama.cpp alone",
        times(whole),
        f"{measured['timings']['photographs']} photographs: too few for an interval",
        f"captions lose at most {measured['calibrated']['target']:g} of ROUGE-L against people's, "
        f"95% on {promise['n']} photographs (here {promise['risk']:.3f}); they are not the full "
        f"model's: {_loose(0.1)} apart in PyTorch, as 1 - ROUGE-L",
        f"CIDEr: {full:.3f} / {promise['CIDEr']:.3f}, difference [{low:+.3f}, {high:+.3f}]",
    )


def _sliced() -> tuple[str, ...]:
    """The photo model without PyTorch, of the hub's own file: exits' part and the kernels'."""
    found = record("runtimes-photo-edge")
    over = found["over_llama_cpp"]
    same = found["same_fed_with_its_embeddings"]["early_exit"]
    return (
        "the hub's file q4_1, sliced, without PyTorch",
        bold(times(over["early_exit"] / over["full"])),
        f"{times(over['early_exit'])} of llama.cpp alone",
        "not measured",
        f"{found['photographs']} photographs",
        f"none; lossless ({times(over['lossless'] / over['full'])}, all in all "
        f"{times(over['lossless'])}) is full depth's in {found['lossless_as_full']} of "
        f"{found['photographs']}",
        f"{same} of {found['photographs']} captions as PyTorch's early exits write them",
    )


def _at_once(dtype: str) -> tuple[str, ...]:
    """The photo model in the batch engine, against single requests at full depth."""
    run = record("loads")["photographs"]["figures"][dtype]
    ways = by(run["ways"], "way")
    full, early = (ways[f"{run['slots']} slots, {mode}"] for mode in ("full", "early_exit"))
    return (
        f"photo model, {run['slots']} captions at once in the batch engine",
        bold(times(early["over_full_alone_decode"] / full["over_full_alone_decode"])),
        f"{times(early['over_full_alone_decode'])} of single requests",
        times(early["over_full_alone"]),
        f"{run['photographs']} photographs",
        f"none: at threshold 0.1 captions are {_loose(0.1)} apart, as 1 - ROUGE-L",
        f"CIDEr: {full['cider']:.3f} / {early['cider']:.3f} on {run['photographs']} photographs",
    )


def _edge(way: str) -> float:
    """Of llama.cpp alone; "exits" and "kernels" are the two parts of early exit."""
    over = record("runtimes-photo-edge")["over_llama_cpp"]
    parts = {"exits": over["early_exit"] / over["full"], "kernels": over["full"]}
    found: float = {**over, **parts}[way]
    return found


TABLES: dict[str, MakeTable] = {"overview": overview}
FIGURES: dict[str, Make] = {
    f"edge-{part}": lambda part=part: f"{_edge(part):.2f}"  # type: ignore[misc]
    for part in ("early_exit", "exits", "kernels")
}
