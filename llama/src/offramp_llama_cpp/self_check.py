"""What the runtime relies on in this build of llama.cpp, tried out when it loads.

The state between two segments is read by the internal name of a tensor; pending tokens
go on in one call, which must give bit by bit what one call each gives; a prediction that is taken
back must leave no trace; and the files must compute what the backbone does.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from offramp.core.errors import AdapterError, UnsupportedBackboneError
from offramp_llama_cpp.chain import CallSizes
from offramp_llama_cpp.graphs import Array
from offramp_llama_cpp.native.tap import States
from offramp_llama_cpp.segment import Part, Segment

AT_ONCE = 48
"""Most tokens that share a call."""

_MOST = (AT_ONCE, 32, 16, 8, 7, 4, 3)
"""Numbers of tokens that are tried. llama.cpp's kernels for K-quants take up to 7 as they take one,
or 3 where it rearranged the weights."""

_TIMED, _TIMES = (2, 3, 4, 8, 16, 32), 3
"""Numbers of rows whose calls are timed, and how often each."""

_LEAST_LIKE = {"f32": 0.99, "f16": 0.99, "bf16": 0.99, "q8_0": 0.98}
_COARSE = 0.5


@dataclass(frozen=True)
class _Seen:
    """What a segment gave for the probe: states [n, D] of its tap, if it has one, and logits."""

    states: States | None
    logits: Array


def call_sizes(segments: Sequence[Segment], probe: States, *, drafts: bool = False) -> CallSizes:
    """Return how many tokens may share a call above the first exit, as `CallSizes` has it.

    probe: states [`AT_ONCE`, D] that enter the first segment. drafts: whether several tokens of a
    sequence enter it at once, to be verified. Leaves the segments empty.

    Raises:
        UnsupportedBackboneError: the tensor between two segments is not there, or has other rows;
            or rows that are taken back leave a trace.
    """
    first, *others = segments
    several = first.sequences > 1
    states = _feed(first, probe, 1).states
    _check_crop(first, probe)
    below = _sizes(first, probe) if several or drafts else CallSizes()
    sizes = [below if several else CallSizes(1, AT_ONCE)]
    inputs = [probe]
    for segment in others:
        assert states is not None
        inputs.append(states)
        sizes.append(_sizes(segment, states))
        _check_crop(segment, states)
        states = _feed(segment, states, AT_ONCE).states
    least, most = max(size.least for size in sizes), min(size.most for size in sizes)
    if least > most:
        return CallSizes(1, 1)
    shared = several and all(
        _shares(segment, states, most) for segment, states in zip(segments, inputs, strict=True)
    )
    seconds = _seconds(segments[-1], probe, least, most)
    return CallSizes(least, most, seconds, shared, below.most if below.least == 1 else 1)


def _shares(segment: Segment, states: States, most: int) -> bool:
    """Whether rows come out of calls with those of other sequences as they do alone."""
    slots = min(segment.sequences, most)
    if slots < 2:
        return False
    rows = AT_ONCE // 4
    shifted = [np.roll(states, slot, axis=0)[:rows] for slot in range(slots)]
    alone = [_feed(segment, each, min(rows, most)) for each in shifted]
    for count in {1, min(rows, most // slots)}:
        found: list[list[States]] = [[] for _ in range(slots)]
        for start in range(0, rows, count):
            parts = [
                Part(i, each[start : start + count], len(each[start : start + count]), 0)
                for i, each in enumerate(shifted)
            ]
            segment.feed_together(parts)
            width = len(parts[0].states)
            logits, taps = segment.logits(width * slots).copy(), None
            if segment.tap is not None:
                taps = segment.tapped()
            for i in range(slots):
                own = slice(i * width, (i + 1) * width)
                found[i].append(logits[own] if taps is None else taps[own])
        for slot in range(slots):
            segment.crop(segment.length_of(slot), slot)
        for seen, each in zip(alone, found, strict=True):
            expected = seen.logits if seen.states is None else seen.states
            if not np.array_equal(expected, np.concatenate(each)):
                return False
    return True


def _seconds(segment: Segment, states: States, least: int, most: int) -> dict[int, float]:
    """CPU time of calls over some numbers of rows from `least` to `most`, without logits."""
    found = {}
    for rows in sorted({least, most, *(n for n in _TIMED if least < n < most)}):
        times = []
        for _ in range(_TIMES):
            begin = time.process_time()
            segment.feed(states[:rows], 0)
            times.append(time.process_time() - begin)
            segment.crop(rows)
        found[rows] = min(times)
    return found


def _sizes(segment: Segment, states: States) -> CallSizes:
    for least in (1, 2):
        few = _feed(segment, states, least)
        for most in _MOST:
            # Odd sizes too, whose remainders fall into other kernels; of few, all.
            sizes = range(least, most + 1) if most < 8 else (most, most // 2 - 1, 3)
            if all(_same(few, _feed(segment, states, size)) for size in sizes):
                return CallSizes(least, most)
    return CallSizes(1, 1)


def _check_crop(segment: Segment, states: States) -> None:
    """Raise `UnsupportedBackboneError` where rows that are taken back leave a trace."""
    half = len(states) // 2

    def logits(rows: States) -> Array:
        segment.feed(rows, half)
        return segment.logits(half).copy()

    segment.feed(states[:half], 1)
    expected = logits(states[half:])
    segment.crop(half)
    logits(-states[half:])
    segment.crop(half)
    actual = logits(states[half:])
    segment.crop(segment.length_of())
    if not np.array_equal(expected, actual):
        raise _unfit("keeps traces of rows that were taken back")


def check_logits(
    segments: Sequence[Segment],
    backbone: str,
    probe: States,
    expected: Array,
    layers: str,
    *,
    ahead: bool = False,
) -> float:
    """The correlation of the last segment's logits with the backbone's, [n, V], on the probe.

    backbone: its name. layers: number format of the layers. ahead: all rows saw each other.

    Raises:
        AdapterError: it is lower than that format explains.
    """
    states, logits = probe, probe
    for segment in segments:
        seen = _feed(segment, states, len(states), ahead=ahead)
        states, logits = seen.states if seen.states is not None else states, seen.logits
    pair = np.array([each.astype(np.float64).ravel() for each in (logits, expected)])
    correlation = float(np.corrcoef(pair)[0, 1])
    least = _LEAST_LIKE.get(layers, _COARSE)
    if not correlation >= least:
        raise AdapterError(
            f"The exported decoder of {backbone} is not the backbone's: their logits "
            f"correlate by {correlation:.4f}, less than {least}.",
            "Export it again; if that does not help, this version of llama.cpp computes it "
            "otherwise: use --engine torch.",
        )
    return correlation


def _feed(segment: Segment, states: States, rows: int, *, ahead: bool = False) -> _Seen:
    """Run the states through a segment, `rows` in a call; it is empty before and after."""
    taps, logits = [], []
    for start in range(0, len(states), rows):
        call = states[start : start + rows]
        segment.feed(call, len(call), ahead=ahead)
        logits.append(segment.logits(len(call)).copy())
        if segment.tap is not None:
            tapped = segment.tapped()
            if len(tapped) != len(call):
                raise _unfit(
                    f"gives {len(tapped)} rows of the states between its layers for {len(call)}"
                )
            taps.append(tapped)
    segment.crop(segment.length_of())
    return _Seen(np.concatenate(taps) if taps else None, np.concatenate(logits))


def _same(first: _Seen, second: _Seen) -> bool:
    if first.states is not None and not np.array_equal(first.states, second.states):  # type: ignore[arg-type]
        return False
    return np.array_equal(first.logits, second.logits)


def _unfit(what: str) -> UnsupportedBackboneError:
    return UnsupportedBackboneError(
        f"This version of llama.cpp {what}, which exits rely on.",
        "Install another version of llama-cpp-python, or use --engine torch.",
    )
