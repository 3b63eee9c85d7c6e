"""Train what joins EfficientNet-lite0 and SmolLM2, and low-rank updates of SmolLM2.

Starts with a detector of words (a minute), whose surest words the language model then reads behind
the bridge's tokens; goes on through the language model, on the likest captions of each photograph.
Cut off at any time, the same command goes on from the last checkpoint, exactly. The best weights
by CIDEr, on photographs of the choosing half of the validation split, are kept beside.
"""

from __future__ import annotations

import copy
import random
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from examples.photo_vlm.command import command, parser_of
from examples.photo_vlm.evaluate import LONGEST, accuracy, answers_from_features, caption_measures
from examples.photo_vlm.learn import (
    add_lora,
    fast_dtype,
    load_state,
    low_rank,
    rate_at,
    save_state,
    set_low_rank,
    text_loss,
)
from examples.photo_vlm.photos import cache_features, features_of, varied
from examples.photo_vlm.rows import (
    Ids,
    PackedRows,
    Row,
    consensual,
    half_of,
    ids_of,
    pack,
    read_photographs,
)
from examples.photo_vlm.words import Detectors, embeddings_of, texts_by_photograph, vocabulary_of
from offramp.common.jsonl_log import JsonlLog
from offramp.core.errors import DataError, InputError
from offramp.core.storage import read_json, write_json
from offramp.inputs.example import Example
from offramp_photo.build import CARD, WEIGHTS, add_updates, load_language, load_network
from offramp_photo.packages import LANGUAGE, VISION, weights_file
from offramp_photo.tower import Bridge, PhotoTowerConfig, WordDetector

T = TypeVar("T", bound="Trainer")


@dataclass(frozen=True)
class Settings:
    """captioned: photographs with captions a step, of `captions` captions each, in rows of `length`
    tokens. asked: photographs with questions, every `ask_every` steps, in rows of `asked_length`;
    question_weight: of their loss. drop: share of detected words that are left out. vary: share of
    photographs that are cropped and mirrored from the second pass on. Only `steps` may change
    between runs of one training."""

    steps: int
    rate: float = 1e-3
    bridge_rate: float = 6e-4
    captioned: int = 8
    captions: int = 2
    length: int = 72
    asked: int = 1
    ask_every: int = 3
    asked_length: int = 112
    question_weight: float = 0.3
    rank: int = 16
    drop: float = 0.1
    vary: float = 0.5
    seed: int = 0


def drawing(name: str) -> torch.Generator:
    """A generator of its own for what has this name, so that a run resumes exactly."""
    return torch.Generator().manual_seed(random.Random(name).getrandbits(40))


class Views:
    """Features of training photographs: as cached or, now and then, of a part of them, mirrored."""

    def __init__(self, features: Any, examples: Sequence[Example], net: Any) -> None:
        """features, examples: by place."""
        self.features, self.examples, self.net = features, examples, net

    def __call__(self, rows: Sequence[Row], share: float, draw: random.Random) -> Tensor:
        """Features [B, 49, 1280]."""
        features: Tensor = self.features[[row.image for row in rows]]
        chosen = [n for n, row in enumerate(rows) if row.pass_ and draw.random() < share]
        if chosen:
            images = [
                varied(self.examples[rows[n].image].open_image(), draw, mirror=not rows[n].sided)
                for n in chosen
            ]
            features[chosen] = features_of(self.net, images)
        return features


class Trainer:
    """One training: `run` takes steps, `save` and `load` keep its state."""

    def __init__(
        self,
        bridge: Bridge,
        detectors: Detectors,
        lm: Any,
        rows: PackedRows,
        views: Views,
        settings: Settings,
    ) -> None:
        """lm: frozen; low-rank updates are added to it here."""
        self.bridge, self.detectors, self.lm = bridge, detectors, lm
        self.rows, self.views, self.settings = rows, views, settings
        self.step = 0
        self.seconds = 0.0
        self.best: dict[str, Any] = {"CIDEr": -1.0, "step": 0, "bridge": {}, "lora": {}}
        torch.manual_seed(settings.seed)
        self.lora = add_lora(lm, settings.rank)
        self._trained = [p for p in bridge.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [{"params": list(self.lora.values())}, {"params": self._trained}],
            lr=0.0,
            betas=(0.9, 0.98),
            weight_decay=0.01,
        )

    def run(self, until: int, report: Callable[[dict[str, float]], bool]) -> None:
        """Take steps until step `until`, or until `report`, called after each, returns False."""
        while self.step < until:
            start = time.process_time()
            row = self._take()
            self.step += 1
            self.seconds += time.process_time() - start
            if not report({"step": self.step, "cpu_seconds": self.seconds, **row}):
                return

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """What is learnt, in copies."""
        return {
            "bridge": {n: t.clone() for n, t in self.bridge.state_dict().items()},
            "lora": {n: p.detach().clone() for n, p in self.lora.items()},
        }

    def save(self, path: Path) -> None:
        save_state(
            path,
            {
                "step": self.step,
                "seconds": self.seconds,
                "settings": asdict(self.settings),
                **self.weights(),
                "optimizer": self.optimizer.state_dict(),
                "best": self.best,
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
        self.step, self.seconds, self.best = state["step"], state["seconds"], state["best"]
        self.bridge.load_state_dict(state["bridge"])
        with torch.no_grad():
            for name, parameter in self.lora.items():
                parameter.copy_(state["lora"][name])
        self.optimizer.load_state_dict(state["optimizer"])

    def _take(self) -> dict[str, float]:
        s = self.settings
        share = rate_at(self.step, s.steps)
        for group, rate in zip(self.optimizer.param_groups, (s.rate, s.bridge_rate), strict=True):
            group["lr"] = share * rate
        self.optimizer.zero_grad()
        row = self._learn_step()
        norm = torch.nn.utils.clip_grad_norm_([*self.lora.values(), *self._trained], 1.0)
        self.optimizer.step()
        return {**row, "gradient": norm.item(), "rate": share}

    def _learn_step(self) -> dict[str, float]:
        s = self.settings
        row = self._learn_captions()
        if self.step % s.ask_every == 0:
            rows = self.rows.questions(self.step // s.ask_every, s.seed, s.asked)
            row["question_loss"] = self._learn(rows, s.asked_length, s.question_weight)
        return row

    def _learn_captions(self) -> dict[str, float]:
        s = self.settings
        rows = self.rows.captions(self.step, s.seed, s.captioned)
        return {"loss": self._learn(rows, s.length, 1.0)}

    def _learn(self, rows: list[Row], length: int, weight: float) -> float:
        """Add the gradient of the loss on some rows; the loss."""
        return self._learn_behind(self._seen(rows, f"{length}"), rows, length, weight)

    def _seen(self, rows: list[Row], name: str) -> Tensor:
        """Visual tokens of the rows' photographs, with a gradient; name: of what is drawn."""
        s = self.settings
        name = f"{s.seed}:{self.step}:{name}"
        features = self.views(rows, s.vary, random.Random(name))
        logits = self.detectors(features, [row.image for row in rows])
        chance = drawing(name)
        words = self.bridge.words.count
        keep = torch.rand(len(rows), words, generator=chance) >= s.drop
        with torch.autocast("cpu", torch.bfloat16, enabled=self.lm.dtype == torch.bfloat16):
            visual: Tensor = self.bridge(features, logits, keep)
        return visual

    def _learn_behind(self, visual: Tensor, rows: list[Row], length: int, weight: float) -> float:
        batch = pack(rows, visual.shape[1], length, self.lm.dtype)
        loss = text_loss(self.lm, visual, batch)
        (weight * loss).backward()  # type: ignore[no-untyped-call]
        return loss.item()


class Validation:
    """Answers of the model in training, its updates merged into a copy, to held-out examples."""

    def __init__(
        self, plain: Any, tokenizer: Any, splits: Any, features: Any, photographs: int
    ) -> None:
        """plain: a language model without updates. photographs: and as many questions."""
        self.lm, self.tokenizer, self.features = plain, tokenizer, features
        self.start = {n: t.clone() for n, t in plain.state_dict().items() if "proj" in n}
        self.examples = {
            split: _spread([e for e in splits[f"{split}_val"] if half_of(e) == 0], photographs)
            for split in LONGEST
        }

    @torch.inference_mode()
    def __call__(self, bridge: Bridge, detector: WordDetector, lora: Any) -> dict[str, Any]:
        row: dict[str, Any] = {}
        for split, examples in self.examples.items():
            asked = [(e.group, e.prompt) for e in examples]
            answers = self.answers(bridge, detector, lora, asked, LONGEST[split])
            if split == "captions":
                measures = caption_measures(answers, examples, ("CIDEr", "Bleu_4"))
                row |= {name: measure.value for name, measure in measures.items()}
            else:
                row["accuracy"] = accuracy(answers, examples)
            row[f"{split}_said"] = answers[:4]
        return row

    @torch.inference_mode()
    def answers(
        self,
        bridge: Bridge,
        detector: WordDetector,
        lora: Any,
        asked: Sequence[tuple[str, str]],
        longest: int,
    ) -> list[str]:
        """Greedy answers. asked: photographs, by `Example.group`, each with a prompt."""
        add_updates(self.lm, self.start, low_rank(lora))
        bridge = copy.deepcopy(bridge).to(self.lm.dtype)
        batches = (
            (self._visual(bridge, detector, [g for g, _ in batch]), [p for _, p in batch])
            for batch in (asked[i : i + 50] for i in range(0, len(asked), 50))
        )
        return answers_from_features(self.lm, self.tokenizer, batches, longest)

    def _visual(self, bridge: Bridge, detector: WordDetector, groups: list[str]) -> Tensor:
        features = self.features[[self.features.places[group] for group in groups]]
        logits = detector(WordDetector.pooled(features))
        visual: Tensor = bridge(features.to(self.lm.dtype), logits)
        return visual


def _spread(examples: list[Example], count: int) -> list[Example]:
    return examples[:: max(1, len(examples) // count)][:count]


def start_bridge(
    config: PhotoTowerConfig, before: Mapping[str, Tensor] | None, table: Tensor
) -> Bridge:
    """A bridge with the words' embeddings; the rest of it new, or as it was learnt `before`."""
    bridge = Bridge(config)
    for parameter in bridge.projector.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
        else:
            torch.nn.init.zeros_(parameter)
    if before is not None:
        own = {n: t for n, t in bridge.state_dict().items() if n.startswith("words.")}
        bridge.load_state_dict({**own, **{n: t.float() for n, t in before.items()}})
    bridge.words.table.data = table.float()
    return bridge


def learnt_before(start: Path) -> dict[str, dict[str, Tensor]]:
    """Bridge, detector and low-rank updates of a folder that `export` wrote.

    Raises:
        DataError: the folder holds none.
    """
    from safetensors.torch import load_file

    if not (start / WEIGHTS).is_file():
        raise DataError(
            f"{start} holds no {WEIGHTS}.",
            "Name a folder that `export` wrote, such as photo-model/offramp_photo.",
        )
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(start / WEIGHTS).items():
        group, _, inner = name.partition(".")
        groups.setdefault(group, {})[inner] = tensor
    return groups


def keep_words(start: Path, work: Path) -> None:
    """Let a training have the words of such a folder, in the order learnt, if it has none yet."""
    if not (work / "words.json").is_file():
        write_json(work / "words.json", read_json(start / CARD)["words"])


def learnt_words(
    splits: Any,
    features: Any,
    embeddings: Tensor,
    ids: Ids,
    work: Path,
    whole: Mapping[str, Tensor] | None = None,
) -> tuple[PhotoTowerConfig, Detectors, Tensor]:
    """The tower's configuration, the detectors and the words' embeddings; learnt where the folder
    does not hold them yet. whole: as of `Detectors.learnt`."""
    spoken = texts_by_photograph(splits)
    # Kept with the detectors: what is trained later holds the words in this order.
    is_kept = (work / "detectors.pt").is_file()
    named = work / "words.json"
    words = read_json(named) if named.is_file() else vocabulary_of(spoken)
    config = PhotoTowerConfig(hidden_size=embeddings.shape[1], vocabulary=len(words))
    table = embeddings_of(words, embeddings, ids)
    if is_kept:
        detectors = Detectors(config)
        detectors.load_state_dict(torch.load(work / "detectors.pt", weights_only=True))
        return config, detectors, table
    places = sorted(features.places[group] for group in spoken)
    names = {place: group for group, place in features.places.items()}
    column = {word: n for n, word in enumerate(words)}
    present = torch.zeros(len(places), len(words), dtype=torch.bool)
    for n, place in enumerate(places):
        present[n, [column[w] for w in spoken[names[place]] if w in column]] = True
    pooled = torch.cat(
        [WordDetector.pooled(features[places[i : i + 64]]) for i in range(0, len(places), 64)]
    )
    halves = [torch.tensor([p % 2 == half for p in places]) for half in range(2)]
    detectors = Detectors.learnt(pooled, present, halves, config, _say, whole)
    write_json(named, words)
    save_state(work / "detectors.pt", detectors.state_dict())
    return config, detectors, table


def options_of(name: str, description: str, steps: int) -> Any:
    """What `train` and `reinforce` are told."""
    parser = parser_of(name, f"--steps {steps}", description, "data", "work")
    parser.add_argument("--steps", type=int, default=steps, help="default: %(default)s")
    parser.add_argument("--every", type=float, default=180, help="seconds between checkpoints")
    parser.add_argument("--validate", type=int, default=100, help="steps between validations")
    parser.add_argument("--photographs", type=int, default=500, help="to validate on")
    parser.add_argument("--no-compile", action="store_true", help="where there is no C++ compiler")
    return parser


def prepared(
    kind: type[T], settings: Settings, before: Mapping[str, Mapping[str, Tensor]], arguments: Any
) -> tuple[T, Validation, dict[str, list[Example]]]:
    """A trainer that starts from bridge and updates of `before`, its validation, and the data."""
    work: Path = arguments.work
    splits = read_photographs(arguments.data)
    examples = {e.group: e for some in splits.values() for e in some}
    weights = work / "weights"
    dtype = fast_dtype()
    net = load_network(weights_file(VISION, weights)).to(dtype)
    features = cache_features(net, list(examples.values()), work, _say)
    plain, tokenizer = load_language(weights_file(LANGUAGE, weights))
    lm = copy.deepcopy(plain.to(dtype))
    lm.set_attn_implementation("eager")
    ids = ids_of(tokenizer)
    embeddings = lm.get_input_embeddings().weight
    config, detectors, table = learnt_words(
        splits, features, embeddings, ids, work, before.get("detector")
    )
    torch.manual_seed(0)
    bridge = start_bridge(config, before.get("bridge"), table)
    rows = PackedRows(
        {**splits, "captions": consensual(splits["captions"], settings.captions)},
        features.places,
        ids,
        tokenizer.eos_token_id,
    )
    views = Views(features, list(examples.values()), net)
    validation = Validation(plain, tokenizer, splits, features, arguments.photographs)
    trainer = kind(bridge, detectors, lm, rows, views, settings)
    if "lora" in before:
        set_low_rank(trainer.lora, before["lora"])
    if not arguments.no_compile:
        for layer in lm.model.layers:
            layer.compile(dynamic=False)
    return trainer, validation, splits


def go(
    trainer: Trainer, validation: Callable[..., dict[str, Any]], name: str, arguments: Any
) -> None:
    """Train to the last step, or until interrupted; state and log are NAME.pt and NAME.jsonl."""
    state: Path = arguments.work / f"{name}.pt"
    if state.exists():
        trainer.load(state)
        _say(f"going on from step {trainer.step}")
    log = JsonlLog(state.with_suffix(".jsonl"))
    stop: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda got, _: stop.append(got))
    saved = time.monotonic()
    total = trainer.settings.steps

    def each(row: dict[str, float]) -> bool:
        nonlocal saved
        if trainer.step % 10 == 0:
            log.append(row)
        if trainer.step % arguments.validate == 0 or trainer.step == total:
            figures = validation(trainer.bridge, trainer.detectors.whole, trainer.lora)
            log.append({"step": trainer.step, "cpu_seconds": trainer.seconds, **figures})
            _say(f"step {trainer.step}: CIDEr {figures['CIDEr']:.3f}")
            if figures["CIDEr"] > trainer.best["CIDEr"]:
                best = {"CIDEr": figures["CIDEr"], "step": trainer.step}
                trainer.best = {**best, **trainer.weights()}
        if stop or trainer.step == total or time.monotonic() - saved > arguments.every:
            trainer.save(state)
            saved = time.monotonic()
        return not stop

    trainer.run(total, each)
    _say(f"step {trainer.step} of {total}; state in {state}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@command
def main() -> None:
    parser = options_of("train", str(__doc__), 4000)
    parser.add_argument(
        "--start",
        type=Path,
        metavar="DIR",
        help="what `export` wrote, as photo-model/offramp_photo, to start from (default: a bridge "
        "that knows nothing)",
    )
    arguments = parser.parse_args()
    before = {}
    if arguments.start is not None:
        before = learnt_before(arguments.start)
        keep_words(arguments.start, arguments.work)
    trainer, validation, _ = prepared(Trainer, Settings(arguments.steps), before, arguments)
    go(trainer, validation, "state", arguments)


if __name__ == "__main__":
    main()
