"""The words that a photograph's captions or questions have, and detectors of them.

What the language model learns to trust must be as good as what it is given later: a training
photograph gets its words from a detector that was trained on the other half of the photographs, and
a new one from a detector that was trained on all.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.photo_vlm.rows import Ids
from offramp.inputs.example import Example
from offramp_photo.tower import PhotoTowerConfig, WordDetector

EPOCHS, BATCH = 14, 64
FEWEST = 20
"""Photographs of whose texts a word must be part, to be learnt."""
_STOP = """
a an the this that these those some another other one and or but of in on at by to for from with
into onto over under through across along around near next behind front between up down out off
while as is are was be being been has have having had do does doing it its his her hers him he she
they them their there who which what where how many much s t not no so very all both each whose
can about above below beneath after before during then than just like close together side left
right opposite object objects thing things item items colour color colours type kept found shown
shaped placed hung hanged stuck largest most visible decorative ornamental question answer picture
photo
"""
STOP = frozenset(_STOP.split())


def words_of(text: str) -> set[str]:
    """Words of a text that say what is seen, in lower case."""
    return set(re.findall(r"[a-z]+", text.lower())) - STOP


def texts_by_photograph(splits: Mapping[str, Sequence[Example]]) -> dict[str, set[str]]:
    """Words of everything that is said of each training photograph, by `Example.group`."""
    spoken: dict[str, set[str]] = {}
    for name in ("captions", "questions"):
        for example in splits[name]:
            texts = [*example.answers, *([example.prompt] if name == "questions" else [])]
            spoken.setdefault(example.group, set()).update(*map(words_of, texts))
    return spoken


def vocabulary_of(spoken: Mapping[str, set[str]]) -> list[str]:
    """Words to be detected, commonest first; those as common as each other in the alphabet's order,
    because a set has another one in every process."""
    counts = Counter(word for words in spoken.values() for word in words)
    often = [word for word, count in counts.items() if count >= FEWEST]
    return sorted(often, key=lambda word: (-counts[word], word))


def embeddings_of(words: Sequence[str], embeddings: Tensor, ids: Ids) -> Tensor:
    """A word's embedding [W, D]: the mean of its pieces."""
    return torch.stack([embeddings[torch.tensor(ids(" " + word))].mean(0) for word in words])


def learnt(pooled: Tensor, present: Tensor, config: PhotoTowerConfig, *, seed: int) -> WordDetector:
    """A detector, from pooled features [N, 3840] and which words are there [N, W]."""
    torch.manual_seed(seed)
    detector = WordDetector(config)
    detector.mean.copy_(pooled.mean(0))
    detector.scale.copy_(1 / (pooled.std(0) + 1e-3))
    nn.init.zeros_(detector.outer.weight)
    detector.outer.bias.data.copy_(torch.logit(present.float().mean(0).clamp(1e-3, 0.9)))
    parameters = [p for p in detector.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    steps = EPOCHS * -(-len(pooled) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(EPOCHS):
        for chosen in torch.split(torch.randperm(len(pooled)), BATCH):
            loss = F.binary_cross_entropy_with_logits(
                detector(pooled[chosen]), present[chosen].float(), reduction="none"
            )
            optimizer.zero_grad()
            loss.sum(1).mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return detector.eval().requires_grad_(False)


class Detectors(nn.Module):
    """Two detectors, each for the training photographs of the other's half; one for all others."""

    def __init__(self, config: PhotoTowerConfig) -> None:
        super().__init__()
        self.halves = nn.ModuleList(WordDetector(config) for _ in range(2))
        self.whole = WordDetector(config)
        self.eval().requires_grad_(False)

    @classmethod
    def learnt(
        cls,
        pooled: Tensor,
        present: Tensor,
        halves: Sequence[Tensor],
        config: PhotoTowerConfig,
        say: Callable[[str], Any],
        whole: Mapping[str, Tensor] | None = None,
    ) -> Detectors:
        """From all training photographs [N, ...]; halves: [N] each, which of them are in it.
        whole: the third one, where it was learnt before."""
        ours = cls(config)
        for half, other in enumerate(reversed(halves)):
            say(f"word detector {half + 1} of 3")
            ours.halves[half] = learnt(pooled[other], present[other], config, seed=half)
        if whole is None:
            say("word detector 3 of 3")
            ours.whole = learnt(pooled, present, config, seed=2)
        else:
            ours.whole.load_state_dict({name: t.float() for name, t in whole.items()})
        return ours

    @torch.no_grad()
    def forward(self, features: Tensor, places: Sequence[int]) -> Tensor:
        """Logits [B, W] of training photographs, by who did not see them; by even and odd place."""
        pooled = WordDetector.pooled(features)
        both = torch.stack([detector(pooled) for detector in self.halves])
        halves = torch.tensor([place % 2 for place in places])
        logits: Tensor = both[halves, torch.arange(len(places))]
        return logits
