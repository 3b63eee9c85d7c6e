"""A static student of five layers of the photo model, for the record `five_layers`.

`python -m examples.photo_vlm.student --out FOLDER` trains it on photographs of the training split
and goes on where it was cut off: the four layers below the exit and the exit's layer, from the
photo model's own first five, all of them learning what the exit learnt (distillation on the full
model's own answers, by the head's rows of the exit's shortlist) from as many captions and answers,
a tenth of them held out to keep the best weights by. It stands in a backbone as those layers do, so
that it decodes with every token at the exit.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.photo_vlm.evaluate import LONGEST, load
from examples.photo_vlm.learn import save_state
from examples.photo_vlm.rows import read_photographs
from offramp.adapter.adapter import Adapter
from offramp.adapter.answers import generate_answers
from offramp.common.progress import progress
from offramp.core.decoding.policy import FULL
from offramp.core.models.exits import Exits
from offramp.inputs.example import Example
from offramp.training.losses import kl
from offramp_lab.places import RUNS
from offramp_lab.records.record import asked
from offramp_lab.records.subjects import photo_exits

BATCH, AT_ONCE = 16, 64
RATE, WARM = 5e-4, 50
HELD, CHECKS = 10, 20
"""One answer in so many is held out; the best weights are looked for so often."""
Taught = tuple[Tensor, list[int], list[int], Tensor]
"""Visual tokens [V, D], ids of the prompt, of the answer [N], its logits over the shortlist
[N, S]."""


def taught(
    adapter: Adapter, encoder: Any, examples: Sequence[Example], most: int, file: Path
) -> list[Taught]:
    """What the full model answers to each example. file: of what was answered, in this order."""
    model, image = adapter.backbone.model, adapter.backbone.model.config.image_token_index
    short = adapter.exits.shortlist
    rows: list[Taught] = torch.load(file) if file.is_file() else []
    starts = range(len(rows), len(examples), AT_ONCE)
    for at in progress(starts, "the full model's answers"):
        group = examples[at : at + AT_ONCE]
        said: dict[int, list[Tensor]] = {row: [] for row in range(len(group))}

        def hear(row: int, place: int, logits: Tensor, said: Any = said) -> None:
            said[row].append(logits[0, short].half())

        answers = generate_answers(
            adapter, encoder, group, FULL, batch_size=AT_ONCE, max_new_tokens=most, observer=hear
        )
        prompts = [encoder.prompts([example]) for example in group]
        with torch.no_grad():
            pixels = torch.cat([prompt["pixel_values"] for prompt in prompts])
            seen = model.get_image_features(pixel_values=pixels.to(model.dtype))
        features = getattr(seen, "pooler_output", seen)
        for row, (prompt, tokens) in enumerate(zip(prompts, features, strict=True)):
            ids, answer = prompt["input_ids"][0].tolist(), list(answers[row].ids)
            assert ids.count(image) == len(tokens) and len(said[row]) == len(answer)
            rows.append((tokens.clone(), ids, answer, torch.stack(said[row])))
        save_state(file, rows)
    return rows[: len(examples)]


def padded(rows: Sequence[Taught]) -> Tensor:
    """Ids [B, T] of prompts and answers, padded after them."""
    ids = [torch.tensor(prompt + answer) for _, prompt, answer, _ in rows]
    return nn.utils.rnn.pad_sequence(ids, batch_first=True)


def embedded(stack: Any, image: int, ids: Tensor, rows: Sequence[Taught]) -> Tensor:
    """States [B, T, D] of ids [B, T], with the rows' visual tokens in the places of `image`."""
    states: Tensor = stack.embed_tokens(ids).clone()
    states[ids == image] = torch.cat([seen for seen, *_ in rows]).to(states.dtype)
    return states


def written(states: Tensor, rows: Sequence[Taught]) -> Tensor:
    """The states [N, D] from which the answers' tokens follow, of states [B, T, D] of `padded`."""
    ends = [len(prompt) - 1 for _, prompt, *_ in rows]
    return torch.cat(
        [
            states[i, end : end + len(answer)]
            for i, (end, (_, _, answer, _)) in enumerate(zip(ends, rows, strict=True))
        ]
    )


class Student(nn.Module):
    """Layers below the exit, and the exit's."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        backbone, (depth, *_) = adapter.backbone, adapter.exits.depths
        exits = Exits(backbone, [depth])  # copies of the layer there: as the exit began
        self.layers = nn.ModuleList([*backbone.layers[:depth], exits.at(depth)])
        self.image = backbone.model.config.image_token_index
        self._frozen = [backbone.stack, adapter.exits.shortlist_head(backbone)]
        self.requires_grad_(True)

    def forward(self, rows: Sequence[Taught]) -> Tensor:
        """KL(full model || student) [N] of the answers' tokens, over the shortlist."""
        stack, head = self._frozen
        states = embedded(stack, self.image, padded(rows), rows)
        turns = stack.rotary_emb(states, torch.arange(states.shape[1])[None])
        for layer in self.layers:
            out = layer(states, position_embeddings=turns)
            states = out[0] if isinstance(out, tuple) else out
        right = torch.cat([logits.float() for *_, logits in rows])
        return kl(right, head(stack.norm(written(states, rows))).float())


def train(
    student: Student, rows: Sequence[Taught], seconds: float, file: Path, **noted: Any
) -> None:
    """seconds: of the CPU, in all. file: of the state, so that training goes on there. noted: kept
    with it."""
    best = torch.optim.AdamW(student.parameters(), lr=RATE, weight_decay=0.01)
    state: dict[str, Any] = {**noted, "steps": 0, "seconds": 0.0, "checks": []}
    if file.is_file():
        state = torch.load(file, weights_only=True)
        student.load_state_dict(state["latest"])
        best.load_state_dict(state["optimizer"])
    held = rows[::HELD]
    learnt = [row for n, row in enumerate(rows) if n % HELD]
    while state["seconds"] < seconds:
        begin = time.process_time()
        batch = random.Random(state["steps"]).sample(learnt, BATCH)
        spent = state["seconds"] / seconds
        for group in best.param_groups:
            group["lr"] = RATE * min(1.0, (state["steps"] + 1) / WARM) * max(0.02, 1 - spent)
        with torch.autocast("cpu", torch.bfloat16):
            loss = student(batch).mean()
        best.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        best.step()
        state["steps"] += 1
        state["seconds"] += time.process_time() - begin
        if state["seconds"] >= seconds * (len(state["checks"]) + 1) / CHECKS:
            begin = time.process_time()
            state["checks"].append(_loss(student, held))
            state["seconds"] += time.process_time() - begin
            print(state["steps"], f"{state['seconds']:.0f} s", state["checks"][-1], flush=True)
            if state["checks"][-1] == min(state["checks"]):
                state["student"] = {n: t.clone() for n, t in student.state_dict().items()}
                state["best"] = state["steps"]
            state |= {"latest": student.state_dict(), "optimizer": best.state_dict()}
            save_state(file, state)


@torch.no_grad()
def _loss(student: Student, rows: Sequence[Taught]) -> float:
    with torch.autocast("cpu", torch.bfloat16):
        losses = [student(rows[at : at + AT_ONCE]) for at in range(0, len(rows), AT_ONCE)]
    return float(torch.cat(losses).mean())


def wear(adapter: Adapter, file: Path) -> None:
    """Give the adapter the student's layers, in the place of its own up to its first exit."""
    depth, *_ = adapter.exits.depths
    student: dict[str, Tensor] = torch.load(file, weights_only=True)["student"]
    for index, layer in enumerate([*adapter.backbone.layers[:depth], adapter.exits.at(depth)]):
        start = f"layers.{index}."
        own = {n.removeprefix(start): t for n, t in student.items() if n.startswith(start)}
        layer.load_state_dict(own, strict=index < depth)


def took(file: Path) -> dict[str, Any]:
    """What the student's training took."""
    state = torch.load(file, weights_only=True)
    told = ("steps", "seconds", "best", "reinforced", *LONGEST)
    return {name: state[name] for name in told if name in state}


def keep(file: Path, layer: nn.Module, **reinforced: Any) -> None:
    """Write the last layer, after reinforcement, into the student's file. reinforced: what that
    took."""
    state = torch.load(file, weights_only=True)
    student: dict[str, Tensor] = state["student"]
    last = max(int(name.split(".")[1]) for name in student)
    for name, weight in layer.state_dict().items():
        if (place := f"layers.{last}.{name}") in student:  # drafts are the exit's alone
            student[place] = weight
    save_state(file, state | {"reinforced": reinforced})


def main() -> None:
    arguments = asked(
        __doc__, photo=True, captions=6000, questions=1000, minutes=62.0, out=RUNS / "student"
    )
    splits = read_photographs(arguments.data)
    backbone, encoder = load("bfloat16")
    adapter = Adapter.load(photo_exits(arguments.adapter), backbone)
    rows: dict[str, list[Taught]] = {}
    for name, longest in LONGEST.items():
        examples = splits[name][: getattr(arguments, name)]
        rows[name] = taught(adapter, encoder, examples, longest, arguments.out / f"{name}.pt")
    backbone, _ = load("float32")
    student = Student(Adapter.load(photo_exits(arguments.adapter), backbone))
    counts = {name: len(found) for name, found in rows.items()}
    seconds, file = 60 * arguments.minutes, arguments.out / "student.pt"
    train(student, [*rows["captions"], *rows["questions"]], seconds, file, **counts)


if __name__ == "__main__":
    main()
