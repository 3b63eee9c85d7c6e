"""Train the bridge between EfficientNet-lite0 and SmolLM2; both stay frozen. Resumes exactly."""

from __future__ import annotations

import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.photo_vlm.build import load_language, load_network, new_bridge
from examples.photo_vlm.command import command, parser_of
from examples.photo_vlm.evaluate import (
    LONGEST,
    accuracy,
    answers_from_features,
    caption_figures,
)
from examples.photo_vlm.learn import (
    Bridge,
    WordDetector,
    load_state,
    rate_at,
    save_state,
    text_loss,
)
from examples.photo_vlm.photos import cache_features
from examples.photo_vlm.rows import PackedRows, ids_of, pack, read_photographs
from examples.photo_vlm.vision import LiteTowerConfig
from offramp.errors import InputError
from offramp.storage import JsonlLog


@dataclass(frozen=True)
class Settings:
    """align: steps of word detection, on `align_batch` photographs each; then `steps` through the
    language model, on so many rows of photographs with captions and with questions. The length of a
    row is in tokens. Only `steps` may change between runs of one training."""

    steps: int
    align: int = 300
    rate: float = 6e-4
    captioned: int = 6
    asked: int = 2
    align_batch: int = 32
    length: int = 96
    seed: int = 0


class Trainer:
    """One training: `run` takes steps, `save` and `load` keep its state."""

    def __init__(
        self,
        bridge: Bridge,
        lm: Any,
        rows: PackedRows,
        features: Any,
        visual: int,
        settings: Settings,
    ) -> None:
        """lm: frozen; features: feature maps by place; visual: number of visual tokens."""
        self.bridge, self.lm, self.rows, self.features = bridge, lm, rows, features
        self.visual, self.settings = visual, settings
        self.step = 0
        self.seconds = 0.0
        self.detector, self._present = _detector(lm, rows)
        self.optimizer = self._new_optimizer()

    def run(self, until: int, report: Callable[[dict[str, float]], bool]) -> None:
        """Take steps until step `until`, or until `report`, called after each, returns False."""
        while self.step < until:
            start = time.perf_counter()
            if self.step == self.settings.align:
                self.optimizer = self._new_optimizer()  # gradients are of another size from here
            row = self._take()
            self.step += 1
            self.seconds += time.perf_counter() - start
            if not report({"step": self.step, "seconds": self.seconds, **row}):
                return

    def save(self, path: Path) -> None:
        bridge = {"bridge": self.bridge.state_dict(), "detector": self.detector.state_dict()}
        save_state(
            path,
            {
                "step": self.step,
                "bridge": bridge,
                "optimizer": self.optimizer.state_dict(),
                "settings": asdict(self.settings),
                "seconds": self.seconds,
            },
        )

    def load(self, path: Path) -> None:
        """Raise `InputError` where the state is of a training with other settings."""
        state = load_state(path)
        changed = {
            name: (state["settings"].get(name), value)
            for name, value in asdict(self.settings).items()
            if name != "steps" and state["settings"].get(name) != value
        }
        if changed:
            name, (was, now) = next(iter(changed.items()))
            raise InputError(
                f"{path} is of a training with {name} {was}, not {now}.",
                "Give the same settings, or another --work folder.",
            )
        self.step, self.seconds = state["step"], state["seconds"]
        self.bridge.load_state_dict(state["bridge"]["bridge"])
        self.detector.load_state_dict(state["bridge"]["detector"])
        self.optimizer = self._new_optimizer()
        self.optimizer.load_state_dict(state["optimizer"])

    def _take(self) -> dict[str, float]:
        aligning = self.step < self.settings.align
        steps = self.settings.align if aligning else self.settings.steps
        step = self.step if aligning else self.step - self.settings.align
        rate = rate_at(step, steps, self.settings.rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self._align_loss(step) if aligning else self._text_loss(step)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.bridge.parameters(), 1.0)
        self.optimizer.step()
        name = "align_loss" if aligning else "loss"
        return {name: loss.item(), "gradient": norm.item(), "rate": rate}

    def _align_loss(self, step: int) -> Tensor:
        size = self.settings.align_batch
        chosen = self.rows.photographs(size * step, size, self.settings.seed)
        visual = self.bridge(self.features[[self.rows.place(i) for i in chosen]])
        return self.detector.loss(visual, self._present[chosen].float())

    def _text_loss(self, step: int) -> Tensor:
        s = self.settings
        rows = self.rows.step(step, s.seed, s.captioned, s.asked)
        batch = pack(rows, self.visual, s.length, self.lm.dtype)
        features = self.features[batch.images]
        return text_loss(self.bridge, self.lm, features, batch)

    def _new_optimizer(self) -> torch.optim.Optimizer:
        parameters = [*self.bridge.parameters(), *self.detector.parameters()]
        return torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.98), weight_decay=0.01)


def _detector(lm: Any, rows: PackedRows) -> tuple[WordDetector, Tensor]:
    """The detector of words that are neither in nearly all captions nor in hardly any, and which
    photographs have which: [photographs, W]."""
    spoken = rows.spoken()
    counts = Counter(i for ids in spoken for i in ids)
    fewest, most = max(1, len(spoken) // 400), 0.8 * len(spoken)
    words = [i for i, count in counts.most_common() if fewest <= count <= most]
    place = {word: n for n, word in enumerate(words)}
    present = torch.zeros(len(spoken), len(words), dtype=torch.bool)
    for n, ids in enumerate(spoken):
        present[n, [place[i] for i in ids if i in place]] = True
    weight = lm.get_input_embeddings().weight[torch.tensor(words)]
    return WordDetector(weight, present.float().mean(0)), present


def _validate(trainer: Trainer, tokenizer: Any, splits: Any, count: int) -> dict[str, Any]:
    """Figures on `count` photographs and as many questions, spread over the held-out ones."""
    row: dict[str, Any] = {"step": trainer.step, "seconds": trainer.seconds}
    for split, longest in LONGEST.items():
        held = splits[f"{split}_val"]
        examples = held[:: max(1, len(held) // count)][:count]
        batches = (
            (
                trainer.features[[trainer.rows.images[e.group] for e in batch]],
                [e.prompt for e in batch],
            )
            for batch in (examples[i : i + 50] for i in range(0, len(examples), 50))
        )
        answers = answers_from_features(trainer.bridge, trainer.lm, tokenizer, batches, longest)
        if split == "captions":
            row |= caption_figures(answers, examples, ("CIDEr", "Bleu_4"))
        else:
            row["accuracy"] = accuracy(answers, examples)
        row[f"{split}_said"] = answers[:4]
    return row


@command
def main() -> None:
    parser = parser_of("train", "--resume --steps 3000", str(__doc__), "data", "work")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--steps", type=int, default=3000, help="through the language model")
    parser.add_argument("--align", type=int, default=300, help="steps of word detection before")
    parser.add_argument("--rate", type=float, default=6e-4, help="highest learning rate")
    parser.add_argument("--every", type=float, default=180, help="seconds between checkpoints")
    parser.add_argument("--validate", type=int, default=300, help="steps between validations")
    parser.add_argument("--no-compile", action="store_true", help="where there is no C++ compiler")
    arguments = parser.parse_args()
    work: Path = arguments.work
    state = work / "state.pt"
    if state.exists() and not arguments.resume:
        raise InputError(f"{state} exists.", "Add --resume, or name another --work folder.")
    settings = Settings(arguments.steps, arguments.align, arguments.rate)
    splits = read_photographs(arguments.data)
    features = cache_features(
        load_network(work).bfloat16(),
        [e for examples in splits.values() for e in examples],
        work,
        _say,
    )
    lm, tokenizer = load_language(work, attn_implementation="eager")
    torch.manual_seed(settings.seed)
    tower = LiteTowerConfig()
    bridge = new_bridge(lm.config, tower)
    rows = PackedRows(splits, features.places, ids_of(tokenizer), tokenizer.eos_token_id)
    trainer = Trainer(bridge, lm, rows, features, tower.tokens, settings)
    if arguments.resume and state.exists():
        trainer.load(state)
    if not arguments.no_compile:
        for layer in lm.model.layers:
            layer.compile(dynamic=False)
    _go(trainer, tokenizer, splits, arguments)


def _go(trainer: Trainer, tokenizer: Any, splits: Any, arguments: Any) -> None:
    work: Path = arguments.work
    log = JsonlLog(work / "log.jsonl")
    stop: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda got, _: stop.append(got))
    saved = time.monotonic()
    total = trainer.settings.align + trainer.settings.steps

    def each(row: dict[str, float]) -> bool:
        nonlocal saved
        if trainer.step % 10 == 0:
            log.append(row)
        done = trainer.step - trainer.settings.align
        if done > 0 and (done % arguments.validate == 0 or trainer.step == total):
            with torch.compiler.set_stance("force_eager"):
                log.append(_validate(trainer, tokenizer, splits, 150))
        if stop or trainer.step == total or time.monotonic() - saved > arguments.every:
            trainer.save(work / "state.pt")
            saved = time.monotonic()
        return not stop

    trainer.run(total, each)
    _say(f"step {trainer.step} of {total}; state in {work / 'state.pt'}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
