"""Learn from what the model says itself: captions that people's agree with are said more often.

Self-critical sequence training (Rennie et al. 2017): several captions of a photograph are sampled,
and each is learnt by how much better its CIDEr-D is than that of the others (leave-one-out as in
Luo 2020). A caption of people's is learnt beside them, without which the language drifts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from examples.photo_vlm.command import command
from examples.photo_vlm.learn import load_state, low_rank
from examples.photo_vlm.rows import Row, Text, ids_of
from examples.photo_vlm.train import (
    Settings,
    Trainer,
    Validation,
    drawing,
    go,
    options_of,
    prepared,
)
from offramp.evaluation.caption_metrics import simple_words
from offramp.inputs.example import Example
from offramp_photo.build import add_updates

ORDERS = 4
END = "<end>"


@dataclass(frozen=True)
class ReinforceSettings(Settings):
    """sampled: captions a photograph, at a temperature, because at 1 few are worth anything;
    longest: tokens of one; human: weight of people's captions beside them."""

    rate: float = 1e-4
    bridge_rate: float = 5e-5
    length: int = 112
    drop: float = 0.0
    captions: int = 1
    sampled: int = 4
    temperature: float = 0.7
    longest: int = 22
    human: float = 0.1


class CiderReward:
    """CIDEr-D (Vedantam et al. 2015) against all captions of a training photograph, document
    frequencies from all of them. An ended caption ends with a word of its own, for else one that
    stops in the middle is as good (Luo 2020)."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._counts = {e.group: [_ngrams(_words(a, True)) for a in e.answers] for e in examples}
        self._frequency = Counter(
            gram for counts in self._counts.values() for gram in set().union(*counts)
        )
        self._total = math.log(len(self._counts))
        self._vectors: dict[str, list[_Vector]] = {}

    def __call__(self, group: str, text: str, ended: bool) -> float:
        """From 0 to 10."""
        if group not in self._vectors:
            self._vectors[group] = [self._vector(counts) for counts in self._counts[group]]
        said = self._vector(_ngrams(_words(text, ended)))
        references = self._vectors[group]
        return 10 * sum(said.likeness(each) for each in references) / len(references)

    def _vector(self, counts: Mapping[tuple[str, ...], int]) -> _Vector:
        weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(ORDERS)]
        for gram, count in counts.items():
            rare = self._total - math.log(max(1, self._frequency[gram]))
            weights[len(gram) - 1][gram] = count * rare
        norms = [math.sqrt(sum(w * w for w in order.values())) for order in weights]
        return _Vector(weights, norms, sum(n for gram, n in counts.items() if len(gram) == 2))


@dataclass(frozen=True)
class _Vector:
    """Weights of n-grams by order, their norms, and how many pairs of words there are."""

    weights: list[dict[tuple[str, ...], float]]
    norms: list[float]
    length: int

    def likeness(self, reference: _Vector) -> float:
        total = 0.0
        for ours, theirs, *norms in zip(
            self.weights, reference.weights, self.norms, reference.norms, strict=True
        ):
            if all(norms):
                common = sum(min(w, theirs[g]) * theirs[g] for g, w in ours.items() if g in theirs)
                total += common / math.prod(norms)
        apart = self.length - reference.length
        return total / ORDERS * math.exp(-(apart**2) / 72)  # deviation 6


def _words(text: str, ended: bool) -> list[str]:
    words = simple_words(text)
    return [*words, END] if ended else words


def _ngrams(words: Sequence[str]) -> Counter[tuple[str, ...]]:
    return Counter(
        tuple(words[i : i + n]) for n in range(1, ORDERS + 1) for i in range(len(words) - n + 1)
    )


@torch.inference_mode()
def sampled(
    lm: Any,
    visual: Tensor,
    prompt: Sequence[int],
    settings: ReinforceSettings,
    end: int,
    chance: torch.Generator,
) -> list[list[tuple[int, ...]]]:
    """Answers to one prompt about each photograph, drawn from all tokens; with the end's token
    where one was ended.

    visual: [B, N, D].
    """
    words = lm.get_input_embeddings()(torch.tensor(prompt)).expand(len(visual), -1, -1)
    made = lm(inputs_embeds=torch.cat((visual.to(words.dtype), words), 1), logits_to_keep=1)
    cache = made.past_key_values
    cache.batch_repeat_interleave(settings.sampled)
    logits = made.logits[:, -1].repeat_interleave(settings.sampled, 0)
    answers: list[list[int]] = [[] for _ in logits]
    going = list(range(len(answers)))
    for _ in range(settings.longest):
        likely = (logits.float() / settings.temperature).softmax(-1)
        drawn = torch.multinomial(likely, 1, generator=chance)
        for row, (token,) in zip(going, drawn.tolist(), strict=True):
            answers[row].append(token)
        kept = (drawn[:, 0] != end).nonzero().flatten()
        if not len(kept):
            break
        if len(kept) < len(going):
            cache.batch_select_indices(kept)
            going = [going[i] for i in kept.tolist()]
        logits = lm(input_ids=drawn[kept], cache=cache).logits[:, -1]
    whole = [tuple(answer) for answer in answers]
    each = settings.sampled
    return [whole[i : i + each] for i in range(0, len(whole), each)]


def advantages(rewards: Sequence[float]) -> list[float]:
    """Each reward against the mean of the others."""
    total = sum(rewards)
    return [r - (total - r) / (len(rewards) - 1) for r in rewards]


class Reinforcer(Trainer):
    """Goes on by reinforcement where `Trainer` learnt from people's captions."""

    settings: ReinforceSettings

    def prepare(self, validation: Validation, examples: Sequence[Example]) -> None:
        """Sample by the validation's language model. examples: with all their captions."""
        self.sampler, self.start = validation.lm, validation.start
        self.tokenizer = validation.tokenizer
        self.reward = CiderReward(examples)
        self.shown = {self.rows.images[e.group]: e for e in examples}

    def _learn_captions(self) -> dict[str, float]:
        s = self.settings
        rows = self.rows.captions(self.step, s.seed, s.captioned)
        visual = self._seen(rows, "reinforce")
        with torch.no_grad():
            add_updates(self.sampler, self.start, low_rank(self.lora))
        ids = ids_of(self.tokenizer)
        prompt = ids("\n" + self.shown[rows[0].image].prompt)
        chance = drawing(f"{s.seed}:{self.step}:sample")
        answers = sampled(self.sampler, visual.detach(), prompt, s, self.rows.end, chance)
        rewards = [
            [self._rewarded(row, answer) for answer in said]
            for row, said in zip(rows, answers, strict=True)
        ]
        gains = [advantages(some) for some in rewards]
        size = sum(abs(g) for some in gains for g in some) / (len(gains) * s.sampled) or 1.0
        reinforced = [
            replace(row, texts=self._texts(row, prompt, said, [g / size for g in gain]))
            for row, said, gain in zip(rows, answers, gains, strict=True)
        ]
        loss = self._learn_behind(visual, reinforced, s.length, 1.0)
        lengths = [len(answer) for said in answers for answer in said]
        mean = sum(map(sum, rewards)) / len(lengths)
        return {"loss": loss, "reward": mean, "tokens": sum(lengths) / len(lengths)}

    def _rewarded(self, row: Row, answer: tuple[int, ...]) -> float:
        ended = answer[-1] == self.rows.end
        text = self.tokenizer.decode(answer, skip_special_tokens=True)
        return self.reward(self.shown[row.image].group, text, ended)

    def _texts(
        self, row: Row, prompt: list[int], said: list[tuple[int, ...]], gains: list[float]
    ) -> tuple[Text, ...]:
        """What was said, each once, and people's captions that the row has."""
        by_answer: Counter[tuple[int, ...]] = Counter()
        for answer, gain in zip(said, gains, strict=True):
            by_answer[answer] += gain  # type: ignore[assignment]
        first = (False,) * len(prompt)
        own = tuple(
            Text((*prompt, *answer), (*first, *(True,) * len(answer)), gain)
            for answer, gain in by_answer.items()
        )
        start = tuple(prompt)
        people = (t for t in row.texts if t.ids[: len(start)] == start)
        return own + tuple(replace(text, weight=self.settings.human) for text in people)


@command
def main() -> None:
    arguments = options_of("reinforce", str(__doc__), 1000).parse_args()
    start = load_state(arguments.work / "state.pt")["best"]
    before = {"bridge": start["bridge"], "lora": low_rank(start["lora"])}
    settings = ReinforceSettings(arguments.steps)
    trainer, validation, splits = prepared(Reinforcer, settings, before, arguments)
    trainer.prepare(validation, splits["captions"])
    go(trainer, validation, "reinforced", arguments)


if __name__ == "__main__":
    main()
