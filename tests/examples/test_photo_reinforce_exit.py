"""Reinforcement of an exit: what is drawn is what the exit alone writes, and what is rewarded is
written more often."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from examples.photo_vlm import reinforce_exit
from examples.photo_vlm.reinforce import CiderReward

from offramp.adapter.adapter import Adapter
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.models.exits import Exits, ExitSet

SETTINGS = reinforce_exit.Settings(
    steps=60, rate=5e-3, warm=1, photographs=2, captions=8, longest=5, temperature=1.0
)
END, WORDS = 2, tuple(range(2, 40))


class Even(CiderReward):
    """Even numbers are good words."""

    def __init__(self) -> None:
        pass

    def __call__(self, group: str, text: str, ended: bool) -> float:
        words = [int(word) for word in text.split()]
        return sum(word % 2 == 0 for word in words) / len(words)


def texts(rows: list[list[int]]) -> list[str]:
    return [" ".join(map(str, ids)) for ids in rows]


ENCODER: Any = SimpleNamespace(eos=END, texts=texts)


@pytest.fixture
def reinforcer(backbone: Any) -> reinforce_exit.ExitReinforcer:
    whole = backbone("llava")
    torch.manual_seed(2)
    modules = Exits(whole, (2,), kind="drafting").requires_grad_(False)
    exits = ExitSet(modules, shortlist=torch.tensor(WORDS))
    adapter = Adapter(whole, exits, ExitPolicy({2: 0.0}, first={2: 0.0}))
    return reinforce_exit.ExitReinforcer(adapter, SETTINGS, Even())


def rows(reinforcer: Any, n: int = 2) -> list[Any]:
    width = reinforcer.adapter.backbone.width
    prompt, answer = [reinforcer.image] * 3 + [7, 9], [8, 5, END]
    return [
        (torch.randn(3, width), prompt, answer, 3 * torch.randn(3, len(WORDS))) for _ in range(n)
    ]


def test_a_caption_is_drawn_from_the_exit_alone(reinforcer: Any) -> None:
    """The states that it read give, in one pass, what each token was drawn from."""
    reinforcer.settings = dataclasses.replace(SETTINGS, temperature=1e-6)  # the likeliest
    drawn, states = reinforcer.drawn(rows(reinforcer), torch.Generator().manual_seed(0), END)
    assert len(drawn) == 16 and all(END not in ids[:-1] and len(ids) <= 5 for ids in drawn)
    whole = reinforcer.logits(reinforcer._run(reinforcer.layer, states, 0))[:, 4:]
    for ids, logits in zip(drawn, whole, strict=True):
        assert ids == [WORDS[i] for i in logits[: len(ids)].argmax(-1).tolist()]


def test_what_is_rewarded_is_written_more_often(reinforcer: Any) -> None:
    shown, rewards = rows(reinforcer), []
    for step in range(SETTINGS.steps):
        chance = torch.Generator().manual_seed(step)
        loss, reward = reinforcer.reinforced(shown, ["a", "b"], ENCODER, chance)
        reinforcer.learn(loss, step)
        rewards.append(reward)
    assert sum(rewards[-10:]) > 1.3 * sum(rewards[:10])


def test_the_divergence_brings_back_what_the_full_model_says(reinforcer: Any) -> None:
    shown = rows(reinforcer, 4)
    before = reinforcer.divergence(shown).item()
    for step in range(30):
        reinforcer.learn(reinforcer.divergence(shown), step)
    assert 0 <= reinforcer.divergence(shown).item() < 0.5 * before


def test_what_was_learnt_is_an_adapter_without_a_guarantee(reinforcer: Any) -> None:
    reinforcer.adapter = dataclasses.replace(reinforcer.adapter, calibration={"target": 0.1})
    before = {n: t.clone() for n, t in reinforcer.adapter.exits.at(2).state_dict().items()}
    reinforcer.learn(reinforcer.divergence(rows(reinforcer)), 0)
    made = reinforcer.made(seconds=1)
    assert made.metrics["reinforced"] == {"steps": 60, "seconds": 1}
    assert made.calibration is None and made.exits.shortlist is not None
    after = made.exits.at(2).state_dict()
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed and not any(name.startswith("drafts.") for name in changed)
