"""Single captions of the photo model: early exit at three thresholds, lossless, and guesses.

    python -m offramp_lab.records.loads.single --dtype bfloat16

One interleaved run over held-out photographs, decoding alone. Of guesses every level of --above
below the threshold is timed, as `offramp draft` does, and the fastest is what the table shows.
"plain" are the loops without guesses and without the lean path: Hugging Face's stack, called once a
token. "prepacked" is the same model with its weights laid out for the processor, "compiled" with
code that was compiled.
Rewrites "single" in lab/records/loads.json, of its number format alone; a quarter of an
hour each, a quiet machine.

--cpu-time: seconds of the thread, not of the clock, for a machine that others use too.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import StoppingCriteriaList

from offramp.engine.policy import FULL, ExitPolicy
from offramp.evaluation.timing import (
    GenerateFn,
    Timing,
    exit_generate_fn,
    speedup,
    speedup_interval,
    stock_generate_fn,
    time_interleaved,
)
from offramp_lab.experiments.experiment import bar, same
from offramp_lab.records.loads import keep
from offramp_lab.records.record import asked, named
from offramp_lab.records.subjects import Subject, photo

THRESHOLDS = (0.2, 0.3, 0.5, 0.6)


def main() -> None:
    arguments = asked(
        __doc__, photo=True, dtype="bfloat16", clock=True, images=50, rounds=2, above=(0.0, 0.1)
    )
    subject, *others = (photo(arguments, arguments.images, arguments.dtype) for _ in range(3))
    inputs = subject.prompts()
    prepacked, compiled = others
    prepacked.adapter.prepack()
    compiled.adapter.backbone = compiled.adapter.backbone.with_decoding(compiled=True)
    ways = policies(subject, arguments.above)
    generates = {
        "generate": stock_generate_fn(subject.adapter.backbone, **subject.options),
        **{name: _way(subject, name, policy) for name, policy in ways.items()},
        **{
            f"{products} {name}": _way(other, name, policy)
            for products, other in (("prepacked", prepacked), ("compiled", compiled))
            for name, policy in ways.items()
            if not name.startswith("plain")
        },
    }
    for prompt in inputs:  # so that all code is there
        for name in (name for name in generates if name.startswith("compiled")):
            generates[name](prompt, StoppingCriteriaList())
    timings = time_interleaved(
        generates, inputs, rounds=arguments.rounds, progress=bar("rounds"),
        clock=arguments.clock,
    )  # fmt: skip
    rows = compared(timings)
    print(*rows.items(), sep="\n")
    figures = {
        "photographs": len(inputs), "rounds": arguments.rounds, "ways": rows,
        "clock": named(arguments.clock),
    }  # fmt: skip
    keep("single", {arguments.dtype: figures}, subject.examples)


def policies(subject: Subject, above: list[float]) -> Mapping[str, ExitPolicy]:
    """Everything that is timed, by name."""
    own = subject.adapter.policy
    (depth,) = own.thresholds
    lossless = own.in_mode("lossless")
    ways = {"full": FULL, "lossless": lossless, "plain lossless": lossless}
    for threshold in THRESHOLDS:
        early = replace(own, thresholds={depth: threshold})
        ways[f"early exit {threshold}"] = ways[f"plain early exit {threshold}"] = early
        for level in above:
            if level < threshold:
                guessing = replace(early, guesses={depth: level})
                ways[f"guesses {threshold} from {level}"] = guessing
    return ways


def _way(subject: Subject, name: str, policy: ExitPolicy) -> GenerateFn:
    """Generation by a policy, without the lean path where the name says plain."""
    adapter = subject.adapter
    exits = adapter.exits if policy is not FULL else None
    backbone = adapter.backbone.with_decoding(lean=not name.startswith("plain"))
    return exit_generate_fn(backbone, exits, policy, **subject.options)


def compared(timings: Mapping[str, Timing]) -> dict[str, dict[str, Any]]:
    """Speed of every way against the full model's, decoding and end to end; decoding against full
    depth by the same products, with its interval over photographs; how many answers are the same
    with guesses."""
    full = timings["full"]
    rows: dict[str, dict[str, Any]] = {}
    for name, timing in timings.items():
        products = next((p for p in ("prepacked ", "compiled ") if name.startswith(p)), "")
        own = timings[f"{products}full"]
        low, high = speedup_interval(own, timing) or (float("nan"),) * 2
        rows[name] = {
            "speedup": speedup(full.decode, timing.decode),
            "end_to_end": speedup(full.seconds, timing.seconds),
            "tokens_per_second": timing.tokens_per_second,
            "over_own": {"times": speedup(own.decode, timing.decode), "low": low, "high": high},
        }
        if "guesses" in name:
            alone = timings[f"early exit {name.split('guesses ')[1].split()[0]}"].answers
            rows[name]["same"] = same(alone, timing.answers)
    return rows


if __name__ == "__main__":
    main()
