"""Free-running greedy answers of a tiny BLIP-2, judged against the exact truth of the world."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from transformers import Blip2ForConditionalGeneration, Blip2Processor

from offramp.data.scenes import language, world
from offramp_lab.recipes.tiny_vlm.build import MAX_NEW_TOKENS, build_processor

Item = tuple[world.Scene, str, str]  # scene, prompt, reference answer
Ask = Callable[[list[Item]], list[str]]  # a text per item


@torch.no_grad()
def said(
    model: Blip2ForConditionalGeneration, processor: Blip2Processor, items: list[Item]
) -> list[str]:
    """One greedy text per item, through stock `generate`; items are sorted by prompt length so that
    little is padded."""
    order = sorted(range(len(items)), key=lambda i: len(items[i][1].split()))
    texts = [""] * len(items)
    for start in range(0, len(order), 64):
        chosen = order[start : start + 64]
        images, prompts = [world.render(items[i][0]) for i in chosen], [items[i][1] for i in chosen]
        inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS)
        if not model.language_model.config.is_encoder_decoder:
            out = out[:, inputs["input_ids"].shape[1] :]
        decoded = processor.batch_decode(out, skip_special_tokens=True)
        for i, text in zip(chosen, decoded, strict=True):
            texts[i] = text
    return texts


def share(values: Iterable[bool]) -> float:
    listed = list(values)
    return sum(listed) / max(1, len(listed))


def caption_scores(ask: Ask, scenes: list[world.Scene]) -> dict[str, float]:
    """Share of captions fully right, share right among four-object scenes, F1 of the facts."""
    texts = ask([(s, world.CAPTION_PROMPT, "") for s in scenes])
    right = [language.caption_correct(t, s) for t, s in zip(texts, scenes, strict=True)]
    claims = [
        (language.caption_attributes(t), language.scene_facts(s))
        for t, s in zip(texts, scenes, strict=True)
    ]
    hits = sum(len(a & b) for a, b in claims)
    return {
        "captions_right": share(right),
        "four_object_captions_right": share(
            r for r, s in zip(right, scenes, strict=True) if len(s.objects) == 4
        ),
        "caption_fact_f1": 2 * hits / max(1, sum(len(a) + len(b) for a, b in claims)),
    }


def question_scores(
    ask: Ask, scenes: list[world.Scene], each: int
) -> tuple[float, dict[str, float]]:
    """Accuracy of single questions, overall and by kind."""
    asked = [(s, q, a) for s in scenes for q, a in language.questions(s, each)]
    texts = ask([(s, language.question_prompt(q), a) for s, q, a in asked])
    kinds: dict[str, list[bool]] = defaultdict(list)
    for (_, question, answer), text in zip(asked, texts, strict=True):
        kinds[language.question_kind(question)].append(language.answer_correct(text, answer))
    overall = share(r for results in kinds.values() for r in results)
    return overall, {kind: share(results) for kind, results in sorted(kinds.items())}


def dialogue_scores(
    ask: Ask, scenes: list[world.Scene], rounds: int
) -> tuple[float, dict[str, float]]:
    """Accuracy of dialogue turns, overall and by turn; history is the model's own answers."""
    talks = [language.dialogue(s, rounds) for s in scenes]
    histories: list[list[language.QA]] = [[] for _ in scenes]
    turns: dict[str, float] = {}
    for turn in range(rounds):
        asked = [
            (s, language.dialogue_prompt(h, talk[turn][0]), talk[turn][1])
            for s, h, talk in zip(scenes, histories, talks, strict=True)
        ]
        texts = ask(asked)
        for history, talk, text in zip(histories, talks, texts, strict=True):
            history.append((talk[turn][0], text))
        turns[f"turn_{turn + 1}"] = share(
            language.answer_correct(t, item[2]) for t, item in zip(texts, asked, strict=True)
        )
    return sum(turns.values()) / rounds, turns


def quick(model: Blip2ForConditionalGeneration, backbone: str) -> dict[str, float]:
    """A first impression on validation scenes, cheap enough to take while training."""
    model.eval()
    ask = partial(said, model, build_processor(backbone))
    scenes = list(world.scenes("validation", 96))
    result = {
        "answers_right": question_scores(ask, scenes, each=3)[0],
        "dialogue_right": dialogue_scores(ask, scenes[:32], rounds=3)[0],
        **caption_scores(ask, scenes),
    }
    model.train()
    return result


def full(
    model: Blip2ForConditionalGeneration, processor: Blip2Processor, split: str, n: int
) -> dict[str, Any]:
    """Everything the record holds, on `n` scenes of a split."""
    model.eval()
    ask, scenes = partial(said, model, processor), list(world.scenes(split, n))
    answers, kinds = question_scores(ask, scenes, each=4)
    dialogue, turns = dialogue_scores(ask, scenes[: n // 2], rounds=5)
    return {
        "split": split,
        "scenes": n,
        "question_accuracy": answers,
        "question_accuracy_by_kind": kinds,
        "dialogue_accuracy": dialogue,
        "dialogue_accuracy_by_turn": turns,
        **caption_scores(ask, scenes),
    }
