"""Conversations and texts with images, as the inputs of a model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from offramp.core.errors import InputError, OfframpError
from offramp.promises.prompt_kinds import OTHER
from offramp.serving.server.api.protocol import (
    ChatRequest,
    CompletionRequest,
    Message,
    Sampling,
    asked_text,
)
from offramp.serving.server.config import ServerConfig
from offramp.serving.server.errors import ApiError
from offramp.serving.server.served import Prompts, Served

_SURROGATE = re.compile("[\ud800-\udfff]")


class Prompter:
    """Makes a model's inputs from requests. Thread-safe."""

    def __init__(self, served: Served, config: ServerConfig) -> None:
        self._served = served
        self.processor: Prompts = served.prompts
        self.config: ServerConfig = config

    # -- checks, before any image is opened --------------------------------------------------------

    def images_of(self, messages: Sequence[Message]) -> list[str]:
        """Return the addresses of a conversation's images, in order.

        Raises:
            ApiError: too many images or messages, or too much text.
        """
        if len(messages) > self.config.messages:
            raise ApiError(
                400,
                f"{len(messages)} messages are more than the {self.config.messages} allowed.",
                param="messages",
                code="too_many_messages",
            )
        turns = [self._content(message) for message in messages]
        texts = [part["text"] for turn in turns for part in turn if part["type"] == "text"]
        self.check_text(texts, "messages")
        parts = [part for message in messages for part in message.parts]
        return self.check_images([p.image_url.url for p in parts if p.type == "image_url"])

    def check_images(self, urls: Sequence[str]) -> list[str]:
        """Return `urls`; raise `ApiError` for more than the server or the model takes."""
        if len(urls) > self.config.images.count:
            raise ApiError(
                400,
                f"{len(urls)} images are more than the {self.config.images.count} allowed.",
                param="image_url",
                code="too_many_images",
            )
        try:
            self.processor.check_images(len(urls))
        except InputError as error:
            said = f"{error.problem} {error.remedy}"
            raise ApiError(400, said, param="image_url", code="too_many_images") from error
        return list(urls)

    def check_text(self, texts: Sequence[str], param: str) -> None:
        """Raise `ApiError` for too much text, or text with placeholders of images."""
        if sum(map(len, texts)) > self.config.characters:
            raise ApiError(
                400,
                f"The text is longer than the {self.config.characters} characters allowed.",
                param=param,
                code="context_length_exceeded",
            )
        if any(_SURROGATE.search(text) for text in texts):
            raise ApiError(400, "The text is not valid Unicode.", param=param, code="invalid_value")
        mark = self.processor.image_mark
        if mark is not None and any(mark in text for text in texts):
            raise ApiError(
                400,
                f"The text holds {mark!r}, which stands for images. Send images as content parts.",
                param=param,
                code="invalid_value",
            )

    # -- prompts -----------------------------------------------------------------------------------

    def conversation(
        self, messages: Sequence[Message], images: Sequence[Image.Image]
    ) -> Mapping[str, Any]:
        """Return a conversation's inputs; its images are already opened. Blocks while it
        computes."""
        return self._inputs(self.conversation_text(messages), images)

    def conversation_text(self, messages: Sequence[Message]) -> str:
        """Return a conversation's text as the model reads it.

        Raises:
            ApiError: several messages to a model without a chat template.
        """
        turns = [
            {
                "role": "system" if message.role == "developer" else message.role,
                "content": self._content(message),
            }
            for message in messages
        ]
        try:
            return self.processor.conversation_text(turns)
        except InputError as error:
            said = f"{error.problem} {error.remedy}"
            raise ApiError(400, said, param="messages", code="no_chat_template") from error
        except Exception as error:  # templates raise what they like for turns out of order
            said = f"The model's chat template refuses these messages: {error}"
            raise ApiError(400, said, param="messages", code="invalid_value") from error

    def question(self, request: Sampling) -> str:
        """Return a request's question about one image, if the model reads it in the form of a
        calibration's example; of several turns, all of them as they are written. Else `OTHER`: for
        several images, an image after the text, turns that no example can be written as, or a text
        without the model's chat template."""
        images, written, asked = 1, "", None
        if isinstance(request, ChatRequest):
            images = sum(p.type == "image_url" for turn in request.messages for p in turn.parts)
            written = self.conversation_text(request.messages) if images == 1 else ""
            if len(request.messages) > 1:
                asked = written.removeprefix(self.processor.placed("", images))
        elif isinstance(request, CompletionRequest):
            images = len(request.images)
            if isinstance(request.prompts[0], str) and len(request.prompts) == 1:
                written = self.processor.placed(request.prompts[0], images)
        if images != 1 or not written:
            return OTHER
        asked = asked_text(request) if asked is None else asked
        return asked if written == self.processor.prompt_text(asked) else OTHER

    def _content(self, message: Message) -> list[dict[str, str]]:
        """A message's texts and images, in order. Where its text marks the place of each image, as
        evaluation harnesses write it, these stand there."""
        mark = self.processor.image_mark or "\0"
        texts = [part.text for part in message.parts if part.type == "text"]
        images = len(message.parts) - len(texts)
        if not images or sum(text.count(mark) for text in texts) != images:
            return [
                {"type": "text", "text": part.text} if part.type == "text" else {"type": "image"}
                for part in message.parts
            ]
        content: list[dict[str, str]] = []
        for text in texts:
            for number, piece in enumerate(text.split(mark)):
                content += [{"type": "image"}] if number else []
                content += [{"type": "text", "text": piece}] if piece else []
        return content

    def text(self, prompt: str, images: Sequence[Image.Image]) -> Mapping[str, Any]:
        """Return the inputs of a literal prompt, with its images before the text."""
        return self._inputs(self.processor.placed(prompt, len(images)), images)

    def ids(self, tokens: Sequence[int]) -> Mapping[str, Any]:
        """Return the inputs of a prompt of token ids."""
        known = len(self._served.tokenizer)
        if wrong := [token for token in tokens if token >= known]:
            raise ApiError(
                400,
                f"There is no token {wrong[0]}: the vocabulary has {known}.",
                param="prompt",
                code="invalid_value",
            )
        return self._checked(self.processor.of_ids(tokens))

    def _inputs(self, text: str, images: Sequence[Image.Image]) -> Mapping[str, Any]:
        try:
            return self._checked(self.processor.of_text(text, images))
        except (ApiError, OfframpError):
            raise
        except Exception as error:  # a processor raises nearly anything for what it cannot take
            raise ApiError(
                400,
                f"The model's processor refuses this prompt: {type(error).__name__}: {error}",
                code="invalid_value",
            ) from error

    def _checked(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Inputs of at least a token, with the image that the model needs."""
        if self._served.tokens(inputs) == 0:
            raise ApiError(400, "The prompt is empty.", code="invalid_value")
        try:
            self._served.check(inputs)
        except InputError as error:
            raise ApiError(
                400,
                "This model needs an image with every prompt. Add a content part "
                '{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}.',
                param="messages",
                code="image_missing",
            ) from error
        return inputs
