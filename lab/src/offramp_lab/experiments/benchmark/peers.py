"""Other ways to decode faster that transformers offers, timed against exits on one backbone.

All write greedily, from the same prompts, in the same dtype, in interleaved rounds at batch 1.
Peers with a knob get the setting that is fastest on a few of the prompts, as the exits' lossless
drafts do. A peer that fails is listed with the reason that HF gives.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any

from transformers import StoppingCriteriaList

from offramp.adapter import Adapter
from offramp.calibration.draft_thresholds import draft_policies
from offramp.engine.policy import ExitPolicy
from offramp.errors import InputError
from offramp.evaluation.timing import (
    GenerateFn,
    Timing,
    exit_generate_fn,
    speedup,
    stock_generate_fn,
    time_interleaved,
)
from offramp.models.exits import Exits
from offramp.report.html import times
from offramp.report.table import Table
from offramp_lab.experiments.experiment import same

OPTIONS: dict[str, Any] = {"max_new_tokens": 48, "do_sample": False, "num_beams": 1}
LOOKUPS = (2, 4, 8)
DRAFT_THRESHOLDS = (0.3, 0.5, 0.7, 0.85, 0.95)
TUNING = 5  # prompts on which settings are compared


@dataclass(frozen=True)
class Peer:
    """A method to generate, in each of its settings; or the reason why there is none.

    bursts: its first round writes several tokens, so the end of the prefill does not show.
    """

    methods: Mapping[str, GenerateFn] = field(default_factory=dict)
    reason: str | None = None
    bursts: bool = False


def time_peers(
    adapter: Adapter,
    inputs: Sequence[Mapping[str, Any]],
    *,
    draft: Any = None,
    rounds: int = 5,
    progress: Any = iter,
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """Time every peer that runs on `inputs`, prompts of batch 1, in one interleaved benchmark.

    draft: a smaller model with the backbone's vocabulary, for assisted generation. options: of
    generation, besides `OPTIONS`.

    Returns, by peer, `speedup_decode` and `speedup_end_to_end` over full depth through the same
    loop as the exits, `identical` (the share of answers that are the full model's) and `setting`;
    or `not_applicable`, the reason.

    Raises:
        InputError: no prompts, or an adapter without thresholds.
    """
    if not inputs or not adapter.policy.thresholds:
        raise InputError(
            "There is nothing to time: no prompts, or an adapter whose exits are all off.",
            "Give some prompts, and calibrate the adapter (or set its thresholds).",
        )
    peers = _peers(adapter, inputs[:TUNING], draft, {**OPTIONS, **options})
    found: dict[str, dict[str, Any]] = {}
    methods: dict[str, GenerateFn] = {}
    for name, peer in peers.items():
        with _settings_kept(adapter.backbone.model):
            reason = peer.reason or _reason(peer, inputs[0])
        if reason is not None:
            found[name] = {"not_applicable": reason}
            continue
        setting = _fastest(peer.methods, inputs[:TUNING])
        methods[name], found[name] = peer.methods[setting], {"setting": setting}
    timings = time_interleaved(methods, inputs, rounds=rounds, progress=progress)
    bursting = [name for name in methods if peers[name].bursts]
    for name, speeds in _speeds(timings, bursting).items():
        found[name] = {**speeds, **found[name]}
    return found


def _peers(
    adapter: Adapter, prompts: Sequence[Mapping[str, Any]], draft: Any, options: dict[str, Any]
) -> dict[str, Peer]:
    backbone, exits = adapter.backbone, adapter.exits
    stock = partial(stock_generate_fn, backbone, **options)
    depth = min(adapter.policy.thresholds)
    same_depth = _mean_depth(adapter, prompts, options)
    lens = Exits(backbone, (same_depth,), kind="lens")
    cut = ExitPolicy({same_depth: 0.0})
    own = partial(exit_generate_fn, backbone, exits, **options)
    none = "No smaller model with this vocabulary was given."
    return {
        "full": Peer({"": exit_generate_fn(backbone, **options)}),
        "generate": Peer({"": stock()}),
        "assistant_early_exit": Peer(
            {f"depth {depth}": stock(assistant_early_exit=depth)}, bursts=True
        ),
        "prompt_lookup": Peer(
            {f"{n} tokens": stock(prompt_lookup_num_tokens=n) for n in LOOKUPS}, bursts=True
        ),
        "assisted": Peer(reason=none)
        if draft is None
        else Peer({"": stock(assistant_model=draft)}, bursts=True),
        "truncation": Peer(
            {f"depth {same_depth}": exit_generate_fn(backbone, lens, cut, **options)}
        ),
        "early_exit": Peer({"": own(policy=adapter.policy)}),
        "lossless": Peer(
            {
                f"threshold {policy.drafts}": own(policy=policy)
                for policy in draft_policies(adapter, DRAFT_THRESHOLDS)
            }
        ),
    }


def _mean_depth(
    adapter: Adapter, prompts: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
) -> int:
    """The whole depth nearest to the mean of the exits' tokens, below the full one."""
    depths: list[int] = [
        d for x in prompts for d in adapter.generate(x, **options).depths[0].tolist() if d
    ]
    return min(max(1, round(sum(depths) / len(depths))), adapter.backbone.depth - 1)


def _reason(peer: Peer, prompt: Mapping[str, Any]) -> str | None:
    """Why the peer does not run on this backbone; None if it does."""
    for method in peer.methods.values():
        try:
            method(prompt, StoppingCriteriaList())
        except Exception as error:  # whatever a model that was not made for it runs into
            lines = str(error).strip().splitlines() or [""]
            return f"{type(error).__name__}: {lines[0]}"
    return None


@contextmanager
def _settings_kept(model: Any) -> Iterator[None]:
    """Put the configs back as they were: HF's early exit changes them, and may fail half-way."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    saved = [(config, copy.copy(config.__dict__)) for config in configs.values()]
    try:
        yield
    finally:
        for config, before in saved:
            config.__dict__.clear()
            config.__dict__.update(before)


def _fastest(methods: Mapping[str, GenerateFn], prompts: Sequence[Mapping[str, Any]]) -> str:
    """The setting that takes least time in all; where there is one, that."""
    if len(methods) == 1:
        return next(iter(methods))
    timings = time_interleaved(methods, prompts, rounds=3)
    return min(timings, key=lambda name: median(timings[name].seconds))


def _speeds(timings: Mapping[str, Timing], bursting: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Speed over full depth, decoding per token: answers need not be equally long.

    Of peers that write in bursts, the decoding time is what the stock prefill, which is the one
    they run, leaves of the whole.
    """
    full, stock = timings["full"], timings["generate"]
    prefill = [a - b for a, b in zip(stock.seconds, stock.decode, strict=True)]
    speeds = {}
    for name, timing in timings.items():
        behind = [a - b for a, b in zip(timing.seconds, prefill, strict=True)]
        decoding = replace(timing, decode=behind) if name in bursting else timing
        speeds[name] = {
            "speedup_decode": decoding.tokens_per_second / full.tokens_per_second,
            "speedup_end_to_end": speedup(full.seconds, timing.seconds),
            "identical": same(timing.answers, full.answers) / len(full.answers),
        }
    return speeds


def table(peers: Mapping[str, Mapping[str, Any]]) -> str:
    """Peers as a person reads them on a terminal."""
    ran = {name: peer for name, peer in peers.items() if "not_applicable" not in peer}
    told: dict[str, Callable[[Any], str]] = {
        "": lambda of: str(of[0]),
        "decode": lambda of: times(of[1]["speedup_decode"]),
        "end to end": lambda of: times(of[1]["speedup_end_to_end"]),
        "identical": lambda of: f"{of[1]['identical']:.1%}",
        "setting": lambda of: str(of[1]["setting"]),
    }
    skipped = (f"{n}: {p['not_applicable']}" for n, p in peers.items() if n not in ran)
    return "\n".join([Table.of(ran.items(), told).plain(), *skipped])
