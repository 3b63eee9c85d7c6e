"""`offramp chat`: questions about one image, line by line."""

from __future__ import annotations

from typing import Any

from offramp.cli.commands.generate import generate, question_options
from offramp.cli.options import add_command
from offramp.cli.parser import Parser


def add(commands: Any) -> None:
    add_command(
        commands,
        "chat",
        "Hold a conversation about an image, line by line; an empty line ends it.",
        "offramp chat photo-chat --image dog.jpg",
        generate,
        _options,
        usual="image max-new-tokens mode depths engine gguf",
        result=False,
    )


def _options(parser: Parser) -> None:
    question_options(parser, chat=True)
    parser.set_defaults(prompt=None, interactive=True, stream=True, json=False, out=None)
