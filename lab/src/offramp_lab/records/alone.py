"""An engine alone, without exits, and ways to write the same answers beside it: each speedup in two
parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from offramp_llama_cpp import EngineOptions
from offramp_llama_cpp.architectures import architecture_of
from offramp_llama_cpp.edge.model import EdgeModel
from offramp_llama_cpp.entry import Embeddings, PromptEntry
from offramp_llama_cpp.native.tap import States
from offramp_llama_cpp.prompt import Prompt
from offramp_llama_cpp.segment import Segment
from torch import Tensor
from transformers import StoppingCriteriaList

from offramp.adapter.adapter import Adapter
from offramp.core.decoding.policy import MODES
from offramp_lab.experiments.experiment import Experiment, same, spent, times

ENGINE, THEIRS = EngineOptions(context=256), EngineOptions(context=256, kernels=False)
ALONE = "alone"
"""The way of who has the engine without offramp."""
Way = Callable[[Any], list[int]]
"""The tokens of a prompt's answer."""


def beside_alone(
    engine: str, formats: str, ways: Mapping[str, Way], prompts: Sequence[Any]
) -> list[dict[str, Any]]:
    """An entry for each way, all in turns on the same prompts: tokens a CPU second; how many times
    those of the engine alone ("all"), in its parts: full depth by ours ("rest"), and exits; paired
    95% intervals over prompts; and how many answers are full depth's.

    ways: `ALONE` and the modes.
    """
    methods = {name: spent(write) for name, write in ways.items()}
    runs = Experiment(methods, prompts, warm=1, title=f"{engine} {formats}").run()
    answers = {name: [answer for answer, _ in told] for name, [told] in runs.items()}
    cost = {
        name: np.array([[len(answer), seconds] for answer, seconds in told]).T
        for name, [told] in runs.items()
    }
    return [
        {
            "engine": engine,
            "format": formats,
            "mode": name,
            "tokens_per_cpu_second": float(cost[name][0].sum() / cost[name][1].sum()),
            "all": times(cost[name], cost[ALONE]),
            "exits": times(cost[name], cost["full"]),
            "rest": times(cost["full"], cost[ALONE]),
            "as_full": same(answers[name], answers["full"]),
        }
        for name in ways
    ]


def greedy(
    segment: Segment,
    states: States,
    embed: Callable[[list[int]], States],
    ends: Callable[[int], bool],
    new: int,
    first: Callable[[], object] = lambda: None,
) -> list[int]:
    """The answer of a decoder in one file to a prompt's states. first: is told of the first
    token."""
    segment.begin()
    tokens: list[int] = []
    while len(tokens) < new:
        segment.feed(states, 1)
        tokens.append(int(np.argmax(segment.logits(1))))
        if len(tokens) == 1:
            first()
        if ends(tokens[-1]):
            break
        states = embed(tokens[-1:])
    return tokens


class Alone:
    """llama.cpp without exits: the decoder in one file, greedy, and fed with the rows that we feed
    ours. end: the token that ends an answer."""

    def __init__(self, adapter: Adapter, file: Path, engine: EngineOptions, end: int) -> None:
        backbone = adapter.backbone
        self.entry = PromptEntry(backbone, architecture_of(backbone), engine)
        self.segment, self.end = Segment(file, engine, tap_layer=None), end
        self.embeddings = Embeddings(backbone)

    def __call__(
        self, inputs: Mapping[str, Any], stop: StoppingCriteriaList, max_new_tokens: int
    ) -> Tensor:
        options = {"max_new_tokens": max_new_tokens, "do_sample": False}
        with torch.inference_mode():
            _, [prompt] = self.entry.read(inputs, options)
        none = torch.zeros(1, 1, dtype=torch.long)  # it only hears that a token is there
        answer = greedy(
            self.segment,
            prompt.states,
            lambda ids: self.embeddings.of_token(ids[0], 0),
            lambda token: token == self.end,
            max_new_tokens,
            lambda: stop(none, None),
        )
        return torch.tensor(answer)


def edge_ways(whole: Segment, model: EdgeModel, new: int) -> dict[str, Way]:
    """Greedy answers: llama.cpp's alone, from the whole file, and ours in every mode."""

    def alone(prompt: Prompt) -> list[int]:
        embed, ends = model._embeddings.of, model.vocabulary.ends
        return greedy(whole, prompt.states, embed, ends, new)

    def ours(prompt: Prompt, mode: str) -> list[int]:
        return [step.token for step in model.write(prompt, max_new_tokens=new, mode=mode)]

    return {ALONE: alone, **{mode: partial(ours, mode=mode) for mode in MODES}}
