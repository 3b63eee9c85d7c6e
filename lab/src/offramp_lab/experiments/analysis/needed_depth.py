"""How deep the tokens of known answers need to go, by kind of token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from offramp.calibration.replay import Array, Replay
from offramp.models.input_processor import InputProcessor

POSITIONS = ("first", "middle", "end")
_FREQUENT, _SHOWN = 10, 24

TokenClass = Callable[[str, int], str]
"""The class of a token from its text and its rank by frequency, from 0."""


def word_class(text: str, rank: int) -> str:
    """Numbers, punctuation, and words by how frequent they are in the answers."""
    word = text.strip()
    if not word:
        return "blank"
    if word.isdigit():
        return "number"
    if not any(letter.isalnum() for letter in word):
        return "punctuation"
    return f"{_FREQUENT} most frequent" if rank < _FREQUENT else "other words"


def needed_depths(
    own: Mapping[str, Replay], encoder: InputProcessor, token_class: TokenClass
) -> dict[str, Any]:
    """How deep tokens need to go, by kind of exit, then of token; see `by_kind`.

    own: replays of the model's own answers by kind of exit: for the lens the depth counts from
    which on every depth says the final token, for exits the first that says it.
    """
    targets = own["lens"].targets
    texts, classes = _classes(targets, encoder, token_class)
    kinds = {
        "position": (positions(targets, encoder.eos), POSITIONS),
        "class": (classes, sorted(set(classes.flat) - {""})),
        "token": (texts, [t for t, _ in Counter(texts.flat).most_common(_SHOWN + 1) if t]),
    }
    needed: dict[str, Any] = {}
    for name, replay in own.items():
        depths = settled(replay) if name == "lens" else first_agreement(replay)
        needed[name] = by_kind(depths, np.where(depths > 0, "all", ""), ["all"])
        needed[name] |= {by: by_kind(depths, *kind) for by, kind in kinds.items()}
    return needed


def _classes(
    targets: Array, encoder: InputProcessor, token_class: TokenClass
) -> tuple[Array, Array]:
    """The text and the class of each token [N, A]; "" where there is none, "end" for the end."""
    times = Counter(targets[targets >= 0].tolist())
    texts, classes = {-1: "", encoder.eos: "end"}, {-1: "", encoder.eos: "end"}
    words = [i for i, _ in times.most_common() if i != encoder.eos]
    for rank, token in enumerate(words):
        text = str(encoder.tokenizer.decode([token]))
        texts[token], classes[token] = text.strip() or repr(text), token_class(text, rank)
    look = [[(texts[i], classes[i]) for i in row] for row in targets.tolist()]
    both = np.array(look, dtype=object)
    return both[..., 0], both[..., 1]


def settled(replay: Replay) -> Array:
    """The depth [N, A] from which on every depth says the final layer's token; 0 for no token."""
    depths = np.array([*replay.said, replay.layers])
    same = np.stack([said == replay.final for said in replay.said.values()])
    run = np.logical_and.accumulate(same[::-1]).sum(0)
    return np.where(replay.mask, depths[len(same) - run], 0)


def first_agreement(replay: Replay) -> Array:
    """The first depth [N, A] that says the final layer's token; 0 for no token."""
    depths = np.array([*replay.said, replay.layers])
    same = np.stack([*(said == replay.final for said in replay.said.values()), replay.mask])
    return np.where(replay.mask, depths[same.argmax(0)], 0)


def positions(targets: Array, end: int) -> Array:
    """The position [N, A] of each token: one of `POSITIONS`, "" behind an answer."""
    names = np.where(targets >= 0, "middle", "")
    names[:, 0] = np.where(targets[:, 0] >= 0, "first", "")
    return np.where(targets == end, "end", names)


def by_kind(needed: Array, kinds: Array, order: Sequence[str]) -> dict[str, Any]:
    """For each kind of `order` that occurs: its tokens `n`, their mean depth, and shares by depth.

    needed: depths [N, A]; 0 is no token. kinds: [N, A].
    """
    rows: dict[str, Any] = {}
    for kind in order:
        depths = needed[(kinds == kind) & (needed > 0)]
        if depths.size:
            seen, times = np.unique(depths, return_counts=True)
            pairs = zip(seen, times, strict=True)
            rows[kind] = {
                "n": int(depths.size),
                "mean_depth": float(depths.mean()),
                "depth_shares": {str(d): float(n / depths.size) for d, n in pairs},
            }
    return rows
