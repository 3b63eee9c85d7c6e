"""Captions and answers of the full model on photographs it was not trained on, greedy."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.photo_vlm.caption import answer, load
from examples.photo_vlm.command import command, parser_of
from examples.photo_vlm.rows import ids_of, read_photographs
from offramp.data.example import Example
from offramp.evaluation.statistics import Measure
from offramp.storage import write_json

METRICS = ("CIDEr", "Bleu_4", "METEOR", "ROUGE_L")
LONGEST = {"captions": 30, "questions": 8}  # tokens of an answer


def caption_figures(
    answers: Sequence[str], examples: Sequence[Example], metrics: Sequence[str]
) -> dict[str, float]:
    """Corpus scores against all captions of each photograph, with the PTB tokenizer."""
    measures = caption_measures(answers, examples, metrics)
    return {name: measure.value for name, measure in measures.items()}


def caption_measures(
    answers: Sequence[str], examples: Sequence[Example], metrics: Sequence[str]
) -> Mapping[str, Measure]:
    """The same, as `offramp.evaluation.metrics.interval` takes them."""
    from offramp.evaluation.caption_metrics import caption_scores

    keyed = {example.key: answer for example, answer in zip(examples, answers, strict=True)}
    references = {example.key: example.answers for example in examples}
    return caption_scores(keyed, references, metrics=metrics, tokenizer="ptb").measures


def accuracy(answers: Sequence[str], examples: Sequence[Example]) -> float:
    """Share of questions whose answer is one of the right ones, case and outer spaces aside."""
    right = [
        answer.strip().lower() in {reference.strip().lower() for reference in example.answers}
        for answer, example in zip(answers, examples, strict=True)
    ]
    return sum(right) / len(right)


@torch.inference_mode()
def answers_from_features(
    lm: Any, tokenizer: Any, batches: Iterator[tuple[Tensor, list[str]]], longest: int, **how: Any
) -> list[str]:
    """Greedy answers, from visual tokens [B, N, D] and prompts in batches. how: of `generate`."""
    embed = lm.get_input_embeddings()
    answers: list[str] = []
    for visual, prompts in batches:
        ids = [ids_of(tokenizer)("\n" + prompt) for prompt in prompts]
        length = max(len(row) for row in ids)
        inputs = visual.new_zeros(len(ids), visual.shape[1] + length, visual.shape[2])
        mask = torch.zeros(inputs.shape[:2], dtype=torch.long)
        for row, (tokens, seen) in enumerate(zip(ids, visual, strict=True)):
            whole = torch.cat((seen, embed(torch.tensor(tokens))))
            inputs[row, -len(whole) :] = whole
            mask[row, -len(whole) :] = 1
        generated = lm.generate(
            inputs_embeds=inputs,
            attention_mask=mask,
            max_new_tokens=longest,
            do_sample=False,
            **how,
        )
        answers += tokenizer.batch_decode(generated, skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def _answers(folder: Path, examples: Sequence[Example], longest: int, size: int) -> list[str]:
    from tqdm import tqdm

    backbone, encoder = load(folder)
    answers: list[str] = []
    for start in tqdm(range(0, len(examples), size), desc=f"{len(examples)} examples"):
        answers += answer(backbone, encoder, list(examples[start : start + size]), longest)
    return answers


@command
def main() -> None:
    parser = parser_of("evaluate", "--model runs/photo_vlm/model", str(__doc__), "data", "model")
    parser.add_argument("--limit", type=int, help="at most so many photographs, and questions")
    parser.add_argument("--batch", type=int, default=32, help="examples at a time")
    parser.add_argument("--out", type=Path, help="write figures and answers there, as JSON")
    arguments = parser.parse_args()
    splits = read_photographs(arguments.data)
    figures: dict[str, float] = {}
    said: dict[str, dict[str, str]] = {}
    for name, longest in LONGEST.items():
        examples = splits[f"{name}_val"][: arguments.limit]
        answers = _answers(arguments.model, examples, longest, arguments.batch)
        said[name] = {e.key: text for e, text in zip(examples, answers, strict=True)}
        if name == "captions":
            figures |= caption_figures(answers, examples, METRICS)
        else:
            figures["daquar_accuracy"] = accuracy(answers, examples)
        figures[f"{name}_count"] = len(examples)
    if arguments.out:
        write_json(arguments.out, {"figures": figures, "answers": said})
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
