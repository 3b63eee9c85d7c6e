"""What runtimes make of the photo model; rewrites runtimes.json in lab/records.

One thread. `python -m offramp_lab.records.runtimes` needs the photographs and the package
llama-cpp-python. Parts, each kept in runs/runtimes for the others: answers (100 photographs,
three minutes; it goes on where it was cut off) and timings (of 50, ten minutes, on a quiet
machine). `--parts timings` measures only these; --compiled times compiled code too, `generate`'s
and ours, which takes minutes to compile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from offramp_lab.places import RUNS
from offramp_lab.records.record import Record, asked
from offramp_lab.records.runtimes.answers import answers
from offramp_lab.records.runtimes.methods import Bench, Name, in_turns, taken
from offramp_lab.records.subjects import halves, load_photo

RECORD = Record("runtimes")
PARTS = ("answers", "timings")
WARM = 8
"""Photographs that all answer before any counts: code is made where a row count is first met."""


def main() -> None:
    arguments = asked(
        __doc__,
        photo=True,
        photographs=100,
        timed=50,
        rounds=1,
        compiled=False,
        more=lambda parser: parser.add_argument(
            "--parts",
            nargs="*",
            choices=PARTS,
            default=list(PARTS),
            help="to measure; none: put the record together from those that are kept",
        ),
    )

    @cache
    def loaded() -> tuple[Bench, Bench]:
        """All photographs of the measuring half that are asked for, and a few."""
        adapter, encoder = load_photo(arguments.adapter)
        _, measuring = halves(arguments.data)
        some = measuring[: arguments.photographs]
        bench = Bench(adapter, encoder, some, RUNS / RECORD.name)
        few = replace(bench, photographs=measuring[: arguments.timed])
        return bench, few

    made: dict[str, Callable[[], Any]] = {
        "answers": lambda: answers(loaded()[0]),
        "timings": lambda: timings(loaded()[1], arguments.rounds, compiled=arguments.compiled),
    }
    RECORD.parts(made, arguments.parts, flags=_processor_flags())


def timings(bench: Bench, rounds: int, *, compiled: bool) -> dict[str, Any]:
    """Tokens a second of decoding, in turns; medians of rounds."""
    methods = {**bench.methods(), **(bench.compiled_methods() if compiled else {})}
    taking = {name: partial(taken, method) for name, method in methods.items()}
    inputs = [bench.encoder.prompts([example]) for example in bench.photographs]
    return in_turns(taking, inputs, rounds, WARM, _bases)


def _bases(name: Name) -> dict[str, Name]:
    """What a method's speed is put beside: llama.cpp's own at its format, Hugging Face's, and the
    same runtime's at full depth."""
    runtime, layers, _ = name
    return {
        "over_generate": ("generate", "float32", "full"),
        "over_llama_cpp": ("llama.cpp", layers, "full"),
        "over_full": (runtime, layers, "full"),
    }


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
