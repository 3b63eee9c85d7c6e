"""Stage 1: teach the eyes. ViT and Q-Former learn what is where from the exact ground truth.

Trained jointly with a language model from scratch, a Q-Former this small stays blind for thousands
of steps. So query i first learns to report grid cell i (shape, colour, size, or empty) and the last
query the background. The heads are thrown away; the features stay.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Blip2QFormerModel, Blip2VisionModel

from offramp.data.scenes import world
from offramp_lab.recipes.tiny_vlm.build import QUERIES, WIDTH, qformer_config, vision_config
from offramp_lab.recipes.tiny_vlm.checkpointing import Log, Training, rate

CELLS = world.GRID**2
SIZE, PEAK = 64, 1e-3  # scenes a step, learning rate
DAMAGED = 0.25  # share of the training pictures that are corrupted
CLASSES = {
    "shape": len(world.SHAPES) + 1,
    "color": len(world.COLORS) + 1,
    "size": len(world.SIZES) + 1,
}


class Eyes(nn.Module):
    """The visual half of the BLIP-2, with two sets of heads that read cells and background."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_model = Blip2VisionModel(vision_config())
        self.qformer = Blip2QFormerModel(qformer_config())
        self.query_tokens = nn.Parameter(torch.randn(1, QUERIES, WIDTH))
        # The second set reads the ViT: a short path for gradients while the Q-Former is blind.
        self.heads = nn.ModuleList(nn.Linear(WIDTH, sum(CLASSES.values())) for _ in range(2))
        self.background = nn.ModuleList(nn.Linear(WIDTH, len(world.BACKGROUNDS)) for _ in range(2))

    def features(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [B, 3, S, S] to ViT states [B, 1 + P, D] and query states [B, Q, D]."""
        patches = self.vision_model(pixels).last_hidden_state
        queries = self.query_tokens.expand(len(pixels), -1, -1)
        return patches, self.qformer(
            query_embeds=queries, encoder_hidden_states=patches
        ).last_hidden_state

    def forward(self, pixels: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(cell logits [B, cells, classes], background logits [B, 4]) of Q-Former and of ViT."""
        patches, queries = self.features(pixels)
        batch, side = len(pixels), world.CELL // self.vision_model.config.patch_size
        grid = patches[:, 1:].reshape(batch, world.GRID, side, world.GRID, side, WIDTH)
        cells = grid.mean(dim=(2, 4)).reshape(batch, CELLS, WIDTH)
        return [
            (self.heads[0](queries[:, :CELLS]), self.background[0](queries[:, CELLS])),
            (self.heads[1](cells), self.background[1](patches[:, 0])),
        ]


@dataclass(frozen=True)
class Batch:
    pixels: Tensor  # [B, 3, S, S] in [-1, 1]
    cells: Tensor  # [B, cells, 3] class numbers of shape, colour, size; 0 is empty
    background: Tensor  # [B]


def targets(scene: world.Scene) -> np.ndarray:
    cells = np.zeros((CELLS, 3), dtype=np.int64)
    for t in scene.objects:
        cells[t.place] = 1 + np.array(
            [world.SHAPES.index(t.shape), world.COLORS.index(t.color), world.SIZES.index(t.size)]
        )
    return cells


def pixels(scenes: list[world.Scene], damage: float = 0.0) -> Tensor:
    """Pictures as [B, 3, S, S] in [-1, 1], like the processor's; a share `damage` is corrupted."""
    images = []
    for scene in scenes:
        image = world.render(scene)
        dice = np.random.default_rng((scene.seed, 99))
        if dice.random() < damage:
            kind, severity = str(dice.choice(world.CORRUPTIONS)), int(dice.integers(1, 3))
            image = world.corrupt(image, kind, severity, scene.seed)
        images.append(np.asarray(image))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def make_batch(split: str, start: int, size: int, damage: float = 0.0) -> Batch:
    scenes = list(world.scenes(split, size, start))
    background = torch.tensor([world.BACKGROUNDS.index(s.background) for s in scenes])
    return Batch(
        pixels(scenes, damage), torch.from_numpy(np.stack([targets(s) for s in scenes])), background
    )


def loss(eyes: Eyes, batch: Batch) -> Tensor:
    """Mean cross-entropies over cells and background, summed over both sets of heads."""
    total = torch.zeros(())
    for cells, background in eyes(batch.pixels):
        parts = cells.split(list(CLASSES.values()), dim=-1)
        for i, part in enumerate(parts):
            total = total + F.cross_entropy(part.flatten(0, 1), batch.cells[..., i].flatten())
        total = total + F.cross_entropy(background, batch.background)
    return total


@torch.no_grad()
def accuracy(eyes: Eyes) -> dict[str, float]:
    """Validation accuracies of the Q-Former heads: on occupied cells, and of whole pictures."""
    batch = make_batch("validation", 0, 512)
    eyes.eval()
    cells, background = eyes(batch.pixels)[0]
    eyes.train()
    guess = torch.stack([p.argmax(-1) for p in cells.split(list(CLASSES.values()), dim=-1)], dim=-1)
    right = guess == batch.cells
    occupied = batch.cells[..., 0] > 0
    seen = right[occupied].float().mean(0)
    whole = right.all(-1).all(-1) & (background.argmax(-1) == batch.background)
    names = dict(zip(CLASSES, seen.tolist(), strict=True))
    return {
        **names,
        "background": (background.argmax(-1) == batch.background).float().mean().item(),
        "picture": whole.float().mean().item(),
    }


def train(work: Path, steps: int, seed: int) -> Eyes:
    """Train the eyes, or go on from the last checkpoint; returns them when all steps are done."""
    torch.manual_seed(seed)
    log = Log(work / "see.jsonl")
    eyes = Eyes()
    training = Training(eyes, PEAK, work / "see.pt")
    for step in range(training.step, steps):
        batch = make_batch("train", step * SIZE, SIZE, DAMAGED)
        [value] = training.take(rate(step, steps), [loss(eyes, batch)])
        if step % 50 == 0:
            log(stage="see", step=step, loss=value)
        if step % 250 == 249 or step == steps - 1:
            log(stage="see", step=step + 1, **accuracy(eyes))
        training.save(step, step == steps - 1, every=120)
    return eyes
