"""Stage 2: teach the tongue. Projection and language model learn to caption and to answer.

The eyes are frozen, so their features are computed once for a pool of training scenes. Plain
next-token training on the answers alone: nothing here knows of early exits. A training text carries
several questions; the last token of an answer is taught to predict </s> although the text goes on
with the next question, so one pass teaches all rounds and `generate` still stops after each answer.
"""

from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Blip2ForConditionalGeneration

from offramp.data.scenes import language, world
from offramp_lab.recipes.tiny_vlm.build import (
    EOS,
    PAD,
    QUERIES,
    WIDTH,
    build_model,
    build_tokenizer,
)
from offramp_lab.recipes.tiny_vlm.checkpointing import Log, Training, rate
from offramp_lab.recipes.tiny_vlm.evaluate import quick
from offramp_lab.recipes.tiny_vlm.train_vision import DAMAGED, Eyes, pixels

IGNORE = -100
PEAKS = {"opt": 1e-3, "t5": 1.5e-3}  # learning rates
SIZES = {"opt": (8, 56), "t5": (8, 88)}  # scenes a step, of captions and of questions
HARD = ("count", "exists", "where", "color")  # asked three times as often: learnt last
Row = tuple[list[int], list[int]]  # token ids, label of each position (OPT) or of the decoder (T5)


@torch.no_grad()
def pool(eyes: Eyes, work: Path, size: int) -> np.ndarray:
    """Query states of the first `size` training scenes, float16 [size, Q, D], computed once."""
    path = work / f"features-{size}.npy"
    if not path.exists():
        eyes.eval()
        states = np.empty((size, QUERIES, WIDTH), dtype=np.float16)
        for start in range(0, size, 250):
            scenes = list(world.scenes("train", min(250, size - start), start))
            states[start : start + len(scenes)] = eyes.features(pixels(scenes, DAMAGED))[1].numpy()
        fresh = path.with_suffix(".new.npy")
        np.save(fresh, states)
        fresh.rename(path)
    return np.load(path)


class Texts:
    """Makes token ids and labels for one backbone; `row` is `rounds` of OPT and `turn` of T5."""

    def __init__(self, backbone: str) -> None:
        self.row = self.rounds if backbone == "opt" else self.turn
        self.tokenizer = build_tokenizer(backbone)
        self.vocab_size = len(self.tokenizer)
        self.chunk = lru_cache(maxsize=None)(self._chunk)

    def _chunk(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def ids(self, text: str) -> list[int]:
        """Token ids without specials; a text splits at spaces, so whole words can be remembered."""
        return [i for chunk in text.split() for i in self.chunk(chunk)]

    def rounds(self, turns: list[language.QA]) -> Row:
        """OPT: `</s> prompt answer prompt answer ...`, labels for answers and their ends."""
        ids, labels = [EOS], [IGNORE]
        for prompt, answer in turns:
            asked, said = self.ids(prompt), self.ids(answer)
            ids += asked + said
            labels += [IGNORE] * (len(asked) - 1) + said + [EOS]
        return ids, labels

    def turn(self, turns: list[language.QA]) -> Row:
        """T5: encoder ids of all rounds, decoder labels of the last answer."""
        prompt, answer = turns[-1]
        history = " ".join(f"{p} {a}" for p, a in turns[:-1])
        return [*self.ids(f"{history} {prompt}"), EOS], [*self.ids(answer), EOS]


def captions(texts: Texts, scenes: list[world.Scene]) -> list[Row]:
    return [texts.row([(world.CAPTION_PROMPT, language.caption(s))]) for s in scenes]


def answers(
    texts: Texts, backbone: str, rng: np.random.Generator, scenes: list[world.Scene]
) -> list[Row]:
    """Two thirds unrelated questions, one third dialogues."""
    rows = []
    for i, scene in enumerate(scenes):
        if i % 3 == 0:
            turns = language.dialogue(scene, 5)
            if backbone == "t5":
                turns = turns[: int(rng.integers(1, 6))]
        else:
            found = language.questions(scene, 8)
            count = 5 if backbone == "opt" else 1
            weights = [3.0 if language.question_kind(q) in HARD else 1.0 for q, _ in found]
            share = np.array(weights) / sum(weights)
            turns = [found[j] for j in rng.choice(len(found), min(count, len(found)), False, share)]
        rows.append(texts.row([(language.question_prompt(q), a) for q, a in turns]))
    return rows


def padded(rows: list[list[int]], value: int) -> Tensor:
    out = torch.full((len(rows), max(map(len, rows))), value)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.tensor(row)
    return out


@torch.autocast("cpu", torch.bfloat16)
def loss(model: Blip2ForConditionalGeneration, states: Tensor, rows: list[Row]) -> Tensor:
    """Mean cross-entropy of the answer tokens; `states` are query states [B, Q, D]."""
    language = model.language_model
    ids, labels = padded([r[0] for r in rows], PAD), padded([r[1] for r in rows], IGNORE)
    seen = model.language_projection(states)
    inputs = torch.cat([seen, model.get_input_embeddings()(ids)], dim=1)  # [B, Q + T, D]
    if language.config.is_encoder_decoder:
        mask = torch.cat([torch.ones(seen.shape[:2], dtype=torch.long), (ids != PAD).long()], dim=1)
        return language(inputs_embeds=inputs, attention_mask=mask, labels=labels).loss
    hidden = language.model.decoder(inputs_embeds=inputs, use_cache=False).last_hidden_state[
        :, QUERIES:
    ]
    taught = labels != IGNORE  # pads come last, so causal attention needs no mask
    return F.cross_entropy(language.lm_head(hidden[taught]), labels[taught])


def batches(
    backbone: str, states: np.ndarray, first: int, steps: int, size: tuple[int, int], seed: int
) -> Iterator[list[tuple[Tensor, list[Row]]]]:
    """For every step one batch of captions and a larger one of questions, which are harder."""
    texts = Texts(backbone)
    for step in range(first, steps):
        rng = np.random.default_rng((seed, step))
        parts = []
        for count, rows in zip(
            size, (partial(captions, texts), partial(answers, texts, backbone, rng)), strict=True
        ):
            index = rng.choice(len(states), size=count, replace=False)
            scenes = [world.scene("train", int(i)) for i in index]
            parts.append((torch.from_numpy(states[index]).float(), rows(scenes)))
        yield parts


def fresh_model(backbone: str, eyes: Eyes) -> Blip2ForConditionalGeneration:
    """A new BLIP-2 that sees with the trained eyes, frozen."""
    model = build_model(backbone, Texts(backbone).vocab_size)
    model.vision_model.load_state_dict(eyes.vision_model.state_dict())
    model.qformer.load_state_dict(eyes.qformer.state_dict())
    model.query_tokens.data.copy_(eyes.query_tokens.data)
    for part in (model.vision_model, model.qformer):
        part.requires_grad_(False)
    model.query_tokens.requires_grad_(False)
    return model


@torch.no_grad()
def name_cells(projection: nn.Linear, states: np.ndarray) -> None:
    """Start the projection so that every image token says, beside all else, which query it is.

    The number of the query makes up 5% of the variance of its state. OPT adds positions of its own;
    T5 has none that reach the decoder, and without this start it named attributes but not places
    for over 500 steps. Least squares reads the number (exactly, on this pool) and random directions
    say it.
    """
    seen = np.asarray(states[:2000], dtype=np.float64).reshape(-1, WIDTH)
    inputs = np.concatenate([seen, np.ones((len(seen), 1))], axis=1)
    number = np.tile(np.eye(QUERIES), (len(seen) // QUERIES, 1))
    readout = torch.from_numpy(np.linalg.lstsq(inputs, number, rcond=None)[0].T).float()
    directions = torch.randn(projection.out_features, QUERIES)
    projection.weight += directions @ readout[:, :-1]
    projection.bias += directions @ readout[:, -1]


def train(
    backbone: str,
    eyes: Eyes,
    states: np.ndarray,
    work: Path,
    steps: int,
    seed: int = 0,
    restart: int = 0,
) -> Blip2ForConditionalGeneration:
    """Train projection and language model, or go on from the last checkpoint.

    restart: step at which the learning rate starts its schedule again (Loshchilov and Hutter 2017).
    """
    torch.manual_seed(seed + 1)
    log = Log(work / f"speak-{backbone}.jsonl")
    model = fresh_model(backbone, eyes)
    if backbone == "t5":
        name_cells(model.language_projection, states)
    # bfloat16 with plain attention takes 0.63 of the time of float32 with the fused one, whose
    # backward pass is slow in bfloat16 on a CPU.
    model.language_model.set_attn_implementation("eager")
    training = Training(model, PEAKS[backbone], work / f"speak-{backbone}.pt")
    first = training.step
    for step, parts in enumerate(
        batches(backbone, states, first, steps, SIZES[backbone], seed), start=first
    ):
        losses = (loss(model, seen, rows) for seen, rows in parts)
        values = training.take(rate(step - restart, steps - restart), losses)
        if step % 50 == 0:
            log(stage=backbone, step=step, caption_loss=values[0], answer_loss=values[1])
        if training.save(step, step == steps - 1, every=180):
            log(stage=backbone, step=step + 1, **quick(model, backbone))
    return model
