"""Measures the parts of the cost model, inside generations as they really run.

Layers alone, one after the other on the same input, would be timed from a warm cache and without
what happens between them. So whole tokens of forced generations are timed, the calls of layers,
exits and head within them by hooks, and what is left over is attributed by the kind of token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

from offramp.calibration.cost_model import LENGTHS, Costs
from offramp.core.decoding.scores import SCORES
from offramp.core.engine.generate import generate
from offramp.core.errors import InputError
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits, ExitSet, propose_depths
from offramp.evaluation.scripted_exits import OPTIONS, Script, generate_forced

FULL = 6  # tokens of a pass in which all are alike
PLAN = ["stay"] * 4 + [k for n in LENGTHS[1:] for k in (*["leave"] * (n - 1), f"deep{n}")]
"""Kinds of token: looked at and kept; left; kept, and running with those that left before it."""


@dataclass(frozen=True)
class _Token:
    """One token of each row: its seconds, and the calls (kind, number of the module, tokens,
    seconds) within it."""

    rows: int
    seconds: float
    calls: tuple[tuple[str, int, int, float], ...]

    @property
    def layers(self) -> float:
        """Seconds in the backbone's layers."""
        return sum(seconds for kind, _, _, seconds in self.calls if kind == "layer")

    @property
    def exit(self) -> float:
        """Seconds in exits' layers."""
        return sum(seconds for kind, _, _, seconds in self.calls if kind == "exit")

    @property
    def head(self) -> float:
        """Seconds of the last call of the LM head."""
        return next((s for kind, _, _, s in reversed(self.calls) if kind == "head"), 0.0)


def _layer(token: _Token, positions: int) -> float:
    """Mean seconds of the layers that ran over so many positions of each row, in one call of all
    rows or in one of each."""
    ran: dict[int, list[float]] = {}
    for kind, number, tokens, seconds in token.calls:
        if kind == "layer":
            of = ran.setdefault(number, [0, 0.0])
            of[0], of[1] = of[0] + tokens, of[1] + seconds
    return fmean(seconds for tokens, seconds in ran.values() if tokens == positions * token.rows)


class _Stopwatch(StoppingCriteria):
    """Stops nothing; notes each token's time and the calls within it.

    rows: are asked about one after the other, and exit alike. hook: seconds that noting a call
    takes, which the tokens' times then leave out.
    """

    def __init__(self, device: torch.device, rows: int = 1, hook: float = 0.0) -> None:
        self.tokens: list[_Token] = []
        self._rows, self._asked, self._hook_seconds = rows, 0, hook
        self._calls: list[tuple[str, int, int, float]] = []
        self._sync: Callable[[], None] = (
            torch.cuda.synchronize if device.type == "cuda" else lambda: None
        )
        self._last = self._began = 0.0

    def now(self) -> float:
        self._sync()
        return time.perf_counter()

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self._asked += 1
        if self._asked % self._rows == 0:
            if self._last:  # the first token came out of the prefill
                seconds = self.now() - self._last - len(self._calls) * self._hook_seconds
                self.tokens.append(_Token(self._rows, seconds, tuple(self._calls)))
            self._calls.clear()
            self._last = self.now()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    @contextmanager
    def inside(self, backbone: Backbone, exits: ExitSet) -> Iterator[None]:
        """Note the calls of layers, exits and head."""
        kinds: list[tuple[str, nn.Module]] = [("layer", layer) for layer in backbone.layers]
        kinds += [("exit", exits.at(depth)) for depth in exits.depths] + [("head", backbone.head)]
        handles = [
            handle
            for number, (kind, module) in enumerate(kinds)
            for handle in self.hook(kind, module, number)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def hook(self, kind: str, module: nn.Module, number: int = 0) -> list[Any]:
        def begin(_: nn.Module, args: Any) -> None:
            self._began = self.now()

        def end(_: nn.Module, args: Any, output: Any) -> None:
            tokens = args[0].shape[:-1].numel()
            self._calls.append((kind, number, tokens, self.now() - self._began))

        return [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]


def measure_costs(
    backbone: Backbone,
    inputs: Mapping[str, Any],
    exits: ExitSet | Exits | None = None,
    *,
    score: str = "max_probability",
    shortlist: bool = False,
    repeats: int = 5,
    progress: Any = iter,
) -> Costs:
    """Time the parts of decoding after the prompt `inputs`, whose rows are the batch.

    Medians over the tokens of `repeats` rounds, in which kinds of token take turns, after one round
    that is not counted. The first exit is used; without `exits`, one copied from the backbone.
    shortlist: whether exits read their shortlist alone.

    Raises:
        InputError: fewer than one repeat; a score that does not read one exit's logits.
    """
    if repeats < 1 or score not in SCORES:
        raise InputError(
            f"Costs cannot be measured with {repeats} repeats and score {score!r}.",
            f"Repeat at least once, with a score of logits: {', '.join(SCORES)}.",
        )
    if exits is None:
        exits = Exits(backbone, propose_depths(backbone.depth)).requires_grad_(False)
    exits = ExitSet.of(exits)
    measured, hook = _Measurements(), _hook_seconds(backbone.device)
    for number in progress(range(repeats + 1)):
        tokens = _round(backbone, inputs, exits, score, hook, shortlist)
        if number:
            measured.add(tokens)
    rows = len(inputs["input_ids"])
    prompt = 1 if backbone.is_encoder_decoder else inputs["input_ids"].shape[1]
    heads, scored = _small_parts(backbone, rows, score, repeats)
    return measured.costs(
        layers=backbone.depth,
        batch=rows,
        context=prompt + len(PLAN) // 2,
        heads=heads,
        score=scored,
    )


Round = dict[str, list[_Token]]


def _round(
    backbone: Backbone,
    inputs: Mapping[str, Any],
    exits: ExitSet,
    score: str,
    hook: float,
    shortlist: bool,
) -> Round:
    """The number of tokens of one round, by kind."""

    rows = len(inputs["input_ids"])

    def forced(plan: Sequence[str], exits: ExitSet, **policy: Any) -> list[_Token]:
        watch = _Stopwatch(backbone.device, rows, hook)
        leave = torch.tensor([False, *(kind == "leave" for kind in plan)])
        script = Script(leave[:, None].expand(-1, rows), score=score)
        with watch.inside(backbone, exits):
            generate_forced(
                backbone,
                inputs,
                exits,
                script,
                len(leave),
                criteria=[watch],
                shortlist=shortlist,
                **policy,
            )
        return watch.tokens

    watch = _Stopwatch(backbone.device, rows, hook)
    with watch.inside(backbone, exits):
        stop = StoppingCriteriaList([watch])
        generate(backbone, inputs, stopping_criteria=stop, max_new_tokens=1 + FULL, **OPTIONS)
    tokens = {"full": watch.tokens}
    for kind, token in zip(PLAN, forced(PLAN, exits), strict=True):
        tokens.setdefault(kind, []).append(token)
    return tokens


def _hook_seconds(device: torch.device) -> float:
    """Seconds that `_Stopwatch` takes to note one call."""
    module, tensor = nn.Identity(), torch.zeros(1, 1)

    def calls() -> float:
        begin = time.perf_counter()
        for _ in range(1000):
            module(tensor)
        return (time.perf_counter() - begin) / 1000

    bare = min(calls() for _ in range(3))
    watch = _Stopwatch(device)
    watch.hook("none", module)
    return max(0.0, min(calls() for _ in range(3)) - bare)


class _Measurements:
    """The tokens of all rounds, by kind, and what they come to."""

    def __init__(self) -> None:
        self._tokens: Round = {}

    def add(self, round: Round) -> None:
        for kind, tokens in round.items():
            self._tokens.setdefault(kind, []).extend(tokens)

    def _median(self, kind: str, value: Callable[[_Token], float]) -> float:
        return median(map(value, self._tokens[kind]))

    def costs(
        self, *, layers: int, batch: int, context: int, heads: Sequence[float], score: float
    ) -> Costs:
        """Solve for the parts, simplest kind of token first; heads: relative to one position."""
        layer = self._median("full", partial(_layer, positions=1))
        more = [self._median(f"deep{n}", partial(_layer, positions=n)) for n in LENGTHS[1:]]
        head = self._median("full", lambda t: t.head)
        overhead = self._median("full", lambda t: t.seconds - t.layers - t.head)

        def outside(token: _Token) -> float:
            return token.seconds - token.layers - token.exit - overhead

        check = max(0.0, self._median("leave", outside))
        deep = ["stay", *(f"deep{n}" for n in LENGTHS[1:])]
        reenter = median(self._median(kind, lambda t: outside(t) - t.head) for kind in deep) - check
        exit = self._median("stay", lambda t: t.exit)
        return Costs(
            layers=layers,
            batch=batch,
            context=context,
            # A longer run is never cheaper; where it seems so, that is noise.
            layer=tuple(np.maximum.accumulate([layer, *more]).tolist()),
            head=tuple(np.maximum.accumulate(head * np.array(heads)).tolist()),
            exit=exit,
            check=check,
            score=score,
            token=max(0.0, overhead),  # hooks may be charged for more than they took
            reenter=max(0.0, reenter),
        )


def _small_parts(
    backbone: Backbone, rows: int, score: str, repeats: int
) -> tuple[list[float], float]:
    """The head over `LENGTHS` positions relative to one, and seconds of a score."""
    sample = torch.randn(rows, LENGTHS[-1], backbone.width).to(backbone.device, backbone.dtype)
    states = {n: sample[:, :n].contiguous() for n in LENGTHS}
    seconds: dict[int, list[float]] = {n: [] for n in LENGTHS}
    scored = []
    watch = _Stopwatch(backbone.device)
    with torch.inference_mode():
        for _ in range(repeats + 1):
            for n, state in states.items():
                begin = watch.now()
                logits = backbone.logits(state)
                seconds[n].append(watch.now() - begin)
            begin = watch.now()
            SCORES[score](logits[:, -1])
            scored.append(watch.now() - begin)
    heads = [median(seconds[n]) / median(seconds[1]) for n in LENGTHS]
    return heads, median(scored)
