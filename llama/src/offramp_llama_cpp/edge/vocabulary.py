"""Tokens and chat templates of a GGUF file, by llama.cpp and Jinja."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from offramp.core.errors import AdapterError, InputError
from offramp.inputs.control import as_text
from offramp_llama_cpp.edge.templates import Refused, Renderer

_PLAIN = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
_NEEDLE = "needle"


class Vocabulary:
    """The vocabulary of a model that llama.cpp has loaded."""

    def __init__(self, lib: Any, model: Any, template: str | None) -> None:
        """template: of chats, as the file says it; None: there is none.

        Raises:
            AdapterError: the file has no tokenizer.
        """
        self._lib = lib
        self._vocab = lib.llama_model_get_vocab(model)
        self.size: int = int(lib.llama_vocab_n_tokens(self._vocab))
        if int(lib.llama_vocab_type(self._vocab)) == 0:
            raise AdapterError(
                "The files hold no tokenizer: they were exported from PyTorch.",
                "Cut a file from the hub, which has one: offramp export EXITS model.gguf.",
            )
        self.has_template: bool = template is not None
        self._template = Renderer(_PLAIN if template is None else template)
        self._pieces: dict[tuple[int, bool], bytes] = {}

    def tokens(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of a text; special: what opens a text is put before it, where the model wants it.

        Raises:
            InputError: the text cannot be written in UTF-8.
        """
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                "The text holds half of a surrogate pair, which is no character.",
                "Give text that can be written in UTF-8.",
            ) from error
        room = len(data) + 8
        while True:
            found = (ctypes.c_int32 * room)()
            count = self._lib.llama_tokenize(
                self._vocab, data, len(data), found, room, special, True
            )
            if count >= 0:
                return list(found[:count])
            room = -count

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes that a token stands for; of a special one none."""
        key = token, special
        if key not in self._pieces:
            room = 64
            while True:
                text = ctypes.create_string_buffer(room)
                count = self._lib.llama_token_to_piece(self._vocab, token, text, room, 0, special)
                if count >= 0:
                    break
                room = -count
            self._pieces[key] = text.raw[:count]
        return self._pieces[key]

    # As Hugging Face's tokenizers are asked (`offramp.serving.server.served.Tokenizer`).

    def __len__(self) -> int:
        return self.size

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": self.tokens(text, special=add_special_tokens)}

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False, **_: Any) -> str:
        """The text of tokens; half a letter is shown as U+FFFD."""
        pieces = (self.piece(token, special=not skip_special_tokens) for token in token_ids)
        return b"".join(pieces).decode(errors="replace")

    @cached_property
    def end_tokens(self) -> tuple[int, ...]:
        """Return all tokens that end an answer."""
        return tuple(token for token in range(self.size) if self.ends(token))

    def ends(self, token: int) -> bool:
        """Return True if a token ends an answer."""
        return bool(self._lib.llama_vocab_is_eog(self._vocab, token))

    def chat(self, messages: Sequence[dict[str, str]]) -> str:
        """The text that a chat is written as for the model, up to where its answer begins; control
        tokens in its messages are text.

        Raises:
            InputError: the file's template refuses the messages, prints nothing of any, or takes
                too long.
        """
        if self._content is None:
            raise InputError(
                "The model's chat template prints nothing of what is asked.",
                "Ask without it: a text (--plain) in place of messages.",
            )
        said = [{**message, "content": self._as_said(message["content"])} for message in messages]
        try:
            text = self._rendered(said, self._content)
        except Refused as error:
            raise InputError(
                f"The model's chat template refuses these messages: {error}.",
                "Give messages with a role (user, assistant, system) and text.",
            ) from error
        bos, _ = self._ends
        return text.removeprefix(bos) if bos and self.tokens("")[:1] else text

    @cached_property
    def _as_said(self) -> Callable[[str], str]:
        control = self._lib.llama_vocab_is_control
        marks = [t for t in range(self.size) if control(self._vocab, t) or self.ends(t)]
        return as_text(self.piece(t, special=True).decode(errors="replace") for t in marks)

    @cached_property
    def _content(self) -> Callable[[str], Any] | None:
        """How the template takes a message's text; None: it prints no text.

        Those of SmolVLM and LLaVA go through a list of parts, and find none in a string.
        """
        text, parts = self._prints(str), self._prints(_parts)
        if parts and not text:
            return _parts
        return None if text is False else str

    def _prints(self, content: Callable[[str], Any]) -> bool | None:
        """Whether the template prints a text that is given so; None: it refuses to."""
        try:
            return _NEEDLE in self._rendered([{"role": "user", "content": _NEEDLE}], content)
        except Refused:
            return None

    def _rendered(self, messages: Sequence[dict[str, str]], content: Callable[[str], Any]) -> str:
        bos, eos = self._ends
        turns = [{**message, "content": content(message["content"])} for message in messages]
        ends = {"bos_token": bos, "eos_token": eos}
        return self._template.render({"messages": turns, "add_generation_prompt": True, **ends})

    @cached_property
    def _ends(self) -> tuple[str, str]:
        """The texts of the tokens that begin and end a prompt; "" for none."""
        bos, eos = (
            self.piece(token, special=True).decode(errors="replace") if token >= 0 else ""
            for token in (
                self._lib.llama_vocab_bos(self._vocab),
                self._lib.llama_vocab_eos(self._vocab),
            )
        )
        return bos, eos


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]
