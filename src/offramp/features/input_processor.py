"""Examples to model inputs: prompts as generation sees them, answers as token ids."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from offramp.core.errors import DataError, InputError
from offramp.core.models.backbone import Backbone
from offramp.features.kept_texts import KeptTexts
from offramp.inputs.control import WRITTEN, as_text
from offramp.inputs.example import Example

# Processors that put the image tokens in themselves.
_PLACES_IMAGE = ("Blip2", "InstructBlip", "PaliGemma", "Florence2")
# What a processor adds after the text it is given, by the start of its class name.
_ADDS_BEHIND = {"PaliGemma": "\n"}


COMPLETES = """\
{%- macro said(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}
{{ content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('\\n') }}
{%- endif -%}
{%- endmacro -%}
{%- set seen = namespace(images=0) -%}
{%- for message in messages if message.content is not string -%}
{%- set found = message.content | selectattr('type', 'equalto', 'image') | list | length -%}
{%- set seen.images = seen.images + found -%}
{%- endfor -%}
{{ '<file_sep>' * seen.images }}{{ '\\n' if seen.images }}
{%- set first = said(messages[0].content) -%}
{%- if messages | length == 1 and messages[0].role == 'user' and first.rstrip().endswith(':') -%}
{{ first }}
{%- else -%}
{%- for message in messages -%}
{{ ('' if loop.first else '\\n') ~ '<|im_start|>' ~ message.role ~ '\\n' }}
{{- said(message.content) ~ '<|im_end|>' }}
{%- endfor -%}
{{ '\\n<|im_start|>assistant\\n' if add_generation_prompt }}
{%- endif -%}"""
"""Chat template of the photo model: images come first, then the turns as its language model was
tuned on them. A lone text that ends in a colon, such as "Caption:", is to be completed, and stays
as it is; so calibrations of such prompts do not depend on it."""


SMALLEST = "_offramp_smallest_side"
"""Where a processor holds its `smallest_side`; see `offramp.features.shrink_on_load`."""


class InputProcessor:
    """A backbone's processor, which makes batches of inputs. Thread-safe."""

    def __init__(self, backbone: Backbone | nn.Module, processor: Any) -> None:
        backbone = Backbone.of(backbone)
        tokenizer = getattr(processor, "tokenizer", None)
        if tokenizer is None and backbone.text_only and hasattr(processor, "convert_ids_to_tokens"):
            tokenizer = processor  # of a language model that is all there is
        if tokenizer is None:
            raise InputError(
                f"{type(processor).__name__} has no tokenizer.",
                "Give the backbone's own processor: AutoProcessor.from_pretrained(...).",
            )
        self.backbone = backbone
        self.processor = processor
        self.tokenizer = tokenizer
        self._is_text = tokenizer is processor
        if self._is_text and tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if not backbone.is_encoder_decoder:
            tokenizer.padding_side = "left"
        self.eos: int = _end_token(backbone, tokenizer)
        # Fast tokenizers keep padding as a state, and refuse a second thread that changes it.
        self._lock = threading.Lock()
        self.kept_texts: KeptTexts = KeptTexts(processor)
        self.smallest_side: int | None = smallest_side(processor)
        """Pixels that a side of an image has at least, where JPEGs are shrunk on load."""

    def prompts(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Return the inputs of `generate` for these examples: one padded batch, on the backbone's
        device."""
        texts = [self.prompt_text(example.prompt) for example in examples]
        if self._is_text:
            return self._of_texts(texts)
        images: list[Any] = [example.open_image(self.smallest_side) for example in examples]
        if not self._places_image:
            images = [[image] for image in images]  # one image for each text
        return self._processed(texts, images)

    def of_text(self, text: str, images: Sequence[Image.Image]) -> dict[str, Any]:
        """Return the inputs of `generate` for one text with placeholders and any number of images.

        Raises:
            InputError: several images where the processor takes one a text.
        """
        if self._is_text and images:
            raise InputError("This model sees no images.", "Send text alone.")
        if self._is_text:
            return self._of_texts([text])
        self.check_images(len(images))
        batch: Any = list(images) if self._places_image else [list(images)]
        return self._processed([text], batch if images else None)

    def check_images(self, images: int) -> None:
        """Raise `InputError` where a processor that takes one image with a text gets several."""
        if images > 1 and self._places_image:
            raise InputError(
                f"This model takes one image with a prompt, and {images} came.",
                "Ask about each image on its own.",
            )

    def of_ids(self, ids: Sequence[int]) -> dict[str, Any]:
        """Return the inputs of `generate` for a prompt of token ids."""
        tokens = torch.tensor([list(ids)], device=self.backbone.device)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    def text_prompt(self, prompt: str) -> dict[str, Any]:
        """Return the inputs of `generate` for a prompt without an image, if the model answers such
        prompts."""
        text = prompt
        if self._is_text:
            return self._of_texts([self.prompt_text(prompt)])
        if self.has_template and not self._is_written(prompt):
            text = self.template_text([turn_of("user", prompt)])
        check_letters([text])
        with self._lock:
            special = self.adds_special_tokens(text)
            batch = self.tokenizer([text], return_tensors="pt", add_special_tokens=special)
        return self._on_device(batch)

    def _of_texts(self, texts: Sequence[str]) -> dict[str, Any]:
        """The same of texts alone: one padded batch."""
        check_letters(texts)
        special = all(map(self.adds_special_tokens, texts))
        with self._lock:
            batch = self.tokenizer(
                list(texts), padding=True, return_tensors="pt", add_special_tokens=special
            )
        # What else a tokenizer returns, such as token types, no decoder takes.
        return self._on_device({n: batch[n] for n in ("input_ids", "attention_mask")})

    def adds_special_tokens(self, text: str) -> bool:
        """Return True if the tokenizer adds special tokens to this text; False where a chat
        template has already written the first."""
        first = getattr(self.tokenizer, "bos_token", None)
        return not (first and text.startswith(first))

    def _processed(self, texts: Sequence[str], images: Any) -> dict[str, Any]:
        check_letters(texts)
        adds = all(map(self.adds_special_tokens, texts))
        more = {} if adds else {"add_special_tokens": False}

        def whole() -> Mapping[str, Any]:
            try:
                made: Mapping[str, Any] = self.processor(
                    images=images, text=texts, padding=True, return_tensors="pt", **more
                )
            except ValueError as error:  # such as a template that leaves the image out
                raise InputError(
                    f"The processor does not read {texts[0][:60]!r} with its image: {error}",
                    "Give a chat template, or a prompt, in which the image has its place.",
                ) from error
            return made

        one = _only(images) if len(texts) == 1 else None
        with self._lock:
            batch = whole() if one is None else self.kept_texts.batch(texts[0], one, whole)
        return self._on_device(batch)

    def _on_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        device, dtype = self.backbone.device, self.backbone.dtype
        return {
            name: value.to(device, dtype if value.is_floating_point() else None)
            for name, value in batch.items()
            if isinstance(value, Tensor)
        }

    def prompt_text(self, prompt: str) -> str:
        """Return the prompt in the form that the backbone was tuned on: chat template or image
        placeholder. Control tokens in it are text where a template wraps it, and count where it is
        read as it is, as in a completion."""
        if self._is_text and not self.has_template:
            return prompt
        if self.has_template and not self._is_written(prompt):
            return self.template_text([turn_of("user", prompt, sees=True)])
        return self.placed(prompt, 1)

    def _is_written(self, prompt: str) -> bool:
        return self.processor.chat_template == COMPLETES and prompt.startswith(WRITTEN)

    @property
    def has_template(self) -> bool:
        """Return True if a chat template for conversations of several turns is there."""
        return getattr(self.processor, "chat_template", None) not in (None, "")

    def template_text(
        self, turns: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation by its chat template, up to where the answer begins.
        add_generation_prompt: False: the last turn is the beginning of the answer."""
        turns = [{**turn, "content": self._as_said(turn["content"])} for turn in turns]
        how = {"add_generation_prompt": add_generation_prompt}
        if not add_generation_prompt:
            how["continue_final_message"] = True
        if self._is_text:
            said = [{**turn, "content": _text_of(turn["content"])} for turn in turns]
            return str(self.tokenizer.apply_chat_template(said, tokenize=False, **how))
        return str(self.processor.apply_chat_template(list(turns), **how))

    def _as_said(self, content: Any) -> Any:
        """A turn's content, in which the tokenizer's control tokens are text."""
        if isinstance(content, str):
            added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
            marks = [str(token) for token in added if getattr(token, "special", False)]
            more = getattr(self.tokenizer, "all_special_tokens", ())
            return as_text([*marks, *more, self.image_mark or ""])(content)
        return [
            {**part, "text": self._as_said(part["text"])} if part["type"] == "text" else part
            for part in content
        ]

    def conversation_text(
        self, turns: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> str:
        """Return the text of a conversation as the model reads it: by its chat template or, without
        one, the text of the only turn.

        turns: role and content, which is a list of {"type": "text", "text": ...} and {"type":
        "image"}.
        add_generation_prompt: as of `template_text`.

        Raises:
            InputError: several turns, or a system message, without a chat template.
        """
        if self.has_template:
            return self.template_text(turns, add_generation_prompt=add_generation_prompt)
        if len(turns) > 1 or turns[0]["role"] != "user":
            roles = ", ".join(str(turn["role"]) for turn in turns)
            raise InputError(
                f"This model answers one message, of the role 'user', and these came: {roles}.",
                "Send one, whose text is the prompt as the model was tuned on it, such as "
                "'Caption:'; it knows no system message and no turns before.",
            )
        parts = turns[0]["content"]
        mark = self.image_mark or "\0"  # it may stand where its image does
        text = mark.join(map(self._as_said, _text_of(parts).split(mark)))
        return self.placed(text, sum(part["type"] == "image" for part in parts))

    @property
    def image_mark(self) -> str | None:
        """Return the placeholder of an image in a text; None: the processor uses none."""
        mark = getattr(self.processor, "image_token", None)
        return None if mark is None else str(mark)

    def placed(self, prompt: str, images: int) -> str:
        """Return a prompt with placeholders for so many images: its own, or new ones before its
        text; unchanged where the processor uses none."""
        mark = self.image_mark
        if mark is None or not images:
            return prompt
        if self._places_image:
            return prompt.replace(mark, "")
        return prompt if mark in prompt else f"{mark * images}\n{prompt}"

    @property
    def _places_image(self) -> bool:
        return type(self.processor).__name__.startswith(_PLACES_IMAGE)

    def answer_ids(self, prompt: str, answer: str) -> list[int]:
        """Return the ids that generation would have to write after `prompt`, end token included.

        Prompt and answer are tokenised as one text where that leaves the prompt's ids unchanged, so
        that a leading space is tokenised as in generation.
        """

        def ids(text: str) -> list[int]:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

        answer = answer.strip()
        if self.backbone.is_encoder_decoder:
            return [*ids(answer), self.eos]
        text = self.prompt_text(prompt) + self._added_behind()
        gap = "" if not text or text[-1].isspace() else " "
        before, both = ids(text), ids(text + gap + answer)
        tail = both[len(before) :] if both[: len(before)] == before else ids(gap + answer)
        return [*tail, self.eos]

    def check_room(self, prompts: Mapping[str, Any], answers: Sequence[tuple[str, int]]) -> None:
        """Raise `DataError` where an answer would run past the backbone's learned positions.

        prompts: a batch. answers: for each row, its example's key and its number of tokens. The
        last token is never read, so it needs no position. Rotary and relative positions have no
        end.
        """
        limit = self.backbone.positions
        if limit is None:
            return
        starts = [1] * len(answers)
        if not self.backbone.is_encoder_decoder:
            starts = prompts["attention_mask"].sum(1).tolist()
        for start, (key, tokens) in zip(starts, answers, strict=True):
            if start + tokens - 1 > limit:
                raise DataError(
                    f"A prompt of {start} tokens and an answer of {tokens} (example {key!r}) are "
                    f"longer than the backbone's {limit} positions.",
                    "Shorten the prompt or the answer, or lower --max-new-tokens.",
                )

    def _added_behind(self) -> str:
        name = type(self.processor).__name__
        return next((text for start, text in _ADDS_BEHIND.items() if name.startswith(start)), "")

    def pad(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Return right-padded ids [B, A] and their mask [B, A]."""
        longest = max(len(row) for row in rows)
        ids = torch.tensor([[*row, *[self.eos] * (longest - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        return ids.to(self.backbone.device), mask.bool().to(self.backbone.device)

    def texts(self, ids: Tensor) -> list[str]:
        """Return the texts of rows [B, N] of generated ids, without special tokens and outer
        spaces."""
        decoded = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [text.strip() for text in decoded]


def turn_of(role: str, text: str, *, sees: bool = False) -> dict[str, Any]:
    """Return a turn as chat templates take it. sees: whether an image stands before its text."""
    image = [{"type": "image"}] if sees else []
    return {"role": role, "content": [*image, {"type": "text", "text": text}]}


def check_letters(texts: Sequence[str]) -> None:
    """Raise `InputError` where a text cannot be tokenised: bytes of a command line that are not
    UTF-8, or half of a pair that JSON escapes."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            around = text[max(0, error.start - 20) : error.end + 20]
            raise InputError(
                f"A text is not UTF-8: {around!r}.", "Write it in UTF-8, without halves of letters."
            ) from error


def _only(images: Any) -> Any:
    """The image of a batch of one text with one image; None of any other."""
    while isinstance(images, list) and len(images) == 1:
        images = images[0]
    return images if isinstance(images, Image.Image) else None


def smallest_side(processor: Any) -> int | None:
    """Return the fewest pixels a side to which a processor's images may be decoded; None: full
    size."""
    found: int | None = getattr(processor, "__dict__", {}).get(SMALLEST)
    return found


def _text_of(content: Any) -> str:
    """A turn's text, as templates of language models want it."""
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part["type"] == "text")


def _end_token(backbone: Backbone, tokenizer: Any) -> int:
    """The id that ends an answer: as generation is configured, else as the tokenizer says."""
    model = backbone.model
    configs = (model, getattr(model, "language_model", None))
    settings = [getattr(m, "generation_config", None) for m in configs]
    named = [getattr(c, "eos_token_id", None) for c in settings] + [tokenizer.eos_token_id]
    eos = next((ids for ids in named if ids is not None), None)  # 0 is an id too
    if eos is None:
        raise InputError(
            "Neither the backbone's generation config nor the tokenizer names an end token.",
            "Set tokenizer.eos_token, so that answers can end.",
        )
    return int(eos[0] if isinstance(eos, list) else eos)
