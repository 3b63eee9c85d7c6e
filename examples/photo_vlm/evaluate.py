"""Captions and answers of the full model, on the half of held-out photographs that chose nothing.

Of Flickr8k's validation split, and of DAQUAR's questions about photographs that were held out.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.photo_vlm.command import command, parser_of
from examples.photo_vlm.rows import half_of, ids_of, read_photographs
from offramp.common.progress import progress
from offramp.common.provenance import provenance
from offramp.core.models.backbone import Backbone
from offramp.core.storage import write_json
from offramp.engines.loading import open_backbone
from offramp.evaluation.statistics import Measure, interval, mean_of
from offramp.features.input_processor import InputProcessor
from offramp.inputs.example import Example

METRICS = ("CIDEr", "Bleu_4", "METEOR", "ROUGE_L")
LONGEST = {"captions": 30, "questions": 8}  # tokens of an answer
BATCH = 32  # examples; a beam sees each photograph as often as it is wide


def load(
    dtype: str = "bfloat16", quantize: str | None = None, vision: str = "torch", name: str = "photo"
) -> tuple[Backbone, InputProcessor]:
    """A model of photographs and its encoder. Arguments and errors: of `open_backbone`."""
    backbone, processor = open_backbone(name, dtype=dtype, quantize=quantize, vision=vision)
    return backbone, InputProcessor(backbone, processor)


@torch.inference_mode()
def full_answers(
    backbone: Any, encoder: InputProcessor, examples: Sequence[Example], longest: int, **how: Any
) -> list[str]:
    """Greedy answers of the full model, in batches. how: of `generate`."""
    texts: list[str] = []
    for start in progress(range(0, len(examples), BATCH), f"{len(examples)} examples"):
        prompts = encoder.prompts(examples[start : start + BATCH])
        ids = backbone.model.generate(**prompts, max_new_tokens=longest, do_sample=False, **how)
        texts += encoder.texts(ids[:, prompts["input_ids"].shape[1] :])
    return texts


def caption_measures(
    answers: Sequence[str], examples: Sequence[Example], metrics: Sequence[str]
) -> Mapping[str, Measure]:
    """Corpus scores against all captions of each photograph, with the PTB tokenizer."""
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
    lm: Any, tokenizer: Any, batches: Iterator[tuple[Tensor, list[str]]], longest: int
) -> list[str]:
    """Greedy answers, from visual tokens [B, N, D] and prompts in batches."""
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
            inputs_embeds=inputs, attention_mask=mask, max_new_tokens=longest, do_sample=False
        )
        answers += tokenizer.batch_decode(generated, skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def figures_of(name: str, answers: Sequence[str], examples: Sequence[Example]) -> dict[str, Any]:
    """Metrics of captions or questions, each with its 95% interval over photographs."""
    groups = [example.group for example in examples]
    if name == "captions":
        measures = caption_measures(answers, examples, METRICS)
    else:
        right = [accuracy([a], [e]) for a, e in zip(answers, examples, strict=True)]
        measures = {"accuracy": mean_of(right)}
    return {
        metric: {"value": measure.value, "interval": interval(measure, groups)}
        for metric, measure in measures.items()
    }


DECODINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beam": {"num_beams": 3, "length_penalty": 0.7},
}


@command
def main() -> None:
    parser = parser_of("evaluate", "--out lab/records/photo-model.json", str(__doc__), "data")
    parser.add_argument("--limit", type=int, help="at most so many photographs, and questions")
    parser.add_argument(
        "--decodings",
        nargs="+",
        choices=DECODINGS,
        default=list(DECODINGS),
        metavar="NAME",
        help="of captions (default: greedy beam)",
    )
    parser.add_argument("--beam-limit", type=int, help="photographs for beam search, which is slow")
    parser.add_argument("--out", type=Path, help="write figures there, as JSON")
    parser.add_argument("--answers", type=Path, help="write what was said there, as JSON")
    arguments = parser.parse_args()
    splits = read_photographs(arguments.data)
    backbone, encoder = load()
    record: dict[str, Any] = {
        "model": "photo",
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "provenance": provenance(0, sys.argv, None),
    }
    said: dict[str, dict[str, str]] = {}
    for name, longest in LONGEST.items():
        examples = [e for e in splits[f"{name}_val"] if half_of(e) == 1][: arguments.limit]
        record[name] = {}
        for decoding in arguments.decodings if name == "captions" else ["greedy"]:
            chosen = examples[: arguments.beam_limit] if decoding == "beam" else examples
            began = time.process_time()
            answers = full_answers(backbone, encoder, chosen, longest, **DECODINGS[decoding])
            seconds = time.process_time() - began
            record[name][decoding] = {
                "count": len(chosen),
                "figures": figures_of(name, answers, chosen),
                "cpu_seconds": round(seconds),
            }
            said[f"{name}, {decoding}"] = {
                e.key: text for e, text in zip(chosen, answers, strict=True)
            }
            print(f"{name}, {decoding}: {json.dumps(record[name][decoding])}", flush=True)
            if arguments.out:  # after each: beam search takes long
                write_json(arguments.out, record)
    if arguments.answers:
        write_json(arguments.answers, said)


if __name__ == "__main__":
    main()
