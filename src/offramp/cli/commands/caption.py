"""`offramp caption`: `offramp generate`, with the images first and the photo model unless named."""

from __future__ import annotations

from functools import partial
from typing import Any

from offramp.cli.commands.generate import USUAL, generate, question_options
from offramp.cli.options import add_command


def add(commands: Any) -> None:
    add_command(
        commands,
        "caption",
        "Describe images, a line each: generate, by the photo model unless another is named.",
        "offramp caption dog.jpg\n  offramp caption photos --out captions.jsonl --model exits",
        generate,
        partial(question_options, captions=True),
        usual=USUAL,
    )
