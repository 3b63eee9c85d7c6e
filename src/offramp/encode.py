"""Examples to model inputs: prompts as generation sees them, answers as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from offramp.backbone import Backbone
from offramp.errors import InputError
from offramp.examples import Example

# Processors that put the image tokens in themselves.
_PLACES_IMAGE = ("Blip2", "InstructBlip", "PaliGemma", "Florence2")


class Encoder:
    """A backbone's processor, asked for batches."""

    def __init__(self, backbone: Backbone, processor: Any) -> None:
        tokenizer = getattr(processor, "tokenizer", None)
        if tokenizer is None:
            raise InputError(
                f"{type(processor).__name__} has no tokenizer.",
                "Give the backbone's own processor: AutoProcessor.from_pretrained(...).",
            )
        self.backbone = backbone
        self.processor = processor
        self.tokenizer = tokenizer
        if not backbone.is_encoder_decoder:
            tokenizer.padding_side = "left"
        config = backbone.model.generation_config
        text = getattr(getattr(backbone.model, "language_model", None), "generation_config", config)
        eos = config.eos_token_id if config.eos_token_id is not None else text.eos_token_id
        self.eos: int = eos[0] if isinstance(eos, list) else (eos or tokenizer.eos_token_id)

    def prompts(self, examples: Sequence[Example]) -> dict[str, Any]:
        """What `generate` takes for these examples, padded to one batch, on the backbone's device."""
        texts = [self.prompt_text(example.prompt) for example in examples]
        images = [example.open_image() for example in examples]
        if not type(self.processor).__name__.startswith(_PLACES_IMAGE):
            images = [[image] for image in images]  # one picture for each text
        batch = self.processor(images=images, text=texts, padding=True, return_tensors="pt")
        device, dtype = self.backbone.device, self.backbone.dtype
        return {
            name: value.to(device, dtype if value.is_floating_point() else None)
            for name, value in batch.items()
            if isinstance(value, Tensor)
        }

    def prompt_text(self, prompt: str) -> str:
        """The prompt in the form the backbone was tuned on: chat template or image placeholder."""
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": prompt}]
            return str(
                self.processor.apply_chat_template(
                    [{"role": "user", "content": content}], add_generation_prompt=True
                )
            )
        placeholder = getattr(self.processor, "image_token", None)
        if placeholder is None or type(self.processor).__name__.startswith(_PLACES_IMAGE):
            return prompt
        return prompt if str(placeholder) in prompt else f"{placeholder}\n{prompt}"

    def answer_ids(self, prompt: str, answer: str) -> list[int]:
        """The ids generation would have to write after `prompt`, end token included.

        Tokenised together with the prompt where that leaves the prompt's own ids as they were, so
        that a leading space lands as the tokenizer wants it.
        """

        def ids(text: str) -> list[int]:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

        answer = answer.strip()
        if self.backbone.is_encoder_decoder:
            return [*ids(answer), self.eos]
        before, both = ids(prompt), ids(f"{prompt} {answer}".strip())
        tail = both[len(before) :] if both[: len(before)] == before else ids(f" {answer}")
        return [*tail, self.eos]

    def pad(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Right-padded ids [B, A] and their mask [B, A]."""
        longest = max(len(row) for row in rows)
        ids = torch.tensor([[*row, *[self.eos] * (longest - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        return ids.to(self.backbone.device), mask.bool().to(self.backbone.device)

    def texts(self, ids: Tensor) -> list[str]:
        """Decoded rows [B, N] of generated ids, special tokens and outer spaces removed."""
        decoded = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [text.strip() for text in decoded]
