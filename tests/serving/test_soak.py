"""Engines that nobody planned: of sizes and requests that are drawn, each answer held to what its
request gets alone. `make fuzz FUZZ=3600 SEED=7` goes on for an hour; a failure names its seed and
the number of the engine.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from families import EOS, FIRST_WORD, NAMES, VOCABULARY, one_row

from offramp.core.decoding.policy import ExitPolicy, GenerationOutput
from offramp.core.decoding.scheduler import Schedule
from offramp.core.decoding.sequence import Token
from offramp.core.engine.generate import generate
from offramp.features.prefix_cache import PrefixCache
from offramp.features.vision_cache import VisionCache
from offramp.serving.core import EngineCore
from offramp.serving.engine_config import EngineConfig
from offramp.serving.request import Handle, Request

SECONDS = float(os.environ.get("OFFRAMP_FUZZ", "0"))
"""0: the first `FEW` alone, whatever time they take."""
FEW = 12
SEED = int(os.environ.get("OFFRAMP_FUZZ_SEED", "0"))
ENCODED = ("blip2-t5", "instructblip-t5", "florence2")
OF_IMAGES = tuple(name for name in NAMES if "blip" in name or name == "florence2")
"""These answer no text alone."""
WORDS = range(FIRST_WORD, VOCABULARY)
TIE = 1e-4
"""Rounding may decide where two logits, or a score and its threshold, are no farther apart."""

ENDLESS = 20_000
"""Rounds, of at most 14 requests of 127 tokens."""


class Gone(Exception):
    """A client's own error."""


@dataclass(eq=False)
class Drawn:
    """A request, and what is to become of it.

    leaves, breaks: after so many tokens its client cancels it, or raises; 0: never.
    """

    inputs: dict[str, Any]
    mode: str | None
    thresholds: dict[int, float] | None
    seed: int
    options: dict[str, Any]
    leaves: int = 0
    breaks: int = 0
    heard: list[Token] = field(default_factory=list)
    handle: Handle | None = None

    def on_token(self, token: Token) -> None:
        self.heard.append(token)
        if len(self.heard) == self.leaves and self.handle is not None:
            self.handle.cancel()
        if len(self.heard) == self.breaks:
            raise Gone

    @property
    def request(self) -> Request:
        return Request(
            self.inputs,
            self.mode,
            self.thresholds,
            self.seed,
            on_token=self.on_token,
            options=self.options,
        )


@dataclass(frozen=True)
class Near:
    """As `observer`: the place of the first token whose largest logits tie."""

    ties: set[int] = field(default_factory=set)

    def __call__(self, row: int, place: int, logits: torch.Tensor) -> None:
        first, second = logits[0].topk(2).values.tolist()
        if first - second < TIE * max(1.0, abs(first)):
            self.ties.add(place)


def prompt(draw: random.Random, shown: dict[str, Any]) -> dict[str, Any]:
    """One with an image, with up to 40 words after it; sometimes these alone."""
    words = [draw.choice(WORDS) for _ in range(draw.choice((0, 1, 2, 5, 13, 40)))]
    more = torch.tensor([words], dtype=shown["input_ids"].dtype)
    if words and draw.random() < 0.3 and "pixel_values" in shown:
        return {"input_ids": more, "attention_mask": torch.ones_like(more)}
    longer = {"input_ids": more, "attention_mask": torch.ones_like(more)}
    for name in ("mm_token_type_ids", "token_type_ids"):
        longer[name] = torch.zeros_like(more)
    return {
        name: torch.cat([value, longer[name].to(value)], 1) if name in longer else value
        for name, value in shown.items()
    }


def drawn(draw: random.Random, name: str, shown: dict[str, Any], limit: int) -> Drawn:
    inputs = prompt(draw, shown)
    while name in OF_IMAGES and "pixel_values" not in inputs:
        inputs = prompt(draw, shown)
    room = max(1, limit - (0 if name in ENCODED else inputs["input_ids"].shape[1]))
    new = draw.choice((1, 1, 2, 3, 5, 9, 17, 30, room, room - 1))
    options: dict[str, Any] = {"max_new_tokens": max(1, min(new, room))}
    options["do_sample"] = draw.random() < 0.3
    if options["do_sample"]:
        options |= {"temperature": draw.choice((0.7, 1.0, 1.6)), "top_k": draw.choice((0, 7))}
    if draw.random() < 0.4:
        options["eos_token_id"] = [EOS, *draw.sample(WORDS, draw.choice((4, 30)))]
    if draw.random() < 0.2:
        options["repetition_penalty"] = draw.choice((0.8, 1.3))
    if draw.random() < 0.1:
        options["no_repeat_ngram_size"] = 2
    mode = draw.choice((None, "full", "early_exit", "early_exit", "lossless", "lossless"))
    at = None
    if mode in (None, "early_exit") and draw.random() < 0.3:
        at = {2: draw.choice((0.0, 0.03, 1.0)), 4: draw.choice((0.02, 0.1))}
    leaves, breaks = (draw.choice((0, 0, 0, 0, 0, 0, 0, 1, 2, 6)) for _ in range(2))
    return Drawn(inputs, mode, at, draw.randrange(2**31), options, leaves, breaks)


def alone(whole: Any, exits: Any, policy: ExitPolicy, one: Drawn) -> tuple[GenerationOutput, Near]:
    asked, near = policy.asked(one.mode, one.thresholds, exits.depths), Near()
    made = generate(
        whole, one.inputs, exits=exits, policy=asked, seed=one.seed, observer=near, **one.options
    )
    for level in (*asked.thresholds.values(), *(asked.first or {}).values()):
        close = (made.scores[0] - level).abs() < TIE
        near.ties.update(close.nonzero().flatten().tolist())
    return made, near


def soak(number: int, backbone: Callable[..., Any], exits: Any, batch: Any) -> Counter[str]:
    """One engine, and what became of its requests."""
    draw = random.Random(f"{SEED} {number}")
    name = draw.choice(NAMES)
    whole, some = backbone(name), exits(name, depths=(2, 4))
    policy = ExitPolicy(
        {2: draw.choice((0.02, 0.05)), 4: 0.04},
        max_draft=draw.choice((1, 3, 8)),
        first=draw.choice((None, {}, {2: 0.0}, {2: 1.0, 4: 0.03})),
        drafts=draw.choice(({}, {2: 0.0}, {4: 0.05})),
    )
    limit = draw.choice((63, 64, 100, 127))
    config = EngineConfig(
        slots=draw.randint(1, 5),
        limit=limit,
        budget=draw.choice((1, 2, 5, 12, 256)),
        longest=draw.choice((1, 2, 7, 64)),
        schedule=draw.choice((None, Schedule(0, 1), Schedule(1, 2), Schedule(9, 9))),
    )
    kept: dict[str, Any] = {}
    if draw.random() < 0.5 and name not in ENCODED:
        kept["prefix_cache"] = PrefixCache()
    if draw.random() < 0.5 and whole.family.vision is not None:
        kept["vision_cache"] = VisionCache()
    shown = [one_row(name, batch(name, 4), row) for row in range(4)]
    core = EngineCore(whole, some, policy, config, **kept)
    wanted = [drawn(draw, name, draw.choice(shown), limit) for _ in range(draw.randint(4, 14))]
    coming, rounds = [*wanted], 0
    which = f"seed {SEED}, engine {number} ({name}): {config}, {policy}"
    while coming or not core.idle:
        if coming and draw.random() < 0.4:
            one = coming.pop()
            one.handle = core.add(one.request)
        core.round()
        rounds += 1
        assert rounds < ENDLESS, f"{which} does not end: {core.decoder.sequences}"
    counts = Counter[str]()
    for place, one in enumerate(wanted):
        told = f"{which}, request {place}: {one}"
        counts[judged(one, lambda: alone(whole, some, policy, one), told)] += 1  # noqa: B023
    assert core.running == core.waiting == 0 and not core.decoder.sequences
    return counts


def judged(one: Drawn, made: Callable[[], tuple[GenerationOutput, Near]], told: str) -> str:
    """In a word, what became of a request; raise AssertionError where it is not what should."""
    assert one.handle is not None and one.handle.done(), told
    try:
        output = one.handle.result(timeout=0).output
    except CancelledError:
        assert one.leaves and len(one.heard) >= one.leaves, told
        return "cancelled"
    except Gone:
        assert len(one.heard) == one.breaks, told
        return "broken"
    except Exception as error:
        if "fit into a slot" in str(error):  # of an image's tokens the drawing does not know
            return "too long"
        raise AssertionError(told) from error
    theirs, near = made()
    said = [token.token for token in one.heard]
    assert said == output.new_tokens[0].tolist(), told
    assert [token.depth for token in one.heard] == output.depths[0].tolist(), told
    both = [(made.new_tokens[0].tolist(), made.depths[0].tolist()) for made in (output, theirs)]
    if both[0] == both[1]:
        return "alike"
    ours, other = ([*zip(*each, strict=True)] for each in both)
    shorter = min(len(ours), len(other))
    first = next((i for i in range(shorter) if ours[i] != other[i]), shorter)
    assert first in near.ties, f"{told}: {ours} alone {other}"
    return "tied"


@pytest.mark.slow
def test_a_request_gets_what_it_gets_alone_in_engines_that_are_drawn(
    backbone: Any, exits: Any, batch: Any
) -> None:
    end, number, counts = time.monotonic() + SECONDS, 0, Counter[str]()
    while number < FEW if not SECONDS else time.monotonic() < end:
        counts += soak(number, backbone, exits, batch)
        number += 1
    print(f"{number} engines with seed {SEED}: {dict(sorted(counts.items()))}")
    assert counts["alike"] > 0.3 * counts.total()
    assert counts["tied"] < 0.02 * counts.total() + 2
