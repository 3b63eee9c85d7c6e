"""Reinforce the photo model's exit: captions that it writes alone are written more often, the more
they agree with people's.

Self-critical sequence training (Rennie et al. 2017) as in `reinforce`, of the exit's layer alone.
The divergence from the full model on the full model's own captions and answers is learnt beside it,
so that tokens that the exit agrees on stay agreed on. No layer above the exit runs for a sample, so
a step of 80 captions takes a second of one core. The exit's drafts stay as they were.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

from examples.photo_vlm.command import command, parser_of
from examples.photo_vlm.evaluate import LONGEST, load
from examples.photo_vlm.held_out import cider
from examples.photo_vlm.reinforce import CiderReward, advantages
from examples.photo_vlm.rows import read_photographs
from examples.photo_vlm.student import Taught, embedded, keep, padded, taught, wear, written
from offramp.adapter.adapter import Adapter
from offramp.adapter.answers import generate_answers
from offramp.common.progress import progress
from offramp.core.decoding.policy import FULL
from offramp.core.executors.kv_cache import cache_parameter
from offramp.core.models.exits import Exits
from offramp.features.shortlist import places_of
from offramp.training.losses import kl
from offramp_lab.records.photographs.opened import always
from offramp_lab.records.subjects import halves, photo_exits

TAUGHT = {"captions": 6000, "questions": 1000}
"""Examples that the full model answers."""
USUAL = 12
"""Tokens of a caption: the loss of a drawn one is a mean over so many."""
MEASURED = 300
"""Of the photographs that exits are measured on the first; the others show what was learnt."""


@dataclass(frozen=True)
class Settings:
    """steps: of AdamW at `rate`, level after `warm` for the first two fifths, then falling.
    photographs, captions: of a step, and of each photograph, drawn at `temperature`, of at most
    `longest` tokens. asked: questions of a step, whose divergence counts `asked_weight`."""

    steps: int = 700
    rate: float = 1e-4
    warm: int = 20
    photographs: int = 16
    captions: int = 5
    temperature: float = 0.7
    longest: int = 22
    asked: int = 4
    asked_weight: float = 0.3


class ExitReinforcer:
    """The layers below the exit, the exit's in float32, and the head's rows of its shortlist."""

    def __init__(self, adapter: Adapter, settings: Settings, reward: CiderReward) -> None:
        """adapter: with one exit and a shortlist, its backbone as it is to run."""
        backbone, (depth,) = adapter.backbone, adapter.exits.depths
        assert adapter.exits.shortlist is not None, "the photo model's exits have one"
        self.adapter, self.settings, self.reward = adapter, settings, reward
        self.stack, self.below = backbone.stack, list(backbone.layers[:depth])
        self.layer = copy.deepcopy(adapter.exits.at(depth)).float()
        for module in self.layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = depth  # type: ignore[assignment]  # of a cache of these alone
        self.learning = [p for n, p in self.layer.named_parameters() if not n.startswith("drafts.")]
        self.layer.requires_grad_(False)
        for weight in self.learning:
            weight.requires_grad_(True)
        self.norm = copy.deepcopy(self.stack.norm).float()
        self.words = torch.as_tensor(adapter.exits.shortlist)
        self.places = places_of(adapter.exits.shortlist, backbone.vocabulary)
        self.head: Any = adapter.exits.shortlist_head(backbone)
        self.image = backbone.model.config.image_token_index
        self.optimizer = torch.optim.AdamW(self.learning, lr=settings.rate, weight_decay=0.0)

    def logits(self, states: Tensor) -> Tensor:
        """[..., S] over the shortlist, of the exit's states [..., D]."""
        return F.linear(self.norm(states.float()), self.head.weight.float())

    def _run(self, layer: nn.Module, states: Tensor, at: int, cache: Any = None) -> Tensor:
        """A layer's output [B, T, D], of columns that begin with `at`."""
        columns = torch.arange(at, at + states.shape[1])[None]
        turns = self.stack.rotary_emb(states, columns)
        more = {} if cache is None else {cache_parameter(self.stack): cache}
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(states, position_embeddings=turns, **more)
        made: Tensor = out[0] if isinstance(out, tuple) else out
        return made

    def _lower(self, states: Tensor, at: int = 0, cache: Any = None) -> Tensor:
        """What the exit reads: the output [B, T, D] of all layers below it."""
        for layer in self.below:
            states = self._run(layer, states, at, cache)
        return states

    @torch.no_grad()
    def drawn(
        self, rows: Sequence[Taught], chance: torch.Generator, end: int
    ) -> tuple[list[list[int]], Tensor]:
        """Captions drawn by the exit alone, and the states that it read: of the prompt and of all
        tokens but the last [R, T, D].

        rows: whose prompts are of one length.
        """
        s = self.settings
        cache = DynamicCache()
        prompts = torch.tensor([prompt for _, prompt, *_ in rows])
        states = self._lower(embedded(self.stack, self.image, prompts, rows), 0, cache)
        last = self._run(self.layer, states, 0, cache)[:, -1].repeat_interleave(s.captions, 0)
        read = [states.repeat_interleave(s.captions, 0)]
        cache.batch_repeat_interleave(s.captions)
        said: list[Tensor] = []
        ended = torch.zeros(len(last), dtype=torch.bool)
        while True:
            likely = (self.logits(last) / s.temperature).softmax(-1)
            said.append(self.words[torch.multinomial(likely, 1, generator=chance)[:, 0]])
            ended |= said[-1] == end
            if ended.all() or len(said) == s.longest:
                break
            at = prompts.shape[1] + len(said) - 1
            states = self._lower(self.stack.embed_tokens(said[-1][:, None]), at, cache)
            read.append(states)
            last = self._run(self.layer, states, at, cache)[:, -1]
        captions = [
            ids[: ids.index(end) + 1] if end in ids else ids
            for ids in torch.stack(said, 1).tolist()
        ]
        return captions, torch.cat(read, 1)

    def reinforced(
        self, rows: Sequence[Taught], groups: Sequence[str], encoder: Any, chance: torch.Generator
    ) -> tuple[Tensor, float]:
        """Loss of drawn captions, each by how much better its CIDEr-D is than that of the others of
        its photograph, and the mean CIDEr-D."""
        s = self.settings
        captions, states = self.drawn(rows, chance, encoder.eos)
        texts = encoder.texts(captions)
        rewards = [
            self.reward(groups[i // s.captions], text, ids[-1] == encoder.eos)
            for i, (text, ids) in enumerate(zip(texts, captions, strict=True))
        ]
        gains = torch.tensor(
            [
                gain
                for i in range(0, len(rewards), s.captions)
                for gain in advantages(rewards[i : i + s.captions])
            ]
        )
        gains = gains / gains.abs().mean().clamp(min=1e-6)
        begun = len(rows[0][1])
        logits = self.logits(self._run(self.layer, states, 0)[:, begun - 1 :]) / s.temperature
        truth = nn.utils.rnn.pad_sequence(
            [self.places[torch.tensor(ids)] for ids in captions], True, -1
        )
        own = F.cross_entropy(logits.mT, truth, ignore_index=-1, reduction="none").sum(1)
        return (own * gains).mean() / USUAL, sum(rewards) / len(rewards)

    def divergence(self, rows: Sequence[Taught]) -> Tensor:
        """Mean KL(full model || exit) over the tokens that the full model wrote."""
        with torch.no_grad():
            states = self._lower(embedded(self.stack, self.image, padded(rows), rows))
        said = written(self._run(self.layer, states, 0), rows)
        return kl(torch.cat([logits.float() for *_, logits in rows]), self.logits(said)).mean()

    def learn(self, loss: Tensor, step: int) -> None:
        s = self.settings
        falling = max(0.05, min(1.0, (1 - step / s.steps) / 0.6))
        for group in self.optimizer.param_groups:
            group["lr"] = s.rate * min(1.0, (step + 1) / s.warm) * falling
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.learning, 1.0)
        self.optimizer.step()

    def made(self, **told: Any) -> Adapter:
        """The adapter with this exit, without a guarantee. told: noted of its training."""
        adapter, (depth,) = self.adapter, self.adapter.exits.depths
        exits = Exits(adapter.backbone, [depth], kind=adapter.exits.modules.kind)
        exits.at(depth).load_state_dict(self.layer.state_dict())
        exits.to(adapter.backbone.dtype).requires_grad_(False)
        told = {"steps": self.settings.steps, **told}
        return replace(
            adapter,
            exits=replace(adapter.exits, modules=exits),
            calibration=None,
            elsewhere={},
            metrics={**adapter.metrics, "reinforced": told},
        )


@command
def main() -> None:
    parser = parser_of("reinforce_exit", "--out runs/reinforced", str(__doc__), "data")
    parser.add_argument("--exits", type=Path, metavar="DIR", help="default: those that ship")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument(
        "--student",
        type=Path,
        metavar="FILE",
        help="reinforce the last layer of this student (`examples.photo_vlm.student`), there",
    )
    arguments = parser.parse_args()
    settings = Settings(arguments.steps)
    splits = read_photographs(arguments.data)
    backbone, encoder = load("bfloat16")
    adapter = Adapter.load(photo_exits(arguments.exits), backbone)
    rows = {
        name: taught(
            adapter, encoder, splits[name][: TAUGHT[name]], longest, arguments.out / f"{name}.pt"
        )
        for name, longest in LONGEST.items()
    }
    if arguments.student is not None:
        wear(adapter, arguments.student)
    reinforcer = ExitReinforcer(adapter, settings, CiderReward(splits["captions"]))
    groups = [example.group for example in splits["captions"]]
    begin = time.process_time()
    for step in progress(range(settings.steps), "reinforcing"):
        chance = random.Random(step)
        places = chance.sample(range(len(groups)), settings.photographs)
        shown = [rows["captions"][i] for i in places]
        draw = torch.Generator().manual_seed(step)
        loss, reward = reinforcer.reinforced(shown, [groups[i] for i in places], encoder, draw)
        apart = reinforcer.divergence(shown)
        asked = reinforcer.divergence(chance.sample(rows["questions"], settings.asked))
        reinforcer.learn(loss + apart + settings.asked_weight * asked, step)
        if step % 50 == 0:
            print(f"step {step}: CIDEr-D {reward:.3f}, divergence {apart.item():.3f}", flush=True)
    seconds = round(time.process_time() - begin)
    if arguments.student is not None:
        keep(arguments.student, reinforcer.layer, steps=settings.steps, seconds=seconds)
        return
    made = reinforcer.made()
    held = halves(arguments.data)[1][MEASURED:]
    alone = always(adapter.policy, *adapter.exits.depths)
    ways = {"full": (adapter, FULL), "before": (adapter, alone), "after": (made, alone)}
    most = LONGEST["captions"]
    found = {
        name: cider(generate_answers(one, encoder, held, policy, max_new_tokens=most), held)
        for name, (one, policy) in ways.items()
    }
    made = reinforcer.made(seconds=seconds, photographs=len(held), cider=found)
    made.save(arguments.out / "exits")


if __name__ == "__main__":
    main()
