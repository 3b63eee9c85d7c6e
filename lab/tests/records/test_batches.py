"""Answers at once, beside full depth of the same load and PyTorch's largest batch."""

from __future__ import annotations

from itertools import product

from offramp.core.decoding.policy import MODES
from offramp_lab.records.batches import AT_ONCE, entries_of


def test_a_way_stands_beside_full_depth_of_its_load_and_the_largest_batch() -> None:
    """Two groups of two captions; a way takes as many seconds as its slots and mode make."""
    loads = [(engine, slots) for engine, all_ in AT_ONCE.items() for slots in all_]
    seconds = {"full": 8.0, "early_exit": 2.0, "lossless": 4.0}
    told = {
        (engine, str(slots), mode): [
            [[[1], [2]], seconds[mode] / slots],
            [[[3], [4 if mode == "early_exit" else 5]], seconds[mode] / slots],
        ]
        for (engine, slots), mode in product(loads, MODES)
    }
    for entry in entries_of(told):
        slots, mode = entry["at_once"], entry["mode"]
        assert entry["milliseconds"] == round(1e3 * seconds[mode] / slots / 2, 2)
        assert entry["over_full"]["times"] == 8.0 / seconds[mode]
        assert entry["over_torch"]["times"] == slots / max(AT_ONCE["PyTorch"])
        assert entry["as_full"] == (3 if mode == "early_exit" else 4)
