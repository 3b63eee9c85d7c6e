"""Reinforcement of the photo model: its reward, its samples, that it learns what is rewarded."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from examples.photo_vlm import reinforce, rows, train, words
from PIL import Image

from offramp.inputs.example import Example
from offramp_photo.tower import Bridge, EfficientNetLite0
from photo import END, language, tokenizer
from photo import TOWER as PHOTO

SETTINGS = reinforce.ReinforceSettings(
    steps=3, captioned=2, ask_every=2, length=64, asked_length=96, rank=2, sampled=3, longest=5
)
SAID = ("a dog runs on grass", "two dogs run", "a man in a hat sits", "a boy jumps over water")


def examples() -> list[Example]:
    picture = Image.new("RGB", (8, 8))
    return [
        Example(picture, "Caption:", (text, f"{text} today"), key=f"c{n}", group=f"c{n}")
        for n, text in enumerate(SAID)
    ]


def speaker() -> Any:
    """The same language model each time, whose likeliest tokens stand out."""
    torch.manual_seed(5)
    lm = language()
    lm.get_input_embeddings().weight.data *= 20
    return lm


def reinforcer(settings: reinforce.ReinforceSettings = SETTINGS) -> reinforce.Reinforcer:
    torch.manual_seed(3)
    bridge, detectors = Bridge(PHOTO), words.Detectors(PHOTO)
    torch.nn.init.normal_(bridge.words.table)
    asked = Example(Image.new("RGB", (8, 8)), "Question: a ? Answer:", ("2",), key="q", group="q")
    splits = {"captions": examples(), "questions": [asked]}
    places = {"c0": 0, "c1": 1, "c2": 2, "c3": 3, "q": 4}
    pictures = [*examples(), asked]
    views = train.Views(torch.rand(5, 49, 1280), pictures, EfficientNetLite0().eval())
    learner = rows.PackedRows(splits, places, rows.ids_of(tokenizer()), END)
    one = reinforce.Reinforcer(bridge, detectors, speaker(), learner, views, settings)
    held = {"captions_val": [], "questions_val": []}
    one.prepare(train.Validation(speaker(), tokenizer(), held, None, 1), examples())
    return one


def test_the_reward_is_cider_d() -> None:
    """As pycocoevalcap computes it, where every caption has one word more: its end."""
    scorer = pytest.importorskip("pycocoevalcap.cider.cider").Cider()
    reward = reinforce.CiderReward(examples())
    said = ["a dog runs", "a man in a hat sits today", "two two dogs", "nothing of it"]
    references = {e.key: [f"{a} {reinforce.END}" for a in e.answers] for e in examples()}
    answers = {e.key: [f"{text} {reinforce.END}"] for e, text in zip(examples(), said, strict=True)}
    _, expected = scorer.compute_score(references, answers)
    ours = [reward(e.group, text, True) for e, text in zip(examples(), said, strict=True)]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(expected).float())


def test_a_caption_that_stops_in_the_middle_is_worth_less() -> None:
    reward = reinforce.CiderReward(examples())
    assert reward("c0", SAID[0], True) > reward("c0", SAID[0], False)


def test_samples_are_those_of_whole_passes() -> None:
    """Rows that have ended leave the batch; the others go on as if they had been alone in it."""
    lm, visual, prompt = language(), torch.randn(2, 3, 32), [5, 6]
    how = dataclasses.replace(SETTINGS, longest=40, temperature=0.5)
    made = reinforce.sampled(lm, visual, prompt, how, 9, torch.Generator().manual_seed(1))
    assert any(answer[-1] == 9 and len(answer) < 40 for some in made for answer in some)
    chance = torch.Generator().manual_seed(1)
    texts: list[list[int]] = [[] for _ in range(6)]
    for _ in range(40):
        going = [n for n in range(6) if 9 not in texts[n]]
        if not going:
            break
        logits = []
        for n in going:
            ids = torch.tensor([*prompt, *texts[n]])
            inputs = torch.cat((visual[n // 3], lm.get_input_embeddings()(ids)))
            logits.append(lm(inputs_embeds=inputs[None]).logits[0, -1])
        drawn = torch.multinomial((torch.stack(logits) / 0.5).softmax(-1), 1, generator=chance)
        for n, (token,) in zip(going, drawn.tolist(), strict=True):
            texts[n].append(token)
    assert [list(answer) for some in made for answer in some] == texts


def test_what_is_rewarded_is_said_more_often() -> None:
    settings = dataclasses.replace(
        SETTINGS,
        steps=200,
        rate=2e-2,
        bridge_rate=1e-3,
        ask_every=99,
        sampled=8,
        human=0.0,
        rank=8,
        temperature=1.0,
    )
    one = reinforcer(settings)

    class Letters(reinforce.CiderReward):
        def __call__(self, group: str, text: str, ended: bool) -> float:
            return sum(letter.isascii() and letter.isalpha() for letter in text) / 5

    one.reward = Letters(examples())
    rewards: list[float] = []
    one.run(60, lambda row: not rewards.append(row["reward"]))
    assert sum(rewards[-10:]) > 1.5 * sum(rewards[:10]) > 0


def test_a_resumed_reinforcement_is_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = reinforcer()
    whole.run(3, lambda row: True)
    first = reinforcer()
    first.run(1, lambda row: True)
    first.save(tmp_path / "state.pt")
    second = reinforcer()
    second.load(tmp_path / "state.pt")
    second.run(3, lambda row: True)
    for name, tensor in whole.weights()["lora"].items():
        assert torch.equal(tensor, second.weights()["lora"][name])


def test_the_same_answer_twice_is_learnt_once_by_both_gains() -> None:
    one = reinforcer()
    (row,) = one.rows.captions(0, 0, 1)
    prompt = rows.ids_of(tokenizer())("\nCaption:")
    texts = one._texts(row, prompt, [(7, END), (8, END), (7, END)], [1.0, -3.0, 2.0])
    assert [text.weight for text in texts] == [3.0, -3.0, *[SETTINGS.human] * (len(texts) - 2)]


def test_advantages_are_against_the_others() -> None:
    assert reinforce.advantages([1.0, 2.0, 6.0]) == [-3.0, -1.5, 4.5]
    assert sum(reinforce.advantages([0.3, 0.1, 0.7, 0.2])) == pytest.approx(0)
