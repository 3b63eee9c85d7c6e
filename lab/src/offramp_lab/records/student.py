"""A static student of five layers of the photo model, for `offramp_lab.records.five_layers`.

`python -m offramp_lab.records.student --out FOLDER` trains it on photographs of the training split
and goes on where it was cut off: the four layers below the exit and the exit's layer, from the
photo model's own first five, all of them learning what the full model writes (sequence-level
distillation, Kim and Rush 2016), by the head's rows of the exit's shortlist. It stands in a
backbone as those layers do, so that it decodes with every token at the exit.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from examples.photo_vlm.evaluate import LONGEST, load
from examples.photo_vlm.rows import read_photographs
from torch import Tensor, nn
from torch.nn import functional as F

from offramp.adapter import Adapter
from offramp.answers import generate_answers
from offramp.data.example import Example
from offramp.engine.policy import FULL
from offramp.models.exits import Exits
from offramp.models.shortlist import places_of
from offramp.progress import progress
from offramp_lab.places import RUNS
from offramp_lab.records.record import Kept, asked
from offramp_lab.records.subjects import photo_exits

BATCH, AT_ONCE = 16, 64
RATE, WARM = 5e-4, 50
Taught = tuple[Tensor, list[int], list[int]]
"""Visual tokens [V, D], ids of the prompt, of the answer."""


def taught(
    adapter: Adapter, encoder: Any, examples: Sequence[Example], most: int, kept: Kept
) -> list[Taught]:
    """What the full model answers to each example."""
    model, image = adapter.backbone.model, adapter.backbone.model.config.image_token_index
    rows: list[Taught] = []
    groups = [examples[at : at + AT_ONCE] for at in range(0, len(examples), AT_ONCE)]
    answer = partial(
        generate_answers, adapter, encoder, policy=FULL, batch_size=AT_ONCE, max_new_tokens=most
    )
    for group in progress(groups, "the full model's answers"):
        if missing := [example for example in group if example.key not in kept]:
            for example, said in zip(missing, answer(missing), strict=True):
                kept.keep(example.key, list(said.ids))
        prompts = [encoder.prompts([example]) for example in group]
        with torch.no_grad():
            pixels = torch.cat([prompt["pixel_values"] for prompt in prompts])
            seen = model.get_image_features(pixel_values=pixels.to(model.dtype))
        features = getattr(seen, "pooler_output", seen)
        for prompt, tokens, example in zip(prompts, features, group, strict=True):
            ids = prompt["input_ids"][0].tolist()
            assert ids.count(image) == len(tokens)
            rows.append((tokens, ids, kept.found[example.key]))
    return rows


class Student(nn.Module):
    """Layers below the exit, and the exit's."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        backbone, (depth,) = adapter.backbone, adapter.exits.depths
        exits = Exits(backbone, [depth])  # copies of the layer there: as the exit began
        self.layers = nn.ModuleList([*backbone.layers[:depth], exits.at(depth)])
        self.image = backbone.model.config.image_token_index
        self._frozen = [backbone.stack, adapter.exits.shortlist_head(backbone)]
        self.requires_grad_(True)

    def forward(self, rows: Sequence[Taught], places: Tensor) -> Tensor:
        """Mean cross-entropy of the answers' tokens that are of the shortlist."""
        stack, head = self._frozen
        ids = nn.utils.rnn.pad_sequence(
            [torch.tensor(prompt + answer) for _, prompt, answer in rows], batch_first=True
        )
        states = stack.embed_tokens(ids).clone()
        states[ids == self.image] = torch.cat([seen for seen, *_ in rows]).to(states.dtype)
        turns = stack.rotary_emb(states, torch.arange(ids.shape[1])[None])
        for layer in self.layers:
            out = layer(states, position_embeddings=turns)
            states = out[0] if isinstance(out, tuple) else out
        begun = [len(prompt) for _, prompt, _ in rows]
        said = [
            states[i, n - 1 : n - 1 + len(row[2])]
            for i, (n, row) in enumerate(zip(begun, rows, strict=True))
        ]
        right = places[torch.tensor([i for *_, answer in rows for i in answer])]
        logits = head(stack.norm(torch.cat(said)))
        return F.cross_entropy(logits.float(), right, ignore_index=-1)


def train(
    student: Student, rows: Sequence[Taught], places: Tensor, seconds: float, file: Path
) -> None:
    """seconds: of the CPU, in all. file: of the state, so that training goes on there."""
    best = torch.optim.AdamW(student.parameters(), lr=RATE, weight_decay=0.01)
    state: dict[str, Any] = {"step": 0, "seconds": 0.0}
    if file.is_file():
        state = torch.load(file, weights_only=True)
        student.load_state_dict(state["student"])
        best.load_state_dict(state["optimizer"])
    step, spent, saved = state["step"], state["seconds"], state["seconds"]
    while spent < seconds:
        begin = time.process_time()
        batch = random.Random(step).sample(rows, BATCH)
        for group in best.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / WARM) * max(0.02, 1 - spent / seconds)
        with torch.autocast("cpu", torch.bfloat16):
            loss = student(batch, places)
        best.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        best.step()
        step, spent = step + 1, spent + time.process_time() - begin
        if step % 50 == 0:
            print(f"step {step}, {spent:.0f} s: loss {loss.item():.3f}", flush=True)
        if spent - saved > 60 or spent >= seconds:
            saved = spent
            torch.save(
                {"step": step, "seconds": spent, "student": student.state_dict(),
                 "optimizer": best.state_dict()},
                file,
            )  # fmt: skip


def wear(adapter: Adapter, file: Path) -> dict[str, Any]:
    """Give the adapter the student's layers, in the place of its own; return what its training
    took."""
    state = torch.load(file, weights_only=True)
    (depth,) = adapter.exits.depths
    student: dict[str, Tensor] = state["student"]
    for index, layer in enumerate([*adapter.backbone.layers[:depth], adapter.exits.at(depth)]):
        start = f"layers.{index}."
        own = {n.removeprefix(start): t for n, t in student.items() if n.startswith(start)}
        layer.load_state_dict(own, strict=index < depth)
    return {"steps": state["step"], "seconds": state["seconds"]}


def main() -> None:
    arguments = asked(
        __doc__, photo=True, captions=3000, questions=600, minutes=20.0, out=RUNS / "student"
    )
    splits = read_photographs(arguments.data)
    backbone, encoder = load("bfloat16")
    adapter = Adapter.load(photo_exits(arguments.adapter), backbone)
    rows: list[Taught] = []
    for name, longest in LONGEST.items():
        examples = splits[name][: getattr(arguments, name)]
        rows += taught(adapter, encoder, examples, longest, Kept(arguments.out / f"{name}.jsonl"))
    assert adapter.exits.shortlist is not None, "the photo model's exits have one"
    places = places_of(adapter.exits.shortlist, backbone.vocabulary)
    backbone, _ = load("float32")
    student = Student(Adapter.load(photo_exits(arguments.adapter), backbone))
    train(student, rows, places, 60 * arguments.minutes, arguments.out / "student.pt")


if __name__ == "__main__":
    main()
