"""What runtimes make of the photo model; rewrites runtimes.json in lab/records.

One thread. `python -m offramp_lab.records.runtimes` needs the model that `python -m
examples.photo_vlm.build` makes, the photographs it names, and the packages llama-cpp-python and
openvino-genai; without the latter its rows are left out. Parts, each kept in runs/runtimes for the
others: answers (200 photographs, a quarter of an hour), calibrated (as long again; both go on where
they were cut off), timings and callback (ten minutes, on a quiet machine). `--parts timings`
measures only these.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from examples.photo_vlm.caption import ADAPTER, load
from examples.photo_vlm.rows import half_of, read_photographs

from offramp.adapter import Adapter
from offramp.provenance import provenance
from offramp.storage import read_json, write_json
from offramp_lab.places import PHOTOGRAPHS, RECORDS, RUNS
from offramp_lab.records.runtimes import answers, calibrated, openvino, timings
from offramp_lab.records.runtimes.methods import Bench

OUT, RECORD = RUNS / "runtimes", RECORDS / "runtimes.json"


PARTS = ("answers", "calibrated", "timings", "callback")


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(1)
    if arguments.parts:
        measure(arguments)
    files = {name: OUT / f"{name}.json" for name in PARTS}
    record = {name: read_json(file) for name, file in files.items() if file.is_file()}
    about = provenance(0, ["offramp_lab.records.runtimes"], None)
    write_json(RECORD, {**record, "provenance": {**about, "flags": _processor_flags()}})


def measure(arguments: argparse.Namespace) -> None:
    """Write the results of the parts that are asked for."""
    backbone, encoder = load(arguments.model, torch.float32)
    adapter = Adapter.load(ADAPTER, backbone)
    held = read_photographs(arguments.data)["captions_val"]
    choosing, measuring = ([e for e in held if half_of(e) == half] for half in (0, 1))
    bench = Bench(adapter, encoder, measuring[: arguments.photographs], OUT)
    few = replace(bench, photographs=measuring[: arguments.timed])

    def timed() -> object:
        more = openvino.methods(few)
        if arguments.compiled:
            more |= few.compiled_methods()
        return timings.timings(few, arguments.rounds, more)

    parts: dict[str, Callable[[], object]] = {
        "answers": lambda: answers.answers(bench),
        "calibrated": lambda: calibrated.calibrated(bench, choosing[: arguments.photographs]),
        "timings": timed,
        "callback": lambda: timings.callback(few),
    }
    for name in arguments.parts:
        write_json(OUT / f"{name}.json", parts[name]())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=RUNS / "photo_vlm" / "model")
    parser.add_argument("--data", type=Path, default=PHOTOGRAPHS)
    parser.add_argument(
        "--parts", nargs="*", choices=PARTS, default=list(PARTS),
        help="to measure; none: put the record together from those that are kept",
    )  # fmt: skip
    parser.add_argument("--photographs", type=int, default=200, help="of each half, to answer")
    parser.add_argument("--timed", type=int, default=6, help="photographs to time on")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--compiled", action="store_true",
        help="time compiled code too, `generate`'s and ours, which takes minutes to compile",
    )  # fmt: skip
    return parser.parse_args()


def _processor_flags() -> list[str]:
    """Which of the processor's instructions for many numbers at once the runtimes may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    flags = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    return [f for f in flags if f.startswith(("avx", "amx", "fma", "f16c"))]


if __name__ == "__main__":
    main()
