"""Token after token through a chain of segments, in numpy: early exit, lossless and full depth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from offramp.errors import InputError, did_you_mean
from offramp.runtimes.edge.sampling import Array, Chooser, Ids
from offramp.runtimes.llama_cpp.chain import SegmentChain
from offramp.runtimes.llama_cpp.native.tap import States
from offramp.runtimes.llama_cpp.prompt import Prompt

MODES = ("early_exit", "lossless", "full")


@dataclass(frozen=True)
class Step:
    """One token of an answer. score: of the last exit that looked at it; NaN: none did."""

    token: int
    depth: int
    score: float


@dataclass(frozen=True)
class Plan:
    """When tokens exit, of an adapter's policy in one of `MODES`.

    gates: weights [D], bias and least score by depth. ids: what exits can say; None: everything.
    """

    thresholds: Mapping[int, float]
    score: Callable[[Array], float]
    lossless: bool
    exit_in_prefill: bool
    max_draft: int
    gates: Mapping[int, tuple[Array, float, float]]
    ids: Ids | None


def plan_of(
    policy: Mapping[str, Any],
    mode: str,
    gates: Mapping[int, tuple[Array, float]],
    shortlist: Sequence[int] | None,
    *,
    causal: bool,
) -> Plan:
    """Raise `InputError` for a mode, score or KV policy that does not run here."""
    for what, name, known in (
        ("Mode", mode, MODES),
        ("Without PyTorch the score", policy["score"], tuple(SCORES)),
        ("Without PyTorch the KV policy", policy["kv"], ("recompute",)),
    ):
        if name not in known:
            raise InputError(f"{what} {name!r} is not known.", did_you_mean(name, known))
    lossless = mode == "lossless"
    by_drafts = lossless and policy.get("drafts")
    thresholds = policy["drafts"] if by_drafts else policy["thresholds"]
    levels = {} if by_drafts else policy.get("gates") or {}
    return Plan(
        {} if mode == "full" else {int(d): float(np.float32(t)) for d, t in thresholds.items()},
        SCORES[policy["score"]],
        lossless,
        bool(policy["exit_in_prefill"]) and causal,
        int(policy["max_draft"]),
        {int(d): (*gates[int(d)], float(level)) for d, level in levels.items()},
        None if shortlist is None else np.asarray(shortlist, dtype=np.int64),
    )


def _probabilities(logits: Array) -> Array:
    shares = np.exp(logits - logits.max())
    return np.asarray(shares / shares.sum(), dtype=np.float32)


def _max_probability(logits: Array) -> float:
    return 1.0 / float(np.add.reduce(np.exp(logits - logits.max())))


def _margin(logits: Array) -> float:
    second, first = np.partition(_probabilities(logits), -2)[-2:]
    return float(first - second)


def _entropy(logits: Array) -> float:
    p = _probabilities(logits).astype(np.float64)
    p = p[p > 0]
    return float(np.clip(1.0 + (p * np.log(p)).sum() / math.log(len(logits)), 0.0, 1.0))


SCORES: dict[str, Callable[[Array], float]] = {
    "max_probability": _max_probability,
    "margin": _margin,
    "entropy": _entropy,
}
"""As `offramp.engine.confidence` has them."""


class _Look:
    """What the exits say of a token. logits: [S] of the exit that it took; None: it took none."""

    def __init__(self, plan: Plan, depths: tuple[int, ...], layers: int, chooser: Chooser) -> None:
        self._plan, self._depths, self._layers, self._chooser = plan, depths, layers, chooser
        self.begin([])

    def begin(self, drafted: list[int]) -> None:
        """A new token. drafted: those before it that are not written yet."""
        self._drafted = drafted
        self.depth, self.score = self._layers, math.nan
        self.logits: Array | None = None

    def __call__(self, exit: int, state: Array, logits: Array) -> bool:
        plan, depth = self._plan, self._depths[exit]
        threshold = plan.thresholds.get(depth)
        if threshold is None:
            return False
        if depth in plan.gates:
            weight, bias, level = plan.gates[depth]
            if not 1.0 / (1.0 + math.exp(-float(state @ weight) - bias)) >= level:
                return False
        logits = self._chooser.allowed(logits, plan.ids, self._drafted)
        if threshold == 0.0:
            self.score = math.nan
        else:
            self.score = plan.score(logits)
            if not self.score >= threshold:  # NaN is not either
                return False
        self.depth, self.logits = depth, logits.copy()
        return True


class Decoder:
    """One answer."""

    def __init__(
        self,
        chain: SegmentChain,
        depths: tuple[int, ...],
        layers: int,
        plan: Plan,
        chooser: Chooser,
        embed: Callable[[int], States],
        ends: Callable[[int], bool],
    ) -> None:
        """depths: of the chain's exits. layers: of the decoder. embed: the states [1, D] of a
        token. ends: whether a token ends the answer."""
        self._chain, self._plan, self._chooser = chain, plan, chooser
        self._embed, self._ends, self._layers = embed, ends, layers
        self._look = _Look(plan, depths, layers, chooser)
        self._unused = [i for i, depth in enumerate(depths) if depth not in plan.thresholds]

    def steps(self, prompt: Prompt, most: int) -> Iterator[Step]:
        """The tokens, as they are written: up to `most`, and up to one that ends the answer."""
        plan = self._plan
        exact = plan.lossless or not plan.thresholds
        self._chain.reset(self._unused, exact=exact, prompt=prompt)
        drafts = plan.lossless and bool(plan.thresholds)
        first = self._look if plan.thresholds and plan.exit_in_prefill and not drafts else None
        last = self._next(prompt.states, first, 0)
        yield last
        written = 1
        while written < most and not self._ends(last.token):
            if drafts:
                steps = self._round(last.token, written, most)
            else:
                steps = [self._next(self._embed(last.token), self._look, written)]
            yield from steps
            written += len(steps)
            last = steps[-1]

    def _next(self, states: States, look: _Look | None, place: int) -> Step:
        self._look.begin([])
        self._chain.run(states, look)
        if self._look.logits is None:
            token = self._full(self._chain.finish(1)[0], place)
        else:
            token = self._chooser.choose(self._look.logits, self._plan.ids, place)
        self._chooser.wrote(token)
        return Step(token, self._look.depth, self._look.score)

    def _full(self, logits: Array, place: int) -> int:
        return self._chooser.choose(self._chooser.allowed(logits, None, []), None, place)

    def _round(self, last: int, place: int, most: int) -> list[Step]:
        """Draft as long as an exit is sure; what the full model agrees to, and its own token."""
        drafts, look = list[Step](), self._look
        fed = 0
        while True:
            look.begin([draft.token for draft in drafts])
            self._chain.run(self._embed(last), look if fed < self._plan.max_draft else None)
            fed += 1
            if look.logits is None:
                break
            last = self._chooser.choose(look.logits, self._plan.ids, place + len(drafts))
            drafts.append(Step(last, look.depth, look.score))
            if self._ends(last) or place + len(drafts) >= most:
                break
        rows, written = self._chain.finish(fed), list[Step]()
        for row in rows:
            token = self._full(row, place + len(written))
            draft = drafts[len(written)] if len(written) < len(drafts) else None
            agreed = draft is not None and draft.token == token
            depth = draft.depth if draft is not None and agreed else self._layers
            written.append(Step(token, depth, look.score if draft is None else draft.score))
            self._chooser.wrote(token)
            if not agreed or self._ends(token) or place + len(written) >= most:
                break
        self._chain.crop(len(rows) - len(written))
        return written
