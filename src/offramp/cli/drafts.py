"""`offramp calibrate --lossless`: the drafts by which lossless decoding is fastest."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from offramp.cli.loading import adapter_folder, check_engine, loaded, read_data
from offramp.cli.options import ASKED, DATA, LOADED, asked_again, one_again
from offramp.cli.output import few, say_next, show_result
from offramp.core.errors import InputError

log = logging.getLogger(__name__)
NEITHER = (
    "Neither drafts nor thresholds pay with these exits. What may: exits that are trained "
    "longer or on more images (offramp train), at another depth (offramp inspect), or a "
    "larger --target."
)
ROUNDS, EXAMPLES = 3, 10
"""Of timing; the examples that are timed, unless --limit says how many."""


OTHERS = (
    "risk",
    "target",
    "confidence",
    "unit",
    "each_kind",
    "target_of",
    "frequencies",
    "of",
    "score",
    "thresholds",
    "first_threshold",
    "write",
    "batch_size",
)
"""Options of a guarantee, which lossless answers need none of."""


def find_drafts(arguments: argparse.Namespace) -> None:
    """Find the drafts with which lossless decoding is fastest, and store them in the adapter."""
    from offramp.training.checkpoint import held

    if wrong := [name for name in OTHERS if name in getattr(arguments, "given", {})]:
        shown = wrong[0].replace("_", "-")
        raise InputError(f"--{shown} does not go with --lossless.", "Leave one of both out.")
    if arguments.max_new_tokens < 2:
        raise InputError("An answer of 1 token is not drafted.", "Raise --max-new-tokens.")
    arguments.limit = arguments.limit or EXAMPLES
    check_engine(arguments)
    out = adapter_folder(arguments)
    with held(out):
        _find(arguments, out)


def _find(arguments: argparse.Namespace, out: Path) -> None:
    """Time what drafts there are, show that, and store the fastest in `out`."""
    from offramp.calibration.draft_thresholds import draft_speeds, with_drafts
    from offramp.common.progress import progress

    items = read_data(arguments, require_answers=False)
    opened = loaded(arguments, threads=arguments.threads or 1, keep_decoder=True)
    adapter, encoder, runtime = opened.adapter, opened.encoder, opened.runtime
    inputs = [encoder.prompts([item.example]) for item in items]
    _say_how_long(adapter, runtime, inputs, arguments)
    options: dict[str, Any] = {
        "runtime": runtime,
        "rounds": ROUNDS,
        "progress": lambda rounds: progress(rounds, "timing"),
        "max_new_tokens": arguments.max_new_tokens,
        "do_sample": False,
    }
    draftings = draft_speeds(adapter, inputs, **options)
    chosen = with_drafts(adapter, draftings)
    better = chosen is not adapter
    rows: list[dict[str, Any]] = [
        {"drafts": d.thresholds, "longest": d.longest, "speedup_decode": d.speedup}
        for d in draftings
    ]
    text = _table(draftings, better=better)
    show_result(rows, text, as_json=arguments.json)
    if chosen.policy != adapter.policy:
        chosen.save(out)
        log.info("Written to %s.", out)
    if better:
        say_next(f"offramp generate {out}{one_again(arguments)} --mode lossless")
    elif adapter.policy.own_mode == "early_exit":
        say_next(f"offramp generate {out}{one_again(arguments)}")
    elif adapter.attempts:
        log.info(NEITHER)
    else:
        of = asked_again(arguments, "data", *LOADED, *ASKED, *DATA)
        say_next(f"offramp calibrate {arguments.adapter}{of} --target 0.01")


def _say_how_long(adapter: Any, runtime: Any, inputs: Any, arguments: argparse.Namespace) -> None:
    """Say how long it takes, estimated from one full-depth answer."""
    import time

    from offramp.calibration.draft_thresholds import LONGEST, draft_policies
    from offramp.common.progress import duration
    from offramp.core.decoding.policy import FULL

    ways = 1 + len(draft_policies(adapter)) + len(LONGEST)
    begin = time.perf_counter()
    (runtime or adapter).generate(
        inputs[0], policy=FULL, max_new_tokens=arguments.max_new_tokens, do_sample=False
    )
    answers = ways * (min(3, len(inputs)) + ROUNDS * len(inputs))
    took = (time.perf_counter() - begin) * answers
    log.info(
        "Timing %d ways to decode on %d prompts, in %d rounds, takes about %s.",
        ways,
        len(inputs),
        ROUNDS,
        duration(took),
    )


def _table(draftings: Any, *, better: bool) -> str:
    """The fastest thresholds and the choice, as a person reads them on a terminal."""
    timed = [f"{_draft_words(drafting):<40}{drafting.speedup:>9.2f}x" for drafting in draftings]
    lines = [f"{'drafts':<40}{'decoding':>10}", *few(timed, 5)]
    best = draftings[0]
    said = (
        f"Lossless decoding drafts by {_draft_words(best)} from here on, "
        f"{best.speedup:.2f}x as fast as the full model."
        if better
        else "No drafts are faster than the full model; the adapter's are left as they are."
    )
    return "\n".join([*lines, "", said])


def _draft_words(drafting: Any) -> str:
    return f"{_words(drafting.thresholds)}, {drafting.longest} at most"


def _words(thresholds: Any) -> str:
    return ", ".join(f"{t:g} at depth {d}" for d, t in thresholds.items()) or "none"
