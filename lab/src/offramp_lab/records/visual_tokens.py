"""Prompts of many visual tokens: what waiting at an exit is worth, and leaving tokens behind.

`python -m offramp_lab.records.visual_tokens` rewrites visual_tokens.json: ten minutes of one core
and 3 GB. Shapes of known models with random weights, in bfloat16, prepacked; exits are forced. The
tower is cut down (`offramp_lab.inputs.shapes`), and is not what is asked about. CPU seconds of the
process until the first token, and until the last one, all ways in turns. Beside each stands what
the costs of a layer by its tokens and keys predict, which are measured at full depth alone, on
prompts of as many tokens as are kept.

What it costs in answers is measured on photographs, which `--parts photographs` needs: captions of
the photo model, whose prompts have a few visual tokens, by all rankings, chance among them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from functools import partial
from itertools import product
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn

from offramp.answers import Answer, generate_answers
from offramp.calibration.risk_functions import RISKS
from offramp.engine.policy import FULL, RANKINGS, ExitPolicy, Thresholds
from offramp.engine.prefill import image_tokens
from offramp.evaluation.scripted_exits import OPTIONS
from offramp.evaluation.statistics import Measure, interval, mean_of
from offramp.evaluation.timing import exit_generate_fn, timed
from offramp.models.backbone import Backbone
from offramp.models.exits import Exits, ExitSet
from offramp.models.prepack import prepack
from offramp_lab.experiments.experiment import Experiment
from offramp_lab.inputs.shapes import shape
from offramp_lab.records.record import Record, asked
from offramp_lab.records.subjects import photo

RECORD = Record("visual_tokens")
NAMES = ("llava-135m", "llava-1b", "qwen2.5-vl-3b-10")
DEPTHS = (2, 4, 8)
KEPT = (1.0, 0.5, 0.25, 0.11)
PHOTOGRAPHS = "photographs"
WORDS = 12
TOKENS = 30
WITHIN = 0.1
ALL = ExitPolicy.visual_ranking
"""What says which go on where all do."""


@dataclass(frozen=True)
class Way:
    """How a prompt is answered. depth: of the exit; None: the full model.

    deep: which tokens go to the layers above the exit: "none", the "first" alone, or "all".
    keep: share of the visual tokens that go on with them; by ranking: of `RANKINGS`.
    """

    depth: int | None = None
    deep: str = "all"
    keep: float = 1.0
    ranking: str = ALL

    @property
    def policy(self) -> ExitPolicy:
        if self.depth is None:
            return FULL
        return ExitPolicy(
            {self.depth: 1.0 if self.deep == "all" else 0.0},
            exit_in_prefill=self.deep == "none",
            visual_keep=self.keep,
            visual_ranking=self.ranking,
        )


def ways() -> list[Way]:
    found = [Way()]
    for depth in DEPTHS:
        found.append(Way(depth, "none"))
        found += [Way(depth, "first", keep) for keep in KEPT]
    found += [Way(DEPTHS[0], "all", keep) for keep in KEPT]
    before = product(("none", "first", "all"), KEPT[1:])
    return [*found, *(Way(DEPTHS[0], deep, keep, "divprune") for deep, keep in before)]


@dataclass(frozen=True)
class Seconds:
    """Of one answer: until its first token, and until its last."""

    first: float
    whole: float


# -- what is measured ------------------------------------------------------------------------------


def answered(
    backbone: Backbone, inputs: Mapping[str, Tensor], exits: ExitSet, policy: ExitPolicy
) -> Seconds:
    write = exit_generate_fn(backbone, exits, policy, max_new_tokens=TOKENS, **OPTIONS)
    whole, decode, ids = timed(write, inputs, time.process_time)
    assert len(ids) == TOKENS
    return Seconds(whole - decode, whole)


class Stopwatch:
    """CPU seconds from where one module begins to where another begins, or to its own end, of each
    time; with few hooks, as modules that have any are called otherwise."""

    def __init__(self, begin: nn.Module, until: nn.Module | None = None) -> None:
        self.taken: list[float] = []
        self._began = 0.0
        ends = begin.register_forward_hook if until is None else until.register_forward_pre_hook
        self._handles = [begin.register_forward_pre_hook(self._begin), ends(self._end)]

    def _begin(self, *_: Any) -> None:
        self._began = time.process_time()

    def _end(self, *_: Any) -> None:
        self.taken.append(time.process_time() - self._began)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


@dataclass(frozen=True)
class Parts:
    """Seconds within one answer of the full model: of a layer over the prompt and over one token,
    of the LM head, and of what is left over until the first token and of each token after it."""

    prompt: float
    token: float
    head: float
    before: float
    beside: float


def parts_of(backbone: Backbone, inputs: Mapping[str, Tensor], exits: ExitSet) -> Parts:
    layers, head = Stopwatch(backbone.layers[0], backbone.norm), Stopwatch(backbone.reader)
    try:
        took = answered(backbone, inputs, exits, FULL)
    finally:
        layers.remove()
        head.remove()
    (prompt, *tokens), (read, *reads) = layers.taken, head.taken
    return Parts(
        prompt / backbone.depth,
        fmean(tokens) / backbone.depth,
        fmean((read, *reads)),
        took.first - prompt - read,
        (took.whole - took.first - sum(tokens) - sum(reads)) / (TOKENS - 1),
    )


def share_of_keys(layer: Any) -> float:
    """Of a layer's products, those until its keys are there."""
    sizes = {n: p.in_features * p.out_features for n, p in layer.named_modules()
             if hasattr(p, "out_features")}  # fmt: skip
    until = sum(size for name, size in sizes.items() if name[-6:] in ("q_proj", "k_proj", "v_proj"))
    return float(until / sum(sizes.values()))


# -- what is predicted -----------------------------------------------------------------------------


def predicted(way: Way, layers: int, whole: Parts, kept: Parts, share: float) -> Seconds:
    """whole, kept: of prompts as long as this one, and as what of it goes on behind the exit.
    share: of a layer, until its keys are there."""
    depth, above = way.depth or layers, layers - (way.depth or layers)
    early = RANKINGS[way.ranking]
    below = kept if early else whole
    first = whole.before + depth * below.prompt + whole.head
    token = whole.beside + depth * below.token + whole.head
    if way.depth is not None:
        asks = way.deep == "none" or (way.keep < 1 and not early)  # or it only keeps the keys
        first += below.prompt * (1.0 if asks else share)
        token += below.token
    if way.deep != "none":
        first += above * kept.prompt
    if way.depth is not None and way.deep == "all":
        token += above * kept.token + whole.head
    return Seconds(first, first + (TOKENS - 1) * token)


# -- shapes ----------------------------------------------------------------------------------------


def measured(name: str, rounds: int) -> dict[str, Any]:
    known = shape(name)
    backbone = known.build(torch.bfloat16)
    exits = ExitSet(Exits(backbone, DEPTHS).requires_grad_(False))
    share = share_of_keys(backbone.layers[0])
    prepack(backbone, exits)
    inputs = known.inputs(backbone, words=WORDS)
    lengths = {keep: WORDS + round(known.images * keep) for keep in KEPT}
    prompts = {keep: _words(backbone, n) if keep < 1 else inputs for keep, n in lengths.items()}
    found = ways()
    for way in found:  # products of so many rows are made once
        if way.depth in (None, DEPTHS[0]):
            answered(backbone, inputs, exits, way.policy)

    def answer(_: None, turn: Way | float) -> Seconds | Parts:
        if isinstance(turn, Way):
            return answered(backbone, inputs, exits, turn.policy)
        return parts_of(backbone, prompts[turn], exits)

    turns: list[Way | float] = [*found, *prompts]
    methods = {turn: partial(answer, turn=turn) for turn in turns}
    runs = Experiment(methods, rounds=rounds, title=name).run()
    taken = {turn: _median([one for [one] in by_round]) for turn, by_round in runs.items()}
    costs = {keep: taken[keep] for keep in prompts}
    return {
        "rounds": rounds,
        "layers": backbone.depth,
        "width": backbone.width,
        "visual_tokens": known.images,
        "costs": {
            str(lengths[keep]): {n: 1e3 * s for n, s in asdict(own).items()}
            for keep, own in costs.items()
        },
        "entries": [
            _entry(
                way, taken[way], taken[Way()],
                predicted(way, backbone.depth, costs[1.0], costs[way.keep], share),
            )
            for way in found
        ],
    }  # fmt: skip


def _entry(way: Way, mine: Seconds, full: Seconds, foretold: Seconds) -> dict[str, Any]:
    return {
        "depth": way.depth,
        "deep": way.deep,
        "keep": way.keep,
        "ranking": way.ranking,
        **{
            part: {
                "milliseconds": 1e3 * getattr(mine, part),
                "over_full": getattr(full, part) / getattr(mine, part),
                "predicted": 1e3 * getattr(foretold, part),
                "within": abs(getattr(foretold, part) / getattr(mine, part) - 1) <= WITHIN,
            }
            for part in ("first", "whole")
        },
    }


def _words(backbone: Backbone, count: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(8, backbone.vocabulary, (1, count), generator=draw)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _median(found: Sequence[Any]) -> Any:
    """Of the same seconds or parts, measured several times, field by field."""
    return type(found[0])(*map(median, zip(*map(astuple, found), strict=True)))


# -- answers ---------------------------------------------------------------------------------------


def captioned(arguments: argparse.Namespace) -> dict[str, Any]:
    """How alike captions are to the full model's, and to people's, where visual tokens stay behind
    by each ranking; of thresholds that ship, and where no token exits."""
    subject = photo(arguments, arguments.photographs)
    adapter, encoder, examples = subject.adapter, subject.encoder, subject.examples
    shipped = adapter.policy
    never = Thresholds.shared([*shipped.thresholds], 1.0)
    policies = {"full depth": replace(shipped, thresholds=never, first={}), "shipped": shipped}

    def answers(policy: ExitPolicy) -> list[Answer]:
        return generate_answers(adapter, encoder, examples, policy, batch_size=1, **subject.options)

    full, entries = answers(FULL), []
    people = mean_of(RISKS["rouge_l_drop"].losses(full, full, examples))
    for thresholds, policy in policies.items():
        found: dict[tuple[float, str], tuple[Measure, Measure]] = {}
        for keep, ranking in ((1.0, ALL), *product(KEPT[1:3], RANKINGS)):
            own = answers(replace(policy, visual_keep=keep, visual_ranking=ranking))
            alike = 1 - RISKS["consistency"].losses(own, full, examples)
            drop = RISKS["rouge_l_drop"].losses(own, full, examples)
            found[keep, ranking] = mean_of(alike), mean_of(-drop)
        entries += [
            {
                "thresholds": thresholds,
                "keep": keep,
                "ranking": ranking,
                "as_full": {
                    "value": alike.value,
                    "over_all": interval(alike, minus=found[1.0, ALL][0]),
                    "over_chance": interval(alike, minus=found.get((keep, chance), [alike])[0]),
                },
                "people": {"value": of_people.value, "interval": interval(of_people, minus=people)},
            }
            for (keep, ranking), (alike, of_people) in found.items()
            for chance in ("random-before" if RANKINGS[ranking] else "random",)
        ]
    prompt = encoder.prompts(examples[:1])["input_ids"][0].tolist()
    marks = {*image_tokens(adapter.backbone.model.config)}
    return {
        "photographs": len(examples),
        "visual_tokens": sum(prompt.count(mark) for mark in marks),
        "prompt": len(prompt),
        "entries": entries,
    }


# -- the record ------------------------------------------------------------------------------------


def _more(parser: argparse.ArgumentParser) -> None:
    parts = (*NAMES, PHOTOGRAPHS)
    parser.add_argument("--parts", nargs="*", default=parts, choices=parts)


def main() -> None:
    arguments = asked(__doc__, photo=True, photographs=50, rounds=3, more=_more)
    parts = {name: partial(measured, name, arguments.rounds) for name in NAMES}
    RECORD.parts({**parts, PHOTOGRAPHS: partial(captioned, arguments)}, arguments.parts)


if __name__ == "__main__":
    main()
